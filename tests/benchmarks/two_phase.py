"""Graft's two phases against a plain Keras `Model.fit` loop: `python -m tests.benchmarks.two_phase`.

Same backbone (EfficientNet-Lite0; with `--backbone vit` a ViT of MiniLM's size, random weights), images (4,000 tiles of
`textures` at stride 24, 96 px), splits, trainable layers, batch and epochs (10 + 5), no augmentation. Each side runs in
a process of its own, in alternating order; imports and loading weights are outside on both sides, everything from the
first file read to the test metrics is inside. The plain loop is the official guide's
(https://keras.io/guides/transfer_learning): frozen base called with training=False, `fit`, thaw, compile again, `fit`;
it keeps its decoded images in memory with `cache()`, as the guide does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time

import numpy as np

from tests.benchmarks.picture import save_result
from tests.benchmarks.sides import run_sides, summary

IMAGES, SIDE, BATCH, HEAD_EPOCHS, FINE_TUNE_EPOCHS, DEPTH = 4000, 96, 32, 10, 5, 2


def chosen_tiles(seed: int, images: int = IMAGES):
    """The examples of a seed: three quarters to train and validate with, a quarter to test with."""
    from models import offline
    from pipelines.sources import find_images

    found = find_images(str(offline.image_data_folder("textures", stride=24)))
    random, chosen = np.random.default_rng(seed), []
    for split, count in (("train", images - images // 4), ("test", images // 4)):
        part = [example for example in found if example.split == split]
        chosen += [part[i] for i in sorted(random.choice(len(part), min(count, len(part)), replace=False))]
    return chosen


def random_vit(seed: int):
    """A ViT as large as MiniLM-L6 (6 units of width 384, 12 heads), 16-pixel patches, random weights."""
    import keras
    import keras_hub

    from models.backbone import load_backbone

    keras.utils.set_random_seed(seed)
    sizes = {"patch_size": 16, "num_layers": 6, "num_heads": 12, "hidden_dim": 384, "mlp_dim": 1536}
    with tempfile.TemporaryDirectory() as folder:
        keras_hub.models.ViTBackbone(image_shape=(SIDE, SIDE, 3), **sizes).save_to_preset(folder)
        backbone = load_backbone(folder)
    backbone.preprocess = dataclasses.replace(backbone.preprocess, mean=(127.0,) * 3, deviation=(128.0,) * 3)
    return backbone


def build(seed: int, name: str = "efficientnet_lite0", side: int = SIDE):
    from models.backbone import load_backbone
    from models.classifier import Classifier

    backbone = random_vit(seed) if name == "vit" else load_backbone(name)
    backbone.preprocess = dataclasses.replace(backbone.preprocess, image_size=(side, side))
    return backbone, lambda classes: Classifier(backbone, classes, 0.2, seed)


def graft_side(
    seed: int,
    cache_dir: str = "",
    depth: str = str(DEPTH),
    label_smoothing: float = 0.0,
    name: str = "efficientnet_lite0",
    side: int = SIDE,
    images: int = IMAGES,
) -> dict:
    import tensorflow as tf

    from pipelines.config import ImageConfig
    from pipelines.data import image_loader, load_images, targets_of
    from pipelines.steps import mean_loss_and_accuracy
    from pipelines.training import fit_two_phase

    tf.keras.utils.set_random_seed(seed)
    found, (backbone, classifier) = chosen_tiles(seed, images), build(seed, name, side)
    config = ImageConfig()
    config.training.seed, config.training.batch_size, config.training.patience = seed, BATCH, 99
    config.training.label_smoothing = label_smoothing
    config.model.depth, config.fine_tune.augmentation = depth, "none"
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = HEAD_EPOCHS, FINE_TUNE_EPOCHS
    config.cache.cache_dir = cache_dir

    started, marks = time.perf_counter(), []
    splits = load_images(found)
    model = classifier(len(splits.class_names))

    def loader(augmentation):
        return image_loader(backbone.preprocess, splits.white_level, augmentation, plain=splits.plain)

    def on_end(phase, logits_of):
        marks.append(time.perf_counter() - started)

    strategy = tf.distribute.get_strategy()
    _, logits_of = fit_two_phase(model, splits, loader, config, strategy, on_end=on_end)
    logits = logits_of(splits.test)
    _, accuracy = mean_loss_and_accuracy(targets_of(splits.test, len(splits.class_names)), logits, False)
    return {"phase_1": marks[0], "total": time.perf_counter() - started, "accuracy": accuracy}


def plain_side(seed: int, name: str = "efficientnet_lite0", images: int = IMAGES) -> dict:
    import keras
    import tensorflow as tf

    from pipelines.data import image_loader, load_images

    keras.utils.set_random_seed(seed)
    found, (backbone, _) = chosen_tiles(seed, images), build(seed, name)
    splits = load_images(found)  # the same splits; its time is not the plain loop's
    load = image_loader(backbone.preprocess, splits.white_level, plain=splits.plain)

    started = time.perf_counter()

    def batches(table, shuffle=False):
        slices = (table["path"].to_pylist(), table["label"].to_numpy())
        data = tf.data.Dataset.from_tensor_slices(slices)
        data = data.map(lambda path, label: (load(path, tf.zeros([2], tf.int32)), label), tf.data.AUTOTUNE).cache()
        if shuffle:
            data = data.shuffle(table.num_rows, seed=seed)
        return data.batch(BATCH).prefetch(tf.data.AUTOTUNE)

    train, val, test = batches(splits.train, True), batches(splits.val), batches(splits.test)
    base = backbone.encoder
    base.trainable = False
    inputs = keras.Input((SIDE, SIDE, 3))
    x = backbone.pooled(base(inputs, training=False))
    outputs = keras.layers.Dense(len(splits.class_names))(keras.layers.Dropout(0.2)(x))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(train, epochs=HEAD_EPOCHS, validation_data=val, verbose=0)
    phase_1 = time.perf_counter() - started
    base.trainable = True
    thawed = {id(layer) for block in backbone.blocks[-DEPTH:] for layer in block.layers}
    for layer in base.layers:
        layer.trainable = id(layer) in thawed and not isinstance(layer, keras.layers.BatchNormalization)
    model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"])  # the guide has 1e-5, which learns less
    model.fit(train, epochs=FINE_TUNE_EPOCHS, validation_data=val, verbose=0)
    _, accuracy = model.evaluate(test, verbose=0)
    return {"phase_1": phase_1, "total": time.perf_counter() - started, "accuracy": accuracy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, with seeds 0, 1, ...")
    parser.add_argument("--backbone", choices=["efficientnet_lite0", "vit"], default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--json", help="file to which the result is added")
    parser.add_argument("--side", choices=["graft", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if options.side == "graft":
            print(json.dumps(graft_side(options.seed, name=options.backbone, images=options.images)))
        else:
            print(json.dumps(plain_side(options.seed, options.backbone, options.images)))
        return 0
    words = ("--backbone", options.backbone, "--images", str(options.images))
    seconds, accuracies = summary(run_sides("tests.benchmarks.two_phase", options.runs, *words))
    if options.json:
        save_result(options.json, "two_phase", {"seconds": seconds, "accuracy": accuracies})
    return 0


if __name__ == "__main__":
    sys.exit(main())
