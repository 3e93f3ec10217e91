"""From a trained recogniser to a SavedModel that takes WAV files and answers what is said, decoding in the graph."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import keras
import tensorflow as tf

from models.audio_inputs import audio_error, encoder_inputs, read_sound
from models.backbone import AudioPreprocess
from models.recogniser import transcripts
from serving.answer_checks import DETAILS_FILE
from serving.contract import sound_contract, sound_probe
from serving.export import write_archive
from serving.folding import MATRICES, as_variables

NO_SAMPLES = "no samples: expected a sound of at least one"


def export_recogniser(
    model: keras.Model,
    preprocess: AudioPreprocess,
    folder,
    longest_seconds: float = 30.0,
    normalise: str = "letters",
    details: dict | None = None,
) -> dict:
    """Write `model` (a models.recogniser.Recogniser) into `folder` as a SavedModel for WAV files.

    Signatures, n being unknown and rows independent of each other:
    - `serving_default`: audio_bytes [n] string, WAV files of any rate, channels and PCM or float format -> transcript
      [n] string, confidence [n] float32 (as `models.recogniser.greedy`), error [n] string, "" where all is well. An
      item with an error, a sound longer than `longest_seconds` among them, has no transcript and confidence 0.
    - `waveform`: waveform [n, samples] float32, mono, -1 to 1, at `preprocess.sample_rate_hz` -> the same.

    `assets.extra/graft.json` holds `details`, the characters and the rule `normalise` that transcripts follow. Weights
    stay variables, as what is returned says.
    """
    longest = round(longest_seconds * preprocess.sample_rate_hz)
    too_long = f"sound is longer than {longest_seconds:g} s, the most that this model takes: cut it"

    def error_of(samples):
        return tf.where(samples > longest, too_long, tf.where(samples > 0, "", NO_SAMPLES))

    def read_one(data):
        waveform, error = read_sound(data, preprocess), audio_error(data)
        error = tf.where(error == "", error_of(tf.size(waveform)), error)
        return waveform[: tf.where(error == "", tf.size(waveform), 0)], error

    def answer(waveforms, lengths, errors):
        """Waveforms [n, samples], of which the first `lengths` [n] count, and errors [n] -> the outputs."""
        waveforms = tf.pad(waveforms, [[0, 0], [0, tf.maximum(1 - tf.shape(waveforms)[1], 0)]])
        mask = tf.sequence_mask(lengths, tf.shape(waveforms)[1], tf.int32)
        logits = model(encoder_inputs(waveforms, mask, preprocess), training=False)
        texts, confidence = transcripts(logits, model.characters)
        good = errors == ""
        return {
            "transcript": tf.where(good, texts, ""),
            "confidence": tf.where(good, confidence, 0.0),
            "error": errors,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def read(audio_bytes):
        """Waveforms [n, samples], how many of the samples are their own [n], and errors [n]; traced once."""
        with tf.device("/CPU:0"):  # reading has no GPU kernels
            specs = (tf.RaggedTensorSpec([None], tf.float32, ragged_rank=0), tf.TensorSpec([], tf.string))
            waveforms, errors = tf.map_fn(read_one, audio_bytes, fn_output_signature=specs)
            return waveforms.to_tensor(), waveforms.row_lengths(), errors

    def serve_bytes(audio_bytes):
        count = tf.shape(audio_bytes)[0]
        # A row is lent where there are none: not every op of an encoder takes an empty batch.
        outputs = answer(*read(tf.concat([audio_bytes, tf.fill([tf.maximum(1 - count, 0)], "")], 0)))
        return {name: values[:count] for name, values in outputs.items()}

    def serve_waveform(waveform):
        count, samples = tf.unstack(tf.shape(waveform))
        finite = tf.where(tf.math.is_finite(waveform), waveform, 0.0)[:, :longest]
        lent = tf.pad(finite, [[0, tf.maximum(1 - count, 0)], [0, 0]])
        rows = tf.shape(lent)[0]
        outputs = answer(lent, tf.fill([rows], tf.minimum(samples, longest)), tf.fill([rows], error_of(samples)))
        return {name: values[:count] for name, values in outputs.items()}

    endpoints = {
        "serving_default": (serve_bytes, [tf.TensorSpec([None], tf.string, name="audio_bytes")]),
        "waveform": (serve_waveform, [tf.TensorSpec([None, None], tf.float32, name="waveform")]),
    }
    write_archive(folder, endpoints)
    known = {"kind": "speech", "backbone": model.backbone.name, "preprocess": dataclasses.asdict(preprocess)}
    known |= {"characters": model.characters, "normalise": normalise, "longest_seconds": longest_seconds}
    probe, _, _ = read(tf.constant([sound_probe()]))
    (waveform,), (mask,) = encoder_inputs(probe, tf.ones_like(probe, tf.int32), preprocess)
    known["input_contract"] = sound_contract(waveform, mask, preprocess.sample_rate_hz)
    weights = as_variables([weight.value for weight in [*model.encoder.weights, *model.head.weights]], MATRICES)
    known["weights"] = weights
    file = Path(folder) / DETAILS_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**(details or {}), **known}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return weights
