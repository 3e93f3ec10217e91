"""Manifests: tables of files or texts and their labels (CSV, TSV, JSONL, Parquet) -> examples. Needs no TensorFlow."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from models import GraftError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# What a split may be called, in a column, as a folder and as a file.
SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SHOWN_ROWS = 10  # most rows that an error names
BLOCK_BYTES = 1 << 26  # of a text file, read at a time: Arrow wants every row to be shorter


class Example(NamedTuple):
    """One labelled file."""

    split: str  # train, val, test, or "" where Graft splits
    labels: tuple[str, ...]  # one; several in a multi-label set
    path: str
    group: str = ""  # what must stay in one split: a patient, a customer; "" where none is given


class TextExample(NamedTuple):
    """One labelled text, or pair of texts."""

    split: str
    labels: tuple[str, ...]
    text: str
    text_b: str | None = None  # the second text; None where there are no pairs
    group: str = ""
    where: str = ""  # what messages call it: its file, or its table and row


class Rows(NamedTuple):
    """What is used of a table's rows, a list of one cell per row each."""

    splits: list[str]
    labels: list[tuple[str, ...]]
    groups: list[str]
    inputs: list[list[str]]  # a list per input column: paths, texts


def manifest_files(data: str) -> dict[str, pathlib.Path]:
    """The manifests that `data` stands for: {"": FILE}, or {split: file} of a folder that holds train.csv and the like.

    Empty where `data` is neither.

    Raises:
        GraftError: no such manifest, a file of another format, two files for one split.
    """
    path = pathlib.Path(data)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise GraftError(
            f"--data {data}: the format of this file is not known. A manifest is a "
            f"{', '.join(SUFFIXES)} file; else give a folder with one folder per class."
        )
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise GraftError(f"--data {data}: there is no such manifest. Give an existing file or folder.")
        return {"": path}
    files = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        split = SPLIT_ALIASES.get(file.stem)
        if split is None or file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        if split in files:
            raise GraftError(f"--data {data}: {files[split].name} and {file.name} are the same split. Remove one.")
        files[split] = file
    return files if "train" in files else {}


def read_manifests(
    files: dict[str, pathlib.Path], path_column: str = "path", label_column: str = "label", group_column: str = "group"
) -> list[Example]:
    """The examples of manifests, sorted by path.

    Paths are relative to their manifest's folder, or absolute. Rows are counted from 1, the header not.

    Args:
        files: as `manifest_files` gives it.

    Raises:
        GraftError: a manifest that cannot be read, is empty or lacks a column; rows without path, label or
            file, or with an unknown split; one path with different labels.
    """
    found = []
    for split, file in files.items():
        found += _read_manifest(file, split, path_column, label_column, group_column)
    rows_of = {}  # path -> where it came first, and its labels
    for where, example in found:
        first, labels = rows_of.setdefault(example.path, (where, example.labels))
        if set(labels) != set(example.labels):
            raise GraftError(
                f"{where}: {example.path} is labelled {'|'.join(example.labels)!r}, but {'|'.join(labels)!r} in "
                f"{first}. Give each file one label; where a file may have several, write them in one row: a|b."
            )
    return sorted((example for _, example in found), key=lambda example: example.path)


def _read_manifest(
    file: pathlib.Path, file_split: str, path_column: str, label_column: str, group_column: str
) -> list[tuple[str, Example]]:
    """(manifest and row, example) for every row; `file_split` is the split that the file's name gives, or ""."""
    inputs = {"--path-column": path_column}
    splits, labels, groups, (paths,) = read_rows(file, file_split, inputs, label_column, group_column)
    refuse_rows(
        file,
        [row for row, path in enumerate(paths, 1) if not path],
        "no path. Every row needs one: fill it in, or remove the row.",
    )
    full_paths = [str(file.parent / path) for path in paths]
    missing = [row for row, path in enumerate(full_paths, 1) if not os.path.isfile(path)]
    if missing:
        listed = "\n".join(f"  row {row}: {full_paths[row - 1]}" for row in missing[:SHOWN_ROWS])
        raise GraftError(
            f"{file}: {len(missing):,} of {len(paths):,} files do not exist. Paths are relative to the "
            f"manifest's folder, or absolute:\n{listed}" + ("\n  ..." if len(missing) > SHOWN_ROWS else "")
        )
    return [
        (f"{file}, row {row}", Example(*values))
        for row, values in enumerate(zip(splits, labels, full_paths, groups), 1)
    ]


def read_rows(
    file: pathlib.Path,
    file_split: str,
    inputs: dict[str, str],
    label_column: str,
    group_column: str,
    read_input: Callable[[pathlib.Path, str, pa.ChunkedArray], list[str]] | None = None,
) -> Rows:
    """The columns of a manifest that are used; rows are counted from 1, the header not.

    Args:
        file_split: the split that the file's name gives, or "".
        inputs: flag that names an input column -> its name.
        read_input: (file, name, column) -> cells; `column_text` where it is not given.

    Raises:
        GraftError: a manifest that cannot be read, is empty or lacks a column; rows without a label, or with an
            unknown split.
    """
    names, read = open_table(file)
    for flag, column in {**inputs, "--label-column": label_column}.items():
        if column not in names:
            raise GraftError(
                f"{file} has no column {column!r}; its columns: {', '.join(names)}. "
                f"Name the right one with {flag}, or rename it."
            )
    if group_column not in names and group_column != "group":
        raise GraftError(
            f"{file} has no column {group_column!r}; its columns: {', '.join(names)}. Correct --group-column."
        )
    wanted = dict.fromkeys([*inputs.values(), label_column, "split", group_column])
    wanted = [name for name in wanted if name in names]
    repeated = [name for name in wanted if names.count(name) > 1]
    if repeated:
        raise GraftError(f"{file} has several columns named {repeated[0]!r}. Rename all but one.")
    try:
        table = read(wanted)
    except (pa.ArrowException, OSError) as error:
        raise GraftError(_unreadable(file, error)) from error
    if not table.num_rows:
        columns = ", ".join([*inputs.values(), label_column])
        raise GraftError(f"{file} is empty: it has no rows. Expected one row per example, with the columns {columns}.")
    others = [name for name in (label_column, "split", group_column) if name in names]
    cells = {name: column_text(file, name, table.column(name)) for name in others}
    empty = [""] * table.num_rows
    splits = [SPLIT_ALIASES.get(cell.lower(), "" if not cell else None) for cell in cells.get("split", empty)]
    labels = [
        tuple(dict.fromkeys(label.strip() for label in cell.split("|") if label.strip()))
        for cell in cells[label_column]
    ]
    refuse_rows(
        file,
        [row for row, cell in enumerate(labels, 1) if not cell],
        "no label. Every row needs one: fill it in, or remove the row.",
    )
    unknown = [row for row, split in enumerate(splits, 1) if split is None]
    if unknown:
        refuse_rows(
            file,
            unknown,
            f"unknown split {cells['split'][unknown[0] - 1]!r}. Expected train, val (also valid, validation) "
            f"or test, or an empty cell where Graft should split.",
        )
    if file_split:
        other = [row for row, split in enumerate(splits, 1) if split not in ("", file_split)]
        refuse_rows(file, other, f"the split is not {file_split}, which the file's name says. Make them agree.")
        splits = [file_split] * table.num_rows
    read_input = read_input or column_text
    read_inputs = [read_input(file, name, table.column(name)) for name in inputs.values()]
    return Rows(splits, labels, cells.get(group_column, empty), read_inputs)


def refuse_rows(file: pathlib.Path, rows: list[int], message: str) -> None:
    """Raise GraftError naming the first rows, where there are any."""
    if rows:
        listed = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
        raise GraftError(f"{file}, row{'s' if len(rows) > 1 else ''} {listed}: {message}")


def column_text(file: pathlib.Path, name: str, column: pa.ChunkedArray) -> list[str]:
    """A column as text without blanks around it: 1 -> "1", true -> "true", ["a", "b"] -> "a|b", nothing -> ""."""
    import pyarrow.compute as compute

    if pa.types.is_list(column.type):
        try:
            column = compute.binary_join(column.cast(pa.list_(pa.string())), "|")
        except pa.ArrowException as error:
            raise GraftError(f"{file}: column {name!r} holds {column.type}, expected text.") from error
    if pa.types.is_floating(column.type):
        # Libraries that lack missing integers write them as not-a-number among floats; 3.0 becomes "3".
        column = compute.if_else(compute.is_nan(column), None, column)
    try:
        texts = column.cast(pa.string())
    except pa.ArrowException as error:
        raise GraftError(f"{file}: column {name!r} holds {column.type}, expected text.") from error
    return [(text or "").strip() for text in texts.to_pylist()]


def _unreadable(file: pathlib.Path, error: Exception) -> str:
    if file.suffix.lower() != ".parquet" and file.is_file() and (where := not_utf8(file)):
        error = where
    return f"{file} could not be read as {file.suffix[1:].upper()}: {error}. Repair it, or save it in another format."


def not_utf8(file: pathlib.Path) -> str:
    """Where a text file first is not UTF-8; "" where all of it is."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at its place {error.start + 1})"
    return ""


def open_table(file: pathlib.Path) -> tuple[list[str], Callable[[list[str]], pa.Table]]:
    """The names of a manifest's columns, and a function: wanted names -> their table.

    Raises:
        GraftError: the file is empty or cannot be read.
    """
    openers = {".csv": _open_text, ".tsv": _open_text, ".jsonl": _open_json_lines, ".parquet": _open_parquet}
    try:
        if not file.stat().st_size:
            raise GraftError(f"{file} is empty. Expected one row per example, with its label.")
        return openers[file.suffix.lower()](file)
    except (pa.ArrowException, OSError) as error:
        raise GraftError(_unreadable(file, error)) from error


def _open_text(file):
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    blocks = csv.ReadOptions(block_size=BLOCK_BYTES)
    with csv.open_csv(file, blocks, parse_options=parse) as reader:
        names = reader.schema.names

    def read(wanted):
        # Everything as text: a guessed type would turn the class "007" into 7.
        convert = csv.ConvertOptions(column_types={name: pa.string() for name in wanted}, include_columns=wanted)
        return csv.read_csv(file, blocks, parse_options=parse, convert_options=convert)

    return names, read


def _open_json_lines(file):
    from pyarrow import json

    if where := not_utf8(file):  # which Arrow's reader of JSON does not check
        raise pa.ArrowInvalid(where)
    blocks = json.ReadOptions(block_size=BLOCK_BYTES)
    table = json.read_json(file, blocks)
    dates = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
    if dates:  # read again as they are written: 2020-01-01 would become 2020-01-01 00:00:00
        schema = pa.schema([(name, pa.string()) for name in dates])
        table = json.read_json(file, blocks, parse_options=json.ParseOptions(explicit_schema=schema))
    return table.column_names, table.select


def _open_parquet(file):
    from pyarrow import parquet

    # Not parquet.read_table: it adds columns from folder names such as site=north/.
    with parquet.ParquetFile(file) as opened:
        names = opened.schema_arrow.names

    def read(wanted):
        with parquet.ParquetFile(file) as opened:
            return opened.read(columns=wanted)

    return names, read
