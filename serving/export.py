"""From a trained classifier to a numbered version folder that TF Serving loads.

`export_image_classifier` writes the SavedModel, `publish_version` makes sure that a version folder is
complete, verified and on disk before it has a number: the server polls for numbers and checks nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from models import GraftError
from models.backbone import ImagePreprocess
from models.inputs import decode_images, resize_image, scale_image
from models.offline import free_bytes
from serving.answer_checks import DETAILS_FILE, LABELS_FILE

LISTED_CLASSES = 5  # `labels` and `scores` hold the best so many, or all where there are fewer


def export_image_classifier(
    model: keras.Model,
    preprocess: ImagePreprocess,
    class_names: list[str],
    folder,
    white_level: int = 255,
    details: dict | None = None,
    thresholds=None,
) -> None:
    """Write `model` (a models.classifier.Classifier) into `folder` as a SavedModel for raw image files.

    Signatures, n being unknown and rows independent of each other:
    - `serving_default`: image_bytes [n] string -> labels [n, k] string and scores [n, k] float32, best
      first, k = min(5, classes); probabilities [n, classes] float32 in the order of `class_names`;
      error [n] string, "" where all is well. An item with an error has zeros and empty labels.
      A multi-label model, for which `thresholds` [classes] float32 are needed, has independent
      probabilities and adds chosen [n, classes] bool: those that are at least their threshold.
    - `features`: image_bytes [n] string -> features [n, d] float32; error [n] string.
    - `pixels`: pixels [n, height, width, 3] float32, RGB 0 to 255, any one size -> as `serving_default`.

    `assets.extra` gets labels.txt, a class a line, and graft.json: `details` and what is known here.
    Nothing from the training set is written. Raises GraftError for a class name that is no line of text.
    """
    class_names = check_class_names(model, class_names, thresholds)

    def apply(function, images):
        """Images [n, height, width, 3] float32, 0 to 255, of the model's size -> float32 [n, ...].

        A row is lent where there are none: TensorFlow's fused convolution of an empty batch gives the
        wrong shape on CPUs ("Incompatible shapes: [0,224,224,3] vs. [32]").
        """
        count = tf.shape(images)[0]
        lent = tf.zeros([tf.maximum(1 - count, 0), *preprocess.image_size, 3])
        images = scale_image(tf.concat([images, lent], 0), preprocess)
        return tf.cast(function(images, training=False), tf.float32)[:count]

    def answers(images, errors):
        return class_outputs(model, apply(model, images), errors, class_names, thresholds)

    def decode(image_bytes):
        # Decoders have no GPU kernels; without this pin the placer may spread their inputs over devices.
        with tf.device("/CPU:0"):
            return decode_images(image_bytes, preprocess, white_level)

    def serve_bytes(image_bytes):
        return answers(*decode(image_bytes))

    def serve_features(image_bytes):
        images, errors = decode(image_bytes)
        features = apply(model.features, images)
        return {"features": tf.where((errors == "")[:, None], features, 0.0), "error": errors}

    def serve_pixels(pixels):
        images = resize_image(pixels, preprocess)
        return answers(images, tf.fill(tf.shape(images)[:1], ""))

    image_bytes = [tf.TensorSpec([None], tf.string, name="image_bytes")]
    pixels = [tf.TensorSpec([None, None, None, 3], tf.float32, name="pixels")]
    endpoints = {
        "serving_default": (serve_bytes, image_bytes),
        "features": (serve_features, image_bytes),
        "pixels": (serve_pixels, pixels),
    }
    write_archive(folder, endpoints)
    known = {
        "image_size": list(preprocess.image_size),
        "preprocess": dataclasses.asdict(preprocess),
        "white_level": white_level,
    }
    write_assets(folder, model, class_names, thresholds, {**(details or {}), **known})


def check_class_names(model, class_names, thresholds) -> list[str]:
    """The class names as a list; raises GraftError for one that is no line of text."""
    if model.multi_label != (thresholds is not None):
        raise ValueError("thresholds: a multi-label model needs one per class, any other model takes none")
    for name in class_names:
        if name.splitlines() != [name] or name != name.encode(errors="replace").decode():
            raise GraftError(f"class name {name!r}: labels.txt needs one line of UTF-8 text for it. Rename it")
    return list(class_names)


def class_outputs(model, logits, errors, class_names, thresholds) -> dict:
    """Logits [n, classes] float32 and errors [n] string -> the outputs of `serving_default`."""
    good = (errors == "")[:, None]  # [n, 1]
    probabilities = tf.where(good, tf.nn.sigmoid(logits) if model.multi_label else tf.nn.softmax(logits), 0.0)
    scores, order = tf.math.top_k(probabilities, k=min(LISTED_CLASSES, len(class_names)))
    labels = tf.where(good, tf.gather(tf.constant(class_names), order), "")
    outputs = {"labels": labels, "scores": scores, "probabilities": probabilities, "error": errors}
    if model.multi_label:
        outputs["chosen"] = good & (probabilities >= tf.constant(thresholds, tf.float32))
    return outputs


def write_archive(folder, endpoints: dict, tracked=()) -> None:
    """Write a SavedModel: {signature: (function, its inputs as TensorSpecs)}; `tracked` holds lookup tables.

    Keras's archive finds the variables behind each endpoint by itself. No archive.track(model): with it every
    weight is saved twice, as Keras's variable and as the TensorFlow one inside.
    """
    archive = keras.export.ExportArchive()
    for resource in tracked:
        archive.track(resource)
    for name, (function, inputs) in endpoints.items():
        # Nothing here needs autograph, and converting takes seconds.
        archive.add_endpoint(name, tf.function(function, input_signature=inputs, autograph=False))
    archive.write_out(str(folder), verbose=False)


def write_assets(folder, model, class_names, thresholds, details: dict) -> None:
    """Write labels.txt, a class a line, and graft.json: `details` and what every classifier has."""
    known = {"backbone": model.backbone.name, "class_names": class_names, "multi_label": model.multi_label}
    if model.multi_label:
        known["thresholds"] = [float(value) for value in np.asarray(thresholds, np.float32)]
    (Path(folder) / LABELS_FILE).parent.mkdir(exist_ok=True)
    (Path(folder) / LABELS_FILE).write_text("".join(f"{name}\n" for name in class_names), "utf-8")
    text = json.dumps({**details, **known}, indent=2, ensure_ascii=False)
    (Path(folder) / DETAILS_FILE).write_text(text + "\n", "utf-8")


def publish_version(write: Callable, name_folder, check: Callable) -> Path:
    """Make the next version folder of `name_folder`, such as serving/photos/3, and return its path.

    `write(folder)` fills a temporary folder on the same file system, `check(folder)` raises where it is
    not fit to serve; then all of it is synced to disk and renamed. Several publishers may do so at once:
    each gets its own number. Whatever is raised on the way, Ctrl-C included, nothing is left behind.
    Raises GraftError where the folder cannot be written or the disk is full.
    """
    name_folder = Path(name_folder)
    # A leading dot and no number: the server ignores it.
    temporary = name_folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    made = [folder for folder in (temporary, *temporary.parents) if not folder.exists()]
    try:
        with explain_refusal(name_folder):
            temporary.mkdir(parents=True)
        write(temporary)
        check(temporary)
        sync_to_disk(temporary)
        return rename_to_next(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = free_bytes(name_folder)
        for folder in made[1:]:  # innermost first; one that another publisher has filled stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if is_disk_full(error):
            raise GraftError(
                f"{name_folder}: the disk is full: a version needs more than the {free / 1e6:.1f} MB that "
                f"are free there. Free some space or choose another folder"
            ) from error
        raise


def next_version(name_folder) -> int:
    """One more than the largest version number in a folder; 1 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(name_folder)
        return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0) + 1
    return 1


def rename_to_next(temporary: Path) -> Path:
    """Give a finished folder the next free number beside it."""
    while True:
        version = temporary.parent / str(next_version(temporary.parent))
        try:
            # rename(2) replaces an empty folder, but a version is never empty: another's is never lost.
            temporary.rename(version)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                continue  # another publisher was quicker
            raise
        sync(version.parent)
        return version


def sync_to_disk(folder) -> None:
    """Flush every file and folder below `folder`: a power cut then leaves no half-written version."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def sync(path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_refusal(folder):
    """Say which folder could not be made, rather than a bare OSError; a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise GraftError(
            f"{folder}: cannot make this folder ({error.strerror}: {error.filename}). Choose another"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says so: Python has an errno for it, TensorFlow (several classes) only the text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)
