"""Two phases for a recogniser, by `pipelines.training`: its objective is CTC, batches are of one length.

There is no L-BFGS for the head, since every frame is an example of its own; all phases train on what crosses a cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from models.recogniser import Recogniser, ctc_losses, greedy
from models.wav2vec2_settings import frame_count
from pipelines.steps import Objective
from pipelines.training import fit_two_phase
from pipelines.transcript_scores import distance
from pipelines.transcripts import clip_parts, clip_samples


def speech_objective(most_frames: int) -> Objective:
    """CTC; what is right of an example is the share of its characters, and what is kept [2 + most_frames].

    That is the loss per character, the confidence, and the places in the vocabulary that were read, -1 behind the end.
    """

    def right(targets, logits):
        targets = tf.cast(targets, tf.int64)
        places, read = tf.where(targets >= 0), tf.cast(greedy(logits)[0], tf.int64).to_sparse()
        said = tf.SparseTensor(places, tf.gather_nd(targets, places), tf.shape(targets, tf.int64))
        return 1.0 - tf.minimum(tf.edit_distance(read, said, normalize=True), 1.0)

    def outputs(targets, logits):
        read, confidence = greedy(logits)
        padded = read.to_tensor(-1, shape=[None, most_frames])
        figures = tf.stack([ctc_losses(targets, logits), confidence], axis=1)
        return tf.concat([figures, tf.cast(padded, tf.float32)], axis=1)

    def shares(targets, outputs):
        errors = [
            (distance(said, read), len(said)) for said, read in zip(sequences(targets), sequences(outputs[:, 2:]))
        ]
        return np.array([1.0 - min(wrong / max(length, 1), 1.0) for wrong, length in errors], np.float32)

    return Objective(
        losses=lambda targets, logits, smoothing: ctc_losses(targets, logits),
        right=right,
        outputs=outputs,
        figures=lambda targets, outputs: (float(outputs[:, 0].mean()), float(shares(targets, outputs).mean())),
        shares=shares,
    )


def sequences(rows: np.ndarray) -> list[list[int]]:
    """Rows of places, -1 behind the end, as lists without that."""
    return [[int(place) for place in row if place >= 0] for row in rows]


def written(outputs: np.ndarray, characters: str) -> tuple[list[str], np.ndarray]:
    """Outputs of `speech_objective` -> transcripts as the served model writes them, and confidences [n]."""
    texts = ["".join(characters[place] for place in row).strip() for row in sequences(outputs[:, 2:])]
    return texts, outputs[:, 1]


def fit_speech(model: Recogniser, splits, config, strategy, **hooks) -> tuple[list[dict], Callable]:
    """Train as `pipelines.training.fit_two_phase` does; hooks: what that takes besides.

    Returns:
        The phase dicts, and a function: table -> outputs of `speech_objective`, of the model as it leaves.
    """
    preprocess, encoder = model.backbone.preprocess, model.encoder
    longest = max(int(clip_samples(table, preprocess.sample_rate_hz).max()) for table in splits)
    model.objective = speech_objective(max(frame_count(longest, encoder.kernels, encoder.strides), 1))
    read_inputs = functools.partial(clip_parts, preprocess=preprocess, batch_size=config.training.batch_size)
    return fit_two_phase(model, splits, None, config, strategy, read_inputs=read_inputs, **hooks)
