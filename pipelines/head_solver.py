"""The head as a convex problem: logistic regression on cached features by L-BFGS, its L2 chosen on validation.

The first half of linear probing, then fine-tuning (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features
and Underperform Out-of-Distribution"): the head that phase 2 starts from is the best one for the frozen features.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

L2_PATH = tuple(10.0 ** (-exponent / 2) for exponent in range(0, 13))
WORSE_IN_A_ROW = 2  # so many weaker penalties without a better validation loss end the search
ITERATIONS = 100  # most per penalty; each starts where the last one ended
TOLERANCE = 1e-5  # relative change of the loss at which L-BFGS stops


def solve_head(features, targets, weights, val_features, val_targets, multi_label=False, label_smoothing=0.0):
    """The kernel [d, classes], bias [classes] and path of the best logistic regression.

    Minimises the weighted mean cross-entropy, as `pipelines.training.cross_entropy` has it, plus
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
    scaled, val_scaled = (features - mean) / deviation, (val_features - mean) / deviation
    size, classes = features.shape[1], targets.shape[1]
    share = (weights / weights.sum()).astype(np.float32)[:, None]
    smooth = targets * (1 - label_smoothing) + label_smoothing / (2 if multi_label else classes)

    def objective(flat, l2):
        kernel, bias = _unflatten(flat, size)
        logits = scaled @ kernel + bias
        losses, slopes = _loss_and_slope(smooth, logits, multi_label)
        slopes *= share
        slope = np.concatenate([scaled.T @ slopes + np.float32(l2) * kernel, slopes.sum(axis=0)[None]])
        loss = float((losses * share[:, 0]).sum(dtype=np.float64)) + 0.5 * l2 * float((kernel**2).sum(dtype=np.float64))
        return loss, slope.ravel().astype(np.float64)

    flat, path, best, error, solutions = np.zeros((size + 1) * classes), [], 0, np.inf, []
    for l2 in L2_PATH:
        found = optimize.minimize(
            objective, flat, args=(l2,), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS, "ftol": TOLERANCE}
        )
        flat = found.x
        kernel, bias = _unflatten(flat, size)
        val_logits = val_scaled @ kernel + bias
        val_losses, _ = _loss_and_slope(val_targets, val_logits, multi_label)
        train_logits = scaled @ kernel + bias
        train_losses, _ = _loss_and_slope(targets, train_logits, multi_label)
        path.append(
            {
                "l2": l2,
                "iterations": int(found.nit),
                "loss": float((train_losses * share[:, 0]).sum()),
                "accuracy": _accuracy(targets, train_logits, multi_label),
                "val_loss": float(val_losses.mean()),
                "val_accuracy": _accuracy(val_targets, val_logits, multi_label),
            }
        )
        solutions.append((kernel / deviation[:, None], bias - (mean / deviation) @ kernel))
        if path[-1]["val_loss"] < path[best]["val_loss"]:
            best, error = len(path) - 1, float(val_losses.std() / np.sqrt(len(val_losses)))
        if len(path) - 1 - best >= WORSE_IN_A_ROW:
            break
    within = path[best]["val_loss"] + error
    chosen = next(index for index, step in enumerate(path) if step["val_loss"] <= within)
    return *solutions[chosen], path, chosen


def _accuracy(targets, logits, multi_label) -> float:
    """Share of examples whose best class is right; with multi_label the share of right yes-or-nos."""
    if multi_label:
        return float(((logits > 0) == (targets > 0.5)).mean())
    return float((logits.argmax(axis=1) == targets.argmax(axis=1)).mean())


def _unflatten(flat, size):
    parameters = flat.reshape(size + 1, -1).astype(np.float32)
    return parameters[:-1], parameters[-1]


def _loss_and_slope(targets, logits, multi_label):
    """Cross-entropy per example [n] in nats, and its derivative by the logits [n, classes]."""
    if multi_label:
        losses = np.logaddexp(0, logits) - targets * logits
        return losses.mean(axis=1), (special.expit(logits) - targets) / logits.shape[1]
    log_probabilities = special.log_softmax(logits, axis=1)
    return -(targets * log_probabilities).sum(axis=1), np.exp(log_probabilities) - targets
