"""Labels that look wrong, classes that are rare, and classes that validation or test lack."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipelines.console import console
from pipelines.leakage import near_copies, shown
from pipelines.probes import linear_probe

MOST_CHECKED = 10_000  # examples, the first by content hash: the probe takes a minute or two then
SHOWN_LABELS = 12
UNEVEN = 10  # largest class over smallest from which it is said


def class_warnings(splits, noun: str = "image") -> list[str]:
    """What follows from classes that validation or test lack, and from very uneven ones."""
    from pipelines.data import targets_of

    counts = [targets_of(table, len(splits.class_names)).sum(axis=0) for table in splits]
    warnings = []
    for name, table, follows in (
        (
            "validation",
            counts[1],
            "when to stop, how deep to go, the temperature and any threshold are chosen blind to it, and it may be "
            "lost without a sign",
        ),
        ("test", counts[2], "no figure of this page says how well it is found"),
    ):
        missing = [splits.class_names[index] for index in np.flatnonzero(table == 0)]
        if missing:
            warnings.append(
                f"{'Class' if len(missing) == 1 else 'Classes'} {', '.join(missing[:10])}"
                f"{' and others' if len(missing) > 10 else ''} {'has' if len(missing) == 1 else 'have'} no {name} "
                f"{noun}s: {follows}."
            )
    largest, smallest = int(counts[0].argmax()), int(counts[0].argmin())
    ratio = counts[0][largest] / max(counts[0][smallest], 1)
    if ratio >= UNEVEN:
        advice = "" if splits.multi_label else " `--class-weights balanced` makes each class weigh the same."
        warnings.append(
            f"Class {splits.class_names[largest]} has {ratio:.0f} times as many training {noun}s as "
            f"{splits.class_names[smallest]} ({counts[0][largest]:.0f} and {counts[0][smallest]:.0f}): accuracy hardly "
            f"shows how rare classes do, the class-by-class table does.{advice}"
        )
    return warnings


def examiner(splits, config) -> tuple[dict, Callable]:
    """A dict of what is found among the examples, and the function that fills it from their features.

    config: `pipelines.options.ImageConfig` or its like. The function takes features as `near_copies` does. Filled in:
    near_copies and near_pairs, with --check-labels also label_check and doubtful_labels, the figures and the examples
    that the two functions give.
    """
    found = {}

    def examine(features) -> None:
        shows = config.report.report_inputs
        found["near_copies"], found["near_pairs"] = near_copies(splits, features, shows)
        if config.guards.check_labels:
            checked = check_labels(splits, features, shows, config.training.seed)
            found["label_check"], found["doubtful_labels"] = checked

    return found, examine


def check_labels(splits, features, report_inputs: str = "all", seed: int = 0) -> tuple[dict, list[dict]]:
    """Examples whose label a model that has not seen them would not give.

    A linear probe on the backbone's features answers each example of all splits out of fold. By confident learning
    (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", section 3.1) a
    label is suspicious where another class is likelier than the given one and as likely as for that class's own
    examples on average. Most suspicious first: the smallest probability of the label less the largest of another.

    Args:
        splits, features, report_inputs: as for `pipelines.leakage.near_copies`; one label each.

    Returns:
        examples, suspicious (how many) and seconds for metrics.json; and for the report the most suspicious, at most
        SHOWN_LABELS: suggested, probability and suggested_probability, and what `pipelines.leakage.shown` gives.
    """
    started = time.perf_counter()
    tables = dict(zip(("train", "val", "test"), splits))
    everything = pa.concat_tables(tables.values()).slice(0, MOST_CHECKED)
    names = np.repeat(list(tables), [table.num_rows for table in splits])
    inputs = np.concatenate([np.asarray(features(table)[:], np.float32) for table in splits])[:MOST_CHECKED]
    labels = everything["label"].to_numpy()
    order, suspicious, probabilities = rank_labels(inputs, labels, everything["group"].to_numpy(), seed)
    seconds = time.perf_counter() - started
    console.print(f"  --check-labels: {suspicious} of {len(labels):,} labels look wrong, {seconds:.1f} s")
    listed = []
    for row in order[: min(suspicious, SHOWN_LABELS)]:
        suggested = int(probabilities[row].argmax())
        example = shown(everything.slice(int(row), 1).to_pylist()[0], str(names[row]), splits, report_inputs)
        figures = {"suggested": splits.class_names[suggested], "probability": float(probabilities[row, labels[row]])}
        listed.append({**example, **figures, "suggested_probability": float(probabilities[row, suggested])})
    return {"examples": len(labels), "suspicious": suspicious, "seconds": seconds}, listed


def rank_labels(features, labels, groups=None, seed: int = 0) -> tuple[np.ndarray, int, np.ndarray]:
    """Rows by how suspicious their label is, most first [n]; how many are suspicious; probabilities [n, classes].

    features: [n, d]. labels: [n] int. Suspicious ones come first.
    """
    present, given = np.unique(labels, return_inverse=True)
    logits = linear_probe(features, labels, seed=seed, groups=groups)["logits"].astype(np.float64)
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    found /= found.sum(axis=1, keepdims=True)
    rows = np.arange(len(given))
    own = found[rows, given]
    usual = np.array([own[given == index].mean() for index in range(len(present))])
    others = found.copy()
    others[rows, given] = 0
    best = others.argmax(axis=1)
    margin = own - others[rows, best]
    suspicious = (margin < 0) & (others[rows, best] >= usual[best])
    order = np.lexsort((margin, ~suspicious))
    probabilities = np.zeros((len(given), int(present.max()) + 1))
    probabilities[:, present] = found
    return order, int(suspicious.sum()), probabilities
