"""Test examples that were trained on, so that the score is too good: exact copies, and near ones by their features."""

from __future__ import annotations

import numpy as np

from models import GraftError
from pipelines.mistakes import with_input

SIMILAR = 0.97  # cosine of centred features from which two examples are near copies
MOST_LEARNED, MOST_TESTED = 5_000, 2_000  # examples that are compared: 10 million pairs, well under a second
AT_ONCE = 500  # rows of the test set
SHOWN_PAIRS = 12


def copied(splits) -> np.ndarray:
    """Whether each test example [n] is in train or val too, by content."""
    known = set(splits.train["id"].to_pylist()) | set(splits.val["id"].to_pylist())
    return np.array([identity in known for identity in splits.test["id"].to_pylist()], bool)


def check_copies(splits, strict: bool, noun: str = "image") -> None:
    """Raise GraftError, with exit code 3, for test examples that are trained on, where --strict was given."""
    count = int(copied(splits).sum())
    if strict and count:
        error = GraftError(
            f"--strict: {count} of {splits.test.num_rows:,} {noun}s of the given test set are in train or val too, so "
            f"that its score would be too good. Take them out of one, or give no split: Graft keeps copies together."
        )
        error.exit_code = 3
        raise error


def score_without_copies(splits, logits) -> dict:
    """Accuracy with and without the test examples that are in train or val too; copies 0 where there are none.

    logits: [n, classes] of the test set. Of several labels, and where nothing would be left, there are no accuracies.
    """
    copy = copied(splits)
    figures = {"copies": int(copy.sum())}
    if copy.any() and not copy.all() and not splits.multi_label:
        right = logits.argmax(axis=1) == splits.test["label"].to_numpy()
        figures |= {"accuracy": float(right.mean()), "accuracy_without": float(right[~copy].mean())}
    return figures


def copies_warnings(figures: dict, noun: str = "image") -> list[str]:
    """The score without copies, in words; nothing where there are none."""
    if "accuracy_without" not in figures:
        return []
    return [
        f"Without the {figures['copies']} test {noun}s that are in train or val too, accuracy is "
        f"{figures['accuracy_without']:.3f}; with them {figures['accuracy']:.3f}."
    ]


def exact_pairs(splits, report_inputs: str = "all") -> list[dict]:
    """Test examples that are in train or val too, for the report: at most SHOWN_PAIRS of test and other, as `shown`."""
    known = {}
    for name, table in (("train", splits.train), ("val", splits.val)):
        for row, identity in enumerate(table["id"].to_pylist()):
            known.setdefault(identity, (name, table, row))
    pairs = []
    for row in np.flatnonzero(copied(splits))[:SHOWN_PAIRS]:
        test = splits.test.slice(int(row), 1).to_pylist()[0]
        name, table, other = known[test["id"]]
        example = table.slice(other, 1).to_pylist()[0]
        pairs.append(
            {
                "test": shown(test, "test", splits, report_inputs),
                "other": shown(example, name, splits, report_inputs),
            }
        )
    return pairs


def near_copies(splits, features, report_inputs: str = "all") -> tuple[dict, list[dict]]:
    """Pairs of a test example and one of train or val that differ little: resized, encoded anew, other punctuation.

    What is near is judged by the cosine of the backbone's pooled features, centred on the mean of train. Exact copies
    are not among them.

    Args:
        splits: `pipelines.data.Splits`; of large sets the first MOST_LEARNED and MOST_TESTED by content hash count.
        features: a function of a table -> pooled features, an array or `pipelines.cache.Rows` [n, d].
        report_inputs: "all" to show pictures and texts, "none" for ids only.

    Returns:
        count, threshold and tested (examples compared) for metrics.json; and for the report the most similar pairs, at
        most SHOWN_PAIRS: similarity, and test and other as `shown` gives them.
    """
    tables = {"train": splits.train.slice(0, MOST_LEARNED)}
    tables["val"] = splits.val.slice(0, MOST_LEARNED - tables["train"].num_rows)
    candidates = np.flatnonzero(~copied(splits))[:MOST_TESTED]
    result = {"count": 0, "threshold": SIMILAR, "tested": len(candidates)}
    pairs = []
    if not len(candidates):
        return result, pairs
    known = [np.asarray(features(table)[:], np.float32) for table in tables.values() if table.num_rows]
    mean = known[0].mean(axis=0)
    known = unit(np.concatenate(known) - mean)
    tested = unit(np.asarray(features(splits.test.take(candidates))[:], np.float32) - mean)
    nearest, similarity = np.zeros(len(tested), int), np.zeros(len(tested), np.float32)
    for start in range(0, len(tested), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        cosines = tested[part] @ known.T
        nearest[part], similarity[part] = cosines.argmax(axis=1), cosines.max(axis=1)
    order = np.argsort(-similarity, kind="stable")
    order = order[similarity[order] >= SIMILAR]
    result["count"] = len(order)
    for row in order[:SHOWN_PAIRS]:
        place, other = int(nearest[row]), "train"
        if place >= tables["train"].num_rows:
            place, other = place - tables["train"].num_rows, "val"
        pair = {"similarity": float(similarity[row])}
        for key, name, table, index in (
            ("test", "test", splits.test, int(candidates[row])),
            ("other", other, tables[other], place),
        ):
            pair[key] = shown(table.slice(index, 1).to_pylist()[0], name, splits, report_inputs)
        pairs.append(pair)
    return result, pairs


def unit(features: np.ndarray) -> np.ndarray:
    """Rows [n, d] of length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def shown(example: dict, split: str, splits, report_inputs: str) -> dict:
    """An example for the report, as `pipelines.mistakes.with_input` gives it, with its split and class."""
    labels = example["label"] if isinstance(example["label"], list) else [example["label"]]
    facts = {"split": split, "class": "|".join(splits.class_names[label] for label in labels)}
    return with_input(example, facts, splits.white_level, report_inputs)


def near_warnings(figures: dict, noun: str = "image") -> list[str]:
    """What near copies mean, in words; nothing where there are none."""
    if not figures["count"]:
        return []
    return [
        f"{figures['count']} of {figures['tested']:,} test {noun}s are much like one of train or val (the report shows "
        f"them): if they are copies, the score is too good. A column `group` in a manifest keeps such {noun}s together."
    ]
