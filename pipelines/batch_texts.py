"""The part of `graft predict` and `graft evaluate` that is about texts: which there are, and how a model is asked."""

from __future__ import annotations

import pathlib

import pyarrow as pa

from models import GraftError
from pipelines.manifests import TextExample
from pipelines.texts import find_texts, text_id

SHOWN_CHARACTERS = 40


def text_rows(inputs: tuple[str, ...], texts: tuple[str, ...], columns: list[str], read_csv) -> list[dict]:
    """What the command line names -> rows with the texts' columns, and those of a CSV file.

    Args:
        inputs: one CSV file, or .txt files; texts: texts themselves, of a model that takes one each.
        columns: the names of the columns, one or two.
        read_csv: (path, columns) -> rows.

    Raises:
        GraftError: nothing named, a file that cannot be read, a CSV without the columns, pairs that are no table.
    """
    if len(inputs) == 1 and inputs[0].lower().endswith(".csv") and not texts:
        return read_csv(pathlib.Path(inputs[0]), columns)
    if len(columns) == 2:
        raise GraftError(
            f"This model takes pairs of texts: give one CSV file with the columns {' and '.join(columns)}."
        )
    rows = [{columns[0]: text} for text in texts]
    for name in inputs:
        try:
            # As in training: the line break that editors end a file with is no part of the text.
            rows.append({"path": name, columns[0]: pathlib.Path(name).read_text("utf-8-sig").strip()})
        except (OSError, UnicodeDecodeError) as error:
            raise GraftError(
                f"{name}: cannot be read as a text file ({error}). Give .txt files, a CSV file with a column "
                f"{columns[0]}, or --text 'the text itself'."
            ) from error
    if not rows:
        raise GraftError(
            f"Nothing to label: give --text 'a text', .txt files, or a CSV file with a column {columns[0]}."
        )
    return rows


def input_names(details: dict) -> tuple[str, ...]:
    """The inputs of a text model's serving_default, in order; `details` as the export says of itself."""
    return ("text_a", "text_b") if details["pairs"] else ("text",)


def texts_reader(names: tuple[str, ...], columns: list[list[str]]):
    """A function: (start, stop) -> what the model is asked, and no errors. columns: the texts by input."""

    def read(start: int, stop: int):
        asked = {name: [text.encode() for text in column[start:stop]] for name, column in zip(names, columns)}
        return asked, [""] * len(columns[0][start:stop])

    return read


def labelled_texts(config, details: dict) -> list[TextExample]:
    """The labelled texts to score, pairs where the model takes pairs."""
    second = config.second_column or ("text_b" if details["pairs"] else "")
    return find_texts(
        config.data, config.text_column, second, config.label_column, config.group_column, config.data_dir
    )


def table_of_texts(found: list[TextExample], labels: pa.Array) -> pa.Table:
    """Labelled texts as a table with the columns id, text (and text_b) and label."""
    second = {} if found[0].text_b is None else {"text_b": [example.text_b for example in found]}
    ids = [text_id(example.text, example.text_b) for example in found]
    return pa.table({"id": ids, "text": [example.text for example in found], **second, "label": labels})


def shortened(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
