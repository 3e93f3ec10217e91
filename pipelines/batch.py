"""Answers of an exported model for files and texts: `graft predict`, and what `graft evaluate` shares with it.

They run the exported version itself, through TensorFlow's C API: no training code, no Python
TensorFlow, first answer within about a second.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import rich.table
from rich.markup import escape

from models import GraftError
from pipelines import facts, runs
from pipelines.batch_options import JobOptions, ModelInputs, parse
from pipelines.batch_texts import input_names, shortened, text_rows, texts_reader
from pipelines.common_options import flat
from pipelines.console import console, progress_bar
from pipelines.sound_files import SOUND_SUFFIXES, wav_of
from pipelines.sources import IMAGE_SUFFIXES

BATCH = 32  # examples per call of the model


@dataclasses.dataclass
class PredictConfig(ModelInputs):
    """Label files or texts with a run's exported model: graft predict runs/photos new/ --out predictions.csv"""

    out: str = ""
    """CSV file to write: the input's columns, then label (a|b where a model gives several), score (the largest
    probability, 0 to 1) and error; unsure (True or False) where a model marks answers. Of a speech model transcript,
    confidence (0 to 1) and error."""
    probabilities: bool = False
    """Also write one column per class with its probability; shards hold them always."""
    job: flat(JobOptions) = dataclasses.field(default_factory=JobOptions)


def predict(argv: list[str]) -> int:
    """`graft predict`: a table on the console, and a CSV file with --out; with --input, shards in --output."""
    config, beam_flags = parse(PredictConfig, argv, prog="graft predict")
    version = runs.find_version(config.run)
    if config.job.input:
        from pipelines.batch_job import run_job

        return run_job(config, version, "serving_default", beam_flags)
    details = read_details(version)
    if config.out and pathlib.Path(config.out).is_dir():
        raise GraftError(f"--out {config.out} is a folder; give the name of a CSV file.")
    if config.probabilities and details.get("kind") == "speech":
        raise GraftError("--probabilities: this model writes transcripts, each with a confidence. Leave the flag out.")
    rows, read, column = what_to_ask(config, details)
    answers = ask(version, len(rows), read)
    for row, answer in zip(rows, answers):
        row.update(columns_of(answer, details.get("class_names", ()), config.probabilities))
    if config.out:
        runs.write_csv(pathlib.Path(config.out), rows, list(rows[0]))
        console.print(f"{len(rows):,} answers in {config.out}")
    else:
        print_answers(rows, answers, column)
    print_failed([row["error"] for row in rows], details)
    return 0


def columns_of(answer: dict, class_names: list[str], probabilities: bool) -> dict:
    """The columns of an answer; of a recogniser, which has no probabilities, transcript, confidence and error."""
    if "transcript" in answer:
        return {**answer, "confidence": f"{answer['confidence']:.6f}"}
    columns = {"label": label_of(answer, class_names), "score": f"{answer['scores'][0]:.6f}", "error": answer["error"]}
    if answer["unsure"] is not None:
        columns["unsure"] = answer["unsure"]
    if probabilities:
        columns |= {f"p({name})": f"{p:.6f}" for name, p in zip(class_names, answer["probabilities"])}
    return columns


def print_failed(errors: list[str], details: dict) -> None:
    """Say how many have no answer, where there are any."""
    failed = sum(bool(error) for error in errors)
    if failed:
        noun = "texts" if "pairs" in details else "files"
        console.print(f"[yellow]{failed:,} of {len(errors):,} {noun} have no answer; the column error says why.")


def what_to_ask(config, details: dict) -> tuple[list[dict], object, str]:
    """What the command line names: its rows, a reader of them for `answers_of`, and the column that names a row.

    config: whatever has inputs, text, text_column and second_column.
    """
    if "pairs" in details:
        columns = [config.text_column, config.second_column][: 1 + details["pairs"]]
        rows = text_rows(config.inputs, config.text, columns, csv_rows)
        return rows, texts_reader(input_names(details), [[row[name] for row in rows] for name in columns]), columns[0]
    if config.text:
        raise GraftError(f"--text: this model takes {files_kind(details).noun}s. Give files, a folder, or a CSV file.")
    rows = input_rows(config.inputs, details)
    return rows, files_reader([row.pop(READ_FROM) for row in rows], details), "path"


READ_FROM = object()  # key, in an input row, of the path to read; never a column


class FilesKind(NamedTuple):
    """Files of a kind that models take."""

    noun: str
    input: str  # of serving_default
    suffixes: frozenset[str]
    prepare: Callable[[bytes], bytes]  # bytes of a file -> what the model is sent


def files_kind(details: dict) -> FilesKind:
    """What files a model takes; `details` as the export says of itself."""
    return FILE_KINDS["audio_bytes" if details.get("kind") in ("audio", "speech") else "image_bytes"]


def as_it_is(data: bytes) -> bytes:
    return data


def sent_sound(data: bytes) -> bytes:
    """WAV that the served model reads as it is; FLAC, OGG, MP3, ADPCM in WAV and so on as such WAV."""
    codec = int.from_bytes(data[data.find(b"fmt ") + 8 :][:2], "little")
    plain = data[:4] in (b"RIFF", b"RF64") and codec in (1, 3, 0xFFFE)  # PCM, float, either with a longer header
    return data if plain or not data else wav_of(data)


FILE_KINDS = {  # by the input of serving_default
    "image_bytes": FilesKind("image", "image_bytes", IMAGE_SUFFIXES, as_it_is),
    "audio_bytes": FilesKind("clip", "audio_bytes", SOUND_SUFFIXES, sent_sound),
}


def input_rows(inputs: tuple[str, ...], details: dict) -> list[dict]:
    """What the command line names -> rows with the column path, and those of a CSV file.

    Raises:
        GraftError: nothing named, a file that does not exist, no images in a folder, a CSV without `path`.
    """
    kind = files_kind(details)
    if len(inputs) == 1 and inputs[0].lower().endswith(".csv"):
        path = pathlib.Path(inputs[0])
        return [{**row, READ_FROM: path.parent / row["path"]} for row in csv_rows(path, ["path"])]
    paths = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in kind.suffixes and p.is_file())
            if not found:
                raise GraftError(f"{name}: no {kind.noun}s in this folder.")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise GraftError(f"{name}: there is no such file or folder.")
    if not paths:
        raise GraftError(f"Nothing to label: give {kind.noun} files, a folder, or a CSV file with a column `path`.")
    return [{"path": str(path), READ_FROM: path} for path in paths]


def csv_rows(path: pathlib.Path, columns: list[str]) -> list[dict]:
    """The rows of a CSV file. Raises GraftError where it cannot be read, is empty or lacks one of the columns."""
    csv.field_size_limit(runs.LONGEST_TEXT)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GraftError(f"{path} could not be read as CSV: {error}.") from error
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        there = ", ".join(rows[0]) if rows else "none"
        relative = " (relative to the CSV file)" if missing == ["path"] else ""
        raise GraftError(f"{path} needs rows and a column `{missing[0]}`{relative}; its columns: {there}.")
    return rows


def files_reader(paths: list[pathlib.Path], details: dict):
    """A function: (start, stop) -> what a model of files is asked, and why a file could not be read ("" if it was)."""

    kind = files_kind(details)

    def read(start: int, stop: int):
        batch = [read_bytes(path) for path in paths[start:stop]]
        return {kind.input: [kind.prepare(data) for data, _ in batch]}, [error for _, error in batch]

    return read


def ask(version: pathlib.Path, count: int, read) -> list[dict]:
    """Answers of the exported model in a version folder, as `answers_of` gives them."""
    from serving.session import Session

    with Session(version) as session:
        return answers_of(session, count, read)


def answers_of(model, count: int, read) -> list[dict]:
    """Answers of a Session or a Client, one per example: labels, scores, probabilities, chosen, unsure, error.

    Of a recogniser: transcript, confidence, error. chosen is None for a model that gives one label, unsure for one that
    does not say. An example that cannot be read gets its error and no label; its neighbours are not affected.

    Args:
        read: (start, stop) -> the inputs of these examples by name, and the error of each.
    """
    answers = []
    with progress_bar() as bar:
        task = bar.add_task("answers", total=count, note="")
        for start in range(0, count, BATCH):
            asked, errors = read(start, start + BATCH)
            answers += answers_in(model.run("serving_default", asked), errors)
            bar.update(task, advance=len(errors))
    return answers


def answers_in(outputs: dict, errors: list[str]) -> list[dict]:
    """The outputs of `serving_default` for one batch, as one dict per example; errors: of reading, "" where fine."""
    if "transcript" in outputs:
        return [
            {
                "transcript": outputs["transcript"][index].decode(),
                "confidence": float(outputs["confidence"][index]),
                "error": read_error or outputs["error"][index].decode(),
            }
            for index, read_error in enumerate(errors)
        ]
    return [
        {
            "labels": [label.decode() for label in outputs["labels"][index]],
            "scores": outputs["scores"][index],
            "probabilities": outputs["probabilities"][index],
            "chosen": outputs["chosen"][index] if "chosen" in outputs else None,
            "unsure": bool(outputs["unsure"][index]) if "unsure" in outputs else None,
            "error": read_error or outputs["error"][index].decode(),
        }
        for index, read_error in enumerate(errors)
    ]


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


def print_answers(rows: list[dict], answers: list[dict], column: str, most: int = 50) -> None:
    """A table on the console; column: what names a row."""
    table = rich.table.Table(box=None)
    if "transcript" in answers[0]:
        for title in ("file", "confidence", "transcript"):
            table.add_column(title, justify="right" if title == "confidence" else "left")
        for row, answer in zip(rows[:most], answers):
            cells = ["", f"[yellow]no answer[/] {escape(row['error'])}"] if row["error"] else []
            cells = cells or [f"{answer['confidence']:.3f}", escape(row["transcript"]) or "[dim]nothing"]
            table.add_row(escape(short(row[column])), *cells)
        print_table(table, len(rows) - most)
        return
    # Of several labels none is the first, so the likeliest are listed, chosen or not.
    first, others = (1, "next") if answers[0]["chosen"] is None else (0, "likeliest")
    for title in ("file" if column == "path" else column, "label", "score", others):
        table.add_column(title, justify="right" if title == "score" else "left")
    for row, answer in zip(rows[:most], answers):
        following = "  ".join(f"{l} {s:.2f}" for l, s in zip(answer["labels"][first:3], answer["scores"][first:3]))
        cells = [row["label"] or "[dim]none", f"{answer['scores'][0]:.3f}", following]
        named = short(row[column]) if column == "path" else shortened(row[column])
        table.add_row(named, *(["[yellow]no answer", "", row["error"]] if row["error"] else cells))
    print_table(table, len(rows) - most)


def print_table(table: rich.table.Table, more: int) -> None:
    """Print a table, and say how many rows it lacks."""
    console.print(table)
    if more > 0:
        console.print(f"... and {more:,} more; --out predictions.csv writes them all.")


def short(path: str, most: int = 30) -> str:
    """A path, or its last parts where it is long."""
    parts = pathlib.PurePath(path).parts
    while len(parts) > 1 and len(path) > most:
        parts = parts[1:]
        path = str(pathlib.PurePath("...", *parts))
    return path
