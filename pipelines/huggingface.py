"""Sets as Hugging Face's `datasets` keeps them on disk -> examples of images, of sounds. Needs neither it nor TF.

Three layouts: what `save_to_disk` writes (Arrow files), Parquet shards as on the hub, and folders of files whose
labels stand in metadata.csv, .jsonl or .parquet. Plain class folders are none of them. What tables of images and of
texts share is here; `pipelines.text_sets` reads the texts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa

from models import GraftError
from pipelines.console import console
from pipelines.manifests import SPLIT_ALIASES, SUFFIXES, Example, open_table, read_manifests
from pipelines.records import Record, graft_splits, set_key, write_once

SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\b.*\.parquet")
NOUNS = {"Image": "images", "Audio": "clips"}  # kinds of columns of files, as `datasets` calls them
EITHER = " or ".join(NOUNS)  # bytes and path, in a table that does not say which
BATCH_ROWS = 64  # read at a time from Parquet, so that few images are in memory
LISTS = ("List", "LargeList", "Sequence")  # what `datasets` has called a list of values, over the years


class Columns(NamedTuple):
    """What is read of a table."""

    inputs: tuple[str, ...]  # the image or sound; the text, or both texts of a pair
    label: str
    group: str  # "" where the table has none
    class_names: list[str] | None  # None: the labels are text or numbers that speak for themselves


def huggingface_examples(
    folder: str | pathlib.Path, label_column: str = "label", group_column: str = "group", kind: str = "Image"
) -> list[Example] | None:
    """The images or sounds of a folder in a layout of `datasets`; None where the folder is in none of them.

    Images inside tables become files in the cache, bytes as they are; those that a table only names stay where
    they are. Splits are called as `pipelines.sources.graft_splits` says. Unlabelled images (no label, or -1 where
    labels have names) are left out.

    Args:
        label_column: column of the label; where there is none called "label", the only one whose classes have names.
        group_column: column of what must stay in one split.
        kind: a key of NOUNS.

    Raises:
        GraftError: damaged or missing files, no image column, no label column, images that are named but missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return None
    tables = saved_tables(folder) or parquet_tables(folder, functools.partial(_holds, kind))
    if tables:
        return _table_examples(folder, tables, label_column, group_column, kind)
    return _metadata_examples(folder, label_column, group_column, kind)


# ---------------------------------------------------------------- finding tables


def saved_tables(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Split -> Arrow files of what `save_to_disk` wrote; empty where the folder is none. A lone table has split ""."""
    if (folder / "dataset_dict.json").is_file():
        parts = {name: folder / name for name in _read_json(folder / "dataset_dict.json", "splits")}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        parts = {"": folder}
    else:
        return {}
    tables = {
        name: [part / entry["filename"] for entry in _read_json(part / "state.json", "_data_files")]
        for name, part in parts.items()
    }
    missing = [str(file) for files in tables.values() for file in files if not file.is_file()]
    if missing:
        raise GraftError(f"{missing[0]} is missing: {folder} says that it belongs to the set. Save or copy it again.")
    return tables


def parquet_tables(folder: pathlib.Path, is_wanted: Callable) -> dict[str, list[pathlib.Path]]:
    """Split -> Parquet shards in the folder or in its only folder of shards, such as data/; else empty.

    is_wanted: file -> whether a file that is called train.parquet or the like, as manifests are, is of this kind.
    """
    tables = _shards(folder)
    if tables:
        return tables
    whole = [file for file in sorted(folder.glob("*.parquet")) if file.stem in SPLIT_ALIASES and is_wanted(file)]
    if whole:
        return {file.stem: [file] for file in whole}
    configs = [part for part in sorted(folder.iterdir()) if part.is_dir() and _shards(part)]
    if len(configs) > 1:
        raise GraftError(
            f"--data {folder}: it holds several configurations: {', '.join(part.name for part in configs)}. "
            f"Give one of them, such as {configs[0]}."
        )
    return _shards(configs[0]) if configs else {}


def _shards(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Split -> files called SPLIT-00000-of-00002.parquet; all of them must be there."""
    tables = {}
    counts = {}
    for file in sorted(folder.glob("*.parquet")):
        match = SHARD.fullmatch(file.name)
        if match:
            tables.setdefault(match["split"], []).append(file)
            counts[match["split"]] = int(match["count"])
    for split, files in tables.items():
        if len(files) != counts[split]:
            raise GraftError(
                f"{folder}: {len(files)} of {counts[split]} files of the split {split} are there: "
                f"{', '.join(file.name for file in files)}. Copy or download all of them."
            )
    return tables


def _holds(kind: str, file: pathlib.Path) -> bool:
    with open_file(file) as (schema, _, _):
        return any(_is_of(kind, feature) for feature in _features(schema, None).values())


def _read_json(file: pathlib.Path, key: str):
    try:
        return json.loads(file.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(
            f"{file} could not be read: {error!r}. Expected what `datasets` writes, with {key!r}: save the set again."
        ) from error


# ---------------------------------------------------------------- reading tables


@contextlib.contextmanager
def open_file(file: pathlib.Path):
    """(schema, number of rows, function: names of columns -> batches of them) of an Arrow stream or a Parquet file.

    Raises GraftError where the file is damaged, inside the block too.
    """
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(file) as table:
                yield (
                    table.schema_arrow,
                    table.metadata.num_rows,
                    lambda names: table.iter_batches(BATCH_ROWS, None, names),
                )
        else:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_stream(source).read_all()  # stays on disk, which memory stands for
                yield table.schema, table.num_rows, lambda names: table.select(names).to_batches()
    except (pa.ArrowException, OSError) as error:
        raise GraftError(
            f"{file} could not be read: {error}. It is damaged: save, copy or download it again."
        ) from error


def _table_examples(folder, tables, label_column, group_column, kind) -> list[Example]:
    splits = graft_splits(tables)
    files = [file for split in splits for file in tables[split]]
    count = 0
    columns = {}
    for file in files:
        with open_file(file) as (schema, rows, _):
            count += rows
            columns[file] = choose_columns(file, schema, label_column, group_column, kind=kind)
    key = set_key(files, str(folder.resolve()), str(splits), str(list(columns.values())))

    def records():
        for split, graft_split in splits.items():
            for file in tables[split]:
                yield from _records(folder, file, columns[file], graft_split, NOUNS[kind])

    return write_once(f"huggingface-{folder.resolve().name}-{key}", count, records, NOUNS[kind])


def choose_columns(
    file: pathlib.Path,
    schema: pa.Schema,
    label_column: str,
    group_column: str,
    texts: tuple[str, ...] = (),
    kind: str = "Image",
) -> Columns:
    """What to read of a table: the only column of a kind; the label by name, or the only one whose classes have names.

    Args:
        texts: names of the text columns, in place of an image; kind: as of `huggingface_examples`.

    Raises:
        GraftError: none, or several and nothing to choose by; lists the columns that there are.
    """
    features = _features(schema, file.parent / "dataset_info.json")
    listed = ", ".join(f"{name} ({feature.get('_type', 'several')})" for name, feature in features.items())
    inputs = texts or tuple(name for name, feature in features.items() if _is_of(kind, feature))
    labels = [name for name, feature in features.items() if _element(feature).get("_type") == "ClassLabel"]
    for name in texts:
        if name not in features or schema.field(name).type not in (pa.string(), pa.large_string()):
            flag = "--text-column" if name == texts[0] else "--second-column"
            raise GraftError(
                f"{file}: expected a column of texts called {name!r}. Its columns: {listed}. "
                f"Name the right one with {flag}."
            )
    if len(inputs) != 1 and not texts:
        raise GraftError(
            f"{file}: expected one {kind.lower()} column, found {', '.join(inputs) or 'none'}. Its columns: {listed}. "
            f"Give a set with one {NOUNS[kind].removesuffix('s')} per row."
        )
    if label_column in features and _element(features[label_column]).get("_type") in ("ClassLabel", "Value"):
        labels = [label_column]
    elif label_column != "label":
        labels = []
    if len(labels) != 1:
        raise GraftError(
            f"{file}: expected a label column called {label_column!r}"
            + (", or one whose classes have names, found " + (", ".join(labels) or "none"))
            + f". Its columns: {listed}. Name the right one with --label-column."
        )
    if group_column not in features and group_column != "group":
        raise GraftError(f"{file} has no column {group_column!r}. Its columns: {listed}. Correct --group-column.")
    label = _element(features[labels[0]])
    class_names = label.get("names") or [str(number) for number in range(label.get("num_classes") or 0)]
    return Columns(inputs, labels[0], group_column if group_column in features else "", class_names or None)


def _features(schema: pa.Schema, info: pathlib.Path | None) -> dict[str, dict]:
    """Name -> description of each column: by dataset_info.json, else by the table's own note, else by its types."""
    if info and info.is_file():
        return {name: _described(feature) for name, feature in _read_json(info, "features").items()}
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
    if noted:
        return {name: _described(feature) for name, feature in noted.items()}
    described = {}
    for field in schema:
        values = field.type.value_type if pa.types.is_list(field.type) else field.type
        is_file = pa.types.is_struct(values) and {"bytes", "path"} <= {part.name for part in values}
        kind = EITHER if is_file and values is field.type else "several" if pa.types.is_nested(values) else "Value"
        described[field.name] = {"_type": kind}
    return described


def _described(feature) -> dict:
    """A feature as a dict with _type; older files write a list of values as a JSON list."""
    if isinstance(feature, list):
        return {"_type": "List", "feature": feature[0]}
    return feature if isinstance(feature.get("_type"), str) else {"_type": "several"}


def _element(feature: dict) -> dict:
    """What a list is a list of; anything else as it is."""
    inner = feature.get("feature")
    return inner if feature.get("_type") in LISTS and isinstance(inner, dict) else feature


def _is_of(kind: str, feature: dict) -> bool:
    return feature.get("_type") in (kind, EITHER)


def _records(folder: pathlib.Path, file: pathlib.Path, columns: Columns, split: str, noun: str) -> Iterator[Record]:
    wanted = [name for name in (*columns.inputs, columns.label, columns.group) if name]
    row = 0
    with open_file(file) as (_, _, batches):
        for batch in batches(list(dict.fromkeys(wanted))):
            for values in batch.to_pylist():
                row += 1
                where = f"{file}, row {row}"
                labels = labels_of_cell(where, values[columns.label], columns.class_names)
                image = _file(where, folder, values[columns.inputs[0]], noun)
                group = values[columns.group] if columns.group else None
                yield Record(split, labels, image, "" if group is None else str(group))


def labels_of_cell(where: str, value, class_names: list[str] | None) -> tuple[str, ...] | None:
    """The names of the labels of a row; None where it has none."""
    values = value if isinstance(value, list) else [value]
    if class_names is None:
        known = [str(label).strip() for label in values if label is not None and str(label).strip()]
    else:
        known = [label for label in values if label not in (None, -1)]
        wrong = [label for label in known if not 0 <= label < len(class_names)]
        if wrong:
            raise GraftError(
                f"{where}: label {wrong[0]}, but the set names only {len(class_names)} classes. Repair it."
            )
        known = [class_names[label] for label in known]
    if not known and not isinstance(value, list):
        return None
    return tuple(dict.fromkeys(known))


def _file(where: str, folder: pathlib.Path, value: dict | None, noun: str) -> bytes | pathlib.Path:
    value = value or {}
    if value.get("bytes"):
        return value["bytes"]
    if not value.get("path"):
        one = noun.removesuffix("s")
        raise GraftError(f"{where}: it holds no {one}, neither bytes nor a path. Fill it in, or remove the row.")
    for path in (pathlib.Path(value["path"]), folder / value["path"]):
        if path.is_file():
            return path
    raise GraftError(
        f"{where}: there is no file {value['path']}, which the table names in place of the content. Put it there, "
        f"or write the {noun} into the table with `save_to_disk` where they are."
    )


# ---------------------------------------------------------------- folders of files with metadata


def _metadata_examples(folder: pathlib.Path, label_column: str, group_column: str, kind: str) -> list[Example] | None:
    """Examples by metadata files with the column file_name, in the split folders or in the folder itself."""
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and part.name in SPLIT_ALIASES]
    files = {part.name: _metadata_file(part) for part in parts}
    files = {name: file for name, file in files.items() if file} or {"": _metadata_file(folder)}
    files = {name: file for name, file in files.items() if file}
    labelled = {name: file for name, file in files.items() if label_column in open_table(file)[0]}
    if not files or (not labelled and label_column == "label" and _only_folders(parts or [folder])):
        return None  # class folders, with metadata that say something else if there are any
    for name in sorted(set(files) - set(labelled)) if labelled else ():
        console.print(f"{files[name]} has no column {label_column!r}: the {NOUNS[kind]} of {name} are left out.")
    found = []
    for name, file in (labelled or files).items():
        for example in read_manifests({"": file}, "file_name", label_column, group_column):
            first = name or os.path.relpath(example.path, folder).split(os.sep)[0]
            found.append(example._replace(split=example.split or SPLIT_ALIASES.get(first, "")))
    names = {example.split for example in found}
    splits = {name: name for name in names} if "" in names else graft_splits(names)
    found = [example._replace(split=splits[example.split]) for example in found]
    return sorted(found, key=lambda example: example.path)


def _only_folders(folders: list[pathlib.Path]) -> bool:
    entries = [entry for folder in folders for entry in folder.iterdir()]
    return all(entry.is_dir() or entry.name.startswith((".", "metadata.")) for entry in entries)


def _metadata_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The metadata file of a folder that names files; None where there is none."""
    files = [folder / f"metadata{suffix}" for suffix in SUFFIXES]
    files = [file for file in files if file.is_file() and "file_name" in open_table(file)[0]]
    if len(files) > 1:
        raise GraftError(f"{folder}: {files[0].name} and {files[1].name} both name its files. Remove one.")
    return files[0] if files else None
