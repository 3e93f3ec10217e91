"""Folders of images, manifests and offline sets -> Splits; and the only maker of tf.data."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute

from models import GraftError, offline
from pipelines.console import progress_bar
from pipelines.manifests import SPLIT_ALIASES, Example, manifest_files, read_manifests
from pipelines.splits import fingerprint, make_splits

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


@dataclasses.dataclass
class Splits:
    """A labelled dataset, split.

    Each table has the columns id (content hash), path, label (index into class_names; a list of indices
    in a multi-label set), group (what must stay in one split: the manifest's, else the content hash) and weight.
    """

    train: pa.Table
    val: pa.Table
    test: pa.Table
    class_names: list[str]
    fingerprint: str  # of ids, labels and splits together
    white_level: int  # white of 16-bit images: 255, 1023, 4095 or 65535
    skipped: list[dict]  # path, reason
    warnings: list[str]

    def __iter__(self):
        return iter((self.train, self.val, self.test))

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels."""
        return pa.types.is_list(self.train.schema.field("label").type)


# ---------------------------------------------------------------- finding files


def find_images(
    data: str, path_column: str = "path", label_column: str = "label", group_column: str = "group"
) -> list[Example]:
    """List the images of a folder, a manifest or an offline set, sorted by path.

    Layouts: FOLDER/class/..., FOLDER/{train,val,test}/class/... ("valid", "validation" are read as val),
    a manifest, or a folder with the manifests {train,val,test}.{csv,tsv,jsonl,parquet}, of which train must be
    there. Needs no TensorFlow, so that a mistake answers at once.

    Args:
        path_column, label_column, group_column: what a manifest calls them.

    Raises:
        GraftError: no such folder, manifest or offline set, no images, images outside class folders, one class
            only; column names for a folder that has no manifest; all that `read_manifests` raises.
    """
    files = manifest_files(data)
    if files:
        found = read_manifests(files, path_column, label_column, group_column)
        give = "rows of at least two labels"
    else:
        renamed = {"--path-column": path_column, "--label-column": label_column, "--group-column": group_column}
        for flag, column in renamed.items():
            if column != flag.removeprefix("--").removesuffix("-column"):
                raise GraftError(f"{flag} {column}: only a manifest has columns, and --data {data} is none.")
        found = _find_in_folders(data)
        give = "one folder of images per class"
    classes = {label for example in found for label in example.labels}
    if len(classes) < 2:
        raise GraftError(
            f"--data {data}: only one class, {classes.pop()!r}. A classifier needs at least two: give {give}."
        )
    return found


def _find_in_folders(data: str) -> list[Example]:
    if data in OFFLINE_IMAGE_SETS and not pathlib.Path(data).exists():
        folder = offline.image_data_folder(data)
    else:
        folder = pathlib.Path(data)
    if not folder.is_dir():
        raise GraftError(
            f"--data {data}: there is no such folder. Give a folder with one folder of images per class, "
            f"a manifest, or an offline set: {', '.join(OFFLINE_IMAGE_SETS)}."
        )
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise GraftError(
            f"--data {data}: no images in this folder. Expected one folder per class that holds "
            f"{', '.join(sorted(IMAGE_SUFFIXES)[:3])}, ... files, such as {folder}/cat/1.jpg."
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


def is_multi_label(found: list[Example]) -> bool:
    """Whether some example has several labels; then all are learned as independent yes-or-no questions."""
    return any(len(example.labels) != 1 for example in found)


def drop_small_classes(found: list[Example], min_per_class: int) -> tuple[list[Example], list[str]]:
    """Leave out classes with fewer than `min_per_class` images; 0 stops at a class that has only one.

    An image of a multi-label set loses such labels, and is left out with its last one.

    Returns:
        What is left, and the names of the classes left out.

    Raises:
        GraftError: a class with one image and min_per_class 0; fewer than two classes left.
    """
    counts = collections.Counter(label for example in found for label in example.labels)
    if not min_per_class:
        single = sorted(label for label, count in counts.items() if count < 2)
        if single:
            raise GraftError(
                f"{'Class' if len(single) == 1 else 'Classes'} {', '.join(single)} "
                f"{'has' if len(single) == 1 else 'have'} one image; training and testing need at least two. "
                f"Add images, or leave such classes out with --min-per-class 2."
            )
        return found, []
    dropped = sorted(label for label, count in counts.items() if count < min_per_class)
    if len(counts) - len(dropped) < 2:
        raise GraftError(
            f"--min-per-class {min_per_class} leaves {len(counts) - len(dropped)} of {len(counts)} classes; "
            f"at least two are needed. The largest class has {max(counts.values())} images."
        )
    left = [example._replace(labels=tuple(name for name in example.labels if name not in dropped)) for example in found]
    return [example for example in left if example.labels], dropped


# ---------------------------------------------------------------- reading and splitting


def load_images(found: list[Example], min_per_class: int = 0) -> Splits:
    """Inspect every image, leave out what cannot be read, and split.

    Args:
        found: as `find_images` gives it.

    Raises:
        GraftError: more unreadable files than max(1%, 3), or a class that loses all but one image.
    """
    from models import inputs  # TensorFlow

    found, dropped = drop_small_classes(found, min_per_class)
    paths = [example.path for example in found]
    with progress_bar() as bar:
        task = bar.add_task("reading images", total=len(paths), note="")
        facts = inputs.inspect_images(paths, progress=lambda done: bar.update(task, completed=done))
    skipped = [{"path": path, "reason": fact["error"]} for path, fact in zip(paths, facts) if fact["error"]]
    limit = max(len(paths) // 100, 3)
    if len(skipped) > limit:
        listed = "\n".join(f"  {row['path']}: {row['reason']}" for row in skipped[:10])
        raise GraftError(
            f"{len(skipped)} of {len(paths)} images cannot be read; up to {limit} are skipped. "
            f"Repair or remove them:\n{listed}" + ("\n  ..." if len(skipped) > 10 else "")
        )
    facts_of = {example.path: fact for example, fact in zip(found, facts) if not fact["error"]}
    multi_label = is_multi_label(found)
    kept, _ = drop_small_classes([example for example in found if example.path in facts_of], min_per_class)
    facts = [facts_of[example.path] for example in kept]
    class_names = sorted({label for example in kept for label in example.labels})

    warnings = []
    if dropped:
        warnings.append(f"{len(dropped)} classes with fewer than {min_per_class} images were left out: {dropped}.")
    if skipped:
        warnings.append(f"{len(skipped)} files could not be read and were skipped (skipped.csv says why).")
    rotated = sum(fact["exif_orientation"] not in (0, 1) for fact in facts)
    if rotated:
        warnings.append(
            f"{rotated} images carry an EXIF rotation. It is ignored, in training and in serving alike: "
            f"rotate the pixels if up matters."
        )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ids = list(pool.map(content_id, [example.path for example in kept]))
    index_of = {name: index for index, name in enumerate(class_names)}
    rows = []
    for example, identity in zip(kept, ids):
        indices = sorted(index_of[label] for label in example.labels)
        rows.append(
            {
                "id": identity,
                "path": example.path,
                "label": indices if multi_label else indices[0],
                "group": example.group or identity,
                "split": example.split,
            }
        )
    tables = make_splits(rows, class_names, warnings)
    peak = max((fact["peak"] for fact in facts), default=0)
    return Splits(
        **tables,
        class_names=class_names,
        fingerprint=fingerprint(tables),
        white_level=inputs.white_level_for(peak),
        skipped=skipped,
        warnings=warnings,
    )


def content_id(path: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------- tf.data


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of examples in an epoch: a pure function of (seed, epoch), so that a resumed run goes on from there."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def targets_of(table: pa.Table, class_count: int) -> np.ndarray:
    """The labels of a table as [n, classes] float32: 1 for each class that an example has, else 0."""
    targets = np.zeros((table.num_rows, class_count), np.float32)
    labels = table["label"].combine_chunks()
    if pa.types.is_list(labels.type):
        rows, columns = pa.compute.list_parent_indices(labels).to_numpy(), labels.flatten().to_numpy()
    else:
        rows, columns = np.arange(len(labels)), labels.to_numpy()
    targets[rows, columns] = 1.0
    return targets


def dataset(
    table: pa.Table,
    load,
    *,
    class_count: int,
    batch_size: int,
    epoch: int = 0,
    training: bool = False,
    seed: int = 0,
):
    """A table as a tf.data of full batches: (inputs, targets [b, classes], weights [b], rows [b] int32), float32.

    The last batch is padded to full size by repeating its first example with weight 0 and row -1, so
    that shapes are static, any batch size works on any number of replicas, and every example counts once.

    Args:
        load: (path, seed [2] int32) -> input of one example; the seed is a function of (seed, epoch, example).
        class_count: width of the targets, which are as `targets_of` makes them.
        training: shuffled by `permutation`, else in the table's order.
    """
    import tensorflow as tf

    count = table.num_rows
    order = permutation(count, seed, epoch) if training else np.arange(count)
    padding = -count % batch_size
    rows = np.concatenate([order, np.full(padding, order[count - count % batch_size] if padding else 0)]).astype(
        np.int32
    )
    real = np.arange(len(rows)) < count
    targets = targets_of(table, class_count)[rows]
    weights = table["weight"].to_numpy()[rows] * real
    paths = np.array(table["path"].to_pylist(), dtype=object)[rows]
    seeds = np.stack([np.full(len(rows), (seed * 1_000_003 + epoch) % (2**31 - 1), np.int32), rows], axis=1)

    @tf.autograph.experimental.do_not_convert
    def load_example(path, example_seed, target, weight, row):
        return load(path, example_seed), target, weight, row

    slices = (
        paths.astype(str),
        seeds,
        targets,
        weights.astype(np.float32),
        np.where(real, rows, -1).astype(np.int32),
    )
    return (
        tf.data.Dataset.from_tensor_slices(slices)
        .map(load_example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


@functools.cache
def image_loader(preprocess, white_level: int, augmentation: str = "none"):
    """A `load` function for `dataset`: path -> scaled image [height, width, 3] float32."""
    import tensorflow as tf

    from models import inputs
    from pipelines.augmentation import random_crop, random_flip

    # A random crop stands in for the backbone's central one: both would show too little of the image.
    whole = dataclasses.replace(preprocess, crop_share=1.0)

    # A tf.function is traced once, not anew for the data set of every epoch.
    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)], autograph=False)
    def load(path, seed):
        data = tf.io.read_file(path)
        if augmentation == "none":
            return inputs.scale_image(inputs.read_image(data, preprocess, white_level), preprocess)
        image = random_flip(random_crop(inputs.decode_image(data, white_level), seed), seed)
        return inputs.scale_image(inputs.resize_image(image, whole), preprocess)

    return load
