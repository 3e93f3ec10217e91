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
TOLERANCE = 1e-5  # relative change of the loss at which L-BFGS stops


def solve_head(features, targets, weights, val_features, val_targets, multi_label=False, label_smoothing=0.0):
    """The kernel [d, classes], bias [classes] and path of the best logistic regression.

    Minimises the weighted mean cross-entropy, as `pipelines.steps.cross_entropy` has it, plus
    l2 / 2 * |W|^2, where W is the kernel on features of mean 0 and deviation 1 (unscaled ones take L-BFGS many
    times as long). No penalty on the bias.

    Args:
        features, val_features: [n, d] float32.
        targets, val_targets: [n, classes], 0 and 1.
        weights: [n], of the training examples.

    Returns:
        kernel and bias for unscaled features; a list with a dict per penalty tried: l2, iterations, loss and
        val_loss in nats without the penalty, accuracy, val_accuracy; and the index of the chosen one: the strongest
        penalty whose validation loss is within one standard error of the best (the rule of Breiman et al. 1984,
        "Classification and Regression Trees"). A head that fits its training set to the last example leaves
        fine-tuning no gradient to learn from.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)
    scaled, val_scaled = tf.constant((features - mean) / deviation), tf.constant((val_features - mean) / deviation)
    shape = (features.shape[1] + 1, targets.shape[1])
    share = tf.constant(weights / weights.sum(), tf.float32)

    @tf.function(input_signature=[tf.TensorSpec(shape), tf.TensorSpec([])], autograph=False)
    def loss_and_slope(parameters, l2):
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            kernel, bias = parameters[:-1], parameters[-1]
            losses = cross_entropy(targets, scaled @ kernel + bias, multi_label, label_smoothing)
            loss = tf.reduce_sum(losses * share) + l2 / 2 * tf.reduce_sum(kernel**2)
        return loss, tape.gradient(loss, parameters)

    def objective(flat, l2):
        loss, slope = loss_and_slope(tf.constant(flat.reshape(shape), tf.float32), tf.constant(l2, tf.float32))
        return float(loss), slope.numpy().ravel().astype(np.float64)

    @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
    def figures(parameters):
        """Losses and correct answers without smoothing and penalty: (of the training set, of the validation set)."""
        kernel, bias = parameters[:-1], parameters[-1]
        result = []
        for inputs, labels in ((scaled, targets), (val_scaled, val_targets)):
            logits = inputs @ kernel + bias
            result.append((cross_entropy(labels, logits, multi_label), share_correct(labels, logits, multi_label)))
        return result

    flat, path, best, error, solutions = np.zeros(shape).ravel(), [], 0, np.inf, []
    for l2 in L2_PATH:
        # SciPy's own vectors are short: one thread is enough for them, and several wait for each other in a loop, ten
        # times as long where anything else runs beside them.
        with threadpool_limits(1, "blas"):
            options = {"maxiter": ITERATIONS, "ftol": TOLERANCE}
            found = optimize.minimize(objective, flat, args=(l2,), jac=True, method="L-BFGS-B", options=options)
        flat = found.x
        parameters = flat.reshape(shape).astype(np.float32)
        (losses, correct), (val_losses, val_correct) = tf.nest.map_structure(np.asarray, figures(parameters))
        path.append(
            {
                "l2": l2,
                "iterations": int(found.nit),
                "loss": float((losses * share.numpy()).sum()),
                "accuracy": float(correct.mean()),
                "val_loss": float(val_losses.mean()),
                "val_accuracy": float(val_correct.mean()),
            }
        )
        solutions.append(parameters)
        if path[-1]["val_loss"] < path[best]["val_loss"]:
            best, error = len(path) - 1, float(val_losses.std() / np.sqrt(len(val_losses)))
        if len(path) - 1 - best >= WORSE_IN_A_ROW:
            break
    within = path[best]["val_loss"] + error
    chosen = next(index for index, step in enumerate(path) if step["val_loss"] <= within)
    kernel, bias = solutions[chosen][:-1] / deviation[:, None], solutions[chosen][-1]
    return kernel, bias - mean @ kernel, path, chosen
