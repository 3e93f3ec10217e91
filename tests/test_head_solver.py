"""The head by L-BFGS: the answers of scikit-learn's logistic regression, and a penalty chosen on validation."""

import numpy as np
import pytest
from scipy import special

from pipelines import head_solver
from pipelines.cache import FileRows, Rows
from pipelines.head_solver import solve_head


def made_problem(classes=4, multi_label=False, examples=400, size=20):
    random = np.random.default_rng(0)
    features = (random.normal(size=(examples, size)) * random.uniform(0.01, 30, size) + 5).astype("float32")
    kernel = random.normal(size=(size, classes))
    logits = (features - features.mean(axis=0)) / features.std(axis=0) @ kernel
    if multi_label:
        targets = (random.random(logits.shape) < special.expit(logits)).astype("float32")
    else:
        targets = np.eye(classes, dtype="float32")[(logits + 2 * random.gumbel(size=logits.shape)).argmax(axis=1)]
    weights = random.uniform(0.5, 2, examples).astype("float32")
    return features, targets, weights


def test_it_equals_scikit_learns_logistic_regression(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    features, targets, weights = made_problem()
    train, val = slice(0, 300), slice(300, 400)
    rows = (features[train], targets[train], weights[train], features[val], targets[val])
    _, early, stopped, _ = solve_head(*rows)
    monkeypatch.setattr(head_solver, "TOLERANCE", 1e-8)
    heads, path, best, _ = solve_head(*rows)
    kernel, bias = heads[best]
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    # scikit-learn weighs the sum of losses with C and leaves the penalty alone.
    share = weights[train] / weights[train].sum()
    reference = LogisticRegression(C=1 / path[best]["l2"], tol=1e-8, max_iter=10_000)
    reference.fit((features[train] - mean) / deviation, targets[train].argmax(axis=1), sample_weight=share)
    expected = reference.predict_proba((features[val] - mean) / deviation)
    found = special.softmax(features[val] @ kernel + bias, axis=1)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert path[best]["val_loss"] == pytest.approx(-np.log(found[targets[val] > 0]).mean(), rel=1e-4)
    # Where it stops by itself it is as good.
    assert early[stopped]["val_loss"] == pytest.approx(path[best]["val_loss"], rel=0.01)


@pytest.mark.parametrize("in_memory", [True, False])
def test_chunks_of_features_give_the_same_head(monkeypatch, tmp_path, in_memory):
    features, targets, weights = made_problem()
    rows = (features[:300], targets[:300], weights[:300], features[300:], targets[300:])
    expected = solve_head(*rows)
    monkeypatch.setattr(head_solver, "ROWS_AT_ONCE", 64)
    np.save(tmp_path / "features.npy", features)
    array = features if in_memory else FileRows(tmp_path / "features.npy")
    train, val = Rows(array, np.arange(300)), Rows(array, np.arange(300, 400))
    found = solve_head(train, *rows[1:3], val, rows[4])
    best = expected[2]
    assert found[2:] == expected[2:]
    (kernel, bias), (expected_kernel, expected_bias) = found[0][best], expected[0][best]
    np.testing.assert_allclose(features @ kernel + bias, features @ expected_kernel + expected_bias, atol=0.02)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_penalty_is_chosen_on_validation(multi_label):
    features, targets, weights = made_problem(multi_label=multi_label)
    rows = (features[:200], targets[:200], weights[:200], features[200:], targets[200:])
    _, path, best, simplest = solve_head(*rows, multi_label)
    losses = [step["val_loss"] for step in path]
    assert losses[best] == min(losses) and best < len(path) - 1
    assert 0 < simplest <= best and losses[simplest] < losses[best] + 0.1 and losses[simplest - 1] > losses[simplest]
    assert [step["loss"] for step in path] == sorted((step["loss"] for step in path), reverse=True)


def test_fine_tuning_starts_from_the_simplest_head_that_has_all_of_validation_right():
    random = np.random.default_rng(0)
    labels = np.arange(600) % 4
    features = (random.normal(size=(600, 16)) + 4 * np.eye(4, 16)[labels]).astype(np.float32)
    targets, weights = np.eye(4, dtype=np.float32)[labels], np.ones(300, np.float32)
    clear = np.sort(features[:, :4], axis=1)
    clear = np.flatnonzero((clear[:, -1] - clear[:, -2] > 2) & (features[:, :4].argmax(1) == labels))
    val = clear[clear >= 300]
    _, path, best, simplest = solve_head(features[:300], targets[:300], weights, features[val], targets[val])
    assert path[best]["val_accuracy"] == path[simplest]["val_accuracy"] == 1 and simplest < best
    assert all(step["val_accuracy"] < 1 for step in path[:simplest])
    assert path[simplest]["val_loss"] > 10 * path[best]["val_loss"]  # far beyond what loss alone would allow


def test_a_feature_that_never_changes_does_no_harm():
    features, targets, weights = made_problem()
    features[:, 3] = 7.0
    heads, path, best, _ = solve_head(
        features[:300], targets[:300], weights[:300], features[300:], targets[300:], label_smoothing=0.1
    )
    assert all(np.isfinite(part).all() for part in heads[best])
    assert path[best]["val_accuracy"] > 0.4  # four classes, noisy labels
