"""Graft's two phases on texts against a plain Keras loop: `python -m tests.benchmarks.text_two_phase`.

`topics` with `minilm_l6`, depth 2, 8 + 3 epochs, batch 32; the plain loop (the official guide's, as in `two_phase`)
gets the same token arrays in the same padded batches, so that only the work differs. Each side runs in a process of
its own, in alternating order; imports and loading weights are outside, everything from the first string to the test
metrics is inside (tokenising too, which the plain loop does once).
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.benchmarks.sides import run_sides, summary

HEAD_EPOCHS, FINE_TUNE_EPOCHS, DEPTH, BATCH = 8, 3, 2, 32


def load():
    from models.backbone import load_backbone
    from pipelines.texts import find_texts, load_texts

    return load_texts(find_texts("topics")), load_backbone("minilm_l6")


def graft_side(seed: int) -> dict:
    import keras
    import tensorflow as tf

    from models.classifier import Classifier
    from pipelines.data import targets_of
    from pipelines.options import TextConfig
    from pipelines.steps import mean_loss_and_accuracy
    from pipelines.tokens import token_parts
    from pipelines.training import fit_two_phase

    keras.utils.set_random_seed(seed)
    splits, backbone = load()
    config = TextConfig()
    config.model.depth = "2"
    config.training.seed, config.training.patience = seed, 99
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = HEAD_EPOCHS, FINE_TUNE_EPOCHS
    started, marks = time.perf_counter(), []
    model = Classifier(backbone, len(splits.class_names), config.model.dropout, seed)
    _, logits_of = fit_two_phase(
        model,
        splits,
        None,
        config,
        tf.distribute.get_strategy(),
        on_end=lambda phase, logits_of: marks.append(time.perf_counter() - started),
        read_inputs=lambda table: token_parts(table, backbone.preprocess),
    )
    targets = targets_of(splits.test, len(splits.class_names))
    _, accuracy = mean_loss_and_accuracy(targets, logits_of(splits.test), False)
    return {"phase_1": marks[0], "total": time.perf_counter() - started, "accuracy": accuracy}


def plain_side(seed: int) -> dict:
    import keras
    import tensorflow as tf

    from pipelines.tokens import token_parts

    keras.utils.set_random_seed(seed)
    splits, backbone = load()
    started = time.perf_counter()

    def batches(table, shuffle=False):
        labels, found = table["label"].to_numpy(), []
        for rows, arrays in token_parts(table, backbone.preprocess):
            for start in range(0, len(rows), BATCH):
                part = slice(start, start + BATCH)
                found.append((tuple(array[part] for array in arrays), labels[rows[part]]))
        specs = tuple(tf.TensorSpec([None, None], tf.int32) for _ in found[0][0]), tf.TensorSpec([None], tf.int64)
        data = tf.data.Dataset.from_generator(lambda: found, output_signature=specs).cache()
        return data.shuffle(len(found), seed=seed) if shuffle else data

    train, val, test = batches(splits.train, True), batches(splits.val), batches(splits.test)
    base = backbone.encoder
    base.trainable = False
    inputs = [keras.Input((None,), dtype="int32") for _ in base.inputs]
    outputs = keras.layers.Dropout(0.2)(base(inputs, training=False))
    model = keras.Model(inputs, keras.layers.Dense(len(splits.class_names))(outputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(train, epochs=HEAD_EPOCHS, validation_data=val, verbose=0)
    phase_1 = time.perf_counter() - started
    base.trainable = True
    thawed = {id(layer) for block in backbone.blocks[-DEPTH:] for layer in block.layers}
    for layer in base.layers:
        layer.trainable = id(layer) in thawed
    model.compile(keras.optimizers.Adam(5e-5), loss, metrics=["accuracy"])
    model.fit(train, epochs=FINE_TUNE_EPOCHS, validation_data=val, verbose=0)
    _, accuracy = model.evaluate(test, verbose=0)
    return {"phase_1": phase_1, "total": time.perf_counter() - started, "accuracy": accuracy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, with seeds 0, 1, ...")
    parser.add_argument("--side", choices=["graft", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps((graft_side if options.side == "graft" else plain_side)(options.seed)))
        return 0
    summary(run_sides("tests.benchmarks.text_two_phase", options.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
