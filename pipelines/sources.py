"""Where images and their labels come from: folders, manifests, TFDS, Hugging Face, offline sets -> examples.

What texts share with them is here too; the rest of texts is in `pipelines.texts`.

Needs no TensorFlow, so that a mistake answers at once; only the first use of a TFDS set starts it.
"""

from __future__ import annotations

import collections
import pathlib

from models import GraftError, offline
from pipelines.huggingface import huggingface_examples
from pipelines.manifests import SPLIT_ALIASES, Example, manifest_files, read_manifests
from pipelines.tfds import tfds_examples

OFFLINE_IMAGE_SETS = tuple(name for name, entry in offline.DATA.items() if entry["kind"] == "image")
# What counts as an image by its name. Kinds that inputs.py refuses are here too: they are reported
# with the reason, where silence would leave a class half empty.
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".dcm",
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
    ]
)


def find_images(
    data: str,
    path_column: str = "path",
    label_column: str = "label",
    group_column: str = "group",
    data_dir: str = "",
) -> list[Example]:
    """List the images of a folder, a manifest, a TFDS set or an offline set, sorted by path.

    Layouts: FOLDER/class/..., FOLDER/{train,val,test}/class/... ("valid", "validation" are read as val),
    a manifest, a folder with the manifests {train,val,test}.{csv,tsv,jsonl,parquet}, of which train must be
    there, or a folder of Hugging Face `datasets`. Needs no TensorFlow, so that a mistake answers at once; only
    the first use of a TFDS set starts it, to unpack the images.

    Args:
        path_column, label_column, group_column: what a manifest calls them, or a set that has several.
        data_dir: folder of prepared TFDS sets ("": TFDS's own).

    Raises:
        GraftError: no such folder, manifest or set, no images, images outside class folders, one class
            only; column names for data that has none; all that `read_manifests` and the readers of sets raise.
    """
    renamed = renamed_columns(path=path_column, label=label_column, group=group_column)
    if data.startswith("tfds:"):
        refuse_columns(renamed, ("--path-column", "--group-column"), f"the TFDS set {data}")
        found, give = tfds_examples(data, data_dir, label_column), "a set of at least two labels"
    elif (in_set := huggingface_examples(pathlib.Path(data), label_column, group_column)) is not None:
        refuse_columns(renamed, ("--path-column",), f"the Hugging Face folder {data}")
        found, give = in_set, "a set of at least two labels"
    elif files := manifest_files(data):
        found = read_manifests(files, path_column, label_column, group_column)
        give = "rows of at least two labels"
    else:
        refuse_columns(renamed, tuple(renamed), f"--data {data}")
        found, give = _find_in_folders(data), "one folder of images per class"
    check_two_classes(data, found, give)
    return found


def check_two_classes(data: str, found: list, give: str) -> None:
    """Raise GraftError where the examples have one label only; `give` says what to give instead."""
    classes = sorted({label for example in found for label in example.labels})
    if len(classes) < 2:
        only = f"only one class, {classes[0]!r}" if classes else "no example has a label"
        raise GraftError(f"--data {data}: {only}. A classifier needs at least two: give {give}.")


def renamed_columns(**columns: str) -> dict[str, str]:
    """Those of the columns whose name is not the default: flag -> name. The default of `path` is "path"."""
    return {f"--{default}-column": name for default, name in columns.items() if name != default}


def refuse_columns(renamed: dict[str, str], flags: tuple[str, ...], what: str) -> None:
    for flag in flags:
        if flag in renamed:
            raise GraftError(f"{flag} {renamed[flag]}: only a manifest has such a column, and {what} is none.")


def _find_in_folders(data: str) -> list[Example]:
    if data in OFFLINE_IMAGE_SETS and not pathlib.Path(data).exists():
        folder = offline.image_data_folder(data)
    else:
        folder = pathlib.Path(data)
    return files_in_class_folders(data, folder, IMAGE_SUFFIXES, "image", OFFLINE_IMAGE_SETS)


def files_in_class_folders(
    data: str, folder: pathlib.Path, suffixes, noun: str, offline_sets: tuple[str, ...]
) -> list[Example]:
    """The files of FOLDER/CLASS/... or FOLDER/{train,val,test}/CLASS/..., sorted by path.

    Args:
        suffixes: what the names of wanted files end in, in small letters.
        noun, offline_sets: for messages, what a file is ("image") and the sets that need no folder.

    Raises:
        GraftError: no such folder, no wanted files in it, files outside class folders.
    """
    if not folder.is_dir():
        raise GraftError(
            f"--data {data}: there is no such folder. Give a folder with one folder of {noun}s per class, "
            f"a manifest, tfds:NAME, or an offline set: {', '.join(offline_sets)}."
        )
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        endings = sorted(suffixes)
        raise GraftError(
            f"--data {data}: no {noun}s in this folder. Expected one folder per class that holds "
            f"{', '.join(endings[:3])}{', ...' if len(endings) > 3 else ''} files, such as {folder}/cat/1{endings[-1]}."
        )
    first_folders = {path.relative_to(folder).parts[0] for path in paths}
    has_splits = first_folders <= set(SPLIT_ALIASES) and "train" in first_folders
    depth = 2 if has_splits else 1
    found = []
    for path in paths:
        parts = path.relative_to(folder).parts
        if len(parts) <= depth:
            raise GraftError(
                f"{path} is in no class folder. Expected {folder}/"
                f"{'train/' if has_splits else ''}CLASS/{path.name}: move it into the folder of its class."
            )
        found.append(Example(SPLIT_ALIASES[parts[0]] if has_splits else "", (parts[depth - 1],), str(path)))
    return found


def is_multi_label(found: list) -> bool:
    """Whether some example has several labels; then all are learned as independent yes-or-no questions."""
    return any(len(example.labels) != 1 for example in found)


def drop_small_classes(found: list, min_per_class: int, noun: str = "image") -> tuple[list, list[str]]:
    """Leave out classes with fewer than `min_per_class` examples; 0 stops at a class that has only one.

    An example of a multi-label set loses such labels, and is left out with its last one.

    Args:
        noun: what an example is called in messages.

    Returns:
        What is left, and the names of the classes left out.

    Raises:
        GraftError: a class with one example and min_per_class 0; fewer than two classes left.
    """
    counts = collections.Counter(label for example in found for label in example.labels)
    if not min_per_class:
        single = sorted(label for label, count in counts.items() if count < 2)
        if single:
            raise GraftError(
                f"{'Class' if len(single) == 1 else 'Classes'} {', '.join(single)} "
                f"{'has' if len(single) == 1 else 'have'} one {noun}; training and testing need at least two. "
                f"Add {noun}s, or leave such classes out with --min-per-class 2."
            )
        return found, []
    dropped = sorted(label for label, count in counts.items() if count < min_per_class)
    if len(counts) - len(dropped) < 2:
        raise GraftError(
            f"--min-per-class {min_per_class} leaves {len(counts) - len(dropped)} of {len(counts)} classes; "
            f"at least two are needed. The largest class has {max(counts.values())} {noun}s."
        )
    left = [example._replace(labels=tuple(name for name in example.labels if name not in dropped)) for example in found]
    return [example for example in left if example.labels], dropped


def check_skipped(skipped: list[dict], count: int, noun: str, problem: str) -> None:
    """Raise GraftError where more than max(1%, 3) of `count` examples are unusable.

    Args:
        skipped: path, reason.
        noun, problem: for the message: "images" that "cannot be read".
    """
    limit = max(count // 100, 3)
    if len(skipped) > limit:
        listed = "\n".join(f"  {row['path']}: {row['reason']}" for row in skipped[:10])
        raise GraftError(
            f"{len(skipped)} of {count} {noun} {problem}; up to {limit} are skipped. "
            f"Repair or remove them:\n{listed}" + ("\n  ..." if len(skipped) > 10 else "")
        )
