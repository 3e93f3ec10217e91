"""Overfitting: the gap, its limit, and one sentence of advice that follows the curves."""

import types

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import flat_config
from pipelines.options import ImageConfig, TextConfig
from pipelines.overfitting import difference, gap_warnings, judge_gap, tuning_advice


def judged(train_right, val_right, limit=0.1, examples=200):
    """The gap of a model that has such shares right."""

    def table(count, start):
        ids = [f"{start + row:04}" for row in range(count)]
        return pa.table({"id": ids, "label": np.zeros(count, int), "group": ids})

    splits = types.SimpleNamespace(
        train=table(examples, 0), val=table(100, 5000), class_names=["a", "b"], multi_label=False
    )

    def logits(count, share):
        wrong = np.arange(count) >= round(share * count)
        return np.eye(2, dtype=np.float32)[wrong.astype(int)]

    return judge_gap(splits, lambda asked: logits(asked.num_rows, train_right), logits(100, val_right), limit)


def test_the_gap_is_in_points_and_its_limit_is_told():
    figures = judged(1.0, 0.8)
    assert figures["gap"] == pytest.approx(20) and figures["passed"]
    low, high = figures["interval"]
    assert low < 20 < high
    (warning,) = gap_warnings(figures, "Do this.")
    assert "a gap of 20.0 points" in warning and "beyond --gap-limit 0.1. Do this." in warning
    assert not judged(0.85, 0.8)["passed"] and gap_warnings(judged(0.85, 0.8), "") == []
    assert not judged(1.0, 0.5, limit=0)["passed"]


def test_no_more_than_the_first_500_are_asked():
    assert judged(1.0, 0.9, examples=900)["examples"] == 500


def test_the_interval_is_that_of_the_paper():
    # Agresti and Caffo 2000: (x + 1) / (n + 2) on both sides.
    found = difference(np.ones(8), np.zeros(8))
    half = 1.95996 * 0.134164  # of 9 in 10 and 1 in 10
    assert found["interval"] == pytest.approx([100 * (0.8 - half), 100 * (0.8 + half)], abs=1e-2)


def phase(name="light", epochs=4, best_epoch=2, kept=True, **more):
    return {"name": name, "epochs": epochs, "best_epoch": best_epoch, "kept": kept, **more}


HEAD = phase("head", 9, 3, solver="lbfgs", history=[{"l2": 1.0}, {"l2": 0.3}, {"l2": 0.1}])


@pytest.mark.parametrize(
    ("phases", "gap", "words"),
    [
        ([HEAD, phase()], False, "can stay as they are"),
        ([HEAD, phase(best_epoch=4)], False, "`--fine-tune-epochs 8`"),
        ([HEAD, phase(best_epoch=1)], False, "`--fine-tune-learning-rate 0.0001`"),
        ([HEAD, phase(best_epoch=4)], True, "`--augmentation rand-augment`, `--dropout 0.5`, `--label-smoothing 0.1`"),
        ([HEAD], False, "penalty (0.1) was chosen on validation"),
        ([HEAD, phase(kept=False)], False, "so a lower rate (`--fine-tune-learning-rate 0.0001`) is worth one try"),
        ([HEAD], True, "graft curve"),
        ([phase("head", 8, 8)], False, "`--head-epochs 16`"),
    ],
)
def test_one_sentence_says_what_to_change(phases, gap, words):
    figures = judged(1.0, 0.5) if gap else judged(0.9, 0.9)
    said = tuning_advice(phases, flat_config(ImageConfig()), figures)
    assert words in said and said.count(". ") == 0 and said.endswith(".")


def test_texts_are_not_told_to_augment():
    said = tuning_advice([HEAD, phase()], flat_config(TextConfig()), judged(1.0, 0.5), "text")
    assert "augment" not in said and "`--weight-decay 0.1`" in said
