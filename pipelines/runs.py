"""Run folders: made once, never overwritten, and read back after training."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import re
import shutil

import pyarrow as pa

from models import GraftError
from models.offline import free_bytes
from pipelines.config import config_yaml
from pipelines.inspections import content_id
from pipelines.splits import INPUT_COLUMNS, SPLIT_NAMES, labels_of
from pipelines.stopping import EXIT_CODE
from pipelines.texts import text_id

# Newest first: the checkpoint of a phase exists only where it beat those before it. full and light are of --depth auto.
CHECKPOINTS = ("full", "light", "fine_tune", "head")
LONGEST_TEXT = 2**31 - 1  # characters that a cell of splits.csv may have; Python's csv would stop at 131,072


def choose_run_folder(out: str, data: str) -> pathlib.Path:
    """The folder of a new run: `out`, or runs/NAME OF THE DATA, then -2, -3. Nothing is written yet.

    Raises:
        GraftError: `out` exists already, or lies below something that is not a folder.
    """
    if out:
        folder = pathlib.Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise GraftError(f"--out {out} exists already and a run is never overwritten. Give another folder.")
    else:
        folder = free_name(pathlib.Path("runs"), data)
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise GraftError(f"--out {folder} cannot be made: {above} is a file, not a folder. Give another folder.")
    if not os.access(above, os.W_OK):
        raise GraftError(f"--out {folder} cannot be made: no right to write in {above}. Give another folder.")
    return folder


def free_name(parent: pathlib.Path, data: str) -> pathlib.Path:
    """PARENT/NAME OF THE DATA, or with -2, -3, ... where that is taken."""
    path = pathlib.Path(data.removeprefix("tfds:").replace(":", "-"))
    name = path.stem if path.is_file() else path.resolve().name if path.exists() else path.name
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder


def check_free_space(folder: pathlib.Path, needed_bytes: int) -> None:
    """Raise GraftError where the disk of `folder` has less free than a run needs."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    free = free_bytes(above)
    if free < needed_bytes:
        raise GraftError(
            f"The disk of {above} is full: {free / 1e6:.0f} MB free, a run needs about {needed_bytes / 1e6:.0f} MB "
            f"for checkpoints and the exported model. Free some space or give another --out."
        )


@contextlib.contextmanager
def explained(run_dir: pathlib.Path, workers: int = 1):
    """Around all that writes to a run folder: what stops it ends with a word on what was saved and how to go on.

    workers: that train together; a failure of what they do together is that of one which is gone.
    """
    try:
        yield
    except GraftError:
        raise
    except KeyboardInterrupt:
        raise stopped(run_dir, "Stopped.") from None
    except Exception as error:
        from pipelines.recovery import is_missing_file
        from serving.new_version import is_disk_full

        if is_disk_full(error):
            raise GraftError(
                f"The disk of {run_dir} is full: {shutil.disk_usage(run_dir).free / 1e6:.0f} MB free. What was "
                f"saved before is whole: free some space, then `graft resume {run_dir}` goes on."
            ) from error
        if is_missing_file(error):
            raise GraftError(
                f"{missing_file(error)} is gone, or cannot be read any more; it was there when the run began. Put it "
                f"back, then `graft resume {run_dir}` goes on."
            ) from error
        if workers > 1 and type(error).__name__ in GONE_ERRORS:
            raise stopped(run_dir, "Stopped: another worker is gone.") from error
        raise


# What TensorFlow raises where workers do something together, and one of them has died.
GONE_ERRORS = ("UnavailableError", "AbortedError", "InternalError", "CancelledError", "DeadlineExceededError")


def missing_file(error: Exception) -> str:
    """The path that an error is about, Python's or TensorFlow's, which has it in its text only."""
    path = getattr(error, "filename", None) or re.search(r"(/[^;\n]*); No such file", str(error))
    return str(path[1] if isinstance(path, re.Match) else path or "A data file")


def stopped(run_dir: pathlib.Path, what: str) -> GraftError:
    """The message for a run that can go on."""
    ways = f"`graft resume {run_dir}` goes on from there"
    if find_checkpoint(run_dir):
        ways += f"; `graft export {run_dir}` makes a model of the best weights so far"
    error = GraftError(f"{what} What was reached is saved: {ways}.")
    error.exit_code = EXIT_CODE
    return error


def start_run_folder(run_dir: pathlib.Path, config, splits, contract: dict | None = None, **more) -> None:
    """Make the run folder with what is known before training: config.yaml, skipped.csv, splits.csv, state.json.

    splits.csv names each example by its content hash and tells where it is: the path of a file, the text itself.
    contract: what training makes of the probe of `serving.contract`, for later exports to be held to.
    With `--report-inputs none` it holds no texts; then `graft export` has none to verify the served answers with.
    more: what else state.json is to hold.
    """
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_csv(run_dir / "skipped.csv", splits.skipped, ["path", "reason"])
    rows = [
        {
            **row,
            "split": name,
            "class": "|".join(splits.class_names[label] for label in labels_of(row)),
            "label": "|".join(str(label) for label in labels_of(row)),
            **({"path": os.path.abspath(row["path"])} if "path" in row else {}),
        }
        for name, table in zip(SPLIT_NAMES, splits)
        for row in table.to_pylist()
    ]
    inputs = [name for name in INPUT_COLUMNS if name in splits.train.column_names]
    hidden = [name for name in inputs if name.startswith("text") and config.report.report_inputs == "none"]
    columns = ["split", "class", "label", "group", "id", *(name for name in inputs if name not in hidden)]
    write_csv(run_dir / "splits.csv", rows, columns)
    state = {
        "kind": type(config).__name__.removesuffix("Config").lower(),
        "class_names": splits.class_names,
        "white_level": splits.white_level,
        "multi_label": splits.multi_label,
        "inputs": inputs,
        "working_directory": os.getcwd(),
        **({"kind": config.kind} if hasattr(config, "kind") else {}),
        "input_contract": contract,
        **more,
    }
    write_json(run_dir / "checkpoints" / "state.json", state)
    write_text(run_dir / "config.yaml", config_yaml(config))  # last: a folder that has it can be resumed


def kind_of(state: dict) -> str:
    """The kind of a run, which is the module of `pipelines` that made it; state: what `start_run_folder` noted."""
    return state.get("kind", "text" if "text" in state.get("inputs", ()) else "image")


def serving_name(run_dir: pathlib.Path) -> str:
    """The model's name in TensorFlow Serving: the run folder's, with what a URL cannot hold made "-"."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.absolute().name)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value) -> None:
    """Write JSON whole or not at all; keys stay in their order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: pathlib.Path, rows: list[dict], columns: list[str]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def save_checkpoint(run_dir: pathlib.Path, name: str, model) -> None:
    """Save the model's weights as checkpoints/NAME.weights.h5, whole or not at all."""
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    temporary = folder / f".tmp-{name}.weights.h5"
    try:
        model.save_weights(temporary)
        os.replace(temporary, folder / f"{name}.weights.h5")
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(run_dir: pathlib.Path) -> pathlib.Path | None:
    """The best weights that a run has saved, or None."""
    for name in CHECKPOINTS:
        path = run_dir / "checkpoints" / f"{name}.weights.h5"
        if path.is_file():
            return path
    return None


def read_split(run_dir: pathlib.Path, split: str, most: int | None = None, multi_label: bool = False) -> pa.Table:
    """The first rows of one split from the run's splits.csv, without examples that are gone or changed since.

    Of texts that the file does not hold (`--report-inputs none`) there are no rows.
    """
    csv.field_size_limit(LONGEST_TEXT)
    with open(run_dir / "splits.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        inputs = [name for name in INPUT_COLUMNS if name in reader.fieldnames]
        rows = (row for row in reader if row["split"] == split and _is_unchanged(row))
        rows = list(itertools.islice(rows, most))
    labels = [[int(label) for label in row["label"].split("|")] for row in rows]
    return pa.table(
        {
            "id": [row["id"] for row in rows],
            **{name: [row[name] for row in rows] for name in inputs},
            "label": pa.array(labels, pa.list_(pa.int64()))
            if multi_label
            else pa.array([label for (label,) in labels], pa.int64()),
            "weight": pa.array([1.0] * len(rows), pa.float32()),
        }
    )


def _is_unchanged(row: dict[str, str]) -> bool:
    """Whether the file or text of a row of splits.csv is still what its id says."""
    if "path" in row:
        return os.path.isfile(row["path"]) and content_id(row["path"]) == row["id"]
    return "text" in row and text_id(row["text"], row.get("text_b")) == row["id"]


def find_version(run: str) -> pathlib.Path:
    """The newest exported version of a run: RUN/serving/NAME/NUMBER.

    Args:
        run: a run folder, or the folder of an exported version itself.

    Raises:
        GraftError: no such folder, or nothing exported in it.
    """
    folder = pathlib.Path(run)
    if (folder / "saved_model.pb").is_file():
        return folder
    if not folder.is_dir():
        raise GraftError(
            f"{run}: there is no such run folder. Give the folder that `graft image` or `graft text` wrote, such as "
            f"runs/photos."
        )
    versions = [path.parent for path in folder.glob("serving/*/*/saved_model.pb") if path.parent.name.isdecimal()]
    if not versions:
        hint = (
            f"Make one with `graft export {run}`." if find_checkpoint(folder) else "Train first: `graft image --help`."
        )
        raise GraftError(f"{run}: this run holds no exported model. {hint}")
    return max(versions, key=lambda path: int(path.name))
