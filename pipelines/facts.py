"""What a run knows of itself: the facts behind metrics.json, report.html and the closing lines."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import shlex
import time

import numpy as np

from pipelines import guards, ladder, recovery
from pipelines.config import flat_config
from pipelines.console import console

NOUNS = {"image": "images", "text": "texts", "audio": "clips"}  # what the examples of each kind of data are called


class Clock:
    """Seconds per stage of a run."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def about_run(config, splits, backbone, phases: list[dict], metrics: dict, kind: str = "image") -> dict:
    """The facts that every kind of run has in common, as `pipelines.report.write_report` takes them.

    kind: "image", "text" or "audio", which is also the word of the command.
    """
    return {
        "title": os.path.basename(os.path.normpath(config.input.data)),
        "kind": kind,
        "created": now(),
        "command": f"graft {kind} " + " ".join(changed_flags(config)),
        "verdicts": verdicts(phases, config.model.depth)
        + guards.verdicts(phases, config.guards.forgetting_limit)
        + recovery.verdicts(phases),
        **({"climb": ladder.story(phases)} if config.model.depth == "auto" else {}),
        "forgetting": guards.story(phases, config.guards.forgetting_limit),
        "warnings": splits.warnings,
        "class_names": splits.class_names,
        "examples": {**split_sizes(splits), "skipped": len(splits.skipped)},
        "class_counts": class_counts(splits),
        "metrics": metrics,
        "phases": phases,
        "settings": flat_config(config),
        "backbone": describe_backbone(backbone),
        "data": {
            "fingerprint": splits.fingerprint,
            **({} if splits.white_level == 255 else {"white_level": splits.white_level}),
        },
        "versions": versions(),
        "machine": f"{platform.machine()}, {cpu_count()} CPU cores",
    }


def metrics_of(splits, logits: dict[str, np.ndarray], thresholds, config) -> dict:
    """`pipelines.evaluate.evaluate` for each split that has logits [n, classes], or its like for several labels.

    thresholds: [classes] float32 of a multi-label model, else None.
    """
    from pipelines.data import targets_of
    from pipelines.evaluate import evaluate
    from pipelines.evaluate_multi_label import evaluate_multi_label

    if thresholds is not None:
        return {
            name: evaluate_multi_label(
                targets_of(getattr(splits, name), len(splits.class_names)),
                values,
                probabilities_of(values, multi_label=True) >= thresholds,
                thresholds,
                splits.class_names,
                seed=config.training.seed,
            )
            for name, values in logits.items()
        }
    return {
        name: evaluate(
            getattr(splits, name)["label"].to_numpy(),
            values,
            splits.class_names,
            positive=config.report.positive or None,
            specificity=config.report.specificity,
            seed=config.training.seed,
        )
        for name, values in logits.items()
    }


def add_test_figures(phase: dict, splits, logits: np.ndarray) -> None:
    """Put figures on the test set (loss, accuracy and what may be the headline) into a phase, and print its end.

    Of several labels, accuracy is the share of right yes-or-nos at a probability of 0.5.
    """
    from sklearn import metrics

    from pipelines.data import targets_of
    from pipelines.steps import mean_loss_and_accuracy

    targets = targets_of(splits.test, logits.shape[1])
    loss, accuracy = mean_loss_and_accuracy(targets, logits, splits.multi_label)
    phase["test"] = {"accuracy": accuracy, "loss": loss}
    present = np.flatnonzero(targets.any(axis=0))
    if splits.multi_label:
        figure = metrics.average_precision_score(targets[:, present], logits[:, present], average="macro")
        phase["test"]["mean_average_precision"] = float(figure)
        shown = f"test mean average precision {figure:.3f}"
    else:
        figure = metrics.f1_score(
            targets.argmax(axis=1), logits.argmax(axis=1), labels=present, average="macro", zero_division=0
        )
        phase["test"]["macro_f1"] = float(figure)
        shown = f"test accuracy {accuracy:.3f}"
    best = f"Best epoch {phase['best_epoch']} of {phase['epochs']}"
    if "solver" in phase:
        chosen = phase["history"][phase["best_epoch"] - 1]
        best = f"L-BFGS, L2 penalty {chosen['l2']:.2g}, chosen from {phase['epochs']}"
    console.print(f"  {phase['seconds']:.0f} s. {best}: validation loss {phase['val_loss']:.3f}, {shown}\n")


def print_splits(splits, noun: str = "image") -> None:
    """How many examples there are of each split, and what the user should know about the data."""
    sizes = split_sizes(splits)
    console.print(
        f"      {len(splits.class_names)} classes{', several labels per ' + noun if splits.multi_label else ''}; "
        f"{sizes['train']:,} to train, {sizes['val']:,} to validate, "
        f"{sizes['test']:,} to test"
    )
    for warning in splits.warnings:
        console.print(f"[yellow]      Note: {warning}")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def headline(metrics: dict) -> str:
    """The figure to quote, with half the width of its 95% interval, and what it is."""
    shown = metrics["headline"]
    return f"{shown['value']:.3f} ± {shown['half_width']:.3f} {shown['metric'].replace('_', ' ')}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """[n, classes] logits -> probabilities, float32."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def probabilities_of(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """[n, classes] logits -> what the exported model gives for them, float32."""
    from pipelines.evaluate_multi_label import sigmoid

    return sigmoid(logits) if multi_label else softmax(logits)


def chosen_labels(class_names: list[str], chosen: np.ndarray) -> str:
    """The names of the chosen classes [classes] bool, as a manifest writes them: a|b; "" for none."""
    return "|".join(name for name, is_chosen in zip(class_names, chosen) if is_chosen)


def verdicts(phases: list[dict], depth: str) -> list[str]:
    """What one would tell a colleague about the phases."""
    if depth == "auto":
        return ladder.verdicts(phases)
    if len(phases) < 2:
        because = "--depth head" if depth == "head" else phases[0]["climb"]["because"]
        return [f"Only the head was trained ({because})."]
    what = {"full": "Fine-tuning the whole backbone", "1": "Fine-tuning the top block"}.get(
        depth, f"Fine-tuning the top {depth} blocks"
    )
    if not phases[1]["kept"]:
        return [f"{what} did not improve validation: the weights of the head phase were kept."]
    return [ladder.gain_verdict(what, phases[0], phases[1])]


def split_sizes(splits) -> dict[str, int]:
    return {"train": splits.train.num_rows, "val": splits.val.num_rows, "test": splits.test.num_rows}


def class_counts(splits) -> dict[str, list[int]]:
    from pipelines.data import targets_of

    return {
        name: targets_of(table, len(splits.class_names)).sum(axis=0).astype(int).tolist()
        for name, table in zip(("train", "val", "test"), splits)
    }


def describe_backbone(backbone) -> dict:
    preprocess = backbone.preprocess
    fields = dataclasses.fields(preprocess) if preprocess else ()
    values = {field.name: getattr(preprocess, field.name) for field in fields if field.name != "tokenizer"}
    return {
        "name": backbone.name,
        "parameters": int(backbone.encoder.count_params()),
        "feature_size": backbone.feature_size,
        "blocks": len(backbone.blocks),
        **({"image_size": list(values["image_size"])} if "image_size" in values else {}),
        "preprocess": values,
        "source": backbone.source,
    }


def versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    return {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def changed_flags(config) -> list[str]:
    """The flags that differ from the defaults, as words of a command line."""
    defaults, words = flat_config(type(config)()), []
    for name, value in flat_config(config).items():
        flag = "--" + name.replace("_", "-")
        if value == defaults[name] and name != "data":
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *(shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value]))]
    return words


def machine_metrics(facts: dict) -> dict:
    """metrics.json: figures without pictures; two equal runs differ in `seconds` and `created` only."""
    kept = ("kind", "created", "class_names", "thresholds", "examples", "class_counts", "verdicts", "warnings")
    kept += ("baselines", "climb", "forgetting", "transfer", "advice", "calibration", "overfitting")
    kept += ("exact_copies", "near_copies", "label_check")
    settings = {name: value for name, value in facts["settings"].items() if name != "out"}
    return {
        **{name: facts[name] for name in kept if name in facts},
        "test": facts["metrics"]["test"],
        "val": facts["metrics"]["val"],
        "phases": facts["phases"],
        "backbone": facts["backbone"],
        "data": facts["data"],
        "settings": settings,
        "versions": facts["versions"],
        "seconds": facts["timings"],
    }


def print_ending(gathered: dict, run_dir: pathlib.Path, version: pathlib.Path | None, report: pathlib.Path) -> None:
    """What one would tell a colleague, and what to type next; version: None without an export."""
    mistakes = len(gathered["mistakes"])
    look = f"{mistakes} worst mistake{'s' if mistakes > 1 else ''}" if mistakes else "no mistakes on the test set"
    noun = NOUNS[gathered["kind"]]
    of_texts = gathered["kind"] == "text"
    inputs = "FILE.csv" if of_texts else "FILES"
    verdicts = gathered["verdicts"]
    if gathered["transfer"]["verdict"] == "hurts":
        console.print(f"[bold yellow]{verdicts[0]}")
        verdicts = verdicts[1:]
    console.print(
        f"[bold]{headline(gathered['metrics']['test'])}[/] on {gathered['examples']['test']:,} test {noun}. "
        f"{' '.join(verdicts)}\n"
        f"Look first: {look}   {report}"
    )
    if not version:
        console.print(export_line(run_dir))
        return
    name = version.parent.name
    console.print(
        f"{served_line(gathered['serving'], noun if of_texts else 'files')}   {version}\n"
        f"Try it:   graft predict {shlex.quote(str(run_dir))} {inputs}\n"
        f"          docker run -p 8501:8501 -v {shlex.quote(f'{version.parent.absolute()}:/models/{name}')} "
        f"-e MODEL_NAME={name} tensorflow/serving:2.20.0"
    )


def export_line(run_dir: pathlib.Path) -> str:
    """What to type for what a run without an export has not made."""
    return f"Not exported. Make a version for TensorFlow Serving:   graft export {shlex.quote(str(run_dir))}"


def served_line(checked: dict, noun: str = "files") -> str:
    """What verification found, in one line; `noun` is what the answers were for."""
    if not checked["files"]:
        return f"Verified for TensorFlow Serving; no test {noun} were left to compare answers with training's."
    return (
        f"Served answers equal training's ({checked['files']} {noun}, "
        f"largest difference {checked['largest_difference']:.0e})"
    )
