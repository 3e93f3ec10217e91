"""From a trained text classifier to a SavedModel that takes strings: `serving/export.py` for text."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from models.backbone import TextPreprocess
from models.text_inputs import read_texts
from serving.contract import LONG_PROBE, TEXT_PROBE, text_contract
from serving.export import calibration_details, check_class_names, class_outputs, network, write_archive, write_assets
from serving.folding import MATRICES, as_variables


def export_text_classifier(
    model: keras.Model,
    preprocess: TextPreprocess | None,
    class_names: list[str],
    folder,
    details: dict | None = None,
    thresholds=None,
    pairs: bool = False,
    temperature: float = 1.0,
    unsure_below: float | None = None,
) -> dict:
    """Write `model` (a models.classifier.Classifier) into `folder` as a SavedModel for strings.

    Signatures, n being unknown and rows independent of each other:
    - `serving_default`: text [n] string, or with `pairs` text_a and text_b [n] string -> as in
      `export_image_classifier`; `error` is "" for every text: none is refused.
    - `features`: the same input -> features [n, d] float32; error [n] string.

    Args:
        preprocess: None where the model takes strings itself (a TF-Hub module).
        temperature, unsure_below: as for `export_image_classifier`.

    Tokenisation is part of the graph; weights stay variables. `assets.extra` gets labels.txt and graft.json, and what
    is returned says what became of the weights, as there. Nothing from the training set is written. Raises GraftError
    for a class name that is no line of text.
    """
    class_names = check_class_names(model, class_names, thresholds)
    run = network(model, temperature)
    names = ("text_a", "text_b") if pairs else ("text",)
    specs = [tf.TensorSpec([None], tf.string, name=name) for name in names]

    @tf.function(input_signature=specs, autograph=False)
    def apply(*texts):
        """Texts, one or two of [n] string -> features and probabilities, float32 [n, ...].

        Traced once for both signatures, which takes seconds. A row is lent where there are none: not every op of an
        encoder takes an empty batch.
        """
        count = tf.shape(texts[0])[0]
        lent = tf.fill([tf.maximum(1 - count, 0)], "")
        # String ops have no GPU kernels; without this pin the placer may spread their inputs over devices.
        with tf.device("/CPU:0"):
            inputs = read_texts(
                tf.concat([texts[0], lent], 0), preprocess, *(tf.concat([text, lent], 0) for text in texts[1:])
            )
        return [values[:count] for values in run(*tf.nest.flatten(inputs))]

    def no_errors(texts):
        return tf.fill(tf.shape(texts[0]), "")

    def serve_texts(*texts):
        return class_outputs(apply(*texts)[1], no_errors(texts), class_names, thresholds, unsure_below)

    def serve_features(*texts):
        return {"features": apply(*texts)[0], "error": no_errors(texts)}

    endpoints = {"serving_default": (serve_texts, specs), "features": (serve_features, specs)}
    # Tables of words are found only through what is tracked: the tokenizer's, or those of a module that takes strings.
    write_archive(folder, endpoints, tracked=[preprocess.tokenizer if preprocess else model])
    fields = dataclasses.fields(preprocess) if preprocess else ()
    facts = {field.name: getattr(preprocess, field.name) for field in fields if field.name != "tokenizer"}
    weights = as_variables([weight.value for weight in [*model.encoder.weights, *model.head.weights]], MATRICES)
    known = {"preprocess": facts, "pairs": pairs, "weights": weights}
    if preprocess:
        known["input_contract"] = served_text_contract(preprocess)
    known |= calibration_details(temperature, unsure_below)
    write_assets(folder, model, class_names, thresholds, {**(details or {}), **known})
    return weights


def served_text_contract(preprocess: TextPreprocess) -> dict:
    """`serving.contract.text_contract` by the function that the graph runs."""
    texts = [TEXT_PROBE, LONG_PROBE, TEXT_PROBE.upper(), TEXT_PROBE.lower()]
    token_ids, mask, *_ = read_texts(tf.constant(texts), preprocess)
    return text_contract(*(numbers[real > 0] for numbers, real in zip(token_ids.numpy(), mask.numpy())))
