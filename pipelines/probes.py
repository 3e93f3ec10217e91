"""What features are worth, measured without training a network: features and labels in, figures out.

Three measures that disagree where it matters: a linear probe (what a new head would reach), k nearest neighbours (how
classes lie without any learning) and LogME (how likely the labels are under a linear model, no example held out).
NumPy and SciPy only, so that raw pixels, term weights and the features of any network are measured alike.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy import optimize, stats
from threadpoolctl import threadpool_limits

FOLDS = 5
L2_PATH = (1.0, 0.1, 0.01, 0.001)  # on features of deviation 1, strong penalty to weak
ITERATIONS = 60  # most per penalty and fold; each starts where the penalty before it ended
TOLERANCE = 1e-3  # relative change of the loss at which L-BFGS stops; 1e-4 moves no accuracy and takes twice as long
NEIGHBOURS = 10
ROUNDS = 50  # most of LogME's fixed point; it settles in a handful
SETTLED = 1e-3  # relative change of alpha / beta at which it has, as in the authors' own code
MOST_RATIO = 1e6  # of alpha / beta to the largest eigenvalue: beyond, features say nothing of a class
TINY = 1e-30
FULL_RANK = 1e-7  # share of the largest eigenvalue below which one is rounding: features are float32


# On matrices as small as these, threads that wait for each other take five to ten times as long as one.
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@one_thread
def linear_probe(features, labels, folds: int = FOLDS, seed: int = 0, groups=None, standardise: bool = True) -> dict:
    """Logistic regression on features as they are, each example answered by a model that has not seen it.

    One L2 penalty for all folds, that of L2_PATH with the lowest out-of-fold loss. Features are scaled over all
    examples, which uses no label.

    Args:
        features: [n, d], any float.
        labels: [n] int; or [n, classes] of 0 and 1 where an example may have several.
        folds: fewer where even the largest class has fewer examples.
        groups: [n], what must stay in one fold (None: nothing).
        standardise: scale each feature to deviation 1; else all by one factor, as suits term weights and pixels.

    Returns:
        accuracy and interval (95%, [low, high]); correct [n] float32: 1 where the out-of-fold answer is right (of
        several labels the share of right yes-or-nos); loss [n], the cross-entropy in nats; logits [n, classes that
        occur], out of fold; l2; folds.
    """
    targets = targets_from(labels)
    multi_label = np.ndim(labels) == 2
    fold_of = fold_numbers(labels, folds, seed, groups)
    inputs = scaled(features, standardise)
    count = int(fold_of.max()) + 1
    parameters = [np.zeros((inputs.shape[1], targets.shape[1]), np.float32)] * count
    best = None
    for l2 in L2_PATH:
        logits = np.zeros(targets.shape, np.float32)
        for fold in range(count):
            seen = fold_of != fold
            parameters[fold] = fit(inputs[seen], targets[seen], l2, parameters[fold], multi_label)
            logits[~seen] = inputs[~seen] @ parameters[fold]
        losses, correct = scores(logits, targets, multi_label)
        if best is not None and losses.mean() >= best["loss"].mean():
            break
        best = {"correct": correct, "loss": losses, "logits": logits, "l2": l2, "folds": count}
    return {"accuracy": float(best["correct"].mean()), "interval": accuracy_interval(best["correct"]), **best}


def fit(inputs, targets, l2: float, start, multi_label: bool = False) -> np.ndarray:
    """Parameters [d + 1, classes] of a logistic regression by L-BFGS; no penalty on the last row, the bias.

    Minimises the mean cross-entropy plus l2 / 2 * |W|^2. inputs: [n, d + 1] with a last column of ones.
    """
    shape, count = start.shape, np.float32(len(inputs))

    def objective(flat):
        parameters = flat.reshape(shape).astype(np.float32)
        logits = inputs @ parameters
        kernel = parameters.copy()
        kernel[-1] = 0
        if multi_label:
            loss = np.logaddexp(0, logits).sum() - (targets * logits).sum()
            probabilities = 1 / (1 + np.exp(-logits))
        else:
            logits -= logits.max(axis=1, keepdims=True)
            probabilities = np.exp(logits)
            total = probabilities.sum(axis=1, keepdims=True)
            loss = np.log(total).sum() - (targets * logits).sum()
            probabilities /= total
        slope = inputs.T @ ((probabilities - targets) / count) + np.float32(l2) * kernel
        return float(loss / count) + l2 / 2 * float((kernel**2).sum()), slope.astype(np.float64).ravel()

    options = {"maxiter": ITERATIONS, "ftol": TOLERANCE}
    with np.errstate(over="ignore"):  # exp of a large logit: the probability is 0, as it should be
        found = optimize.minimize(
            objective, start.astype(np.float64).ravel(), jac=True, method="L-BFGS-B", options=options
        )
    return found.x.reshape(shape).astype(np.float32)


@one_thread
def nearest_neighbours(features, labels, neighbours: int = NEIGHBOURS, groups=None) -> dict:
    """Each example answered by the vote of its nearest others; similarity is the cosine of centred features.

    Args:
        features, labels, groups: as for `linear_probe`; examples of one group have no vote for each other.
        neighbours: at most all others.

    Returns:
        accuracy, interval (95%) and correct [n], as `linear_probe`; neighbours.
    """
    targets, multi_label = targets_from(labels), np.ndim(labels) == 2
    centred = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    similarity = centred @ centred.T
    if groups is None:
        np.fill_diagonal(similarity, -np.inf)
    else:
        numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
        similarity[numbers[:, None] == numbers[None, :]] = -np.inf
    neighbours = min(neighbours, len(targets) - 1)
    nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
    near = np.take_along_axis(similarity, nearest, axis=1)
    # Votes weigh by similarity, so that there are hardly ties; those of its own group weigh nothing.
    weights = np.where(np.isfinite(near), 1 + near, 0)
    votes = np.einsum("nk,nkc->nc", weights, targets[nearest]) / np.maximum(weights.sum(axis=1), 1e-12)[:, None]
    correct = scores(votes - 0.5 if multi_label else votes, targets, multi_label)[1]
    return {
        "accuracy": float(correct.mean()),
        "interval": accuracy_interval(correct),
        "correct": correct,
        "neighbours": neighbours,
    }


@one_thread
def log_me(features, labels) -> float:
    """LogME: the largest log evidence of the labels per example, a mean over classes; higher is better.

    Each class is a yes-or-no (0 and 1) that a Bayesian linear model explains: weights of precision alpha, noise of
    precision beta, both found by the fixed point of You et al. 2021, "LogME: Practical Assessment of Pre-trained
    Models for Transfer Learning", algorithm 1, in the eigenbasis of the features.

    Args:
        features: [n, d], used as they are. labels: as for `linear_probe`.
    """
    features, targets = np.asarray(features, np.float64), targets_from(labels).astype(np.float64)
    count, size = features.shape
    wide = size > count
    values, vectors = np.linalg.eigh(features @ features.T if wide else features.T @ features)
    kept = values > FULL_RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    # Squares of the targets' parts along the left singular vectors, [rank, classes].
    along = vectors.T @ targets if wide else vectors.T @ (features.T @ targets) / np.sqrt(values)[:, None]
    squares, norms = along**2, (targets**2).sum(axis=0)
    return float(np.mean([log_evidence(values, squares[:, c], norms[c], count, size) for c in range(targets.shape[1])]))


def log_evidence(values, squares, norm: float, count: int, size: int) -> float:
    """The log evidence of one target per example, at the alpha and beta that the fixed point finds.

    Args:
        values: [r] eigenvalues of F'F that are not 0. squares: [r] of the target's parts in their directions.
        norm: squared norm of the target [count]; size: number of features.
    """
    outside = max(norm - squares.sum(), 0.0)  # what no weights can explain
    ratio = 1.0  # alpha / beta
    for _ in range(ROUNDS):
        explained = float((values / (ratio + values)).sum())  # gamma: how many weights the data determine
        weights = float((values * squares / (ratio + values) ** 2).sum())  # |m|^2
        residual = float(((ratio / (ratio + values)) ** 2 * squares).sum()) + outside
        beta = (count - explained) / max(residual, TINY)
        before, ratio = ratio, min(explained / (beta * max(weights, TINY)), MOST_RATIO * values[-1])
        if abs(ratio - before) <= SETTLED * before:
            break
    return evidence_at(ratio * beta, beta, values, squares, norm, size, count) / count


def evidence_at(alpha: float, beta: float, values, squares, norm: float, size: int, count: int) -> float:
    """log p(y | F, alpha, beta), equation 2 of You et al. 2021; arguments as for `log_evidence`."""
    ratio = alpha / beta
    weights = (values * squares / (ratio + values) ** 2).sum()
    residual = ((ratio / (ratio + values)) ** 2 * squares).sum() + max(norm - squares.sum(), 0.0)
    log_determinant = np.log(alpha + beta * values).sum() + (size - len(values)) * np.log(alpha)
    fits = count * np.log(beta / (2 * np.pi)) + size * np.log(alpha) - log_determinant
    return float((fits - beta * residual - alpha * weights) / 2)


# ---------------------------------------------------------------- what they share


def targets_from(labels) -> np.ndarray:
    """Labels [n] int, or [n, classes] of 0 and 1 -> [n, classes] float32; a class without examples has no column."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        return labels.astype(np.float32)
    names, numbers = np.unique(labels, return_inverse=True)
    return np.eye(len(names), dtype=np.float32)[numbers]


def fold_numbers(labels, folds: int = FOLDS, seed: int = 0, groups=None) -> np.ndarray:
    """The fold [n] of each example, 0 to `folds` - 1: each class spread evenly, each group in one fold.

    Of several labels an example counts for its rarest. Fewer groups make fewer folds; a single one is taken apart.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = np.asarray(labels)
    if labels.ndim == 2:
        rarity = np.where(labels > 0, labels.sum(axis=0), np.inf)
        labels = np.where(labels.any(axis=1), rarity.argmin(axis=1), -1)
    folds = int(max(2, min(folds, np.unique(labels, return_counts=True)[1].max())))
    group_count = len(labels) if groups is None else len(np.unique(np.asarray(groups)))
    grouped = 1 < group_count < len(labels)
    folds = min(folds, group_count) if grouped else folds
    maker = (StratifiedGroupKFold if grouped else StratifiedKFold)(folds, shuffle=True, random_state=seed)
    fold_of = np.zeros(len(labels), int)
    with warnings.catch_warnings():
        # A class with fewer examples than folds is missing from some of them, which is as it must be.
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, held_out) in enumerate(maker.split(np.zeros(len(labels)), labels, groups if grouped else None)):
            fold_of[held_out] = fold
    return fold_of


def scaled(features, standardise: bool = True) -> np.ndarray:
    """Features [n, d] of mean 0 and deviation 1 with a last column of ones, [n, d + 1] float32.

    Where d > n, in the basis of the examples, [n, n + 1]: logistic regression with an L2 penalty cares for angles and
    lengths only (Hastie and Tibshirani 2004, "Efficient quadratic regularization for expression arrays").
    """
    features = np.asarray(features, np.float32)
    centred = features - features.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = centred.std(axis=0, dtype=np.float64)
    if not standardise:
        deviation[:] = np.sqrt((deviation**2).mean())
    centred /= np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)
    if centred.shape[1] > centred.shape[0]:
        values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        centred = (vectors * np.sqrt(np.maximum(values, 0.0))).astype(np.float32)
    return np.concatenate([centred, np.ones((len(centred), 1), np.float32)], axis=1)


def scores(logits, targets, multi_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cross-entropy [n] of logits [n, classes] in nats, and what is right [n] float32."""
    if multi_label:
        losses = (np.logaddexp(0, logits) - targets * logits).mean(axis=1)
        return losses, ((logits > 0) == (targets > 0)).mean(axis=1).astype(np.float32)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - (targets * shifted).sum(axis=1)
    return losses, (logits.argmax(axis=1) == targets.argmax(axis=1)).astype(np.float32)


def accuracy_interval(correct, level: float = 0.95) -> list[float]:
    """[low, high] of the mean of `correct` [n] in 0 to 1: Wilson's score interval, 1927."""
    count, share = len(correct), float(np.mean(correct))
    z = stats.norm.ppf((1 + level) / 2)
    centre, width = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [float((centre - width) / (1 + z**2 / count)), float((centre + width) / (1 + z**2 / count))]


def paired_difference(correct, other, level: float = 0.95) -> dict:
    """How much more is right in `correct` than in `other`, both [n] on the same examples: difference and interval.

    The adjusted interval of Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data": as if there were two more examples, one won and one lost.
    """
    differences = np.asarray(correct, np.float64) - np.asarray(other, np.float64)
    count = len(differences) + 2
    centre = differences.sum() / count
    variance = ((differences**2).sum() + 2) / count - centre**2
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt(variance / count)
    return {"difference": float(differences.mean()), "interval": [float(centre - half), float(centre + half)]}
