"""Overfitting: how much better the finished model is on what it learned from, a limit to that, and what to change.

What stops it while it happens is early stopping, which keeps the weights of the best epoch on validation. This is the
look back: training and validation accuracy of the finished model, both without dropout and augmentation. The limit
(--gap-limit) stops nothing; a gap beyond it is a warning at the top of the report.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from pipelines import ladder

MOST_EXAMPLES = 500  # of the training set, the first by content hash: the answers to more are rarely worth their time


def judge_gap(splits, logits_of, val_logits, limit: float) -> dict:
    """The gap between training and validation accuracy.

    Args:
        splits: `pipelines.data.Splits`. logits_of: table -> logits [n, classes] of the finished model.
        val_logits: [n, classes], its logits of the validation set.
        limit: largest gap that is let pass, a share of one; 0: none.

    Returns:
        train_accuracy and val_accuracy (of several labels the share of right yes-or-nos), examples (of the training
        set, at most MOST_EXAMPLES), gap and interval (95%) in points, limit in points, and passed: the gap is beyond
        the limit. Nothing where there is no validation set.
    """
    from pipelines.data import targets_of
    from pipelines.probes import scores

    if not splits.val.num_rows:
        return {}
    sample = splits.train.take(np.sort(np.argsort(splits.train["id"].to_numpy())[:MOST_EXAMPLES]))
    classes = len(splits.class_names)
    right = {
        name: scores(np.asarray(logits), targets_of(table, classes), splits.multi_label)[1]
        for name, table, logits in (("train", sample, logits_of(sample)), ("val", splits.val, val_logits))
    }
    gap = difference(right["train"], right["val"])
    return {
        "train_accuracy": float(right["train"].mean()),
        "val_accuracy": float(right["val"].mean()),
        "examples": sample.num_rows,
        **gap,
        "limit": 100 * limit,
        "passed": bool(0 < limit < gap["gap"] / 100),
    }


def difference(one, other, level: float = 0.95) -> dict:
    """The difference of the means of two sets of other examples, in points: gap, and interval by Agresti and Caffo.

    2000, "Simple and Effective Confidence Intervals for Proportions": as if each set had two more examples, one right.
    """
    shares = [((values.sum() + 1) / (len(values) + 2), len(values) + 2) for values in (one, other)]
    centre = shares[0][0] - shares[1][0]
    half = stats.norm.ppf((1 + level) / 2) * sum(share * (1 - share) / count for share, count in shares) ** 0.5
    gap = float(np.mean(one) - np.mean(other))
    return {"gap": 100 * gap, "interval": [100 * float(centre - half), 100 * float(centre + half)]}


def gap_sentence(figures: dict) -> str:
    """The gap in words."""
    low, high = figures["interval"]
    return (
        f"{figures['train_accuracy']:.1%} right on {figures['examples']:,} training examples, "
        f"{figures['val_accuracy']:.1%} on validation: a gap of {figures['gap']:.1f} points ({low:.1f} to {high:.1f})"
    )


def gap_warnings(figures: dict, advice: str) -> list[str]:
    """A gap beyond the limit, and what to do; nothing where it is not."""
    if not figures or not figures["passed"]:
        return []
    return [f"Overfitting: {gap_sentence(figures)}, beyond --gap-limit {figures['limit'] / 100:g}. {advice}"]


def tuning_advice(phases: list[dict], settings: dict, figures: dict, kind: str = "image") -> str:
    """Learning rate and regularisation in one sentence, from the curves of the phase that was kept and from the gap.

    Args:
        phases: phase dicts of `fit_two_phase`. settings: every flag by its name, as `pipelines.config.flat_config`
            gives it. figures: as `judge_gap` gives them.
    """
    phase = ladder.best_phase(phases)
    overfits = bool(figures) and figures["passed"]
    if "solver" in phase:
        return head_advice(phase, phases, settings, overfits)
    of_head = phase["name"] == "head"
    rate_flag, epochs_flag = (f"{'head' if of_head else 'fine-tune'}-{what}" for what in ("learning-rate", "epochs"))
    rate, epochs = (settings[flag.replace("-", "_")] for flag in (rate_flag, epochs_flag))
    best, last = phase["best_epoch"], phase["epochs"]
    if overfits:
        return (
            f"It knows its training set too well: try {stronger(settings, kind)}, or more data (`graft curve` says "
            f"what that brings)."
        )
    if best == last == epochs:
        return (
            f"Validation loss still fell in the last epoch, so more epochs (`--{epochs_flag} {2 * epochs}`) or a "
            f"higher learning rate (`--{rate_flag} {2 * rate:.2g}`) may bring more; regularisation can stay."
        )
    if best == 1 and last > 1:
        return (
            f"Validation loss rose from the first epoch on, so try a lower learning rate "
            f"(`--{rate_flag} {rate / 3:.1g}`); regularisation can stay."
        )
    return (
        f"Validation loss was lowest in epoch {best} of {last} and the gap to training is small, so learning rate and "
        f"regularisation can stay as they are."
    )


def head_advice(phase: dict, phases: list[dict], settings: dict, overfits: bool) -> str:
    """The sentence where the head alone was kept, found by L-BFGS: its L2 penalty was chosen, it has no rate."""
    penalty = phase["history"][phase["best_epoch"] - 1]["l2"]
    text = f"The head's L2 penalty ({penalty:.2g}) was chosen on validation and has no learning rate"
    if overfits:
        return (
            f"{text}, so what closes the gap is more data (`graft curve` says what that brings) or another backbone "
            f"(`graft rank`)."
        )
    tuned = [other for other in phases if other is not phase]
    if tuned:
        rate = settings["fine_tune_learning_rate"]
        return (
            f"{text}; fine-tuning made validation worse, so a lower rate (`--fine-tune-learning-rate {rate / 3:.1g}`) "
            f"is worth one try."
        )
    return f"{text}, so there is nothing to tune but the depth."


def stronger(settings: dict, kind: str) -> str:
    """Flags that regularise more than what a run had, mildest first."""
    flags = []
    if kind == "image" and settings["augmentation"] != "rand-augment":
        flags.append("`--augmentation rand-augment`")
    if settings["dropout"] < 0.5:
        flags.append("`--dropout 0.5`")
    if settings["label_smoothing"] == 0:
        flags.append("`--label-smoothing 0.1`")
    flags.append(f"`--weight-decay {10 * (settings['weight_decay'] or 0.01):g}`")
    return ", ".join(flags[:3]) + ", or fewer blocks (`--depth head`)"
