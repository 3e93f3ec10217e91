"""What a run knows of itself: the facts behind metrics.json, report.html and the closing lines."""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import pathlib
import platform
import shlex
import time

import numpy as np

from pipelines.config import flat_config
from pipelines.console import console

SHOWN_MISTAKES = 12
THUMBNAIL_SIDE = 192  # pixels


class Clock:
    """Seconds per stage of a run."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def about_run(config, splits, backbone, phases: list[dict], metrics: dict) -> dict:
    """The facts that every kind of run has in common, as `pipelines.report.write_report` takes them."""
    return {
        "title": os.path.basename(os.path.normpath(config.input.data)),
        "kind": "image",
        "created": now(),
        "command": "graft image " + " ".join(changed_flags(config)),
        "verdicts": verdicts(phases, config.model.depth),
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


def metrics_of(splits, logits: dict[str, np.ndarray], config) -> dict:
    """`pipelines.evaluate.evaluate` for each split that has logits [n, classes]."""
    from pipelines.evaluate import evaluate

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


def add_test_figures(phase: dict, table, logits: np.ndarray) -> None:
    """Put accuracy, loss and macro F1 on the test set into a phase, and print how the phase ended."""
    from sklearn.metrics import f1_score

    from pipelines.data import targets_of
    from pipelines.training import mean_loss_and_accuracy

    labels = table["label"].to_numpy()
    loss, accuracy = mean_loss_and_accuracy(targets_of(table, logits.shape[1]), logits, False)
    macro_f1 = f1_score(labels, logits.argmax(axis=1), labels=np.unique(labels), average="macro", zero_division=0)
    phase["test"] = {"accuracy": accuracy, "loss": loss, "macro_f1": float(macro_f1)}
    console.print(
        f"  {phase['seconds']:.0f} s. Best epoch {phase['best_epoch']} of {phase['epochs']}: "
        f"validation loss {phase['val_loss']:.3f}, test accuracy {accuracy:.3f}\n"
    )


def print_splits(splits) -> None:
    """How many examples there are of each split, and what the user should know about the data."""
    sizes = split_sizes(splits)
    console.print(
        f"      {len(splits.class_names)} classes; {sizes['train']:,} to train, {sizes['val']:,} to validate, "
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


def verdicts(phases: list[dict], depth: str) -> list[str]:
    """What one would tell a colleague about the two phases."""
    if len(phases) < 2:
        return ["Only the head was trained (--depth head)."]
    what = {"full": "Fine-tuning the whole backbone", "1": "Fine-tuning the top block"}.get(
        depth, f"Fine-tuning the top {depth} blocks"
    )
    if not phases[1]["kept"]:
        return [f"{what} did not improve validation: the weights of the head phase were kept."]
    head = phases[0]["test"]["accuracy"]
    gain = 100 * (phases[1]["test"]["accuracy"] - head)
    if gain > 0:
        return [f"{what} was worth it: {gain:+.1f} points over the head alone ({head:.3f})."]
    change = f"cost {-gain:.1f} points of test accuracy" if gain < 0 else "left test accuracy as it was"
    return [f"{what} lowered the validation loss, yet {change} (head alone: {head:.3f})."]


def worst_mistakes(table, probabilities, class_names, white_level: int, report_inputs: str) -> list[dict]:
    """The examples that were most confidently wrong, worst first.

    Args:
        table: the examples, with columns id, path and label.
        probabilities: [n, classes] float32.
        report_inputs: "all" for pictures, "none" for ids only: data that must not leave the machine.
    """
    with_pictures = report_inputs == "all"
    labels, paths, ids = table["label"].to_numpy(), table["path"].to_pylist(), table["id"].to_pylist()
    predicted = probabilities.argmax(axis=1)
    true_probability = probabilities[np.arange(len(labels)), labels]
    wrong = [i for i in np.argsort(true_probability, kind="stable") if predicted[i] != labels[i]][:SHOWN_MISTAKES]
    return [
        {
            "id": ids[i],
            "path": paths[i] if with_pictures else None,
            "true": class_names[labels[i]],
            "predicted": class_names[predicted[i]],
            "probability": float(probabilities[i].max()),
            "true_probability": float(true_probability[i]),
            "picture": thumbnail(paths[i], white_level) if with_pictures else None,
        }
        for i in wrong
    ]


def thumbnail(path: str, white_level: int) -> bytes:
    """An image file as a JPEG whose longer side is THUMBNAIL_SIDE pixels; small images are enlarged without blur."""
    from PIL import Image  # for the report's pictures only: the model's input comes from models/inputs.py

    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey
            grey = np.clip(np.asarray(image, np.float32) / white_level, 0, 1) * 255
            image = Image.fromarray(grey.astype(np.uint8))
        rgba = image.convert("RGBA")
    picture = Image.new("RGB", rgba.size, "white")
    picture.paste(rgba, mask=rgba.getchannel("A"))
    scale = THUMBNAIL_SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def split_sizes(splits) -> dict[str, int]:
    return {"train": splits.train.num_rows, "val": splits.val.num_rows, "test": splits.test.num_rows}


def class_counts(splits) -> dict[str, list[int]]:
    classes = len(splits.class_names)
    return {
        name: np.bincount(table["label"].to_numpy(), minlength=classes).tolist()
        for name, table in zip(("train", "val", "test"), splits)
    }


def describe_backbone(backbone) -> dict:
    return {
        "name": backbone.name,
        "parameters": int(backbone.encoder.count_params()),
        "feature_size": backbone.feature_size,
        "blocks": len(backbone.blocks),
        "image_size": list(backbone.preprocess.image_size),
        "preprocess": dataclasses.asdict(backbone.preprocess),
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
    kept = ("kind", "created", "class_names", "examples", "class_counts", "verdicts", "warnings")
    settings = {name: value for name, value in facts["settings"].items() if name != "out"}
    return {
        **{name: facts[name] for name in kept},
        "test": facts["metrics"]["test"],
        "val": facts["metrics"]["val"],
        "phases": facts["phases"],
        "backbone": facts["backbone"],
        "data": facts["data"],
        "settings": settings,
        "versions": facts["versions"],
        "seconds": facts["timings"],
    }


def print_ending(gathered: dict, run_dir: pathlib.Path, version: pathlib.Path, report: pathlib.Path) -> None:
    """What one would tell a colleague, and what to type next."""
    checked, name = gathered["serving"], version.parent.name
    mistakes = len(gathered["mistakes"])
    look = f"{mistakes} worst mistake{'s' if mistakes > 1 else ''}" if mistakes else "no mistakes on the test set"
    console.print(
        f"[bold]{headline(gathered['metrics']['test'])}[/] on {gathered['examples']['test']:,} test images. "
        f"{' '.join(gathered['verdicts'])}\n"
        f"Look first: {look}   {report}\n"
        f"{served_line(checked)}   {version}\n"
        f"Try it:   graft predict {shlex.quote(str(run_dir))} FILES\n"
        f"          docker run -p 8501:8501 -v {shlex.quote(f'{version.parent.absolute()}:/models/{name}')} "
        f"-e MODEL_NAME={name} tensorflow/serving:2.20.0"
    )


def served_line(checked: dict) -> str:
    """What verification found, in one line."""
    if not checked["files"]:
        return "Verified for TensorFlow Serving; no test files were left to compare answers with training's."
    return (
        f"Served answers equal training's ({checked['files']} files, "
        f"largest difference {checked['largest_difference']:.0e})"
    )
