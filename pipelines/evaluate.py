"""Evaluation: labels and logits in, one JSON-able dict of figures out. Numpy and scikit-learn only."""

from __future__ import annotations

import numpy

from models import GraftError

CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks", section 5
MAJORITY_LIMIT = 0.7  # with a larger class than this, accuracy flatters and macro F1 is the headline
INTERVAL = (2.5, 97.5)  # percentiles of a 95% interval
RESAMPLED_AT_ONCE = 1_000_000  # examples per bootstrap step: 8 MB an array


def evaluate(labels, logits, class_names, positive=None, specificity=0.9, seed=0, bootstrap_samples=1000) -> dict:
    """Every figure about one split; equal arguments give equal figures.

    labels: [n] int class indices. logits: [n, classes] float32. `positive` names the class to detect,
    for two classes only: adds its sensitivity at the given specificity. Means over classes (macro F1,
    balanced accuracy, AUROC, average precision) are over the classes that occur in `labels`; what is
    undefined is None. Intervals are 95% percentile bootstrap intervals over the examples.

    Raises GraftError without examples, for logits that are not finite, an unknown `positive`, a
    `positive` with more than two classes, or a specificity outside 0 to 1.
    """
    from sklearn import metrics

    class_names = list(class_names)
    check_positive(positive, specificity, class_names)
    labels, logits = checked(labels, logits, class_names)
    probabilities, losses = softmax_and_cross_entropy(labels, logits)
    predicted = logits.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(len(class_names)))
    classes = per_class(labels, probabilities, confusion, class_names)
    present = [entry for entry in classes if entry["examples"]]
    intervals = bootstrap_intervals(labels, predicted, losses, len(class_names), seed, bootstrap_samples)
    bins = reliability_bins(probabilities.max(axis=1), predicted == labels)

    figures = {
        "examples": len(labels),
        "accuracy": float(numpy.mean(predicted == labels)),
        "loss": float(losses.mean()),
        "balanced_accuracy": mean_of(present, "recall"),
        "macro_f1": mean_of(present, "f1"),
        "auroc": mean_of(present, "auroc"),
        "average_precision": mean_of(present, "average_precision"),
        "expected_calibration_error": expected_calibration_error(bins),
        "intervals": intervals,
        "reliability": bins,
        "confusion": confusion.tolist(),
        "per_class": classes,
    }
    if len(class_names) > 5:
        figures["top_5_accuracy"] = float(
            metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(len(class_names)))
        )
    if positive is not None:
        index = class_names.index(positive)
        figures["positive"] = {
            "class": positive,
            "auroc": classes[index]["auroc"],
            **sensitivity_at(specificity, labels == index, probabilities[:, index]),
        }
    figures["headline"] = headline(figures)
    return figures


def check_positive(positive, specificity, class_names) -> None:
    """Raise GraftError where sensitivity at a specificity cannot be asked for. Callable before training."""
    if positive is None:
        return
    names = ", ".join(class_names)
    if positive not in class_names:
        raise GraftError(f"positive class {positive!r} is not among the classes; choose one of: {names}")
    if len(class_names) != 2:
        raise GraftError(
            f"positive class {positive!r} was given with {len(class_names)} classes ({names}); "
            "sensitivity at a specificity needs exactly two. Leave it out: the per-class table covers every class"
        )
    if not 0 < specificity < 1:
        raise GraftError(f"specificity is {specificity}; expected a share between 0 and 1, such as 0.9")


def checked(labels, logits, class_names) -> tuple[numpy.ndarray, numpy.ndarray]:
    """labels as [n] int64 and logits as [n, classes] float64, or an error that says what is wrong."""
    labels, logits = numpy.asarray(labels), numpy.asarray(logits, "float64")
    if not len(labels):
        raise GraftError("there are no examples to evaluate; expected at least one")
    if logits.shape != (len(labels), len(class_names)):
        raise ValueError(
            f"logits have shape {logits.shape}; expected {(len(labels), len(class_names))}, "
            f"for {len(labels)} labels and {len(class_names)} class names"
        )
    labels = labels.astype("int64")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(f"labels are {labels.min()} to {labels.max()}; expected 0 to {len(class_names) - 1}")
    check_finite(logits)
    return labels, logits


def check_finite(logits) -> None:
    """Raise GraftError where some of the logits [n, classes] are no numbers."""
    broken = int((~numpy.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise GraftError(
            f"the model's answers for {broken} of {len(logits)} examples are not finite numbers: "
            "training diverged; train again with a lower learning rate"
        )


def softmax_and_cross_entropy(labels, logits) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Probabilities [n, classes] and losses [n] in nats; float64 keeps near-certain answers apart."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))
    log_probabilities = shifted - log_sum
    losses = -numpy.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    return numpy.exp(log_probabilities), losses


def per_class(labels, probabilities, confusion, class_names) -> list[dict]:
    """One dict per class. None: recall and F1 without examples, precision of a class never predicted."""
    from sklearn import metrics

    rows = []
    for index, name in enumerate(class_names):
        hits, examples = confusion[index, index], confusion[index].sum()
        predictions = confusion[:, index].sum()
        is_class, auroc, average_precision = labels == index, None, None
        if examples:
            average_precision = float(metrics.average_precision_score(is_class, probabilities[:, index]))
        if 0 < examples < len(labels):
            auroc = float(metrics.roc_auc_score(is_class, probabilities[:, index]))
        rows.append(
            {
                "name": name,
                "examples": int(examples),
                "precision": float(hits / predictions) if predictions else None,
                "recall": float(hits / examples) if examples else None,
                "f1": float(2 * hits / (examples + predictions)) if examples else None,
                "auroc": auroc,
                "average_precision": average_precision,
            }
        )
    return rows


def mean_of(rows, key) -> float | None:
    """Mean of one figure over rows; None where a row lacks it (AUROC with a single class)."""
    values = [row[key] for row in rows]
    return None if None in values else float(numpy.mean(values))


def reliability_bins(confidence, correct) -> list[dict]:
    """Answers by top probability, in 15 bins of equal width, closed above: (0, 1/15], (1/15, 2/15], ..."""
    edges = numpy.linspace(0, 1, CALIBRATION_BINS + 1)
    bin_of = numpy.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for index in range(CALIBRATION_BINS):
        inside = bin_of == index
        count = int(inside.sum())
        bins.append(
            {
                "lower": float(edges[index]),
                "upper": float(edges[index + 1]),
                "count": count,
                "confidence": float(confidence[inside].mean()) if count else None,
                "accuracy": float(correct[inside].mean()) if count else None,
            }
        )
    return bins


def expected_calibration_error(bins) -> float:
    """Mean gap between confidence and accuracy, weighted by count: Guo et al. 2017, equation 3."""
    filled = [row for row in bins if row["count"]]
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in filled)
    return gaps / sum(row["count"] for row in filled)


def bootstrap_intervals(labels, predicted, losses, classes, seed, samples) -> dict[str, list[float]]:
    """95% percentile intervals [low, high] of accuracy, macro F1 and loss over resampled examples.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. A class that a resample
    misses is left out of that resample's macro F1, as a class without examples is everywhere.
    """
    generator = numpy.random.default_rng(seed)
    n, drawn = len(labels), {"accuracy": [], "macro_f1": [], "loss": []}
    hit = numpy.where(predicted == labels, labels, classes)  # the extra class collects the misses
    for start in range(0, samples, max(1, RESAMPLED_AT_ONCE // n)):
        rows = min(max(1, RESAMPLED_AT_ONCE // n), samples - start)
        chosen = generator.integers(n, size=(rows, n))
        examples = counts(labels[chosen], classes)
        predictions = counts(predicted[chosen], classes)
        hits = counts(hit[chosen], classes + 1)[:, :classes]
        f1 = 2 * hits / numpy.maximum(examples + predictions, 1)
        drawn["accuracy"].append(hits.sum(axis=1) / n)
        drawn["macro_f1"].append(f1.sum(axis=1) / (examples > 0).sum(axis=1))
        drawn["loss"].append(losses[chosen].mean(axis=1))
    return {
        name: [float(bound) for bound in numpy.percentile(numpy.concatenate(values), INTERVAL)]
        for name, values in drawn.items()
    }


def counts(indices, classes) -> numpy.ndarray:
    """How often each class occurs in each row: [rows, n] int -> [rows, classes] int."""
    rows = len(indices)
    offset = numpy.arange(rows)[:, None] * classes
    return numpy.bincount((indices + offset).ravel(), minlength=rows * classes).reshape(rows, classes)


def sensitivity_at(target, is_positive, probability) -> dict:
    """The best sensitivity among thresholds whose specificity reaches `target`.

    An example is called positive where its probability is at least `threshold`; that is None where only
    calling nothing positive is specific enough. All figures are None unless both classes occur.
    """
    from sklearn import metrics

    undefined = dict.fromkeys(("specificity", "sensitivity", "threshold"))
    figures = {"specificity_target": float(target), **undefined}
    if is_positive.all() or not is_positive.any():
        return figures
    false_positive_rate, sensitivity, thresholds = metrics.roc_curve(is_positive, probability, drop_intermediate=False)
    allowed = 1 - false_positive_rate >= target - 1e-12  # 1 - 0.07 must reach 0.93
    best = int(numpy.argmax(numpy.where(allowed, sensitivity, -1)))  # the first is the most specific
    figures["specificity"] = float(1 - false_positive_rate[best])
    figures["sensitivity"] = float(sensitivity[best])
    figures["threshold"] = float(thresholds[best]) if numpy.isfinite(thresholds[best]) else None
    return figures


def headline(figures) -> dict:
    """The one figure to quote, its interval, and what always answering the largest class would score."""
    examples = [entry["examples"] for entry in figures["per_class"]]
    largest = int(numpy.argmax(examples))
    share = examples[largest] / figures["examples"]
    metric, baseline = "accuracy", share
    if share > MAJORITY_LIMIT:
        # All answers one class: its precision is its share, its recall 1, and every other F1 is 0.
        metric, baseline = "macro_f1", 2 * share / (1 + share) / sum(count > 0 for count in examples)
    low, high = figures["intervals"][metric]
    return {
        "metric": metric,
        "value": figures[metric],
        "interval": [low, high],
        "half_width": (high - low) / 2,
        "majority_class": figures["per_class"][largest]["name"],
        "majority_share": share,
        "majority_value": baseline,
    }
