"""WiSE-FT: the average of pretrained and fine-tuned weights that does best on validation.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models": between the two ends of a fine-tuning there are often
weights that are better than both, and that have forgotten less. One end is the pretrained backbone with the head of
phase 1, the other what was kept in the end.
"""

from __future__ import annotations

from pipelines import ladder
from pipelines.console import console
from pipelines.data import targets_of
from pipelines.steps import objective_of

SHARES = tuple(tenth / 10 for tenth in range(11))  # of the fine-tuned weights


def average_kept(guard, feed, logits_of, val, phases: list[dict], on_best=None) -> None:
    """Leave the model with the best average of where it began and where it is, and say so in the phase it is from.

    An average whose features are beyond the guard's limit is not taken. Of equal ones the most fine-tuned is. Where
    the head alone was kept there is nothing to average.

    Args:
        guard: `pipelines.guards.ForgettingGuard`, which holds the weights of the beginning.
        feed, logits_of: what the kept phase trained on, and table -> logits [n, classes] through it, or the outputs of
            the model's own objective.
        val: the validation table.
        phases: phase dicts. That of the phase whose weights the model has gets wise_ft: share (of the fine-tuned
            weights), kept (the guard's figures for it) and table, a row for each share: share, val_loss, val_accuracy,
            cka and passed (the limit).
        on_best: (name, model), where the weights have changed.
    """
    phase = ladder.best_phase(phases)
    if phase is phases[0]:
        return
    guard.begin(feed)
    ends = [(weight, start, weight.numpy()) for weight, start in guard.values.values()]
    targets, kept_row = targets_of(val, guard.model.head.units), phase["history"][phase["best_epoch"] - 1]
    table = []
    for share in SHARES:
        if share == 1:  # as training left it: known
            figures, passed = {name: kept_row[name] for name in ("cka",) if name in kept_row}, False
            loss, accuracy = kept_row["val_loss"], kept_row["val_accuracy"]
        else:
            set_share(ends, share)
            figures, passed = guard.look()
            loss, accuracy = objective_of(guard.model).figures(targets, logits_of(val))
        row = {"share": share, "val_loss": loss, "val_accuracy": accuracy}
        table.append({**row, **({"cka": figures["cka"]} if figures else {}), "passed": passed})
    best = min((row for row in table if not row["passed"]), key=lambda row: (row["val_loss"], -row["share"]))
    set_share(ends, best["share"])
    phase["wise_ft"] = {"share": best["share"], "kept": guard.look()[0], "table": table}
    console.print(
        f"  WiSE-FT: validation loss {table[0]['val_loss']:.3f} with pretrained weights, "
        f"{table[-1]['val_loss']:.3f} fine-tuned, {best['val_loss']:.3f} with {100 * best['share']:.0f}% fine-tuned\n"
    )
    if on_best and best["share"] < 1:
        on_best(phase["name"], guard.model)


def set_share(ends: list[tuple], share: float) -> None:
    """Give each (weight, start, end) the value (1 - share) * start + share * end."""
    for weight, start, end in ends:
        weight.assign((1 - share) * start + share * end)
