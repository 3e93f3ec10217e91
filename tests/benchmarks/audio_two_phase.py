"""Graft's two phases on sounds against a plain Keras loop: `python -m tests.benchmarks.audio_two_phase`.

`spoken_words` with `whisper_tiny_en`, depth 2, 8 + 4 epochs, batch 32, no augmentation; the plain loop (the official
guide's, as in `two_phase`) gets the same windows of 2 s from the same decoder, cached by tf.data, so that only the work
differs. Each side runs in a process of its own, in alternating order; imports and loading weights are outside,
everything from the first file to the test metrics is inside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.benchmarks.sides import run_sides, summary

HEAD_EPOCHS, FINE_TUNE_EPOCHS, DEPTH, BATCH, WINDOW_SECONDS = 8, 4, 2, 32, 2.0


def load(head_epochs: int, fine_tune_epochs: int):
    """The splits, and the model that `graft audio` would build."""
    from pipelines.audio import build_model
    from pipelines.options import AudioConfig
    from pipelines.sounds import find_sounds, load_sounds

    config = AudioConfig()
    config.model.depth, config.model.window_seconds = str(DEPTH), WINDOW_SECONDS
    config.fine_tune.augmentation, config.training.patience = "none", 99
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = head_epochs, fine_tune_epochs
    splits = load_sounds(find_sounds("spoken_words"))
    return config, splits, build_model(config, splits.class_names)


def graft_side(seed: int, head_epochs: int, fine_tune_epochs: int) -> dict:
    import functools

    import keras
    import tensorflow as tf

    from pipelines.data import targets_of
    from pipelines.sound_augmentation import sound_loader
    from pipelines.sounds import sound_parts
    from pipelines.steps import mean_loss_and_accuracy
    from pipelines.training import fit_two_phase

    keras.utils.set_random_seed(seed)
    config, splits, model = load(head_epochs, fine_tune_epochs)
    config.training.seed, config.cache.cache = seed, "memory"  # nothing is found that another run has left
    preprocess = model.backbone.preprocess
    started, marks = time.perf_counter(), []
    _, logits_of = fit_two_phase(
        model,
        splits,
        functools.partial(sound_loader, preprocess),
        config,
        tf.distribute.get_strategy(),
        on_end=lambda phase, logits_of: marks.append(time.perf_counter() - started),
        read_inputs=functools.partial(sound_parts, preprocess=preprocess),
    )
    targets = targets_of(splits.test, len(splits.class_names))
    _, accuracy = mean_loss_and_accuracy(targets, logits_of(splits.test), False)
    return {"phase_1": marks[0], "total": time.perf_counter() - started, "accuracy": accuracy}


def plain_side(seed: int, head_epochs: int, fine_tune_epochs: int) -> dict:
    import keras
    import tensorflow as tf

    from models.sound_windows import read_windows

    keras.utils.set_random_seed(seed)
    _, splits, model = load(head_epochs, fine_tune_epochs)
    backbone = model.backbone
    started = time.perf_counter()

    def batches(table, shuffle=False):
        def read(path, label):
            windows, masks = read_windows(tf.io.read_file(path), backbone.preprocess)
            return (windows[0], masks[0]), label  # every word fits one window

        data = tf.data.Dataset.from_tensor_slices((table["path"].to_pylist(), table["label"].to_numpy()))
        data = data.map(read, num_parallel_calls=tf.data.AUTOTUNE).cache()
        return (data.shuffle(table.num_rows, seed=seed) if shuffle else data).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    train, val, test = batches(splits.train, True), batches(splits.val), batches(splits.test)
    base = backbone.encoder
    base.trainable = False
    inputs = [keras.Input((None,), dtype=tensor.dtype) for tensor in base.inputs]
    outputs = keras.layers.Dropout(0.2)(base(inputs, training=False))
    model = keras.Model(inputs, keras.layers.Dense(len(splits.class_names))(outputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(train, epochs=head_epochs, validation_data=val, verbose=0)
    phase_1 = time.perf_counter() - started
    base.trainable = True
    thawed = {id(layer) for block in backbone.blocks[-DEPTH:] for layer in block.layers}
    for layer in base.layers:
        layer.trainable = id(layer) in thawed
    model.compile(keras.optimizers.Adam(5e-5), loss, metrics=["accuracy"])
    model.fit(train, epochs=fine_tune_epochs, validation_data=val, verbose=0)
    _, accuracy = model.evaluate(test, verbose=0)
    return {"phase_1": phase_1, "total": time.perf_counter() - started, "accuracy": accuracy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, with seeds 0, 1, ...")
    parser.add_argument("--side", choices=["graft", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, nargs=2, default=(HEAD_EPOCHS, FINE_TUNE_EPOCHS), help="of both phases")
    options = parser.parse_args()
    if options.side:
        side = graft_side if options.side == "graft" else plain_side
        print(json.dumps(side(options.seed, *options.epochs)))
        return 0
    epochs = [str(number) for number in options.epochs]
    summary(run_sides("tests.benchmarks.audio_two_phase", options.runs, "--epochs", *epochs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
