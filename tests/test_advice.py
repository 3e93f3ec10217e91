"""Advice: the rule of thumb by default, the probes where they say otherwise, and words that follow the figures."""

import re

import pytest

from pipelines.advice import advice, recommended_depth, run_advice


@pytest.mark.parametrize(
    ("examples", "depth"), [(300, "head"), (1_999, "head"), (2_000, "light"), (19_999, "light"), (20_000, "full")]
)
def test_without_evidence_the_number_of_examples_decides(examples, depth):
    assert recommended_depth(examples)[0] == depth


@pytest.mark.parametrize(
    ("examples", "probe", "raw", "depth"),
    [
        (500, 0.90, 0.60, "head"),  # near: the rule of thumb holds
        (500, 0.90, 0.95, "light"),  # features lose to raw input: they have to change
        (5_000, 0.90, 0.95, "full"),
        (50_000, 0.90, 0.95, "full"),
        (5_000, 0.98, 0.60, "head"),  # nothing left to win
        (5_000, 0.80, 0.60, "light"),
        (5_000, 0.80, None, "light"),
    ],
)
def test_the_probe_moves_it(examples, probe, raw, depth):
    assert recommended_depth(examples, probe, raw)[0] == depth


def test_the_paragraph_says_what_is_known_and_nothing_else():
    bare = advice("image", [40, 45, 50])
    assert "135 training images in 3 classes (40 to 50 each: well balanced)" in bare
    assert "--depth head" in bare and "probe" not in bare
    full = advice("image", [40, 45, 50], probe=0.9, neighbours=0.89, raw=0.5)
    assert "90.0%" in full and "50.0%" in full and "89.0%" in full
    assert "domain is near" in full and "lie apart without any learning" in full


@pytest.mark.parametrize(
    ("probe", "raw", "words"), [(0.9, 0.5, "is near"), (0.6, 0.5, "some way off"), (0.9, 0.95, "is far")]
)
def test_how_near_the_domain_is(probe, raw, words):
    assert words in advice("text", [100, 100], probe=probe, raw=raw)


@pytest.mark.parametrize(
    ("counts", "words", "weights"),
    [([50, 60], "well balanced", False), ([20, 60], "somewhat uneven", False), ([10, 200], "uneven", True)],
)
def test_how_balanced(counts, words, weights):
    paragraph = advice("image", counts)
    assert words in paragraph and ("--class-weights balanced" in paragraph) == weights


def test_augmentation_is_of_images_and_of_deeper_phases():
    few, many = [50] * 60, [3_000] * 4
    assert "rand-augment" in advice("image", few, probe=0.8)  # 3,000 examples: light, few of each class
    assert "--augmentation none" in advice("image", many)
    assert "no part while only the head trains" in advice("image", [100, 100])
    assert "ugmentation" not in advice("text", few)


def test_a_runs_head_is_its_probe():
    history = [{"val_accuracy": 0.5}, {"val_accuracy": 0.8}, {"val_accuracy": 0.7}]
    head = {"history": history, "best_epoch": 2, "test": {"accuracy": 0.75}}
    run = {"kind": "text", "class_counts": {"train": [50, 60]}, "examples": {"train": 110}, "phases": [head]}
    assert "80.0%" in run_advice(run) and "words" not in run_advice(run)
    # Where words alone were scored, on the test set, both figures are from there.
    beside = run_advice({**run, "baselines": [{"name": "TF-IDF", "accuracy": 0.85}]})
    assert "75.0%" in beside and "bare words 85.0%" in beside and "far from this one" in beside
    # The verdict on transfer, where there is one, goes before: its probes saw the same examples.
    probes = {"pretrained": {"accuracy": 0.9}, "raw": {"accuracy": 0.5}}
    judged = run_advice({**run, "baselines": [{"name": "TF-IDF", "accuracy": 0.85}], "transfer": {"probes": probes}})
    assert "90.0%" in judged and "50.0%" in judged and "is near" in judged
    several = run_advice({**run, "thresholds": [0.5, 0.5], "examples": {"train": 90}})
    assert "90 training texts" in several and "probe" not in several


def test_every_flag_it_names_is_one():
    from pipelines.config import parse_config

    paragraphs = [
        advice(kind, counts, probe, raw=raw)
        for kind in ("image", "text")
        for counts in ([5, 100], [50] * 60, [9_000] * 4)
        for probe, raw in ((None, None), (0.9, 0.95), (0.99, 0.5), (0.7, 0.6))
    ]
    flags = {found for text in paragraphs for found in re.findall(r"`(--[a-z-]+ [a-z0-9-]+)`", text)}
    assert len(flags) >= 5
    for flag in flags:
        assert parse_config(flag.split())


def test_what_is_unlike_photographs_is_not_mirrored():
    assert "--augmentation crop" in advice("image", [111] * 10, probe=0.89, raw=0.94)
    assert "--augmentation crop" not in advice("image", [111] * 10, probe=0.94, raw=0.89)
