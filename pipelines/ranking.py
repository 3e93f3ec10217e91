"""What measured backbones amount to: their order and how sure it is, what each costs, and which one to take."""

from __future__ import annotations

import pathlib

import numpy as np
import rich.box
import rich.table

from models.names import RANDOM
from pipelines.console import console
from pipelines.probes import paired_difference

RESAMPLES = 1000
MOST_LOSS = 0.01  # accuracy that a quicker backbone may cost and still be the one to take
QUICKER = 1.25  # times as quick that it must be


def order_certainty(correct: np.ndarray, seed: int = 0) -> list[float]:
    """How often each of m backbones stays ahead of the next one where the examples are drawn anew, m - 1 shares.

    correct: [m, n], best first; all backbones are judged on the same draw. A tie counts half.
    """
    count = correct.shape[1]
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    accuracies = draws.astype(np.float32) @ correct.T.astype(np.float32)
    ahead = accuracies[:, :-1] - accuracies[:, 1:]
    return ((ahead > 0) + 0.5 * (ahead == 0)).mean(axis=0).tolist()


def pareto_front(rows: list[dict]) -> set[str]:
    """The names of backbones that no other one beats or equals in both accuracy and milliseconds."""
    front, best = set(), -1.0
    for row in sorted(rows, key=lambda row: (row["milliseconds"], -row["probe"]["accuracy"])):
        if row["probe"]["accuracy"] > best:
            best = row["probe"]["accuracy"]
            front.add(row["name"])
    return front


def recommendation(rows: list[dict]) -> tuple[dict, str]:
    """The backbone to take, and why, in one sentence; rows: best first.

    It is the best one, or the quickest of those that are so near that the sample cannot tell them apart.
    """
    best, others = rows[0], rows[1:]
    accuracy, (low, high) = best["probe"]["accuracy"], best["probe"]["interval"]
    reaches = f"{accuracy:.1%} ({low:.1%} to {high:.1%})"
    gaps = [paired_difference(best["probe"]["correct"], row["probe"]["correct"]) for row in others]
    quicker = [
        (row, gap)
        for row, gap in zip(others, gaps)
        if gap["difference"] <= MOST_LOSS
        and gap["interval"][0] <= 0
        and row["milliseconds"] * QUICKER <= best["milliseconds"]
    ]
    if quicker:
        row, gap = min(quicker, key=lambda pair: pair[0]["milliseconds"])
        times = best["milliseconds"] / row["milliseconds"]
        return row, (
            f"Take {short_name(row['name'])}: {times:.1f} times as quick as {short_name(best['name'])}, whose "
            f"{reaches} is not measurably better: {points(gap)}."
        )
    name = short_name(best["name"])
    if not others:
        return best, f"Take {name}, the only one: its features reach {reaches}."
    return best, f"Take {name}: its features reach {reaches}, {points(gaps[0])} over {short_name(others[0]['name'])}."


def pretraining_worth(rows: list[dict], chosen: dict) -> str:
    """What the chosen backbone's weights are worth, where its random copy was measured too; else ""."""
    copy = next((row for row in rows if row["name"] == RANDOM + chosen["name"]), None)
    if copy is None:
        return ""
    gap = paired_difference(chosen["probe"]["correct"], copy["probe"]["correct"])
    if gap["interval"][0] > 0:
        return f" Its pretrained weights are worth {points(gap)}."
    return f" Yet its pretrained weights are no better than random ones here, {points(gap)}: look for another."


def points(gap: dict) -> str:
    """A difference of accuracies with its interval, in points."""
    low, high = gap["interval"]
    return f"{100 * gap['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def certainty(rows: list[dict], stays: list[float]) -> str:
    """What order to expect of fine-tuning, and how sure that is."""
    if not stays:
        return "With one backbone there is no order to foretell."
    names = [short_name(row["name"]) for row in rows]
    sure = f"{names[0]} stays ahead of {names[1]} in {stays[0]:.0%} of resamplings"
    return f"Expected order after fine-tuning: {' > '.join(names)} ({sure})."


def print_table(gathered: dict) -> None:
    """The figures of every backbone, best first; ms per example, MB of weights, ahead of the next in so many draws."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("backbone", overflow="fold", min_width=28)
    columns = ("probe", "95% interval", "kNN", "LogME", "ms", "MB", "ahead")
    for title in columns:
        table.add_column(title, justify="right")
    for row in gathered["backbones"]:
        low, high = row["probe"]["interval"]
        table.add_row(
            ("[bold]" if row["name"] == gathered["recommended"] else "") + short_name(row["name"]),
            f"{row['probe']['accuracy']:.1%}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{row['neighbours']['accuracy']:.1%}",
            f"{row['log_me']:.3f}",
            f"{row['milliseconds']:.2f}",
            f"{row['megabytes']:,.1f}",
            "" if row["stays_ahead"] is None else f"{row['stays_ahead']:.0%}",
        )
    console.print(table)


def short_name(name: str) -> str:
    """A name as it fits a table: of a folder the last part."""
    prefix = RANDOM if name.startswith(RANDOM) else ""
    base = name.removeprefix(prefix)
    return prefix + (pathlib.PurePath(base).name if base.startswith(("/", ".")) else base)
