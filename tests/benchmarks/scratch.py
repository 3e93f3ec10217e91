"""Time to the accuracy that training from scratch reaches at best: `python -m tests.benchmarks.scratch`.

The images and splits of `two_phase`. From scratch: the same architecture with random weights, all of it trained,
BatchNorm too, by Adam with a cosine schedule from 1e-3 to 0, no augmentation on either side. Its accuracy is the best
on the test set after any epoch, and the time is that epoch's end: a choice by the test set, in favour of training
from scratch. Graft's is the time at which its head-only model is there. Each side runs in a process of its own;
imports and loading weights are outside, everything from the first file read is inside, measuring on the test set
after each epoch is not.
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
from tests.benchmarks.picture import save_result
from tests.benchmarks.two_phase import BATCH, DEPTH, SIDE, build, chosen_tiles, graft_side

RATE, DROPOUT = 1e-3, 0.2


def scratch_side(seed: int, epochs: int) -> list[dict]:
    """A row per epoch: seconds since the first file was read, accuracy on the training, validation and test set."""
    import keras
    import numpy as np

    from models.efficientnet_lite import efficientnet_lite
    from pipelines.data import dataset, image_loader, load_images

    keras.utils.set_random_seed(seed)
    found, (backbone, _) = chosen_tiles(seed), build(seed)  # of the backbone only the preprocessing is used
    started = time.perf_counter()
    splits = load_images(found)
    load = image_loader(backbone.preprocess, splits.white_level, plain=splits.plain)

    def in_memory(table):
        batches = dataset(table, load, class_count=len(splits.class_names), batch_size=BATCH)
        images = np.concatenate([images.numpy()[rows.numpy() >= 0] for images, _, _, rows in batches])
        return images, table["label"].to_numpy()

    (x, y), val, test = (in_memory(table) for table in splits)
    encoder = efficientnet_lite("lite0")
    inputs = keras.Input((SIDE, SIDE, 3))
    features = keras.layers.GlobalAveragePooling2D()(encoder(inputs))
    outputs = keras.layers.Dense(len(splits.class_names))(keras.layers.Dropout(DROPOUT)(features))
    model = keras.Model(inputs, outputs)
    schedule = keras.optimizers.schedules.CosineDecay(RATE, epochs * -(-len(x) // BATCH))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])
    rows, outside = [], 0.0

    def on_epoch_end(epoch, logs):
        nonlocal outside
        ended = time.perf_counter()
        correct = model.predict(test[0], batch_size=BATCH, verbose=0).argmax(axis=1) == test[1]
        row = {"seconds": ended - started - outside, "train": logs["accuracy"], "val": logs["val_accuracy"]}
        rows.append({**row, "test": float(correct.mean())})
        outside += time.perf_counter() - ended

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)]
    model.fit(x, y, BATCH, epochs, validation_data=val, callbacks=callbacks, verbose=0)
    return rows


def run_apart(seed: int, side: str, epochs: int = 0):
    """A side in a process of its own with an empty cache; epochs: of training from scratch."""
    command = [PYTHON, "-m", "tests.benchmarks.scratch", "--side", side, "--seed", str(seed), "--epochs", str(epochs)]
    with tempfile.TemporaryDirectory() as cache:
        environment = own_cache(pathlib.Path(cache))
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="of training from scratch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file of results for `tests.benchmarks.picture`")
    parser.add_argument("--side", choices=["scratch", "head", str(DEPTH)], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "scratch":
        print(json.dumps(scratch_side(options.seed, options.epochs)))
        return 0
    if options.side:
        print(json.dumps(graft_side(options.seed, "", options.side)))
        return 0
    head, both = run_apart(options.seed, "head"), run_apart(options.seed, str(DEPTH))
    epochs = run_apart(options.seed, "scratch", options.epochs)
    best = max(range(len(epochs)), key=lambda epoch: epochs[epoch]["test"])
    kept = max(range(len(epochs)), key=lambda epoch: epochs[epoch]["val"])
    print("                                      seconds   test accuracy")
    for what, row in (
        (f"from scratch, best on test: epoch {best + 1}", epochs[best]),
        (f"from scratch, best on val.: epoch {kept + 1}", epochs[kept]),
        ("Graft, head only", {"seconds": head["phase_1"], "test": head["accuracy"]}),
        ("Graft, both phases", {"seconds": both["total"], "test": both["accuracy"]}),
    ):
        print(f"{what:36} {row['seconds']:8.1f}   {row['test']:.3f}")
    last = epochs[-1]  # far apart: not what training from scratch can do
    print(f"from scratch, after the last epoch: {last['train']:.3f} in training, {last['val']:.3f} in validation")
    target, until = epochs[best]["test"], epochs[best]["seconds"]
    steps = (("head only", head["phase_1"], head["accuracy"]), ("both phases", both["total"], both["accuracy"]))
    reached = next((step for step in steps if step[2] >= target), None)
    result = {"scratch": until, "epochs": epochs, "accuracy": target, "head": head, "both": both}
    if reached is None:
        print(f"Graft does not reach {target:.3f}")
    else:
        result["graft"] = reached[1]
        print(f"Graft ({reached[0]}) is at {target:.3f} or better {until / reached[1]:.1f} times sooner")
    if options.json:
        save_result(options.json, "scratch", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
