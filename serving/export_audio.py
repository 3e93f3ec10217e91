"""From a trained sound classifier to a SavedModel that takes WAV files: `serving/export.py` for sounds."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from models.audio_inputs import encoder_inputs
from models.backbone import AudioPreprocess
from models.sound_windows import average_rows, cut_windows, read_windows_of_many, window_samples
from serving.contract import sound_contract, sound_probe
from serving.export import calibration_details, check_class_names, class_outputs, write_archive, write_assets
from serving.folding import MATRICES, as_variables

NO_SAMPLES = "no samples: expected a waveform of at least one"


def export_audio_classifier(
    model: keras.Model,
    preprocess: AudioPreprocess,
    class_names: list[str],
    folder,
    details: dict | None = None,
    thresholds=None,
    temperature: float = 1.0,
    unsure_below: float | None = None,
) -> dict:
    """Write `model` (a models.classifier.Classifier) into `folder` as a SavedModel for WAV files.

    Signatures, n being unknown and rows independent of each other:
    - `serving_default`: audio_bytes [n] string, WAV files of any rate, channels and PCM or float format -> as in
      `export_image_classifier`.
    - `features`: audio_bytes [n] string -> features [n, d] float32; error [n] string.
    - `waveform`: waveform [n, samples] float32, mono, -1 to 1, at `preprocess.sample_rate_hz` -> as `serving_default`.

    A sound that is longer than the window is heard in several windows, whose features are averaged, as in training's
    evaluation. Weights stay variables. `assets.extra` gets labels.txt and graft.json, and what is returned says what
    became of the weights, as there. Nothing from the training set is written. Raises GraftError for a class name that
    is no line of text.
    """
    class_names = check_class_names(model, class_names, thresholds)
    window = window_samples(preprocess)

    @tf.function(autograph=False)
    def apply(inputs, rows):
        """Windows [w, samples] and the row of each -> features and probabilities of the rows, float32 [n, ...].

        Traced once for signatures whose windows have the same shapes.
        """
        features = average_rows(tf.cast(model.features(inputs, training=False), tf.float32), rows)
        logits = tf.cast(model.logits(features, training=False), tf.float32)
        if temperature != 1:
            logits = logits / tf.constant(temperature, tf.float32)
        return features, tf.nn.sigmoid(logits) if model.multi_label else tf.nn.softmax(logits)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def read(audio_bytes):
        """Traced once for all signatures, which takes seconds."""
        # Reading has no GPU kernels; without this pin the placer may spread its inputs over devices.
        with tf.device("/CPU:0"):
            return read_windows_of_many(audio_bytes, preprocess)

    def apply_bytes(audio_bytes):
        """A row is lent where there are none: not every op of an encoder takes an empty batch."""
        count = tf.shape(audio_bytes)[0]
        inputs, rows, errors = read(tf.concat([audio_bytes, tf.fill([tf.maximum(1 - count, 0)], "")], 0))
        return [values[:count] for values in (*apply(inputs, rows), errors)]

    def answers(probabilities, errors):
        return class_outputs(probabilities, errors, class_names, thresholds, unsure_below)

    def serve_bytes(audio_bytes):
        _, probabilities, errors = apply_bytes(audio_bytes)
        return answers(probabilities, errors)

    def serve_features(audio_bytes):
        features, _, errors = apply_bytes(audio_bytes)
        return {"features": tf.where((errors == "")[:, None], features, 0.0), "error": errors}

    def serve_waveform(waveform):
        count, samples = tf.unstack(tf.shape(waveform))
        finite = tf.where(tf.math.is_finite(waveform), waveform, 0.0)
        lent = tf.pad(finite, [[0, tf.maximum(1 - count, 0)], [0, tf.maximum(1 - samples, 0)]])
        windows, masks = cut_windows(lent, window)
        rows = tf.repeat(tf.range(tf.shape(windows)[0]), tf.shape(windows)[1])
        flat = [tf.reshape(part, [-1, window]) for part in (windows, masks)]
        probabilities = apply(encoder_inputs(*flat, preprocess), rows)[1][:count]
        return answers(probabilities, tf.fill([count], tf.where(samples > 0, "", NO_SAMPLES)))

    audio_bytes = [tf.TensorSpec([None], tf.string, name="audio_bytes")]
    endpoints = {
        "serving_default": (serve_bytes, audio_bytes),
        "features": (serve_features, audio_bytes),
        "waveform": (serve_waveform, [tf.TensorSpec([None, None], tf.float32, name="waveform")]),
    }
    write_archive(folder, endpoints)
    weights = as_variables([weight.value for weight in [*model.encoder.weights, *model.head.weights]], MATRICES)
    known = {"kind": "audio", "preprocess": dataclasses.asdict(preprocess), "weights": weights}
    known |= calibration_details(temperature, unsure_below)
    (windows, masks), _, _ = read(tf.constant([sound_probe()]))
    known["input_contract"] = sound_contract(windows[0], masks[0], preprocess.sample_rate_hz)
    write_assets(folder, model, class_names, thresholds, {**(details or {}), **known})
    return weights
