"""Copies across splits, wrong labels, and classes that a split lacks: planted, and found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from pipelines import label_checks, leakage
from pipelines.__main__ import main
from pipelines.data import Splits
from tests.conftest import write_png_folder


def table(ids, labels) -> pa.Table:
    texts = [f"text {identity}" for identity in ids]
    return pa.table({"id": list(ids), "text": texts, "label": list(labels), "group": list(ids)})


def splits_of(train, val, test, classes: int = 3) -> Splits:
    """Splits of (ids, labels)."""
    names = [f"class{index}" for index in range(classes)]
    return Splits(table(*train), table(*val), table(*test), names, "", 255, [], [])


def clusters(labels, seed: int = 0, size: int = 12) -> np.ndarray:
    """Features [n, size] of classes that overlap a little."""
    random = np.random.default_rng(seed)
    centres = 2.2 * np.random.default_rng(7).normal(0, 1, (labels.max() + 1, size))
    return (centres[labels] + random.normal(0, 1, (len(labels), size)) + 5).astype(np.float32)


def test_the_score_without_copies_is_told():
    splits = splits_of((["a", "b", "c"], [0, 1, 2]), (["d"], [0]), (["a", "d", "e", "f"], [0, 0, 1, 2]))
    logits = np.eye(3)[[0, 0, 1, 1]]  # both copies right, one of the others wrong
    figures = leakage.score_without_copies(splits, logits)
    assert figures == {"copies": 2, "accuracy": 0.75, "accuracy_without": 0.5}
    assert "Without the 2 test texts" in leakage.copies_warnings(figures, "text")[0]
    leakage.check_copies(splits, strict=False, noun="text")


def test_near_copies_are_found_with_the_split_that_holds_them():
    labels = np.arange(60) % 3
    ids = [f"{index:02}" for index in range(60)]
    splits = splits_of((ids[:30], labels[:30]), (ids[30:40], labels[30:40]), (ids[40:], labels[40:]))
    values = clusters(labels)
    noise = np.random.default_rng(1).normal(0, 0.02, (2, values.shape[1]))
    values[45], values[50] = values[5] + noise[0], values[33] + noise[1]

    def features(part):
        return values[[int(identity) for identity in part["id"].to_pylist()]]

    figures, pairs = leakage.near_copies(splits, features)
    found = {(pair["test"]["id"], pair["other"]["id"], pair["other"]["split"]) for pair in pairs}
    assert found >= {("45", "05", "train"), ("50", "33", "val")} and figures["count"] == len(pairs) <= 4
    assert pairs[0]["test"]["texts"][0]["text"].startswith("text ")
    hidden = leakage.near_copies(splits, features, report_inputs="none")[1]
    assert "texts" not in hidden[0]["test"]


def test_flipped_labels_come_first():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 600)
    given, flipped = true.copy(), random.choice(600, 30, replace=False)
    given[flipped] = (given[flipped] + random.integers(1, 5, 30)) % 5
    order, suspicious, probabilities = label_checks.rank_labels(clusters(true), given)
    assert np.isin(flipped, order[:60]).mean() >= 0.7
    assert 20 <= suspicious <= 60
    assert (probabilities[flipped].argmax(axis=1) == true[flipped]).mean() > 0.8


def test_a_class_that_a_split_lacks_and_a_rare_one_are_told():
    train = [f"t{index}" for index in range(33)], [0] * 30 + [1] * 2 + [2]
    splits = splits_of(train, (["a", "b"], [0, 2]), (["c", "d", "e"], [0, 1, 2]))
    missing, uneven = label_checks.class_warnings(splits, "text")
    assert "Class class1 has no validation texts: when to stop" in missing
    assert "class0 has 30 times as many training texts as class2" in uneven


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A data set with given splits: 4 of its test pictures are in train too, one class is missing from val."""
    folder = tmp_path_factory.mktemp("planted")
    for seed, (name, count) in enumerate((("train", 20), ("val", 6), ("test", 6))):
        write_png_folder(folder / name, per_class=count, seed=seed)
    shutil.rmtree(folder / "val" / "class2")
    for index in range(4):
        picture = folder / "train" / "class0" / f"{index:03}.png"
        shutil.copy(picture, folder / "test" / "class0" / f"copy{index}.png")
    return folder


def test_strict_stops_before_training_where_test_examples_are_trained_on(planted, tiny_preset, tmp_path, capsys):
    words = ["image", "--data", planted, "--backbone", tiny_preset, "--out", tmp_path / "run", "--strict"]
    assert main([str(word) for word in words]) == 3
    assert "--strict: 4 of 22 images of the given test set are in train or val too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_reports_what_was_planted(planted, tiny_preset, tmp_path):
    out = tmp_path / "run"
    words = ["image", "--data", planted, "--backbone", tiny_preset, "--out", out, "--depth", "head", "--check-labels"]
    assert main([str(word) for word in words]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["exact_copies"]["copies"] == 4
    said = " ".join(metrics["warnings"])
    assert "Without the 4 test images" in said and "class2 has no validation images" in said
    assert metrics["near_copies"]["tested"] == 18 and metrics["label_check"]["examples"] == 94
    assert "Labels to look at" in (out / "report.html").read_text()
