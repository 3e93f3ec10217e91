"""What lies inside other libraries' records and tables -> the cache: images as files, texts as a list; examples."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from models import GraftError, offline
from pipelines.console import console, progress_bar
from pipelines.manifests import SPLIT_ALIASES, Example, TextExample

# How files of each kind begin, and the ending that such a file gets; other kinds get .bin and are reported
# by the reader of images, as any file that it does not know.
MAGIC_BYTES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"RIFF....WEBP", ".webp"),
    (b"RIFF....WAVE", ".wav"),
    (b"fLaC", ".flac"),
    (b"OggS", ".ogg"),
    (b"ID3|\xff[\xe2-\xff]", ".mp3"),
    (b"II\\*\x00", ".tif"),
    (b"MM\x00\\*", ".tif"),
    (b"....ftyphei", ".heic"),
    (b"....ftypavif", ".avif"),
)


class Record(NamedTuple):
    """One image of a set, or one sound."""

    split: str  # train, val, test, or "" where Graft splits
    labels: tuple[str, ...] | None  # None: not labelled
    image: bytes | pathlib.Path  # an encoded image, a WAV file, or the file where it lies already
    group: str = ""


def graft_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits of a set that are used -> train, val or test; all -> "" where there is none to compare train with.

    Others than train, validation and test ("unsupervised") are used only where there are no such.
    """
    known = {name: SPLIT_ALIASES[name] for name in names if name in SPLIT_ALIASES}
    if "train" in known.values() and len(known) > 1:
        return known
    return dict.fromkeys(known or names, "")


def set_key(files: Iterable[pathlib.Path], *facts: str) -> str:
    """12 hexadecimal digits that change with the facts, and with the name, size or time of change of any file."""
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps([facts, stamps]).encode()).hexdigest()[:12]


def write_once(name: str, count: int, records: Callable[[], Iterable[Record]], noun: str = "images") -> list[Example]:
    """The records as files `SPLIT/CLASS/NUMBER.png` (or .jpg, ...) in the cache, and their examples by path.

    The bytes are written as they are, on first use; later calls read only the list. Whole or absent, as all
    in the cache. Images of several labels lie in SPLIT itself, and those that are files already stay where they are.

    Args:
        name: of the folder in the cache: it must change when the set does (`set_key`).
        count: of the records, for the progress bar.
        records: called where the folder is not there yet.
        noun: what they are called in messages.

    Raises:
        GraftError: no labelled image, or no room for the files.
    """

    def row_of(folder, number, record):
        return [record.split, record.labels, str(_write_image(folder, number, record)), record.group]

    folder, rows = _rows_once(name, count, records, row_of, noun)
    found = [Example(split, tuple(labels), str(folder / path), group) for split, labels, path, group in rows]
    return sorted(found, key=lambda example: example.path)


def write_texts_once(name: str, count: int, records: Callable[[], Iterable[TextExample]]) -> list[TextExample]:
    """As `write_once`, of texts: the examples in their order. labels None: not labelled."""

    def row_of(folder, number, record):
        return [record.split, record.labels, record.text, record.text_b, record.group, f"{name}, row {number + 1}"]

    _, rows = _rows_once(name, count, records, row_of, "texts")
    return [TextExample(split, tuple(labels), *others) for split, labels, *others in rows]


def _rows_once(name: str, count: int, records, row_of: Callable, noun: str) -> tuple[pathlib.Path, list[list]]:
    """The folder in the cache and the rows of its list, written on first use: row_of(folder, number, record)."""
    folder = offline.cache_folder() / "data" / _file_name(name)
    if not folder.is_dir():
        with offline.whole_or_nothing(folder) as temporary, progress_bar() as bar:
            task = bar.add_task(f"unpacking {noun}", total=count, note="")
            rows, unlabelled = [], 0
            for number, record in enumerate(records()):
                if record.labels is None:
                    unlabelled += 1
                else:
                    rows.append(row_of(temporary, number, record))
                bar.update(task, completed=number + 1)
            if not rows:
                raise GraftError(f"{name}: none of its {count:,} {noun} is labelled. Give a set with labels.")
            (temporary / "examples.json").write_text(json.dumps(rows))
        if unlabelled:
            console.print(f"{unlabelled:,} {noun} without a label are left out.")
    return folder, json.loads((folder / "examples.json").read_text())


def _write_image(folder: pathlib.Path, number: int, record: Record) -> pathlib.Path:
    """Write one image; its path, relative to `folder` where it was written there."""
    if isinstance(record.image, pathlib.Path):
        return record.image.absolute()
    ending = next((end for magic, end in MAGIC_BYTES if re.match(magic, record.image, re.DOTALL)), ".bin")
    place = pathlib.Path(record.split or "all")
    if len(record.labels) == 1:
        place /= _file_name(record.labels[0])
    path = place / f"{number:07}{ending}"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(record.image)
    return path


def _file_name(text: str) -> str:
    """A name as a file's: without the characters that some file systems refuse, 60 characters at most."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|]|^\.', "_", text)[:60]
