"""What a batch job is asked: the rows of a folder, a manifest, TFRecords or a TFDS set, and the reading of one row.

A row names its input and holds no image or sound: {"id", "error"} and {"path"} of a file, {"path", "place", "length"}
of a record, or the model's texts. Rows with an error cannot be read, and are listed all the same.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator

from models import GraftError
from pipelines.batch import FILE_KINDS, read_bytes
from pipelines.manifests import SUFFIXES, column_text, open_table
from pipelines.tfds import PREFIX, VERSION, find_prepared
from pipelines.tfrecords import features_of, index_records, read_record

FILE_FEATURES = {  # the served model's own name, tf.Example's convention, TFDS's
    "image_bytes": ("image_bytes", "image/encoded", "image"),
    "audio_bytes": ("audio_bytes", "audio/encoded", "audio"),
}


def job_rows(options, names: tuple[str, ...], text_columns: tuple[str, ...]) -> Iterator[dict]:
    """The rows of `--input`, in an order that depends on nothing but what is there.

    Args:
        options: pipelines.batch_options.JobOptions.
        names: the inputs of the model: image_bytes, audio_bytes, text, or text_a and text_b.
        text_columns: what a table or record calls the texts.

    Raises:
        GraftError: nothing there, or of a kind that the model does not take; a table without the column.
    """
    given = options.input
    files = FILE_KINDS.get(names[0])
    path = pathlib.Path(given)
    if given.startswith(PREFIX):
        return record_rows(given, tfds_files(given, options.data_dir), features_asked(options, names, text_columns))
    if "://" in given:
        raise GraftError(f"--input {given}: only paths are read, no URLs. Mount it as a folder, or copy it.")
    if path.is_dir():
        records = sorted(file for file in path.iterdir() if ".tfrecord" in file.name and file.is_file())
        if records:
            return record_rows(given, records, features_asked(options, names, text_columns))
        return folder_rows(path, files.suffixes if files else {".txt"}, len(names))
    if not path.is_file():
        raise GraftError(f"--input {given}: there is no such file or folder.")
    if path.suffix.lower() in SUFFIXES:
        return path_rows(path, options.path_column) if files else text_rows(path, names, text_columns)
    if ".tfrecord" in path.name:
        return record_rows(given, [path], features_asked(options, names, text_columns))
    raise GraftError(
        f"--input {given}: the kind of this file is not known. Expected a folder, a manifest ({', '.join(SUFFIXES)}) "
        f"or a file with .tfrecord in its name."
    )


def features_asked(options, names, text_columns) -> list[tuple[str, ...]]:
    """For each input of the model, the features of a record that may hold it; the first one that is there counts."""
    if names[0] in FILE_FEATURES:
        return [(options.file_feature,) if options.file_feature else FILE_FEATURES[names[0]]]
    return [(column,) for column in text_columns]


# ---------------------------------------------------------------- listing


def folder_rows(folder: pathlib.Path, suffixes, texts: int) -> Iterator[dict]:
    """A row per file of a folder and those below; links that lead nowhere are listed too, and fail later."""
    if texts == 2:
        raise GraftError(f"--input {folder}: this model takes pairs of texts; give a manifest with both columns.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.is_dir())
    if not found:
        raise GraftError(f"--input {folder}: no {', '.join(sorted(suffixes))} files in this folder.")
    # A name that is not UTF-8 stays so in path; an id goes into Parquet, which takes nothing else.
    ids = (str(path).encode("utf-8", "replace").decode() for path in found)
    return ({"id": name, "path": os.path.abspath(path), "error": ""} for name, path in zip(ids, found))


def path_rows(file: pathlib.Path, column: str) -> Iterator[dict]:
    """A row per row of a manifest of files; paths are relative to its folder."""
    for number, cell in enumerate(table_columns(file, [column], "--path-column", column_text)[0], 1):
        path = os.path.abspath(file.parent / cell) if cell else ""
        error = "" if cell else f"no path in the column {column!r}"
        yield {"id": cell or f"{file.name}#{number}", "path": path, "error": error}


def text_rows(file: pathlib.Path, names: tuple[str, ...], columns: tuple[str, ...]) -> Iterator[dict]:
    """A row per row of a manifest of texts, FILE#ROW, counted from 1."""
    from pipelines.texts import read_text_column

    read = table_columns(file, list(columns), "--text-column and --second-column", read_text_column)
    for number, texts in enumerate(zip(*read), 1):
        yield {"id": f"{file.name}#{number}", **dict(zip(names, texts)), "error": ""}


def table_columns(file: pathlib.Path, columns: list[str], flag: str, read_column) -> list[list[str]]:
    """Columns of a manifest as lists of cells; read_column: (file, name, column) -> cells."""
    import pyarrow as pa

    there, read = open_table(file)
    for column in columns:
        if there.count(column) != 1:
            found = "several columns" if column in there else "no column"
            raise GraftError(f"{file} has {found} {column!r}; it has: {', '.join(there)}. Name the right one: {flag}.")
    try:
        table = read(columns)
    except (pa.ArrowException, OSError) as error:
        raise GraftError(f"{file} could not be read: {error}. Repair it, or save it in another format.") from error
    return [read_column(file, column, table.column(column)) for column in columns]


def record_rows(given: str, files: list[pathlib.Path], features: list[tuple[str, ...]]) -> Iterator[dict]:
    """A row per record, FILE#NUMBER, counted from 1. Raises GraftError where the first record lacks the features."""
    checked = False
    for file in files:
        path = os.path.abspath(file)
        for number, (place, length, error) in enumerate(index_records(file), 1):
            if not checked and not error:
                with open(file, "rb") as opened:
                    _, problem = values_of_record(opened, place, length, features)
                if problem:
                    raise GraftError(f"--input {given}: the first record of {file} {problem}.")
                checked = True
            yield {"id": f"{file.name}#{number}", "path": path, "place": place, "length": length, "error": error}


def tfds_files(given: str, data_dir: str) -> list[pathlib.Path]:
    """The TFRecord files of a prepared TFDS set, all splits."""
    match = re.fullmatch(rf"{PREFIX}(\w+)(?:/([^/:]+))?(?::({VERSION.pattern}))?", given)
    if not match:
        raise GraftError(f"--input {given}: expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION.")
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = find_prepared(given, root, *match.groups(default=""))
    if folder is None:
        raise GraftError(
            f"--input {given}: {root} holds no such prepared set. Prepare it (`tfds build "
            f"{given.removeprefix(PREFIX)}`), or name the folder of prepared sets with --data-dir."
        )
    files = sorted(file for file in folder.iterdir() if ".tfrecord" in file.name)
    if not files:
        raise GraftError(f"--input {given}: {folder} holds no TFRecord files; prepare the set with TFDS's own format.")
    return files


# ---------------------------------------------------------------- reading


def rows_reader(rows: list[dict], names: tuple[str, ...], features: list[tuple[str, ...]]):
    """A function: (start, stop) -> what the model is asked, by input, and the error of each row, "" where it is good.

    A row with an error is asked as an empty string, so that batches keep their size.
    """

    def read(start: int, stop: int):
        batch = [read_row(row, names, features) for row in rows[start:stop]]
        asked = {name: [values[place] for values, _ in batch] for place, name in enumerate(names)}
        return asked, [error for _, error in batch]

    return read


def read_row(row: dict, names, features) -> tuple[list[bytes], str]:
    """The values of a row by input, and why it has none, "" where it has."""
    files, error = FILE_KINDS.get(names[0]), row["error"]
    values = [b""] * len(names)
    if error:
        return values, error
    if "place" in row:
        values, error = read_values(row, features)
    elif "path" in row:
        data, error = read_bytes(pathlib.Path(row["path"]))
        if not files and not error:
            data, error = decoded(data)
        values = [data]
    else:
        values = [row[name].encode("utf-8", "surrogatepass") for name in names]
    if files and not error:
        values = [files.prepare(data) for data in values]
    elif not error:
        empty = [name for name, value in zip(names, values) if not value.strip()]
        error = "" if not empty else "the text is empty" if len(names) == 1 else f"{' and '.join(empty)}: empty"
    return (values, "") if not error else ([b""] * len(names), error)


def decoded(data: bytes) -> tuple[bytes, str]:
    """The bytes of a .txt file as those of its text: no mark at the start, no line break at the end, UTF-8."""
    try:
        return data.decode("utf-8-sig").strip().encode(), ""
    except UnicodeDecodeError as error:
        return b"", f"not UTF-8: byte 0x{data[error.start]:02x} at place {error.start + 1:,}"


def read_values(row: dict, features) -> tuple[list[bytes], str]:
    """The values of a row that is a record."""
    try:
        with open(row["path"], "rb") as file:
            return values_of_record(file, row["place"], row["length"], features)
    except OSError as error:
        return [b""] * len(features), f"cannot be read: {error.strerror}"


def values_of_record(file, place: int, length: int, features) -> tuple[list[bytes], str]:
    """One bytes value per entry of `features`, and what is wrong with the record, "" where nothing is."""
    nothing = [b""] * len(features)
    data = read_record(file, place, length)
    if data is None:
        return nothing, "is damaged: its checksum is wrong"
    there = features_of(data)
    if there is None:
        return nothing, "is no tf.train.Example"
    values = []
    for candidates in features:
        name = next((name for name in candidates if name in there), None)
        if name is None:
            has = ", ".join(sorted(there))
            return nothing, f"has no feature {' or '.join(candidates)}; it has {has}"
        if len(there[name]) != 1 or not isinstance(there[name][0], bytes):
            return nothing, f"has no single string in its feature {name}"
        values.append(there[name][0])
    return values, ""
