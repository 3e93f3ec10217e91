"""From a trained image classifier to a SavedModel that takes raw image files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from models import GraftError
from models.backbone import ImagePreprocess
from models.inputs import decode_images, resize_image, scale_image
from serving.answer_checks import DETAILS_FILE, LABELS_FILE
from serving.contract import image_contract, image_probe
from serving.folding import FOLDED_BYTES, fold_weights

LISTED_CLASSES = 5  # `labels` and `scores` hold the best so many, or all where there are fewer
EXAMPLES = 2  # made-up inputs for which constants must give what variables give


def export_image_classifier(
    model: keras.Model,
    preprocess: ImagePreprocess,
    class_names: list[str],
    folder,
    white_level: int = 255,
    details: dict | None = None,
    thresholds=None,
    temperature: float = 1.0,
    unsure_below: float | None = None,
    folded_bytes: int = FOLDED_BYTES,
) -> dict:
    """Write `model` (a models.classifier.Classifier) into `folder` as a SavedModel for raw image files.

    Signatures, n being unknown and rows independent of each other:
    - `serving_default`: image_bytes [n] string -> labels [n, k] string and scores [n, k] float32, best
      first, k = min(5, classes); probabilities [n, classes] float32 in the order of `class_names`;
      error [n] string, "" where all is well. An item with an error has zeros and empty labels.
      A multi-label model, for which `thresholds` [classes] float32 are needed, has independent
      probabilities and adds chosen [n, classes] bool: those that are at least their threshold.
      With `unsure_below`, unsure [n] bool: whether the best score is less; labels stay as they are.
    - `features`: image_bytes [n] string -> features [n, d] float32; error [n] string.
    - `pixels`: pixels [n, height, width, 3] float32, RGB 0 to 255, any one size -> as `serving_default`.

    Logits are divided by `temperature`, where that is not 1, before they become probabilities.

    Weights of at most `folded_bytes` become constants of one function that the signatures share, where that
    changes no answer by more than 1e-5; else they stay variables. `assets.extra` gets labels.txt, a class a line,
    and graft.json: `details` and what is known here, such as what `serving.contract` says of it. Nothing from the
    training set is written.

    Returns what became of the weights, as `serving.folding.fold_weights` says; graft.json holds it under "weights".
    Raises GraftError for a class name that is no line of text.
    """
    class_names = check_class_names(model, class_names, thresholds)
    shape = [*preprocess.image_size, 3]
    noise = np.random.default_rng(0).uniform(0, 255, [EXAMPLES, *shape])
    run, weights = fold_weights(
        network(model, temperature),
        [tf.TensorSpec([None, *shape], tf.float32)],
        [scale_image(tf.constant(noise, tf.float32), preprocess)],
        folded_bytes,
    )

    def apply(images):
        """Images [n, height, width, 3] float32, 0 to 255, of the model's size -> features and probabilities.

        A row is lent where there are none: TensorFlow's fused convolution of an empty batch gives the
        wrong shape on CPUs ("Incompatible shapes: [0,224,224,3] vs. [32]").
        """
        count = tf.shape(images)[0]
        lent = tf.zeros([tf.maximum(1 - count, 0), *shape])
        return [values[:count] for values in run(scale_image(tf.concat([images, lent], 0), preprocess))]

    def answers(images, errors):
        return class_outputs(apply(images)[1], errors, class_names, thresholds, unsure_below)

    def decode(image_bytes):
        # Decoders have no GPU kernels; without this pin the placer may spread their inputs over devices.
        with tf.device("/CPU:0"):
            return decode_images(image_bytes, preprocess, white_level)

    def serve_bytes(image_bytes):
        return answers(*decode(image_bytes))

    def serve_features(image_bytes):
        images, errors = decode(image_bytes)
        return {"features": tf.where((errors == "")[:, None], apply(images)[0], 0.0), "error": errors}

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
        "input_contract": image_contract(scale_image(decode([image_probe()])[0], preprocess)[0]),
        "weights": weights,
        **calibration_details(temperature, unsure_below),
    }
    write_assets(folder, model, class_names, thresholds, {**(details or {}), **known})
    return weights


def check_class_names(model, class_names, thresholds) -> list[str]:
    """The class names as a list; raises GraftError for one that is no line of text."""
    if model.multi_label != (thresholds is not None):
        raise ValueError("thresholds: a multi-label model needs one per class, any other model takes none")
    for name in class_names:
        if name.splitlines() != [name] or name != name.encode(errors="replace").decode():
            raise GraftError(f"class name {name!r}: labels.txt needs one line of UTF-8 text for it. Rename it")
    return list(class_names)


def network(model, temperature: float = 1.0):
    """The function from a model's scaled input, a tensor or several -> [features, probabilities], float32 each."""

    def run(*inputs):
        features = model.features(list(inputs) if len(inputs) > 1 else inputs[0], training=False)
        logits = tf.cast(model.logits(features, training=False), tf.float32)
        if temperature != 1:
            logits = logits / tf.constant(temperature, tf.float32)
        probabilities = tf.nn.sigmoid(logits) if model.multi_label else tf.nn.softmax(logits)
        return [tf.cast(features, tf.float32), probabilities]

    return run


def class_outputs(probabilities, errors, class_names, thresholds, unsure_below: float | None = None) -> dict:
    """Probabilities [n, classes] float32 and errors [n] string -> the outputs of `serving_default`."""
    good = (errors == "")[:, None]  # [n, 1]
    probabilities = tf.where(good, probabilities, 0.0)
    scores, order = tf.math.top_k(probabilities, k=min(LISTED_CLASSES, len(class_names)))
    labels = tf.where(good, tf.gather(tf.constant(class_names), order), "")
    outputs = {"labels": labels, "scores": scores, "probabilities": probabilities, "error": errors}
    if thresholds is not None:
        outputs["chosen"] = good & (probabilities >= tf.constant(thresholds, tf.float32))
    if unsure_below is not None:
        outputs["unsure"] = scores[:, 0] < tf.constant(unsure_below, tf.float32)
    return outputs


def calibration_details(temperature: float, unsure_below: float | None) -> dict:
    """What graft.json says of them."""
    threshold = {} if unsure_below is None else {"unsure_below": float(np.float32(unsure_below))}
    return {"temperature": float(temperature), **threshold}


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
