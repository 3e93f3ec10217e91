"""Texts in tables as Hugging Face's `datasets` keeps them on disk -> examples. Needs neither it nor TensorFlow."""

from __future__ import annotations

import pathlib

from pipelines.console import console
from pipelines.huggingface import choose_columns, labels_of_cell, open_file, parquet_tables, saved_tables
from pipelines.manifests import TextExample
from pipelines.records import graft_splits


def huggingface_texts(
    folder: pathlib.Path,
    text_column: str = "text",
    second_column: str = "",
    label_column: str = "label",
    group_column: str = "group",
) -> list[TextExample] | None:
    """The texts of a folder that `save_to_disk` wrote, or of Parquet shards as on the hub; None for other folders.

    Files called train.parquet and the like are of this kind where they note their columns as `datasets` does; other
    such files are manifests. Splits, labels and unlabelled rows are as of `pipelines.huggingface.huggingface_examples`.

    Raises:
        GraftError: damaged or missing files, no such text column, no label column.
    """
    if not folder.is_dir():
        return None
    tables = saved_tables(folder) or parquet_tables(folder, _notes_features)
    if not tables:
        return None
    texts = (text_column, second_column) if second_column else (text_column,)
    found, unlabelled = [], 0
    for split, graft_split in graft_splits(tables).items():
        for file in tables[split]:
            for example in _examples(file, graft_split, label_column, group_column, texts):
                if example.labels is None:
                    unlabelled += 1
                else:
                    found.append(example)
    if unlabelled:
        console.print(f"{unlabelled:,} texts without a label are left out.")
    return found


def _notes_features(file: pathlib.Path) -> bool:
    with open_file(file) as (schema, _, _):
        return b"huggingface" in (schema.metadata or {})


def _examples(file, split, label_column, group_column, texts):
    """Yields the rows of a table; labels is None where there is none."""
    row = 0
    with open_file(file) as (schema, _, batches):
        columns = choose_columns(file, schema, label_column, group_column, texts)
        wanted = dict.fromkeys(name for name in (*texts, columns.label, columns.group) if name)
        for batch in batches(list(wanted)):
            for values in batch.to_pylist():
                row += 1
                where = f"{file}, row {row}"
                labels = labels_of_cell(where, values[columns.label], columns.class_names)
                group = values[columns.group] if columns.group else None
                both = [values[name] or "" for name in texts] + [None] * (2 - len(texts))
                yield TextExample(split, labels, *both, "" if group is None else str(group), where)
