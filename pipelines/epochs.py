"""An epoch of a phase: what updates the weights, the loop over steps (it can stop between any two), and validation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from models import optimizer as optimizers
from models.classifier import Classifier
from models.precision import LossScale
from pipelines import stopping
from pipelines.data import targets_of
from pipelines.distribute import chief_says, shard_of
from pipelines.prediction import predict_logits
from pipelines.progress import Diverged, Progress
from pipelines.recovery import Recovery
from pipelines.steps import (
    MovingAverage,
    dropout_seeder,
    make_predict_step,
    make_train_calls,
    make_train_step,
    objective_of,
)


@dataclasses.dataclass
class Updates:
    """What updates the weights in a phase."""

    optimizer: object
    call: Callable  # as `pipelines.steps.make_train_calls` gives it
    steps_per_call: int
    average: MovingAverage | None
    variables: list  # all that a step changes, but for dropout's state, which is a function of the step
    flags: tf.Variable | None  # of several workers: whether this one shall stop, and whether a save is due

    @property
    def learning_rate(self) -> float:
        """Of the head, as the schedule has it now."""
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def validating(self):
        """Within, the model has the weights that are validated and kept: the averaged ones where there are any."""
        return self.average.in_place() if self.average else contextlib.nullcontext()


def make_updates(
    model: Classifier, feed, learning_rate: float, total_steps: int, moving: list, options, strategy, spec=None
) -> Updates:
    """What updates the weights in a phase.

    Args:
        moving: the weights that training may change, as `models.freezing.moving_weights` gives them.
        options: `pipelines.common_options.TrainingOptions`.
        spec: as `batch_spec` of `make_train_step`.
    """
    schedule = learning_rate
    if options.schedule == "cosine":
        schedule = optimizers.warmup_cosine(learning_rate, total_steps, options.warmup)
    with strategy.scope():
        optimizer = optimizers.make_optimizer(
            options.optimizer, model, schedule, options.weight_decay, options.clip_norm or None
        )
        loss_scale = LossScale() if options.precision == "float16" else None
        average = MovingAverage(model, options.ema) if options.ema else None
    flags = tf.Variable([0.0, 0.0], trainable=False) if shard_of(strategy)[1] > 1 else None
    train_step = make_train_step(
        model,
        optimizer,
        strategy,
        options.accumulation_steps,
        options.label_smoothing,
        loss_scale,
        average,
        feed.forward,
        spec,
        flags,
    )
    call = make_train_calls(train_step, dropout_seeder(model, options.seed), options.steps_per_call)
    variables = [*moving, *(slot for slot in optimizer.variables if slot.name != "learning_rate")]
    variables += average.averages if average else []
    variables += [loss_scale.scale, loss_scale.good_steps] if loss_scale else []
    return Updates(optimizer, call, options.steps_per_call, average, variables, flags)


def train_epoch(
    updates: Updates, batches, observers, progress: Progress, recovery: Recovery, steps: int, first_step: int, model
) -> None:
    """Train to the end of an epoch of `steps` steps, from where `progress` is; batches begin there.

    first_step: steps of earlier epochs, which dropout goes on from.

    Raises:
        KeyboardInterrupt: SIGTERM or Ctrl-C, between two calls.
        pipelines.progress.Diverged: a loss that is no number, or far too large.
    """
    iterator, guessing_loss = iter(batches), math.log(2 if model.multi_label else max(model.head.units, 2))
    with stopping.held():
        while progress.step < steps:
            count = min(updates.steps_per_call, steps - progress.step)
            if updates.flags is not None:
                updates.flags.assign(np.float32([stopping.stop_asked(), recovery.is_due()]))
            observers.on_train_batch_begin(progress.step)
            progress.is_whole = count == 1
            rows = updates.call(iterator, first_step + progress.step, count)
            progress.is_whole = True
            for row in rows:
                progress.add(row[:4], guessing_loss)
                figures = {"loss": progress.mean_loss, "accuracy": progress.accuracy}
                observers.on_train_batch_end(progress.step - 1, figures)
            stop, due = stopping.stop_asked(), recovery.is_due()
            if updates.flags is not None:  # at the same step for all workers
                stop, due = rows[:, 4:].any(axis=0)
            recovery.between_steps(bool(due), count)
            if stop:
                raise KeyboardInterrupt


def validator(model: Classifier, feed, val, strategy, spec) -> Callable:
    """A function: Updates -> loss and accuracy of a table, and what is right of each example, [val] float32.

    They are those of the weights that may be kept. It raises Diverged where the loss is no number.
    """
    objective, targets = objective_of(model), targets_of(val, model.head.units)
    predict_step = make_predict_step(feed.forward, strategy, spec, objective.outputs)

    def validate(updates: Updates) -> tuple[float, float, np.ndarray]:
        with updates.validating():
            outputs = predict_logits(predict_step, strategy, feed.batches(val), val.num_rows)
            figures = objective.figures(targets, outputs)
        loss, accuracy = chief_says(strategy, figures)
        if not math.isfinite(loss):
            raise Diverged(loss)
        return loss, accuracy, objective.shares(targets, outputs)

    return validate
