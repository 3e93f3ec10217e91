"""How well transcripts are written: word and character error rates with intervals, and aligned differences."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000


def align(expected: list, found: list) -> list[tuple]:
    """The shortest edit of one sequence into another: (expected or None, found or None) pairs, in order.

    Levenshtein 1966; of equally short ones a substitution is preferred.
    """
    rows, columns = len(expected) + 1, len(found) + 1
    costs = np.zeros((rows, columns), np.int32)
    costs[:, 0], costs[0] = np.arange(rows), np.arange(columns)
    for row in range(1, rows):
        for column in range(1, columns):
            same = expected[row - 1] == found[column - 1]
            costs[row, column] = min(
                costs[row - 1, column - 1] + (not same), costs[row - 1, column] + 1, costs[row, column - 1] + 1
            )
    pairs, row, column = [], rows - 1, columns - 1
    while row or column:
        here = costs[row, column]
        if row and column and here == costs[row - 1, column - 1] + (expected[row - 1] != found[column - 1]):
            row, column = row - 1, column - 1
            pairs.append((expected[row], found[column]))
        elif row and here == costs[row - 1, column] + 1:
            row -= 1
            pairs.append((expected[row], None))
        else:
            column -= 1
            pairs.append((None, found[column]))
    return pairs[::-1]


def distance(expected, found) -> int:
    """Substitutions, deletions and insertions that turn one sequence into another."""
    costs = np.arange(len(found) + 1)
    for row, item in enumerate(expected, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(found, 1):
            before, costs[column] = (
                costs[column],
                min(before + (item != other), costs[column] + 1, costs[column - 1] + 1),
            )
    return int(costs[-1])


def error_rates(expected: list[str], found: list[str], seed: int = 0) -> dict:
    """Word and character error rate: errors over the length of what was said, all transcripts together.

    Returns:
        word_error_rate and character_error_rate, each with an interval (95%, bootstrap over transcripts), exact (the
        share of transcripts without an error), examples, words and characters (how many were said); headline: the one
        figure by which versions are compared, as `pipelines.evaluate.evaluate` gives it: more is better.
    """
    result = {"exact": float(np.mean([a == b for a, b in zip(expected, found, strict=True)])) if expected else 0.0}
    for name, split in (("word", str.split), ("character", list)):
        errors = np.array([distance(split(a), split(b)) for a, b in zip(expected, found)], np.float64)
        lengths = np.array([len(split(text)) for text in expected], np.float64)
        draws = np.random.default_rng(seed).integers(0, len(errors), (RESAMPLES, len(errors)))
        rates = errors[draws].sum(1) / np.maximum(lengths[draws].sum(1), 1)
        result[f"{name}_error_rate"] = float(errors.sum() / max(lengths.sum(), 1))
        result[f"{name}_interval"] = [float(bound) for bound in np.quantile(rates, [0.025, 0.975])]
        result[f"{name}s"] = int(lengths.sum())
    low, high = (1 - bound for bound in result["word_interval"][::-1])
    right = {"metric": "words_right", "value": 1 - result["word_error_rate"], "interval": [low, high]}
    return {**result, "examples": len(expected), "headline": {**right, "half_width": (high - low) / 2}}


def worst_transcripts(expected: list[str], found: list[str], confidence, most: int = 12) -> list[dict]:
    """The transcripts with most errors by character, aligned by word: index, errors, confidence, words.

    words: pairs of what was said and what was written, None where there is nothing.
    """
    errors = [distance(a, b) for a, b in zip(expected, found)]
    order = sorted(range(len(errors)), key=lambda index: (-errors[index], -confidence[index]))
    return [
        {
            "index": index,
            "errors": errors[index],
            "confidence": float(confidence[index]),
            "words": align(expected[index].split(), found[index].split()),
        }
        for index in order[:most]
        if errors[index]
    ]
