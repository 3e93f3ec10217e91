"""Training examples per second against KerasHub's own classifier: `python -m tests.benchmarks.text_throughput`.

Short texts (`topics`), MiniLM-L6, the top two transformer layers and the head training, batch 32, three epochs.
KerasHub's `BertTextClassifier.fit` takes strings: once with its default preprocessor (256 tokens here), once with its
sequence length set to 128, which 99% of the texts need no more than. Graft's time is that of both phases, validation,
tokenising and caching included; the examples of phase 1 are not counted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.acceptance.tools import PYTHON, ROOT, own_cache
from tests.benchmarks.text_two_phase import BATCH, DEPTH, FINE_TUNE_EPOCHS, graft_side, load

KERASHUB_EPOCHS = 1  # each takes as long as the others; with 512 tokens that is minutes

TUNED = 128  # tokens: Graft's own limit, so that both keep the same of each text


def kerashub_side(sequence_length: int | None) -> dict:
    import keras
    import keras_hub
    import tensorflow as tf

    from models import offline

    keras.utils.set_random_seed(0)
    splits, _ = load()
    folder = str(offline.fetch("minilm_l6"))
    more = {"sequence_length": sequence_length} if sequence_length else {}
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor.from_preset(folder, **more)
    backbone = keras_hub.models.BertBackbone.from_preset(folder)
    model = keras_hub.models.BertTextClassifier(backbone, len(splits.class_names), preprocessor)
    backbone.trainable = False
    for layer in backbone.transformer_layers[-DEPTH:]:
        layer.trainable = True
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(5e-5), loss=loss, metrics=["accuracy"])
    texts, labels = splits.train["text"].to_pylist(), splits.train["label"].to_numpy()
    started = time.perf_counter()
    model.fit(tf.constant(texts), labels, batch_size=BATCH, epochs=KERASHUB_EPOCHS, verbose=0)
    return {"seconds": time.perf_counter() - started, "examples": len(texts) * KERASHUB_EPOCHS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["graft", "default", "tuned"], help=argparse.SUPPRESS)
    side = parser.parse_args().side
    if side == "graft":
        splits, _ = load()
        examples = splits.train.num_rows * FINE_TUNE_EPOCHS
        print(json.dumps({"seconds": graft_side(0)["total"], "examples": examples}))
        return 0
    if side:
        print(json.dumps(kerashub_side(TUNED if side == "tuned" else None)))
        return 0
    rates = {}
    for name in ("graft", "tuned", "default"):
        with tempfile.TemporaryDirectory() as cache:
            command = [PYTHON, "-m", "tests.benchmarks.text_throughput", "--side", name]
            environment = own_cache(pathlib.Path(cache))
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rates[name] = row["examples"] / row["seconds"]
        print(f"{name:8} {rates[name]:7.1f} training examples per second ({row['seconds']:.1f} s)", flush=True)
    print(
        f"Graft trains {rates['graft'] / rates['default']:.1f} times as many examples per second as KerasHub does by "
        f"default, {rates['graft'] / rates['tuned']:.1f} times as many as with {TUNED} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
