"""Texts and their labels: manifests, folders, TFDS, Hugging Face, offline sets -> examples -> Splits. No TensorFlow.

Only the first use of a TFDS set starts it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re

import pyarrow as pa

from models import GraftError, offline
from models.offline_texts import text_data_file
from pipelines.manifests import TextExample, manifest_files, not_utf8, read_rows
from pipelines.sources import (
    check_skipped,
    check_two_classes,
    drop_small_classes,
    files_in_class_folders,
    is_multi_label,
    refuse_columns,
    renamed_columns,
)
from pipelines.splits import fingerprint, make_splits, rows_of
from pipelines.text_sets import huggingface_texts
from pipelines.tfds import PREFIX, tfds_texts

OFFLINE_TEXT_SETS = tuple(name for name, entry in offline.DATA.items() if entry["kind"] == "text")
NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?%?", re.IGNORECASE)


# ---------------------------------------------------------------- finding


def find_texts(
    data: str,
    text_column: str = "text",
    second_column: str = "",
    label_column: str = "label",
    group_column: str = "group",
    data_dir: str = "",
) -> list[TextExample]:
    """List the texts of a manifest, a folder, a TFDS set or an offline set, in their order there.

    Layouts: a manifest (CSV, TSV, JSONL, Parquet), a folder with {train,val,test}.{csv,tsv,jsonl,parquet}, of which
    train must be there, FOLDER/class/*.txt, FOLDER/{train,val,test}/class/*.txt, a folder of Hugging Face `datasets`.

    Args:
        second_column: of the second text, where an example is a pair of texts; "" where it is one text.
        text_column, label_column, group_column: what a table calls them.
        data_dir: folder of prepared TFDS sets ("": TFDS's own).

    Raises:
        GraftError: no such folder, manifest or set; a missing column; a text column of numbers; no texts; one class
            only; column names for data that has none; all that `read_rows` and the readers of sets raise.
    """
    renamed = renamed_columns(text=text_column, label=label_column, group=group_column)
    renamed |= {"--second-column": second_column} if second_column else {}
    if second_column == text_column:
        raise GraftError(f"--second-column {second_column}: this is the first text too. Name the column of the second.")
    columns = text_column, second_column, label_column
    if data.startswith(PREFIX):
        refuse_columns(renamed, ("--group-column",), f"the TFDS set {data}")
        found = tfds_texts(data, data_dir, *columns)
    elif (in_set := huggingface_texts(pathlib.Path(data), *columns, group_column)) is not None:
        found = in_set
    elif files := manifest_files(data):
        found = _read_manifests(files, *columns, group_column)
    elif data in OFFLINE_TEXT_SETS and not pathlib.Path(data).exists():
        others = tuple(flag for flag in renamed if flag != "--group-column")
        refuse_columns(renamed, others, f"the offline set {data}")
        found = _read_manifests({"": text_data_file(data)}, group_column=group_column)
    else:
        refuse_columns(renamed, tuple(renamed), f"--data {data}")
        found = _read_folders(data)
    check_two_classes(data, found, "texts of at least two labels")
    return found


def _read_manifests(
    files: dict[str, pathlib.Path],
    text_column: str = "text",
    second_column: str = "",
    label_column: str = "label",
    group_column: str = "group",
) -> list[TextExample]:
    """The examples of manifests; `files` as `pipelines.manifests.manifest_files` gives it."""
    inputs = {"--text-column": text_column} | ({"--second-column": second_column} if second_column else {})
    found = []
    for split, file in files.items():
        rows = read_rows(file, split, inputs, label_column, group_column, read_text_column)
        texts = [*rows.inputs, *[[None] * len(rows.splits)] * (2 - len(rows.inputs))]
        found += [
            TextExample(*cells, f"{file}, row {row}")
            for row, cells in enumerate(zip(rows.splits, rows.labels, *texts, rows.groups), 1)
        ]
    return found


def read_text_column(file: pathlib.Path, name: str, column: pa.ChunkedArray) -> list[str]:
    """A column of texts as they are, "" for what is missing.

    Raises:
        GraftError: the column holds something else than text, or texts that are all numbers.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return [""] * len(column)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise GraftError(f"{file}: column {name!r} holds {kind}, expected text. Name the texts with --text-column.")
    texts = [text or "" for text in column.to_pylist()]
    check_not_numbers(f"{file}: column {name!r}", texts)
    return texts


def check_not_numbers(what: str, texts: list[str]) -> None:
    """Raise GraftError where all texts that are not empty are numbers; one such column was taken for another."""
    numbers = [text for text in texts if text.strip()]
    if numbers and all(NUMBER.fullmatch(text.strip()) for text in numbers):
        raise GraftError(
            f"{what} holds numbers ({', '.join(numbers[:3])}, ...), expected text. Name the texts with --text-column."
        )


def _read_folders(data: str) -> list[TextExample]:
    found = []
    for example in files_in_class_folders(data, pathlib.Path(data), {".txt"}, "text", OFFLINE_TEXT_SETS):
        file = pathlib.Path(example.path)
        where = not_utf8(file)
        if where:
            raise GraftError(f"{file}: {where}. Save it as UTF-8, or remove it.")
        # The line break that editors end a file with is no part of the text.
        text = file.read_text(encoding="utf-8-sig").strip()
        found.append(TextExample(example.split, example.labels, text, where=example.path))
    return found


# ---------------------------------------------------------------- splitting


def load_texts(found: list[TextExample], min_per_class: int = 0):
    """Leave out empty texts, and split; returns `pipelines.data.Splits`.

    Its tables have the columns id (hash of the text, of both in a pair), text (and text_b of pairs), label (index
    into class_names; a list of indices in a multi-label set), group and weight.

    Args:
        found: as `find_texts` gives it.

    Raises:
        GraftError: more empty texts than max(1%, 3), a class with one text, nothing to validate or test with.
    """
    from pipelines.data import Splits

    found, dropped = drop_small_classes(found, min_per_class, "text")
    skipped = [{"path": example.where, "reason": "the text is empty"} for example in found if _is_empty(example)]
    check_skipped(skipped, len(found), "texts", "are empty")
    multi_label = is_multi_label(found)
    found, _ = drop_small_classes([example for example in found if not _is_empty(example)], min_per_class, "text")
    warnings = []
    if dropped:
        warnings.append(f"{len(dropped)} classes with fewer than {min_per_class} texts were left out: {dropped}.")
    if skipped:
        warnings.append(f"{len(skipped)} texts are empty and were skipped (skipped.csv says where).")
    inputs = [
        {
            "id": text_id(example.text, example.text_b),
            "text": example.text,
            **({} if example.text_b is None else {"text_b": example.text_b}),
        }
        for example in found
    ]
    rows, class_names = rows_of(found, inputs, multi_label)
    # By content, not by place: the same texts give the same batches in whatever order they come.
    rows.sort(key=lambda row: (row["id"], row["label"], row["group"], row["split"]))
    tables = make_splits(rows, class_names, warnings, "text")
    return Splits(
        **tables,
        class_names=class_names,
        fingerprint=fingerprint(tables),
        white_level=255,  # means nothing here
        skipped=skipped,
        warnings=warnings,
    )


def _is_empty(example: TextExample) -> bool:
    return not example.text.strip() or (example.text_b is not None and not example.text_b.strip())


def text_id(text: str, text_b: str | None = None) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text, or of both texts of a pair."""
    content = text if text_b is None else json.dumps([text, text_b])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
