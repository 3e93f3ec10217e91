"""Two phases for a recogniser, by the loop of `pipelines.training`: its objective is CTC, batches are of one length.

There is no L-BFGS for the head, since every frame is an example of its own; both phases train on what crosses a cut.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from models import freezing
from models import optimizer as optimizers
from models.recogniser import Recogniser, ctc_losses, greedy
from models.wav2vec2_settings import frame_count
from pipelines.config import budget_seconds, depth_blocks
from pipelines.feeds import Feeds
from pipelines.prediction import feed_predictor
from pipelines.steps import Objective
from pipelines.training import check_batch_size, fit_phase
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


def fit_speech(
    model: Recogniser, splits, config, strategy, *, callbacks=(), on_start=None, on_best=None
) -> tuple[list[dict], Callable]:
    """The head on the frozen backbone first, then the blocks that --depth says too, at reduced rates.

    A phase that does not improve validation is undone. Arguments as for `pipelines.training.fit_two_phase`.

    Returns:
        The phase dicts of `fit_phase`, and a function: table -> outputs of `speech_objective`, of the model as it is.
    """
    options, preprocess = config.training, model.backbone.preprocess
    check_batch_size(options, strategy.num_replicas_in_sync)
    encoder = model.encoder
    longest = max(int(clip_samples(table, preprocess.sample_rate_hz).max()) for table in splits)
    most_frames = max(frame_count(longest, encoder.kernels, encoder.strides), 1)
    model.objective = speech_objective(most_frames)
    read_inputs = functools.partial(clip_parts, preprocess=preprocess, batch_size=options.batch_size)
    feeds = Feeds(model, splits, splits.train, None, config, strategy, read_inputs)
    total, depth = len(model.blocks), depth_blocks(config.model.depth)
    blocks = freezing.thawable_blocks(model) if depth is None else depth
    deadline = time.perf_counter() + budget_seconds(options.budget)
    more = {"options": options, "strategy": strategy, "callbacks": callbacks, "deadline": deadline}
    phases, best = [], None

    def run_phase(name: str, cut: int, epochs: int, rate: float, **others):
        nonlocal best
        if on_start:
            on_start(name, freezing.trainable_table(model, rate, optimizers.block_multipliers(model)))
        save = (lambda model: on_best(name, model)) if on_best else lambda model: None
        feed = feeds.fine_tune(cut, config.fine_tune)
        phase = fit_phase(
            model,
            name,
            feed,
            splits.train,
            splits.val,
            epochs=epochs,
            learning_rate=rate,
            on_best=save,
            **more,
            **others,
        )
        phase.pop("right")
        phases.append(phase)
        if phase["kept"] or best is None:
            best = feed_predictor(feed.forward, feed.batches, strategy, model.objective.outputs)

    freezing.freeze(model)
    run_phase("head", total - 1, config.head.head_epochs, config.head.head_learning_rate)
    epochs = config.fine_tune.fine_tune_epochs
    if blocks and epochs and time.perf_counter() < deadline:
        freezing.unfreeze_top(model, blocks)
        rate, before = config.fine_tune.fine_tune_learning_rate, phases[0]
        others = {"first_epoch": before["epochs"], "best_val_loss": before["val_loss"]}
        run_phase("fine_tune", total - blocks, epochs, rate, **others)
    return phases, best
