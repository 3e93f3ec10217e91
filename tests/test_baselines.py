"""The yardstick for texts: TF-IDF with logistic regression, on the run's own splits, scored as the run is."""

import csv

import numpy as np
import pytest

from pipelines.baselines import baseline_verdict, term_weights, tfidf_baseline
from pipelines.texts import find_texts, load_texts

WORDS = {"cats": ["purr", "whiskers", "kitten"], "dogs": ["bark", "leash", "puppy"], "cows": ["moo", "milk", "calf"]}


def made_splits(folder, labels_of=lambda label, number: label, second=False, classes=3):
    """Splits of sentences in which the class's own words stand among others; with `second`, in the second text only."""
    random = np.random.default_rng(0)
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "reply", "label"])
        for label, words in list(WORDS.items())[:classes]:
            for number in range(60):
                noise = " ".join(random.choice(["the", "a", "old", "new", "house", "tree"], 4))
                telling = f"{noise} {random.choice(words)} {number}"
                text, reply = (f"{noise} {label[0]} {number}", telling) if second else (telling, noise)
                writer.writerow([text, reply, labels_of(label, number)])
    return load_texts(find_texts(str(folder / "m.csv"), second_column="reply" if second else ""))


def test_topics_within_seconds_and_far_above_chance():
    baseline = tfidf_baseline(load_texts(find_texts("topics")))
    low, high = baseline["interval"]
    assert baseline["metric"] == "accuracy" and baseline["value"] == baseline["accuracy"]
    assert 0.6 < low < baseline["value"] < high < 0.8
    assert baseline["half_width"] == pytest.approx((high - low) / 2)
    assert baseline["name"] == "TF-IDF with logistic regression"


@pytest.mark.parametrize("classes", [2, 3])
def test_words_that_tell_the_class_are_learned(tmp_path, classes):
    baseline = tfidf_baseline(made_splits(tmp_path, classes=classes))
    assert baseline["accuracy"] > 0.95
    assert tfidf_baseline(made_splits(tmp_path, classes=classes)) == baseline


def test_the_second_text_of_a_pair_counts(tmp_path):
    splits = made_splits(tmp_path, second=True)
    assert tfidf_baseline(splits)["accuracy"] > 0.95
    alone = splits.train.drop_columns(["text_b"])
    assert term_weights([splits.train])[0].shape[1] > term_weights([alone])[0].shape[1]


def test_several_labels(tmp_path):
    splits = made_splits(tmp_path, lambda label, number: label if number % 3 else f"{label}|third")
    baseline = tfidf_baseline(splits)
    assert baseline["metric"] == "mean_average_precision" and baseline["accuracy"] is None
    assert baseline["value"] > 0.7  # three labels stand in the words, one in the numbers that no text shares


def test_texts_without_words(tmp_path):
    (tmp_path / "m.csv").write_text("text,label\n" + "".join(f"{'! ' * n},a\n{'? ' * n},b\n" for n in range(1, 21)))
    assert tfidf_baseline(load_texts(find_texts(str(tmp_path / "m.csv"))))["accuracy"] == 1.0


def test_the_verdict_names_the_gap():
    baseline = {"name": "TF-IDF", "metric": "accuracy", "value": 0.7}
    assert baseline_verdict({"metric": "accuracy", "value": 0.82}, baseline) == "+0.120 accuracy over TF-IDF (0.700)."
    worse = baseline_verdict({"metric": "accuracy", "value": 0.65}, baseline)
    assert worse == "TF-IDF does better on the same texts: accuracy 0.700 (+0.050)."
