"""Answers of an exported model for files: `graft predict` and `graft evaluate`.

They run the exported version itself, through TensorFlow's C API: no training code, no Python
TensorFlow, first answer within about a second.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from typing import Literal

import numpy as np
import pyarrow as pa
import rich.table
import tyro

from models import GraftError
from pipelines import facts, runs
from pipelines.console import console, progress_bar
from pipelines.data import targets_of
from pipelines.inspections import content_id
from pipelines.manifests import Example
from pipelines.mistakes import worst_mistakes
from pipelines.sources import IMAGE_SUFFIXES, find_images, is_multi_label

BATCH = 32  # files per call of the model


@dataclasses.dataclass
class PredictConfig:
    """Label files with a run's exported model: graft predict runs/photos new/ --out predictions.csv"""

    run: tyro.conf.Positional[str]
    """Run folder, or the folder of an exported version."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of images, or one CSV file with a column `path` (its columns are kept)."""
    out: str = ""
    """CSV file to write: the input's columns, then label (a|b where a model gives several), score (the largest
    probability, 0 to 1) and error."""
    probabilities: bool = False
    """Also write one column per class with its probability."""


def predict(argv: list[str]) -> int:
    """`graft predict`: a table on the console, and a CSV file with --out."""
    config = tyro.cli(PredictConfig, args=argv, prog="graft predict")
    version = runs.find_version(config.run)
    rows = input_rows(config.inputs)
    if config.out and pathlib.Path(config.out).is_dir():
        raise GraftError(f"--out {config.out} is a folder; give the name of a CSV file.")
    answers = answer_files(version, [row.pop(READ_FROM) for row in rows])
    class_names = read_details(version)["class_names"]
    for row, answer in zip(rows, answers):
        row.update(label=label_of(answer, class_names), score=f"{answer['scores'][0]:.6f}", error=answer["error"])
        if config.probabilities:
            row.update({f"p({name})": f"{p:.6f}" for name, p in zip(class_names, answer["probabilities"])})
    if config.out:
        runs.write_csv(pathlib.Path(config.out), rows, list(rows[0]))
        console.print(f"{len(rows):,} answers in {config.out}")
    else:
        print_answers(rows, answers)
    failed = sum(bool(row["error"]) for row in rows)
    if failed:
        console.print(f"[yellow]{failed:,} of {len(rows):,} files have no answer; the column error says why.")
    return 0


READ_FROM = object()  # key, in an input row, of the path to read; never a column


def input_rows(inputs: tuple[str, ...]) -> list[dict]:
    """What the command line names -> rows with the column path, and those of a CSV file.

    Raises:
        GraftError: nothing named, a file that does not exist, no images in a folder, a CSV without `path`.
    """
    if len(inputs) == 1 and inputs[0].lower().endswith(".csv"):
        return csv_rows(pathlib.Path(inputs[0]))
    paths = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not found:
                raise GraftError(f"{name}: no images in this folder.")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise GraftError(f"{name}: there is no such file or folder.")
    if not paths:
        raise GraftError("Nothing to label: give image files, a folder, or a CSV file with a column `path`.")
    return [{"path": str(path), READ_FROM: path} for path in paths]


def csv_rows(path: pathlib.Path) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GraftError(f"{path} could not be read as CSV: {error}.") from error
    if not rows or "path" not in rows[0]:
        columns = ", ".join(rows[0]) if rows else "none"
        raise GraftError(f"{path} needs rows and a column `path` (relative to the CSV file); its columns: {columns}.")
    return [{**row, READ_FROM: path.parent / row["path"]} for row in rows]


def answer_files(version: pathlib.Path, paths: list[pathlib.Path]) -> list[dict]:
    """Answers of the exported model, one per path: labels, scores, probabilities, chosen, error.

    chosen is None for a model that gives one label. A file that cannot be read gets its error and no label;
    its neighbours are not affected.
    """
    from serving.session import Session

    answers = []
    with Session(version) as session, progress_bar() as bar:
        task = bar.add_task("files", total=len(paths), note="")
        for start in range(0, len(paths), BATCH):
            batch = [read_bytes(path) for path in paths[start : start + BATCH]]
            outputs = session.run("serving_default", {"image_bytes": [data for data, _ in batch]})
            for index, (_, read_error) in enumerate(batch):
                answers.append(
                    {
                        "labels": [label.decode() for label in outputs["labels"][index]],
                        "scores": outputs["scores"][index],
                        "probabilities": outputs["probabilities"][index],
                        "chosen": outputs["chosen"][index] if "chosen" in outputs else None,
                        "error": read_error or outputs["error"][index].decode(),
                    }
                )
            bar.update(task, advance=len(batch))
    return answers


def label_of(answer: dict, class_names: list[str]) -> str:
    """The label of an answer; of a multi-label model the chosen ones as a|b, "" where there are none."""
    return answer["labels"][0] if answer["chosen"] is None else facts.chosen_labels(class_names, answer["chosen"])


def read_bytes(path: pathlib.Path) -> tuple[bytes, str]:
    """A file's bytes and "", or b"" and why it could not be read."""
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"


def read_details(version: pathlib.Path) -> dict:
    """What the export says of itself: assets.extra/graft.json."""
    path = version / "assets.extra" / "graft.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GraftError(
            f"{version} is not a model that Graft exported: {path.name} could not be read ({error})."
        ) from error


def print_answers(rows: list[dict], answers: list[dict], most: int = 50) -> None:
    table = rich.table.Table(box=None)
    # Of several labels none is the first, so the likeliest are listed, chosen or not.
    first, others = (1, "next") if answers[0]["chosen"] is None else (0, "likeliest")
    for column in ("file", "label", "score", others):
        table.add_column(column, justify="right" if column == "score" else "left")
    for row, answer in zip(rows[:most], answers):
        following = "  ".join(f"{l} {s:.2f}" for l, s in zip(answer["labels"][first:3], answer["scores"][first:3]))
        cells = [row["label"] or "[dim]none", f"{answer['scores'][0]:.3f}", following]
        table.add_row(short(row["path"]), *(["[yellow]no answer", "", row["error"]] if row["error"] else cells))
    console.print(table)
    if len(rows) > most:
        console.print(f"... and {len(rows) - most:,} more; --out predictions.csv writes them all.")


def short(path: str, most: int = 30) -> str:
    """A path, or its last parts where it is long."""
    parts = pathlib.PurePath(path).parts
    while len(parts) > 1 and len(path) > most:
        parts = parts[1:]
        path = str(pathlib.PurePath("...", *parts))
    return path


# ---------------------------------------------------------------- evaluate


@dataclasses.dataclass
class EvaluateConfig:
    """Score a run's exported model on other labelled data: graft evaluate runs/photos --data clinic-b/"""

    run: tyro.conf.Positional[str]
    """Run folder, or the folder of an exported version."""
    data: str
    """Folder of class folders (of {train,val,test}/class folders: the test part), a manifest (CSV, TSV, JSONL or
    Parquet; with a column split: the test part), or an offline set."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    label_column: str = "label"
    """Column of a manifest with the class of each file, or several as a|b."""
    group_column: str = "group"
    """Column of a manifest with the patient, customer or the like; no figure depends on it."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""
    out: str = ""
    """Folder for report.html, metrics.json and predictions.csv (empty: RUN/evaluations/NAME OF THE DATA)."""
    positive: str = ""
    """For two classes, the one to find: adds sensitivity at --specificity."""
    specificity: float = 0.9
    """Specificity at which sensitivity is reported, 0 to 1."""
    report_inputs: Literal["all", "none"] = "all"
    """all: show the worst mistakes as pictures; none: by id only."""


def evaluate_run(argv: list[str]) -> int:
    """`graft evaluate`: the same metrics and report as after training, on external data."""
    from pipelines.report import write_report

    config = tyro.cli(EvaluateConfig, args=argv, prog="graft evaluate")
    version = runs.find_version(config.run)
    details = read_details(version)
    class_names = details["class_names"]
    thresholds = np.array(details["thresholds"], np.float32) if "thresholds" in details else None
    found = labelled_files(config, details)
    out = runs.choose_run_folder(
        config.out or str(runs.free_name(pathlib.Path(config.run) / "evaluations", config.data)), ""
    )
    answers = answer_files(version, [pathlib.Path(example.path) for example in found])
    skipped = [{"path": e.path, "reason": a["error"]} for e, a in zip(found, answers) if a["error"]]
    if len(skipped) == len(found):
        raise GraftError(f"--data {config.data}: none of the {len(found)} files could be read, the first: {skipped[0]}")
    found, answers = zip(*((e, a) for e, a in zip(found, answers) if not a["error"]))
    table = table_of(found, class_names, multi_label=thresholds is not None)
    probabilities = np.stack([answer["probabilities"] for answer in answers])
    targets = targets_of(table, len(class_names))
    metrics = served_metrics(config, class_names, thresholds, targets, probabilities)
    gathered = {
        "title": f"{version.parent.name} on {pathlib.Path(config.data).name}",
        "kind": "image",
        "created": facts.now(),
        "command": f"graft evaluate {config.run} --data {config.data}",
        "verdicts": [],
        "warnings": [f"{len(skipped)} files could not be read and were skipped (skipped.csv says why)."]
        if skipped
        else [],
        "class_names": class_names,
        "examples": {"test": len(found), "skipped": len(skipped)},
        "class_counts": {"test": targets.sum(axis=0).astype(int).tolist()},
        "metrics": {"test": metrics},
        "mistakes": worst_mistakes(
            table, probabilities, class_names, details["white_level"], config.report_inputs, thresholds
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    runs.write_csv(out / "skipped.csv", skipped, ["path", "reason"])
    rows = [
        {
            "path": example.path,
            "true": facts.chosen_labels(class_names, truth > 0),
            "label": label_of(answer, class_names),
            "score": f"{answer['scores'][0]:.6f}",
        }
        for example, truth, answer in zip(found, targets, answers)
    ]
    runs.write_csv(out / "predictions.csv", rows, list(rows[0]))
    report = write_report(out, gathered)
    runs.write_json(out / "metrics.json", {"created": gathered["created"], "class_names": class_names, "test": metrics})
    console.print(f"[bold]{facts.headline(metrics)}[/] on {len(found):,} images   {report}")
    return 0


def labelled_files(config: EvaluateConfig, details: dict) -> list[Example]:
    """The labelled files to score: the test part where the data has one.

    Raises:
        GraftError: no usable data, classes that the model does not know, several labels per image for a model that
            gives one, a `positive` that cannot be asked for.
    """
    from pipelines.evaluate import check_positive

    class_names, multi_label = details["class_names"], "thresholds" in details
    if multi_label and config.positive:
        raise GraftError(
            f"--positive {config.positive}: this model gives several labels per image; sensitivity at a specificity "
            f"needs exactly one of two. Leave the flag out: the report has precision and recall of every class."
        )
    check_positive(config.positive or None, config.specificity, class_names)
    found = find_images(config.data, config.path_column, config.label_column, config.group_column, config.data_dir)
    if any(example.split for example in found):
        found = [example for example in found if example.split == "test"] or found
    unknown = sorted({label for example in found for label in example.labels} - set(class_names))
    if unknown:
        raise GraftError(
            f"--data {config.data}: the model does not know the classes {', '.join(unknown)}. "
            f"It knows {', '.join(class_names)}: rename the labels, or leave these out."
        )
    if is_multi_label(found) and not multi_label:
        several = next(example for example in found if len(example.labels) > 1)
        raise GraftError(
            f"--data {config.data}: {several.path} has the labels {'|'.join(several.labels)}, but the model was "
            f"trained to give one per image. Give data with one label each, or train on data with several."
        )
    return found


def table_of(found, class_names: list[str], multi_label: bool) -> pa.Table:
    """Labelled files as a table with the columns id, path and label."""
    labels = [sorted(class_names.index(label) for label in example.labels) for example in found]
    paths = [example.path for example in found]
    return pa.table(
        {
            "id": [content_id(path) for path in paths],
            "path": paths,
            "label": pa.array(labels, pa.list_(pa.int64())) if multi_label else [label for (label,) in labels],
        }
    )


def served_metrics(config: EvaluateConfig, class_names, thresholds, targets, probabilities: np.ndarray) -> dict:
    """The figures of the export's probabilities [n, classes] float32, whose logarithms are valid logits."""
    from pipelines.evaluate import evaluate
    from pipelines.evaluate_multi_label import evaluate_multi_label

    smallest = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(probabilities, smallest))
    if thresholds is not None:
        logits -= np.log(np.maximum(1 - probabilities, smallest))
        return evaluate_multi_label(targets, logits, probabilities >= thresholds, thresholds, class_names)
    return evaluate(
        targets.argmax(axis=1),
        logits,
        class_names,
        positive=config.positive or None,
        specificity=config.specificity,
    )
