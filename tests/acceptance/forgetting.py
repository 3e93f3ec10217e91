"""Forgetting: a learning rate 100 times too high, stopped by a limit on CKA, and what averaging weights does.

    make acceptance OF=forgetting             or: python -m tests.acceptance.forgetting [too_high averaged]

About 20 minutes on two cores. IMAGE_SIZE=96 in the environment makes pictures smaller, and takes 7; DEPTHS=full
leaves the climb out. Gradients are clipped and the lower blocks learn more slowly, so that even at such a rate linear
CKA does not go to 0: what collapses is told by the same run at the default rate, beside it.
"""

from __future__ import annotations

import json
import os

from pipelines.options import FineTuneOptions
from tests.acceptance.tools import graft, run_checks

LIMIT = 0.8
TOO_HIGH = 100 * FineTuneOptions().fine_tune_learning_rate
HALF_A_POINT = 0.005


def run(folder, name: str, *words) -> tuple[dict, str]:
    """metrics.json of a run on `textures`, and what it printed."""
    words = ["--data", "textures", "--out", folder / name, "--image-size", os.environ.get("IMAGE_SIZE", 0), *words]
    done, _ = graft("image", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / name / "metrics.json").read_text()), done.stdout


def lowest_cka(figures: dict) -> float:
    return min(row["cka"] for phase in figures["phases"][1:] for row in phase["history"])


def too_high(folder):
    """CKA collapses, the limit stops the run, and what is exported is within half a point of the best rung."""
    words = ["--fine-tune-learning-rate", TOO_HIGH]
    for depth in os.environ.get("DEPTHS", "full,auto").split(","):
        usual, _ = run(folder, f"usual-{depth}", "--depth", depth)
        free, _ = run(folder, f"free-{depth}", "--depth", depth, *words)
        kept, lowest = lowest_cka(usual), lowest_cka(free)
        yield (
            f"--depth {depth}, no limit: lowest CKA at the default rate, and at 100 times as much",
            f"{kept:.2f}, {lowest:.2f}",
            f"above and below {LIMIT}",
            lowest < LIMIT < kept,
        )
        held, printed = run(folder, f"held-{depth}", "--depth", depth, *words, "--forgetting-limit", LIMIT)
        stopped = [phase for phase in held["phases"] if phase.get("forgot")]
        verdict = any("was stopped in epoch" in said for said in held["verdicts"])
        told = verdict and "below --forgetting-limit" in printed
        yield (
            f"--depth {depth}: the limit of {LIMIT} stops it",
            "; ".join(f"{phase['name']} in epoch {phase['epochs']}" for phase in stopped) or "nothing was stopped",
            "stopped, and told",
            bool(stopped) and held["phases"][-1] is stopped[-1] and told,
        )
        # The rungs as they were tested after each phase: of one that was undone, what was kept instead.
        best = max(phase["test"]["accuracy"] for phase in held["phases"])
        exported = held["test"]["accuracy"]
        yield (
            f"--depth {depth}: test accuracy of the exported model, and of the best rung",
            f"{exported:.3f}, {best:.3f}",
            "within half a point",
            exported >= best - HALF_A_POINT,
        )


def averaged(folder):
    """What WiSE-FT does, at the default learning rate: a row for each share of fine-tuned weights."""
    figures, _ = run(folder, "averaged", "--depth", "2", "--wise-ft")
    found = figures["forgetting"].get("wise_ft")
    if not found:
        yield "something was fine-tuned that could be averaged", figures["forgetting"]["sentence"], "yes", False
        return
    lowest = min(row["val_loss"] for row in found["table"])
    for row in found["table"]:
        chosen = row["share"] == found["share"]
        yield (
            f"{100 * row['share']:.0f}% fine-tuned{', chosen' if chosen else ''}",
            f"validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.3f}, CKA {row['cka']:.3f}",
            "the lowest loss" if chosen else "",
            not chosen or row["val_loss"] == lowest,
        )
    alone = figures["phases"][-1]["test"]
    yield (
        "test loss and accuracy: as training left it, and averaged",
        f"{alone['loss']:.3f} {alone['accuracy']:.3f}, {figures['test']['loss']:.3f} {figures['test']['accuracy']:.3f}",
        "",
        True,
    )


if __name__ == "__main__":
    raise SystemExit(run_checks([too_high, averaged], __file__, "Forgetting: a limit, and averaged weights"))
