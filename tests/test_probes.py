"""Probes: the answers of scikit-learn, of a calculation by hand, of brute force; honest where examples are related."""

import numpy as np
import pytest
from scipy import optimize, stats
from threadpoolctl import threadpool_limits

from pipelines import probes
from pipelines.probes import accuracy_interval, fold_numbers, linear_probe, log_me, nearest_neighbours


def made_features(count=240, size=12, classes=3, shift=1.0, seed=0):
    """Features whose classes overlap: (features [n, d] of uneven scales, labels [n])."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    features = random.normal(size=(count, size)) + shift * random.normal(size=(classes, size))[labels] / 2
    return (features * random.uniform(0.01, 30, size) + 5).astype("float32"), labels


@pytest.mark.parametrize(("size", "shift"), [(12, 1.0), (400, 0.3)])  # fewer features than examples, and more
def test_the_linear_probe_equals_scikit_learns_regression_on_the_same_folds(monkeypatch, size, shift):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr(probes, "TOLERANCE", 1e-9)
    monkeypatch.setattr(probes, "ITERATIONS", 1000)
    monkeypatch.setattr(probes, "L2_PATH", (1.0, 0.1))
    features, labels = made_features(size=size, shift=shift)
    found = linear_probe(features, labels, folds=4, seed=3)
    inputs, fold_of = StandardScaler().fit_transform(features), fold_numbers(labels, 4, 3)
    losses, correct = np.zeros(len(labels)), np.zeros(len(labels))
    for fold in range(4):
        seen = fold_of != fold
        model = LogisticRegression(C=1 / (found["l2"] * seen.sum()), tol=1e-9, max_iter=10_000)
        with threadpool_limits(1, "blas"):
            probabilities = model.fit(inputs[seen], labels[seen]).predict_proba(inputs[~seen])
        correct[~seen] = probabilities.argmax(axis=1) == labels[~seen]
        losses[~seen] = -np.log(probabilities[np.arange((~seen).sum()), labels[~seen]])
    np.testing.assert_allclose(found["loss"], losses, rtol=0.02, atol=2e-3)
    assert (found["correct"] != correct).mean() < 0.01
    low, high = found["interval"]
    assert found["accuracy"] == found["correct"].mean() and low < found["accuracy"] < high


def test_where_it_stops_by_itself_it_is_as_good(monkeypatch):
    features, labels = made_features(count=600, size=64, classes=6, shift=0.7)
    early = linear_probe(features, labels)
    monkeypatch.setattr(probes, "TOLERANCE", 1e-9)
    monkeypatch.setattr(probes, "ITERATIONS", 1000)
    late = linear_probe(features, labels)
    assert early["accuracy"] == pytest.approx(late["accuracy"], abs=0.015)
    assert early["loss"].mean() == pytest.approx(late["loss"].mean(), rel=0.02)


def test_labels_that_features_know_nothing_of_are_guessed():
    features, _ = made_features(count=300)
    labels = np.random.default_rng(1).integers(0, 3, 300)
    probe, near = linear_probe(features, labels), nearest_neighbours(features, labels)
    assert probe["interval"][0] < 0.4 and near["interval"][0] < 0.4


@pytest.mark.parametrize("measure", [linear_probe, nearest_neighbours])
def test_copies_of_an_example_do_not_answer_for_each_other(measure):
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 30)), random.integers(0, 2, 60)
    features, labels, groups = np.repeat(features, 4, axis=0), np.repeat(labels, 4), np.repeat(np.arange(60), 4)
    more = {"neighbours": 1} if measure is nearest_neighbours else {}
    assert measure(features, labels, **more)["accuracy"] > 0.85
    assert measure(features, labels, groups=groups, **more)["accuracy"] < 0.7


def test_neighbours_are_found_by_direction_and_no_example_votes_for_itself():
    angles = np.radians([0, 2, 4, 120, 122, 124, 240, 242, 244])
    lengths = np.array([1, 5, 2, 4, 1, 3, 2, 1, 6])[:, None]
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths
    labels = np.repeat([0, 1, 2], 3)
    assert nearest_neighbours(features, labels, neighbours=2)["accuracy"] == 1
    alone = np.arange(9)  # its own class is nobody else's
    assert nearest_neighbours(features, alone, neighbours=2)["accuracy"] == 0


def test_several_labels_are_answered_one_by_one():
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 10)).astype("float32")
    targets = (features[:, :4] + 0.3 * random.normal(size=(200, 4)) > 0).astype(int)
    probe, near = linear_probe(features, targets), nearest_neighbours(features, targets)
    assert probe["accuracy"] > 0.85 and near["accuracy"] > 0.6
    assert probe["correct"].shape == (200,) and set(np.unique(probe["correct"])) <= {0, 0.25, 0.5, 0.75, 1}
    assert np.isfinite(log_me(features, targets))


def test_every_fold_has_its_share_of_every_class_and_whole_groups():
    labels = np.repeat([0, 1, 2], [50, 30, 3])
    fold_of = fold_numbers(labels, 5)
    assert [np.bincount(fold_of[labels == label], minlength=5).tolist() for label in (0, 1)] == [[10] * 5, [6] * 5]
    groups = np.arange(83) // 2
    folds_of_groups = [set(fold_numbers(labels, 5, groups=groups)[groups == group]) for group in range(41)]
    assert all(len(folds) == 1 for folds in folds_of_groups)


def test_fewer_groups_than_folds():
    """Three voices make three folds; what is all of one group is taken apart, as nothing else could be held out."""
    labels, groups = np.tile([0, 1], 30), np.repeat([0, 1, 2], 20)
    fold_of = fold_numbers(labels, 5, groups=groups)
    assert sorted(set(fold_of)) == [0, 1, 2]
    assert all(len(set(fold_of[groups == group])) == 1 for group in range(3))
    assert sorted(set(fold_numbers(labels, 5, groups=np.zeros(60)))) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- LogME


def test_log_me_of_a_case_worked_by_hand():
    # One feature, F = (1, 0, 0), and y = (1, 0, 1). F'F = 1, z = F'y = 1, and 1 of |y|^2 = 2 lies outside.
    # With t = alpha / beta: gamma = 1 / (1 + t), |m|^2 = 1 / (1 + t)^2, residual = t^2 / (1 + t)^2 + 1.
    # alpha = gamma / |m|^2 = 1 + t, beta = (3 - gamma) / residual; t = alpha / beta is solved by t = 1:
    # alpha = 2, beta = (3 - 1/2) / (5/4) = 2. The evidence, with |A| = alpha + beta = 4:
    # 3/2 log(2 / 2 pi) + 1/2 log 2 - 2/2 * 5/4 - 2/2 * 1/4 - 1/2 log 4 = -3/2 log pi - 1/2 log 2 - 3/2.
    expected = (-1.5 * np.log(np.pi) - 0.5 * np.log(2) - 1.5) / 3
    assert log_me([[1.0], [0.0], [0.0]], [[1], [0], [1]]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("count", "size"), [(30, 5), (12, 40)])
def test_log_me_is_the_largest_evidence_that_a_search_finds(count, size):
    random = np.random.default_rng(0)
    features = random.normal(size=(count, size)) + 1
    labels = (features[:, :2].sum(axis=1) + random.normal(size=count) > 2).astype(int)

    def negative_evidence(logs, target):
        """Of y as one Gaussian: weights integrated out without any of the formulas above."""
        covariance = np.eye(count) / np.exp(logs[1]) + features @ features.T / np.exp(logs[0])
        return -stats.multivariate_normal.logpdf(target, np.zeros(count), covariance)

    best = [
        min(
            optimize.minimize(negative_evidence, start, (target,), method="Nelder-Mead").fun
            for start in ([0, 0], [2, 2], [3, 0])
        )
        for target in (labels == 0, labels == 1)
    ]
    assert log_me(features, labels) == pytest.approx(-np.mean(best) / count, abs=2e-3)


def test_log_me_prefers_features_that_tell_the_classes_apart():
    scores = [log_me(*made_features(shift=shift)) for shift in (0.0, 1.0, 3.0)]
    assert scores == sorted(scores) and scores[0] < scores[2]


# ---------------------------------------------------------------- intervals


def test_intervals_of_an_accuracy_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    intervals = [accuracy_interval(random.random(80) < 0.9) for _ in range(400)]
    assert 0.92 < np.mean([low <= 0.9 <= high for low, high in intervals]) <= 0.99
    assert accuracy_interval(np.ones(10))[0] < 0.8 and accuracy_interval(np.ones(10))[1] == pytest.approx(1)


def test_on_the_same_examples_a_small_difference_shows():
    right = np.random.default_rng(0).random(500) < 0.7
    better = right.copy()
    better[np.flatnonzero(~right)[:30]] = True
    gap = probes.paired_difference(better, right)
    assert gap["difference"] == pytest.approx(0.06) and gap["interval"][0] > 0.03
    # Apart, the two accuracies could not be told from each other.
    assert accuracy_interval(right)[1] > accuracy_interval(better)[0]
    same = probes.paired_difference(right, right)
    assert same["interval"][0] < 0 < same["interval"][1]
