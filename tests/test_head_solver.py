"""The head by L-BFGS: the answers of scikit-learn's logistic regression, and a penalty chosen on validation."""

import numpy as np
import pytest
from scipy import special

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


def test_it_equals_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    features, targets, weights = made_problem()
    train, val = slice(0, 300), slice(300, 400)
    kernel, bias, path, best = solve_head(features[train], targets[train], weights[train], features[val], targets[val])
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    # scikit-learn weighs the sum of losses with C and leaves the penalty alone.
    share = weights[train] / weights[train].sum()
    reference = LogisticRegression(C=1 / path[best]["l2"], tol=1e-8, max_iter=10_000)
    reference.fit((features[train] - mean) / deviation, targets[train].argmax(axis=1), sample_weight=share)
    expected = reference.predict_proba((features[val] - mean) / deviation)
    found = special.softmax(features[val] @ kernel + bias, axis=1)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert path[best]["val_loss"] == pytest.approx(-np.log(found[targets[val] > 0]).mean(), rel=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_penalty_is_chosen_on_validation(multi_label):
    features, targets, weights = made_problem(multi_label=multi_label)
    path, best = solve_head(features[:200], targets[:200], weights[:200], features[200:], targets[200:], multi_label)[
        2:
    ]
    losses = [step["val_loss"] for step in path]
    lowest = losses.index(min(losses))
    assert 0 < best <= lowest < len(path) - 1 and losses[best] < losses[lowest] + 0.1
    assert losses[best - 1] > losses[best]
    assert [step["loss"] for step in path] == sorted((step["loss"] for step in path), reverse=True)


def test_a_feature_that_never_changes_does_no_harm():
    features, targets, weights = made_problem()
    features[:, 3] = 7.0
    kernel, bias, path, best = solve_head(
        features[:300], targets[:300], weights[:300], features[300:], targets[300:], label_smoothing=0.1
    )
    assert np.isfinite(kernel).all() and np.isfinite(bias).all()
    assert path[best]["val_accuracy"] > 0.4  # four classes, noisy labels
