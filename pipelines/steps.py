"""One step of the training loop, and what it is made of: loss, update, moving average, prediction.

Everything here is a tf.function under a strategy or part of one; `pipelines.epochs` loops over them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from models import freezing
from models.classifier import Classifier
from models.precision import LossScale, all_finite


def cross_entropy(targets, logits, multi_label: bool, label_smoothing: float = 0.0):
    """Cross-entropy per example in nats: targets and logits [b, classes] float32 -> [b].

    Of the softmax over all classes; with `multi_label` of a sigmoid per class, and the mean over classes, as
    Keras's BinaryCrossentropy. Smoothing draws targets towards 1 / classes, with `multi_label` towards 1/2.
    """
    if multi_label:
        targets = targets * (1.0 - label_smoothing) + label_smoothing / 2
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(targets, logits), axis=-1)
    targets = targets * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    return tf.nn.softmax_cross_entropy_with_logits(targets, logits)


def share_correct(targets, logits, multi_label: bool):
    """Per example [b] float32: 1 where the best class is right; with `multi_label` the share of right yes-or-nos."""
    if multi_label:
        return tf.reduce_mean(tf.cast((logits > 0) == (targets > 0.5), tf.float32), axis=-1)
    return tf.cast(tf.argmax(logits, -1) == tf.argmax(targets, -1), tf.float32)


def mean_loss_and_accuracy(targets: np.ndarray, logits: np.ndarray, multi_label: bool) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of correct answers, every example counted once, in float64.

    Args:
        targets: [n, classes] of 0 and 1, as `pipelines.data.targets_of` makes them.
    """
    losses = cross_entropy(targets.astype(np.float64), logits.astype(np.float64), multi_label)
    return float(tf.reduce_mean(losses)), float(tf.reduce_mean(share_correct(targets, logits, multi_label)))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a model is trained for; targets are as `pipelines.data.targets_of` makes them."""

    losses: Callable  # (targets, logits, label smoothing) -> [b] float32
    right: Callable  # (targets, logits) -> [b] float32, 0 to 1: how much of each example is right
    outputs: Callable  # (targets, logits) -> [b, k] float32: what is kept of each example in evaluation
    figures: Callable  # (targets, outputs, numpy) -> mean loss and share of what is right, of a whole table
    shares: Callable  # (targets, outputs, numpy) -> [n]: `right`, of outputs


def objective_of(model: Classifier) -> Objective:
    """A model's own objective, where it has one; else that of classes, whose outputs are the logits."""
    own = getattr(model, "objective", None)
    if own is not None:
        return own
    return Objective(
        losses=lambda targets, logits, smoothing: cross_entropy(targets, logits, model.multi_label, smoothing),
        right=lambda targets, logits: share_correct(targets, logits, model.multi_label),
        outputs=lambda targets, logits: logits,
        figures=lambda targets, logits: mean_loss_and_accuracy(targets, logits, model.multi_label),
        shares=lambda targets, logits: share_correct(targets, logits, model.multi_label).numpy(),
    )


class MovingAverage:
    """Exponential moving averages of the weights that train, over updates; build it in scope, after freezing.

    average <- d * average + (1 - d) * weight, d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...: the lower
    decay of the first updates, as in tf.train.ExponentialMovingAverage, lets short phases forget where they started.
    """

    def __init__(self, model: Classifier, decay: float):
        self.decay = decay
        self.weights = [weight.value for weight in freezing.moving_weights(model)]
        self.averages = [tf.Variable(weight.numpy(), trainable=False, name="average") for weight in self.weights]

    @contextlib.contextmanager
    def in_place(self):
        """Within, the weights hold their averages; afterwards what they held before."""
        latest = [weight.numpy() for weight in self.weights]
        for weight, average in zip(self.weights, self.averages):
            weight.assign(average.numpy())
        try:
            yield
        finally:
            for weight, value in zip(self.weights, latest):
                weight.assign(value)

    def update(self, strategy, updates) -> None:
        """Take in the weights after `updates` updates, an integer scalar; call it in cross-replica context."""
        updates = tf.cast(updates, tf.float32)
        decay = tf.minimum(self.decay, (1.0 + updates) / (10.0 + updates))

        def step(average, weight):
            average.assign_add((1.0 - decay) * (weight - average))

        for average, weight in zip(self.averages, self.weights):
            strategy.extended.update(average, step, args=(weight,), group=False)


def make_train_step(
    model: Classifier,
    optimizer,
    strategy,
    accumulation_steps: int = 1,
    label_smoothing: float = 0.0,
    loss_scale: LossScale | None = None,
    average: MovingAverage | None = None,
    forward=None,
    batch_spec=None,
    flags=None,
):
    """A tf.function: distributed batch -> [4] float32: summed weighted loss, weight, correct answers, examples.

    Loss and gradient are those of the weighted mean over the global batch plus the model's own losses
    (`model.losses`: regularisation), which count once: each replica divides by the weight of all, and by the number of
    replicas and parts, and the optimizer sums the gradients over replicas (once: never reduce before).

    Args:
        loss_scale: for float16; a step whose gradients are not finite then changes nothing but the scale.
        average: updated after each update.
        forward: (inputs, training) -> logits, where the inputs are not the model's own but lie above a cut.
        batch_spec: `element_spec` of the distributed batches; where lengths differ, one graph then serves them all.
        flags: a tf.Variable [m] of this worker, whose sum over all replicas is added to what is returned: [4 + m].
    """
    forward, objective = forward or model, objective_of(model)
    parts_of_batch = accumulation_steps * strategy.num_replicas_in_sync

    def gradients_of(inputs, targets, weights, rows, total):
        scale = loss_scale.scale if loss_scale else 1.0
        with tf.GradientTape() as tape:
            logits = forward(inputs, training=True)
            losses = objective.losses(targets, logits, label_smoothing) * weights
            loss = tf.math.divide_no_nan(tf.reduce_sum(losses), total)
            own_loss = tf.add_n([tf.cast(own, tf.float32) for own in model.losses] or [0.0]) / parts_of_batch
            scaled_loss = (loss + own_loss) * scale
        variables = [weight.value for weight in model.trainable_weights]
        gradients = tape.gradient(scaled_loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        if loss_scale:
            gradients = [tf.math.scalar_mul(1.0 / scale, gradient) for gradient in gradients]
        real = tf.cast(rows >= 0, tf.float32)
        correct = objective.right(targets, logits) * real
        sums = [tf.reduce_sum(values) for values in (losses, weights, correct, real)]
        sums[0] += own_loss * total
        return gradients, tf.stack(sums)

    def replica_gradients(inputs, targets, weights, rows):
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(weights))
        batch = (inputs, targets, weights, rows)
        if accumulation_steps == 1:
            return gradients_of(*batch, total)
        parts = tf.nest.map_structure(
            lambda x: tf.reshape(x, tf.concat([[accumulation_steps, -1], tf.shape(x)[1:]], 0)), batch
        )
        gradients = [tf.zeros_like(weight.value) for weight in model.trainable_weights]
        sums = tf.zeros([4])
        for index in tf.range(accumulation_steps):
            part = tf.nest.map_structure(lambda x, index=index: x[index], parts)
            more, part_sums = gradients_of(*part, total)
            gradients = [a + b for a, b in zip(gradients, more)]
            sums += part_sums
        return gradients, sums

    def update(gradients):
        strategy.run(lambda gradients: optimizer.apply(gradients, model.trainable_weights), args=(gradients,))
        if average:
            average.update(strategy, optimizer.iterations.value)

    # Autograph is for the loop over parts only: converting takes seconds.
    @tf.function(autograph=accumulation_steps > 1, input_signature=[batch_spec] if batch_spec else None)
    def train_step(batch):
        gradients, sums = strategy.run(replica_gradients, args=batch)
        if loss_scale:
            bad = strategy.run(lambda gradients: tf.cast(~all_finite(gradients), tf.int32), args=(gradients,))
            finite = strategy.reduce(tf.distribute.ReduceOp.SUM, bad, axis=None) == 0
            tf.cond(finite, lambda: update(gradients), lambda: None)
            loss_scale.update(finite)
        else:
            update(gradients)
        if flags is not None:
            sums = strategy.run(lambda sums: tf.concat([sums, flags], 0), args=(sums,))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return train_step


def make_train_calls(train_step, seed_dropout, steps_per_call: int = 1):
    """A function (iterator, first step, count) -> [count, n] float32: the sums of `count` steps, made by one call.

    With steps_per_call above 1 they are one graph, a loop over steps: what a TPU wants, which idles while Python gets
    the next batch ready. The figures are those of single steps.
    """
    if steps_per_call == 1:

        def call(iterator, step, count):
            batch = next(iterator)
            seed_dropout(step)
            return train_step(batch).numpy()[None]

        return call

    @tf.function
    def loop(iterator, step, count):
        sums = tf.TensorArray(tf.float32, size=count)
        for index in tf.range(count):
            seed_dropout(step + tf.cast(index, tf.int64))
            sums = sums.write(index, train_step(next(iterator)))
        return sums.stack()

    return lambda iterator, step, count: loop(iterator, tf.constant(step, tf.int64), tf.constant(count)).numpy()


def dropout_seeder(model: Classifier, seed: int):
    """A function of the step that sets every dropout layer's random state: dropout is a function of (seed, step).

    It takes an int, or an int64 scalar within a tf.function.
    """
    generators = [layer.seed_generator for layer in model._flatten_layers() if hasattr(layer, "seed_generator")]

    def set_seeds(step) -> None:
        for index, generator in enumerate(generators):
            own = (seed * 1_000_003 + index) % 2**32
            if isinstance(step, int):
                generator.state.assign(np.array([own, step * 65_536 % 2**32], np.uint32))
            else:
                state = tf.stack([tf.constant(own, tf.int64), step * 65_536 % 2**32])
                generator.state.assign(tf.cast(state, tf.uint32))

    return set_seeds


def gathered(strategy, value) -> np.ndarray:
    """The parts of all replicas, one after the other."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def make_predict_step(forward, strategy, batch_spec=None, outputs=lambda targets, logits: logits):
    """A tf.function: distributed batch -> per-replica (outputs [b, k], rows [b]); forward as in training.

    outputs: of an `Objective`, what is kept of the logits; all of them where it is not given.
    """

    def on_replica(inputs, targets, weights, rows):
        return outputs(targets, forward(inputs, training=False)), rows

    @tf.function(autograph=False, input_signature=[batch_spec] if batch_spec else None)
    def predict_step(batch):
        return strategy.run(on_replica, args=batch)

    return predict_step
