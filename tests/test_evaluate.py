"""Figures of pipelines.evaluate against cases worked by hand, scikit-learn and plain loops."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy
import pytest
from sklearn import metrics

from models import GraftError
from pipelines.evaluate import (
    bootstrap_intervals,
    check_positive,
    evaluate,
    expected_calibration_error,
    reliability_bins,
    sensitivity_at,
)


def logits_of(probabilities):
    return numpy.log(numpy.asarray(probabilities, "float64")).astype("float32")


def random_case(examples, classes, seed=0, signal=1.5):
    generator = numpy.random.default_rng(seed)
    labels = generator.integers(classes, size=examples)
    logits = generator.normal(size=(examples, classes)).astype("float32")
    logits[numpy.arange(examples), labels] += signal
    return labels, logits


def test_a_case_worked_by_hand():
    labels = [0, 0, 0, 1]
    figures = evaluate(labels, logits_of([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]), ["cat", "dog"])

    assert figures["examples"] == 4
    assert figures["accuracy"] == 0.75
    assert figures["loss"] == pytest.approx(-numpy.log([0.9, 0.8, 0.4, 0.7]).mean(), abs=1e-6)
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["confusion"] == [[2, 1], [0, 1]]
    cat, dog = figures["per_class"]
    assert (cat["name"], cat["examples"], cat["precision"], cat["recall"]) == ("cat", 3, 1.0, 2 / 3)
    assert (dog["examples"], dog["precision"], dog["recall"]) == (1, 0.5, 1.0)
    assert cat["f1"] == pytest.approx(0.8) and dog["f1"] == pytest.approx(2 / 3)
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["auroc"] == dog["auroc"] == 1.0
    assert "top_5_accuracy" not in figures and "positive" not in figures


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (3, 1), (15, 2)])
def test_random_cases_equal_scikit_learn(classes, seed):
    labels, logits = random_case(400, classes, seed)
    figures = evaluate(labels, logits, [f"class {i}" for i in range(classes)])
    predicted = logits.argmax(axis=1)
    probabilities = numpy.exp(logits.astype("float64"))
    probabilities /= probabilities.sum(axis=1, keepdims=True)

    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "loss": metrics.log_loss(labels, probabilities),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "auroc": metrics.roc_auc_score(
            labels, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr"
        ),
    }
    if classes > 2:
        one_hot = numpy.eye(classes)[labels]
        expected["average_precision"] = metrics.average_precision_score(one_hot, probabilities)
    if classes > 5:
        expected["top_5_accuracy"] = metrics.top_k_accuracy_score(labels, logits, k=5)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-9), name
    columns = metrics.precision_recall_fscore_support(labels, predicted)
    for name, column in zip(("precision", "recall", "f1", "examples"), columns):
        assert [row[name] for row in figures["per_class"]] == pytest.approx(list(column)), name


def test_json_holds_every_figure_and_equal_calls_give_equal_figures():
    labels, logits = random_case(200, 8)
    names = list("abcdefgh")
    first = json.dumps(evaluate(labels, logits, names), allow_nan=False)
    assert first == json.dumps(evaluate(labels, logits, names), allow_nan=False)
    assert json.loads(first)["intervals"] != evaluate(labels, logits, names, seed=1)["intervals"]


def test_classes_without_examples_are_none_and_leave_the_means_alone():
    labels, logits = random_case(100, 3)
    padded = numpy.pad(logits, ((0, 0), (0, 4)), constant_values=-50.0)
    padded[0, 5] = 50  # one stray answer for a class that does not occur
    logits[0] = [0, 0, 0]
    logits[0, labels[0] - 1] = 9  # the same mistake among the three
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = evaluate(labels, padded, list("abcdefg"))
    alone = evaluate(labels, logits, list("abc"))

    absent = figures["per_class"][6]
    assert absent == {
        "name": "g", "examples": 0, "precision": None, "recall": None, "f1": None,
        "auroc": None, "average_precision": None,
    }  # fmt: skip
    assert figures["per_class"][5]["precision"] == 0.0
    assert figures["balanced_accuracy"] == pytest.approx(alone["balanced_accuracy"])
    assert figures["accuracy"] == alone["accuracy"]
    present = [row["f1"] for row in figures["per_class"][:3]]
    assert figures["macro_f1"] == pytest.approx(numpy.mean(present))


def test_a_single_class_among_the_labels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = evaluate([1], logits_of([[0.2, 0.8]]), ["no", "yes"], positive="yes")
    json.dumps(figures, allow_nan=False)
    assert figures["accuracy"] == figures["macro_f1"] == 1.0
    assert figures["auroc"] is None
    assert figures["positive"]["sensitivity"] is None and figures["positive"]["threshold"] is None


def test_near_certain_answers_keep_their_order():
    # As float32 probabilities all three would be 1.0 and the ranking lost.
    logits = numpy.array([[20, 0], [25, 0], [30, 0]], "float32")
    assert evaluate([1, 0, 0], logits, ["a", "b"])["auroc"] == 1.0


def test_calibration_by_hand():
    bins = reliability_bins(numpy.array([1.0, 1.0, 0.62, 0.62]), numpy.array([True, True, True, False]))
    assert len(bins) == 15 and bins[14]["upper"] == 1.0
    assert (bins[14]["count"], bins[14]["confidence"], bins[14]["accuracy"]) == (2, 1.0, 1.0)
    assert (bins[9]["count"], bins[9]["confidence"], bins[9]["accuracy"]) == (2, pytest.approx(0.62), 0.5)
    assert bins[0]["count"] == 0 and bins[0]["accuracy"] is None
    assert expected_calibration_error(bins) == pytest.approx(0.5 * 0.12)


def test_a_bin_is_closed_above():
    third = reliability_bins(numpy.array([3 / 15]), numpy.array([True]))
    assert [row["count"] for row in third][:4] == [0, 0, 1, 0]


def test_bootstrap_equals_a_plain_loop():
    labels, logits = random_case(60, 4)
    predicted, losses = logits.argmax(axis=1), numpy.random.default_rng(1).random(60)
    intervals = bootstrap_intervals(labels, predicted, losses, 4, seed=3, samples=200)

    chosen = numpy.random.default_rng(3).integers(60, size=(200, 60))
    accuracy = [numpy.mean(labels[rows] == predicted[rows]) for rows in chosen]
    macro_f1 = [
        metrics.f1_score(labels[rows], predicted[rows], labels=numpy.unique(labels[rows]), average="macro",
                         zero_division=0) for rows in chosen
    ]  # fmt: skip
    expected = {"accuracy": accuracy, "macro_f1": macro_f1, "loss": losses[chosen].mean(axis=1)}
    for name, values in expected.items():
        assert intervals[name] == pytest.approx(list(numpy.percentile(values, [2.5, 97.5]))), name


def test_the_interval_of_accuracy_has_the_textbook_width():
    labels = numpy.zeros(1000, int)
    predicted = (numpy.arange(1000) < 100).astype(int)
    low, high = bootstrap_intervals(labels, predicted, numpy.ones(1000), 2, seed=0, samples=1000)["accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * numpy.sqrt(0.9 * 0.1 / 1000), rel=0.1)


def test_headline_is_accuracy_until_one_class_exceeds_seventy_percent():
    labels, logits = [0] * 7 + [1] * 3, logits_of([[0.9, 0.1]] * 10)
    seventy = evaluate(labels, logits, ["common", "rare"])["headline"]
    assert (seventy["metric"], seventy["value"]) == ("accuracy", 0.7)
    assert seventy["majority_value"] == seventy["majority_share"] == 0.7

    labels = [0] * 8 + [1] * 2
    figures = evaluate(labels, logits, ["common", "rare"])
    headline = figures["headline"]
    assert headline["metric"] == "macro_f1" and headline["majority_class"] == "common"
    # This model does answer the largest class always, so it scores what the yardstick says.
    assert headline["value"] == pytest.approx(headline["majority_value"]) == pytest.approx(0.8 / 0.9 / 2)
    assert headline["interval"] == figures["intervals"]["macro_f1"]
    assert headline["half_width"] == pytest.approx((headline["interval"][1] - headline["interval"][0]) / 2)


def test_sensitivity_at_a_specificity_by_hand():
    # Ten negatives: specificity 0.9 allows exactly one of them above the threshold.
    negatives, positives = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.55, 0.8], [0.5, 0.6, 0.7, 0.9]
    is_positive = numpy.array([False] * 10 + [True] * 4)
    figures = sensitivity_at(0.9, is_positive, numpy.array(negatives + positives))
    assert figures["sensitivity"] == 0.75 and figures["threshold"] == 0.6
    assert figures["specificity"] == pytest.approx(0.9) and figures["specificity_target"] == 0.9

    # 1 - 0.07 is a little less than 0.93 in binary floating point, and yet it counts.
    scores = numpy.arange(101) / 101  # the positive one lies above 93 negatives and below 7
    assert sensitivity_at(0.93, numpy.arange(101) == 93, scores)["sensitivity"] == 1.0
    assert sensitivity_at(0.94, numpy.arange(101) == 93, scores)["sensitivity"] == 0.0

    unreachable = sensitivity_at(0.95, is_positive, numpy.array([0.9] * 10 + [0.1] * 4))
    assert unreachable["sensitivity"] == 0.0 and unreachable["specificity"] == 1.0
    assert unreachable["threshold"] is None


def test_positive_is_the_named_class():
    labels, logits = random_case(300, 2)
    figures = evaluate(labels, logits, ["healthy", "ill"], positive="ill", specificity=0.8)["positive"]
    probability = 1 / (1 + numpy.exp(logits[:, 0].astype("float64") - logits[:, 1]))
    assert figures["class"] == "ill"
    assert figures["auroc"] == pytest.approx(metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    called = probability >= figures["threshold"] - 1e-12
    assert figures["sensitivity"] == pytest.approx(called[labels == 1].mean())
    assert figures["specificity"] == pytest.approx(1 - called[labels == 0].mean())
    assert figures["specificity"] >= 0.8


def test_errors_say_what_to_do():
    labels, logits = random_case(10, 3)
    with pytest.raises(GraftError, match="'wolf' is not among the classes; choose one of: ant, bee, cat"):
        evaluate(labels, logits, ["ant", "bee", "cat"], positive="wolf")
    with pytest.raises(GraftError, match=r"'bee' was given with 3 classes .ant, bee, cat.; .* exactly two"):
        check_positive("bee", 0.9, ["ant", "bee", "cat"])
    with pytest.raises(GraftError, match="specificity is 90; expected a share between 0 and 1"):
        check_positive("ant", 90, ["ant", "bee"])
    with pytest.raises(GraftError, match="no examples to evaluate"):
        evaluate([], numpy.zeros((0, 3)), ["ant", "bee", "cat"])
    logits[4, 1] = numpy.nan
    with pytest.raises(GraftError, match=r"1 of 10 examples are not finite numbers: .* lower learning rate"):
        evaluate(labels, logits, ["ant", "bee", "cat"])
    with pytest.raises(ValueError, match=r"shape \(10, 3\); expected \(10, 2\)"):
        evaluate(labels, logits, ["ant", "bee"])


def test_importing_evaluation_and_report_is_light():
    heavy = "{'tensorflow', 'keras', 'sklearn', 'matplotlib', 'jinja2'}"
    code = f"import sys, pipelines.evaluate, pipelines.report; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
