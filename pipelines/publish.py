"""`graft publish`, `graft rollback`, `graft versions`: a run's model in the folder that TF Serving watches."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
from typing import Literal

import rich.table
import tyro

from models import GraftError
from pipelines import runs
from pipelines.batch import READ_FROM, csv_rows, files_kind, input_rows, read_details
from pipelines.batch_texts import text_rows
from pipelines.console import console
from serving.config import MODELS_FILE
from serving.publish import list_versions, publish, read_about, rollback, shown_figure

TEXT_COLUMNS = ("text", "text_b")


@dataclasses.dataclass
class PublishConfig:
    """Verify a run's exported model and publish it as the next version: graft publish runs/photos --to repository/"""

    run: tyro.conf.Positional[str]
    """Run folder, or the folder of an exported or published version."""
    to: str
    """Repository: the folder that holds a folder per model, which TensorFlow Serving watches."""
    name: str = ""
    """The model's name there, part of its URL (empty: the run's)."""
    accept_worse: bool = False
    """Publish even what is worse than the served version on the same test set."""
    keep: int = 0
    """Afterwards keep the latest so many versions, 2 or more, and those with a label (0: keep all)."""
    label: Literal["none", "stable", "canary"] = "none"
    """Give the version this label in the repository's models.config; the first time the one served before becomes
    stable. A server that reads the file answers /labels/stable and /labels/canary."""
    server_folder: str = "/models"
    """Where the server finds the repository, for a models.config that lacks the model; as in the Docker image."""
    batch_sizes: tuple[int, ...] = ()
    """The only batch sizes to form, filling others up to the next one, as suits GPUs: 1 8 32 (none: any up to 32). For
    the warm-up requests, and for a server with --enable_per_model_batching_parameters."""
    warmup_from: tuple[str, ...] = ()
    """Real inputs for the warm-up requests, which are published with the model: images, folders of images, .txt files
    or a CSV file (none: made up)."""


@dataclasses.dataclass
class RollbackConfig:
    """Serve an older version again: graft rollback repository/ photos"""

    repository: tyro.conf.Positional[str]
    """Repository, as given to graft publish."""
    name: tyro.conf.Positional[str]
    """The model's name there."""
    to: int = 0
    """Number of the version to go back to (0: the one before the one that is served)."""


@dataclasses.dataclass
class VersionsConfig:
    """List the versions of a published model: graft versions repository/ photos"""

    repository: tyro.conf.Positional[str]
    """Repository, as given to graft publish."""
    name: tyro.conf.Positional[str]
    """The model's name there."""


def publish_run(argv: list[str]) -> int:
    """`graft publish`."""
    config = tyro.cli(PublishConfig, args=argv, prog="graft publish")
    source = runs.find_version(config.run)
    details = read_details(source)
    name, about = config.name or source.absolute().parent.name, about_version(source, details)
    samples = warmup_samples(config.warmup_from, details) if config.warmup_from else []
    with console.status("verifying and publishing"):
        version, done = publish(
            source,
            config.to,
            name,
            about,
            details,
            warmup_samples=samples,
            accept_worse=config.accept_worse,
            keep=config.keep,
            label="" if config.label == "none" else config.label,
            server_folder=config.server_folder,
            batch_sizes=config.batch_sizes,
        )
    if done["before"] is not None and not done["compared"]:
        console.print(
            f"[yellow]Note: which one is better, this or version {done['before']}, is not known: they were not "
            f"measured on the same test set."
        )
    if done["deleted"]:
        console.print(f"Deleted version{'s' * (len(done['deleted']) > 1)} {', '.join(map(str, done['deleted']))}.")
    console.print(
        f"Verified for TensorFlow Serving {done['target']}, {done['warmup_requests']} warm-up requests   {version}"
    )
    if not done["served"]:
        console.print(
            f"{pathlib.Path(config.to) / MODELS_FILE} keeps another version as the one that answers. "
            f"Once this one has proved itself: graft rollback {config.to} {name} --to {version.name}"
        )
    return 0


def rollback_version(argv: list[str]) -> int:
    """`graft rollback`."""
    config = tyro.cli(RollbackConfig, args=argv, prog="graft rollback")
    with console.status("verifying"):
        version, number = rollback(config.repository, config.name, config.to or None)
    if int(version.name) == number:
        console.print(f"stable is version {number} now, in {pathlib.Path(config.repository) / MODELS_FILE}")
    else:
        console.print(f"Version {number} is served again, as the newest version: {version}")
    return 0


def print_versions(argv: list[str]) -> int:
    """`graft versions`."""
    config = tyro.cli(VersionsConfig, args=argv, prog="graft versions")
    table = rich.table.Table(box=None)
    for title in ("number", "published (UTC)", "accuracy", "backbone", "labels", "size"):
        table.add_column(title, justify="right" if title in ("number", "size") else "left", no_wrap=True)
    for row in list_versions(config.repository, config.name):
        test, marks = row["test"], [*row["labels"], *(["served"] if row["served"] else [])]
        figure = ""
        if test:
            metric = test["headline"]["metric"].replace("_", " ")
            figure = shown_figure(test) + ("" if metric == "accuracy" else f" {metric}")
        again = f" (= {row['copy_of']})" if row["copy_of"] else ""
        when = (row["published"] or "").replace("T", " ")[: len("2026-11-24 05:05")]  # UTC
        size = f"{row['bytes'] / 1e6:,.1f} MB"
        table.add_row(f"{row['number']}{again}", when, figure, row["backbone"] or "", ", ".join(marks), size)
    console.print(table)
    return 0


def about_version(version: pathlib.Path, details: dict) -> dict:
    """What is known of a version, as `serving.publish.publish` stores it: from its run, or from where it is published.

    Of a run that was stopped before its evaluation, and of a folder that lies in no run, only what the export says.
    """
    known = read_about(version)
    if known:
        return {key: value for key, value in known.items() if key not in ("published", "copy_of")}
    run_dir = version.absolute().parents[2]  # RUN/serving/NAME/NUMBER
    if not (run_dir / "metrics.json").is_file() or not (run_dir / "splits.csv").is_file():
        return {"backbone": details["backbone"]}
    metrics = json.loads((run_dir / "metrics.json").read_text("utf-8"))
    headline = {key: metrics["test"]["headline"][key] for key in ("metric", "value", "half_width")}
    return {
        "run": run_dir.name,
        "trained": metrics["created"],
        "backbone": metrics["backbone"]["name"],
        "test": {
            "fingerprint": test_fingerprint(run_dir),
            "examples": metrics["test"]["examples"],
            "headline": headline,
        },
    }


def test_fingerprint(run_dir: pathlib.Path) -> str:
    """SHA-256 of the contents and classes of a run's test set; its order and the other splits play no part."""
    csv.field_size_limit(runs.LONGEST_TEXT)
    with open(run_dir / "splits.csv", newline="", encoding="utf-8") as file:
        lines = sorted(f"{row['id']}\t{row['class']}\n" for row in csv.DictReader(file) if row["split"] == "test")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def warmup_samples(inputs: tuple[str, ...], details: dict) -> list:
    """Real inputs of a model: bytes of files or texts, tuples of bytes for pairs of texts.

    Raises GraftError for files that cannot be read.
    """
    if "pairs" in details:
        columns = list(TEXT_COLUMNS[: 1 + details["pairs"]])
        samples = [
            tuple(row[column].encode() for column in columns) for row in text_rows(inputs, (), columns, csv_rows)
        ]
        return samples if details["pairs"] else [text for (text,) in samples]
    try:
        prepare = files_kind(details).prepare
        return [prepare(pathlib.Path(row[READ_FROM]).read_bytes()) for row in input_rows(inputs, details)]
    except OSError as error:
        raise GraftError(f"--warmup-from {error.filename}: cannot be read ({error.strerror})") from error
