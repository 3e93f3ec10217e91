"""Evaluation where an example may have several labels: a yes or no for each class. Numpy and scikit-learn only."""

from __future__ import annotations

import numpy

from pipelines.evaluate import (
    INTERVAL,
    RESAMPLED_AT_ONCE,
    check_finite,
    counts,
    expected_calibration_error,
    mean_of,
    reliability_bins,
)

UNKNOWN_THRESHOLD = 0.5  # of a class without a yes or without a no among the validation examples


def sigmoid(logits) -> numpy.ndarray:
    """[n, classes] logits -> probabilities, float32."""
    return numpy.exp(-numpy.logaddexp(0.0, -numpy.asarray(logits, "float64"))).astype("float32")


def choose_thresholds(targets, probabilities) -> numpy.ndarray:
    """The threshold of each class with the best F1 on these examples: [classes] float32.

    A class is chosen where its probability is at least its threshold. Thresholds lie halfway between
    neighbouring probabilities, so that small changes matter least; of equally good ones the nearest to
    0.5 is taken. A class that all examples have, or none, keeps 0.5.

    targets: [n, classes] of 0 and 1. probabilities: [n, classes] float32.
    """
    probabilities = numpy.asarray(probabilities, "float32")
    thresholds = numpy.full(probabilities.shape[1], UNKNOWN_THRESHOLD, "float32")
    for index, truth in enumerate(numpy.asarray(targets).T > 0):
        if not truth.any() or truth.all():
            continue
        order, ends = ranked(probabilities[:, index])
        upper = probabilities[order[ends], index]
        lower = numpy.append(upper[1:], numpy.float32(0))
        middle = ((upper.astype("float64") + lower) / 2).astype("float32")
        middle = numpy.where(middle > lower, middle, upper)  # of neighbours in float32 the upper one
        hits = numpy.cumsum(truth[order])[ends]
        f1 = 2 * hits / (ends + 1 + truth.sum())
        distance = numpy.where(f1 == f1.max(), numpy.abs(middle - 0.5), numpy.inf)
        thresholds[index] = middle[numpy.argmin(distance)]
    return thresholds


def evaluate_multi_label(targets, logits, chosen, thresholds, class_names, seed=0, bootstrap_samples=1000) -> dict:
    """Every figure about one split; equal arguments give equal figures.

    targets: [n, classes] of 0 and 1. logits: [n, classes] of a sigmoid per class. chosen: [n, classes] bool, the
    classes that the model names, given `thresholds` [classes]. Means over classes (mean average precision, macro
    F1, AUROC) are over the classes that occur in `targets`; what is undefined is None. Micro F1 counts all
    decisions alike. Intervals are 95% percentile bootstrap intervals over the examples.

    Raises GraftError for logits that are not finite.
    """
    truth, chosen = numpy.asarray(targets) > 0, numpy.asarray(chosen, bool)
    logits = numpy.asarray(logits, "float64")
    if not truth.shape == logits.shape == chosen.shape == (len(truth), len(class_names)):
        raise ValueError(
            f"targets {truth.shape}, logits {logits.shape}, chosen {chosen.shape}: expected one shape, with "
            f"{len(class_names)} columns"
        )
    check_finite(logits)
    classes = per_class(truth, logits, chosen, thresholds, class_names)
    present = [entry for entry in classes if entry["examples"]]
    # Of a sigmoid per class: -log p where the class is there, -log (1 - p) where it is not, without overflow.
    losses = numpy.logaddexp(0.0, numpy.where(truth, -logits, logits)).mean(axis=1)
    bins = reliability_bins(sigmoid(logits).ravel(), truth.ravel())
    figures = {
        "examples": len(truth),
        "mean_average_precision": mean_of(present, "average_precision"),
        "micro_f1": float(2 * (chosen & truth).sum() / max(chosen.sum() + truth.sum(), 1)),
        "macro_f1": mean_of(present, "f1"),
        "subset_accuracy": float((chosen == truth).all(axis=1).mean()),
        "auroc": mean_of(present, "auroc"),
        "loss": float(losses.mean()),
        "expected_calibration_error": expected_calibration_error(bins),
        "labels_per_example": float(truth.sum(axis=1).mean()),
        "chosen_per_example": float(chosen.sum(axis=1).mean()),
        "intervals": bootstrap_intervals(truth, logits, chosen, losses, seed, bootstrap_samples),
        "reliability": bins,
        "per_class": classes,
    }
    low, high = figures["intervals"]["mean_average_precision"]
    figures["headline"] = {
        "metric": "mean_average_precision",
        "value": figures["mean_average_precision"],
        "interval": [low, high],
        "half_width": (high - low) / 2,
        # One probability for all examples ranks nothing: its average precision is the share of the class.
        "chance_value": mean_of(present, "examples") / len(truth),
    }
    return figures


def per_class(truth, logits, chosen, thresholds, class_names) -> list[dict]:
    """One dict per class. None: recall and F1 without examples, precision of a class never chosen."""
    from sklearn import metrics

    rows = []
    for index, name in enumerate(class_names):
        is_class, scores = truth[:, index], logits[:, index]
        hits, predictions = int((is_class & chosen[:, index]).sum()), int(chosen[:, index].sum())
        examples, auroc, average_precision = int(is_class.sum()), None, None
        if examples:
            average_precision = float(metrics.average_precision_score(is_class, scores))
        if 0 < examples < len(truth):
            auroc = float(metrics.roc_auc_score(is_class, scores))
        rows.append(
            {
                "name": name,
                "examples": examples,
                "threshold": float(thresholds[index]),
                "precision": hits / predictions if predictions else None,
                "recall": hits / examples if examples else None,
                "f1": 2 * hits / (examples + predictions) if examples else None,
                "auroc": auroc,
                "average_precision": average_precision,
            }
        )
    return rows


def bootstrap_intervals(truth, logits, chosen, losses, seed, samples) -> dict[str, list[float]]:
    """95% percentile intervals [low, high] of the means over resampled examples.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. A class that a resample
    misses is left out of that resample's means over classes, as a class without examples is everywhere.
    """
    generator, n = numpy.random.default_rng(seed), len(truth)
    hits, right = (chosen & truth).astype("float64"), (chosen == truth).all(axis=1)
    drawn = {name: [] for name in ("mean_average_precision", "micro_f1", "macro_f1", "subset_accuracy", "loss")}
    for start in range(0, samples, max(1, RESAMPLED_AT_ONCE // n)):
        rows = min(max(1, RESAMPLED_AT_ONCE // n), samples - start)
        drawn_times = counts(generator.integers(n, size=(rows, n)), n)  # [rows, n]: how often each example is in
        named, found = drawn_times @ (chosen + truth.astype("float64")), drawn_times @ hits
        occurs = drawn_times @ truth.astype("float64") > 0
        classes = numpy.maximum(occurs.sum(axis=1), 1)
        precisions = [average_precisions(drawn_times, *pair) for pair in zip(truth.T, logits.T)]
        drawn["mean_average_precision"].append(sum(precisions) / classes)
        drawn["micro_f1"].append(2 * found.sum(axis=1) / numpy.maximum(named.sum(axis=1), 1))
        drawn["macro_f1"].append((2 * found / numpy.maximum(named, 1)).sum(axis=1) / classes)
        drawn["subset_accuracy"].append(drawn_times @ right / n)
        drawn["loss"].append(drawn_times @ losses / n)
    return {
        name: [float(bound) for bound in numpy.percentile(numpy.concatenate(values), INTERVAL)]
        for name, values in drawn.items()
    }


def average_precisions(times, truth, scores) -> numpy.ndarray:
    """Average precision of one class in each resample, 0 where it has no example of the class: [rows].

    The sum over thresholds of precision times gained recall, as scikit-learn's average_precision_score.

    times: [rows, n], how often each example is in a resample. truth: [n] bool. scores: [n].
    """
    order, ends = ranked(scores)
    times = times[:, order]
    found = numpy.cumsum(times * truth[order], axis=1)[:, ends]
    precision = found / numpy.maximum(numpy.cumsum(times, axis=1)[:, ends], 1)
    gained = numpy.diff(found, axis=1, prepend=0)
    return (gained * precision).sum(axis=1) / numpy.maximum(found[:, -1], 1)


def ranked(scores) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Indices by falling score, and the position of the last of each group of equal scores."""
    order = numpy.argsort(-scores, kind="stable")
    return order, numpy.append(numpy.flatnonzero(numpy.diff(scores[order])), len(scores) - 1)
