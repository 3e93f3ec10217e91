"""`graft evaluate`: an exported model scored on other labelled data, with the report that follows training."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import numpy as np
import pyarrow as pa
import tyro

from models import GraftError
from pipelines import facts, runs
from pipelines.batch import ask, files_reader, label_of, read_details
from pipelines.batch_texts import input_names, labelled_texts, table_of_texts, texts_reader
from pipelines.console import console
from pipelines.data import targets_of
from pipelines.inspections import content_id
from pipelines.manifests import Example
from pipelines.mistakes import worst_mistakes
from pipelines.sounds import find_sounds
from pipelines.sources import find_images, is_multi_label


@dataclasses.dataclass
class EvaluateConfig:
    """Score a run's exported model on other labelled data: graft evaluate runs/photos --data clinic-b/"""

    run: tyro.conf.Positional[str]
    """Run folder, or the folder of an exported version."""
    data: str
    """Folder of class folders (of {train,val,test}/class folders: the test part), a manifest (CSV, TSV, JSONL or
    Parquet; with a column split: the test part), or an offline set; images or texts, as the model takes."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    text_column: str = "text"
    """Column of a manifest with the texts, for a text model; with what is said, for a speech model."""
    second_column: str = ""
    """Column of a manifest with the second texts (empty: text_b, for a text model that takes pairs)."""
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
    if details.get("kind") == "speech":
        from pipelines.speech_report import evaluate_speech

        return evaluate_speech(config, version, details)
    class_names = details["class_names"]
    thresholds = np.array(details["thresholds"], np.float32) if "thresholds" in details else None
    found = labelled_files(config, details)
    kind = "text" if "pairs" in details else details.get("kind", "image")
    out, found, answers, skipped = answer_all(config, version, details, found)
    table = table_of(found, class_names, multi_label=thresholds is not None)
    probabilities = np.stack([answer["probabilities"] for answer in answers])
    targets = targets_of(table, len(class_names))
    metrics = served_metrics(config, class_names, thresholds, targets, probabilities)
    gathered = {
        "title": title_of(config, version),
        "kind": kind,
        "created": facts.now(),
        "command": f"graft evaluate {config.run} --data {config.data}",
        "verdicts": [],
        "warnings": skipped_warning(skipped),
        "class_names": class_names,
        "examples": {"test": len(found), "skipped": len(skipped)},
        "class_counts": {"test": targets.sum(axis=0).astype(int).tolist()},
        "metrics": {"test": metrics},
        "mistakes": worst_mistakes(
            table, probabilities, class_names, details.get("white_level", 255), config.report_inputs, thresholds
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    runs.write_csv(out / "skipped.csv", skipped, ["path", "reason"])
    rows = [
        {
            ("example" if kind == "text" else "path"): name_of(example),
            "true": facts.chosen_labels(class_names, truth > 0),
            "label": label_of(answer, class_names),
            "score": f"{answer['scores'][0]:.6f}",
        }
        for example, truth, answer in zip(found, targets, answers)
    ]
    runs.write_csv(out / "predictions.csv", rows, list(rows[0]))
    report = write_report(out, gathered)
    runs.write_json(out / "metrics.json", {"created": gathered["created"], "class_names": class_names, "test": metrics})
    console.print(f"[bold]{facts.headline(metrics)}[/] on {len(found):,} {facts.NOUNS[kind]}   {report}")
    return 0


def answer_all(config: EvaluateConfig, version: pathlib.Path, details: dict, found: list) -> tuple:
    """The folder to write, the labelled examples that have an answer, the answers, and path and reason of the others.

    Raises:
        GraftError: none has an answer, --out is taken.
    """
    out = config.out or str(runs.free_name(pathlib.Path(config.run) / "evaluations", config.data))
    out = runs.choose_run_folder(out, "")
    answers = ask(version, len(found), reader_of(found, details))
    skipped = [{"path": name_of(e), "reason": a["error"]} for e, a in zip(found, answers) if a["error"]]
    if len(skipped) == len(found):
        raise GraftError(f"--data {config.data}: none of the {len(found)} files could be read, the first: {skipped[0]}")
    found, answers = zip(*((e, a) for e, a in zip(found, answers) if not a["error"]))
    return out, found, answers, skipped


def title_of(config: EvaluateConfig, version: pathlib.Path) -> str:
    return f"{version.parent.name} on {pathlib.Path(config.data).name}"


def skipped_warning(skipped: list[dict]) -> list[str]:
    return [f"{len(skipped)} files could not be read and were skipped (skipped.csv says why)."] if skipped else []


def test_part(found: list) -> list:
    """The test part of labelled examples, where they have one."""
    return [example for example in found if example.split == "test"] or found


def name_of(example) -> str:
    """What messages call a labelled example: its file, or its table and row."""
    return example.path if isinstance(example, Example) else example.where


def reader_of(found: list, details: dict):
    """How labelled examples are put to the model, as `ask` wants it."""
    if "pairs" in details:
        columns = [[example.text for example in found], [example.text_b for example in found]]
        return texts_reader(input_names(details), columns[: 1 + details["pairs"]])
    return files_reader([pathlib.Path(example.path) for example in found], details)


def labelled_files(config: EvaluateConfig, details: dict) -> list:
    """The labelled examples to score, checked against what the model knows.

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
    found = find_labelled(config, details)
    unknown = sorted({label for example in found for label in example.labels} - set(class_names))
    if unknown:
        raise GraftError(
            f"--data {config.data}: the model does not know the classes {', '.join(unknown)}. "
            f"It knows {', '.join(class_names)}: rename the labels, or leave these out."
        )
    if is_multi_label(found) and not multi_label:
        several = next(example for example in found if len(example.labels) > 1)
        raise GraftError(
            f"--data {config.data}: {name_of(several)} has the labels {'|'.join(several.labels)}, but the model was "
            f"trained to give one. Give data with one label each, or train on data with several."
        )
    return found


def find_labelled(config, details: dict) -> list:
    """The labelled examples of --data, of the kind that the model takes: the test part where the data has one."""
    if "pairs" in details:
        return test_part(labelled_texts(config, details))
    find = find_sounds if details.get("kind") == "audio" else find_images
    return test_part(find(config.data, config.path_column, config.label_column, config.group_column, config.data_dir))


def table_of(found, class_names: list[str], multi_label: bool) -> pa.Table:
    """Labelled examples as a table with the columns id, path or text, and label."""
    labels = [sorted(class_names.index(label) for label in example.labels) for example in found]
    labels = pa.array(labels, pa.list_(pa.int64())) if multi_label else pa.array([label for (label,) in labels])
    if not isinstance(found[0], Example):
        return table_of_texts(found, labels)
    paths = [example.path for example in found]
    return pa.table({"id": [content_id(path) for path in paths], "path": paths, "label": labels})


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
