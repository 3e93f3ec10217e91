"""Forgetting: CKA and neighbours against worked cases and scikit-learn; a limit that holds; averaged weights."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from sklearn.neighbors import NearestNeighbors

from models import GraftError
from models.classifier import Classifier
from pipelines import guards, ladder, training
from pipelines.config import parse_config
from pipelines.data import image_loader, load_images, targets_of
from pipelines.sources import find_images
from pipelines.steps import mean_loss_and_accuracy
from tests.conftest import tiny_backbone
from tests.test_report import make_facts, page_of, phase
from tests.test_training import make_config


@pytest.fixture(scope="module")
def splits(png_folder):
    return load_images(find_images(str(png_folder)))


def trained(splits, strategy=None, **options):
    """A tiny model after both phases, its phases, its weights after each of them, and table -> logits."""
    strategy = strategy or tf.distribute.get_strategy()
    options = {"optimizer": "sgd", "fine_tune_learning_rate": 0.5, "cache": "memory", "head_solver": "sgd"} | options
    with strategy.scope():
        backbone = tiny_backbone()
        random = np.random.default_rng(0)
        backbone.source_head = random.normal(size=(8, 5)).astype("float32"), np.zeros(5, "float32")
        model = Classifier(backbone, len(splits.class_names), dropout=0.0, seed=1)
    weights = []

    def loader(augmentation, random_erasing=0.0):
        return image_loader(backbone.preprocess, splits.white_level, augmentation, random_erasing)

    def on_end(phase, logits_of):
        weights.append([weight.numpy() for weight in model.weights])

    config = make_config(**options)
    phases, logits_of = training.fit_two_phase(model, splits, loader, config, strategy, on_end=on_end)
    return model, phases, weights, logits_of


@pytest.fixture(scope="module")
def without_limit(splits):
    return trained(splits)


# ---------------------------------------------------------------- the measures


def test_cka_is_one_for_the_same_features_turned_and_stretched_and_near_zero_for_unrelated_ones():
    random = np.random.default_rng(0)
    features = random.normal(size=(128, 1280)) * random.uniform(0.1, 3, size=1280) + 5
    rotation, _ = np.linalg.qr(random.normal(size=(1280, 1280)))
    assert guards.linear_cka(features, features) == pytest.approx(1)
    assert guards.linear_cka(features, features @ rotation) == pytest.approx(1)
    assert guards.linear_cka(features, 0.01 * features[:, ::-1] - 3) == pytest.approx(1)
    unrelated = [guards.linear_cka(features, random.normal(size=(128, size))) for size in (8, 200, 1280)]
    assert np.abs(unrelated).max() < 0.1, unrelated
    half = guards.linear_cka(features, np.hstack([features, 3 * random.normal(size=(128, 1280))]))
    assert 0.1 < half < 0.9
    assert guards.linear_cka(np.ones((128, 8)), features) == 0


def test_cka_is_the_u_statistic_worked_out_over_all_fours():
    random = np.random.default_rng(1)
    features, others = random.normal(size=(7, 3)), random.normal(size=(7, 4))
    others[:, 0] = features[:, 0]

    def hsic(one, other):
        """Song et al. 2012, before it is simplified: the mean over all four different examples."""
        fours = itertools.permutations(range(7), 4)
        return np.mean([one[a, b] * (other[a, b] + other[c, d] - 2 * other[a, c]) for a, b, c, d in fours])

    one, other = features @ features.T, others @ others.T
    expected = hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))
    assert guards.linear_cka(features, others) == pytest.approx(expected)


def test_neighbour_overlap_is_that_of_scikit_learn():
    random = np.random.default_rng(2)
    features = random.normal(size=(100, 16)) + 1000
    others = features + random.normal(size=(100, 16))

    def nearest(values):
        return NearestNeighbors(n_neighbors=10).fit(values).kneighbors(return_distance=False)

    pairs = zip(nearest(features), nearest(others))
    expected = np.mean([len(set(one) & set(other)) / 10 for one, other in pairs])
    assert 0.2 < expected < 0.8
    assert guards.neighbour_overlap(features, others) == pytest.approx(expected)
    assert guards.neighbour_overlap(features, 7 * features) == 1
    assert guards.neighbour_overlap(features[:4], others[:4]) == 1  # all others, where there are so few


# ---------------------------------------------------------------- a phase that is watched


def test_every_epoch_of_phase_2_says_how_far_the_backbone_is(without_limit, splits):
    model, phases, weights, _ = without_limit
    assert not any("cka" in row for row in phases[0]["history"])
    rows = phases[1]["history"]
    assert len(rows) == 3 and phases[1]["forgot"] is False
    assert [row["cka"] for row in rows] == sorted((row["cka"] for row in rows), reverse=True)
    assert all(0 <= row[name] <= 1 for row in rows for name in ("neighbour_overlap", "source_agreement"))
    assert rows[-1]["cka"] < 0.999 and set(rows[-1]["weight_distance"]) == {"block1", "block2"}
    # The last epoch by hand, where its weights were kept: all that the head saw, through the whole model.
    kept = rows[phases[1]["best_epoch"] - 1]
    table = splits.train.take(np.argsort(splits.train["id"].to_numpy()))
    load = image_loader(model.backbone.preprocess, splits.white_level)
    batches = training.Feeds(model, splits, splits.train, lambda *_: load, make_config(), tf.distribute.get_strategy())
    inputs = [(inputs, rows.numpy() >= 0) for inputs, _, _, rows in batches.whole().batches(table)]

    def features(values):
        model.set_weights(values)
        return np.concatenate([model.features(images).numpy()[real] for images, real in inputs])

    before, after = features(weights[0]), features(weights[1])
    kernel, bias = model.backbone.source_head
    same = (after @ kernel + bias).argmax(1) == (before @ kernel + bias).argmax(1)
    assert kept["cka"] == pytest.approx(guards.linear_cka(before, after), abs=1e-4)
    assert kept["source_agreement"] == pytest.approx(same.mean(), abs=0.05)
    ends = {}
    for end, values in zip(("before", "after"), weights):
        model.set_weights(values)
        ends[end] = np.concatenate([weight.numpy().ravel() for weight in model.blocks[2].layers[0].weights])
    way = np.linalg.norm(ends["after"] - ends["before"]) / np.linalg.norm(ends["before"])
    assert kept["weight_distance"]["block2"] == pytest.approx(way, rel=1e-3)


def test_a_limit_ends_the_phase_and_keeps_the_best_weights_within_it(without_limit, splits):
    first, second = (row["cka"] for row in without_limit[1][1]["history"][:2])
    _, phases, _, _ = trained(splits, forgetting_limit=(first + second) / 2)
    stopped = phases[1]
    assert stopped["forgot"] and stopped["epochs"] == 2 and stopped["best_epoch"] == 1 and stopped["kept"]
    assert stopped["history"][1]["val_loss"] < stopped["val_loss"]  # it would have been better, and is not taken
    assert guards.verdicts(phases, 0.9)[0].startswith("Fine-tuning the top 2 blocks was stopped in epoch 2: linear CKA")
    assert guards.story(phases, 0.9)["kept"]["cka"] == pytest.approx(first, abs=1e-5)


def test_where_even_the_first_epoch_is_beyond_it_the_head_is_kept_and_nothing_deeper_is_tried(splits):
    model, phases, weights, _ = trained(splits, forgetting_limit=1.0, depth="auto", wise_ft=True)
    assert [phase["name"] for phase in phases] == ["head", "light"]
    assert phases[1]["forgot"] and phases[1]["epochs"] == 1 and not phases[1]["kept"]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(weights[0], model.weights))
    assert phases[1]["climb"]["because"] == "training the top 2 blocks went beyond --forgetting-limit"
    assert guards.story(phases, 1.0)["sentence"].startswith("Yes: the head alone was kept")


def test_too_few_examples_are_not_compared(splits):
    few = splits.train.slice(0, guards.LEAST_EXAMPLES - 1)
    guard = guards.ForgettingGuard(Classifier(tiny_backbone(), 3), few, limit=1.0)
    assert guard() == ({}, False)


def test_a_limit_that_is_none_is_named():
    with pytest.raises(GraftError, match="--forgetting-limit is 2.0, expected from 0 to 1"):
        parse_config(["--forgetting-limit", "2"])


# ---------------------------------------------------------------- weights averaged


def test_the_average_that_does_best_on_validation_is_kept(without_limit, splits):
    _, _, (head, fine_tuned), _ = without_limit
    model, phases, _, logits_of = trained(splits, wise_ft=True)
    found = phases[1]["wise_ft"]
    assert [row["share"] for row in found["table"]] == pytest.approx(np.arange(11) / 10)
    for end, values in ((0, head), (-1, fine_tuned)):
        model_at_end = [weight.numpy() for weight in model.weights]
        model.set_weights(values)
        loss, accuracy = figures(splits, logits_of)
        assert found["table"][end]["val_loss"] == pytest.approx(loss, abs=1e-5)
        assert found["table"][end]["val_accuracy"] == pytest.approx(accuracy)
        model.set_weights(model_at_end)
    best = min(found["table"], key=lambda row: row["val_loss"])
    assert found["share"] == best["share"]
    assert figures(splits, logits_of) == pytest.approx((best["val_loss"], best["val_accuracy"]), abs=1e-5)
    for weight, start, end in zip(model.weights, head, fine_tuned):
        np.testing.assert_allclose(weight, (1 - best["share"]) * start + best["share"] * end, atol=1e-6)
    assert found["table"][0]["cka"] == pytest.approx(1) and found["kept"]["cka"] == pytest.approx(best["cka"])


def figures(splits, logits_of):
    targets = targets_of(splits.val, len(splits.class_names))
    return mean_loss_and_accuracy(targets, logits_of(splits.val), multi_label=False)


@pytest.mark.slow
def test_two_replicas_and_no_cache_give_the_same_figures(splits, mirrored, without_limit):
    for options in ({"cache": "none"}, {"strategy": mirrored}):
        _, phases, _, _ = trained(splits, wise_ft="strategy" in options, **options)
        rows = zip(phases[1]["history"], without_limit[1][1]["history"], strict=True)
        assert all(one["cka"] == pytest.approx(other["cka"], abs=1e-3) for one, other in rows)
    assert len(phases[1]["wise_ft"]["table"]) == 11


# ---------------------------------------------------------------- what people read


def watched_phase(**more):
    fine_tuned = {**phase("fine_tune", 2), "forgot": False, **more}
    for number, row in enumerate(fine_tuned["history"], start=1):
        row |= {"cka": 1 - 0.2 * number, "neighbour_overlap": 0.75, "source_agreement": 0.5}
        row["weight_distance"] = {"block4": 0.011, "block5": 0.022 * number}
    return fine_tuned


def test_the_report_says_whether_it_is_still_what_it_was(tmp_path):
    table = [{"share": share, "val_loss": 0.5 - share / 10, "val_accuracy": 0.8, "cka": 0.9, "passed": False}
             for share in (0.0, 0.5, 1.0)]  # fmt: skip
    kept = {"cka": 0.9, "neighbour_overlap": 0.8, "source_agreement": 0.71}
    fine_tuned = watched_phase(wise_ft={"share": 0.5, "kept": kept, "table": table})
    phases = [phase("head", 3), fine_tuned]
    text = page_of(tmp_path, make_facts(phases=phases, forgetting=guards.story(phases, 0.0))).text
    for words in (
        "Is it still what it was", "Nearly: linear CKA to the pretrained features is 0.90, 80% of the nearest",
        "original classifier would answer 71% of them as before", "0.800", "0.600", "block5 4.4%", "WiSE-FT", "0.450",
    ):  # fmt: skip
        assert words in text, words
    assert "Is it still" not in page_of(tmp_path, make_facts(forgetting={})).text


def test_it_says_where_a_phase_was_stopped(tmp_path):
    stopped = watched_phase(forgot=True, best_epoch=1)
    stopped["history"][-1]["cka"] = 0.31
    phases = [phase("head", 3), stopped]
    text = page_of(tmp_path, make_facts(phases=phases, forgetting=guards.story(phases, 0.5))).text
    assert "beyond the limit of 0.5: stopped" in text and "Nearly" not in text
    assert guards.story([phase("head", 3)], 0.5) == {}
    assert ladder.best_phase(phases) is stopped
    assert "fell to 0.31 (limit 0.5)" in guards.verdicts(phases, 0.5)[0]
