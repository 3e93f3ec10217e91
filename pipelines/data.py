"""Examples -> Splits: read, checked and split; and the only maker of tf.data."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipelines.inspections import read_files
from pipelines.manifests import Example
from pipelines.sources import drop_small_classes, is_multi_label
from pipelines.splits import fingerprint, make_splits, rows_of


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
    plain: str = ""  # what all files are, as `models.image_formats.plain_format` says; "" for several kinds

    def __iter__(self):
        return iter((self.train, self.val, self.test))

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels."""
        return pa.types.is_list(self.train.schema.field("label").type)


# ---------------------------------------------------------------- reading and splitting


def load_images(found: list[Example], min_per_class: int = 0) -> Splits:
    """Inspect every image, leave out what cannot be read, and split.

    Args:
        found: as `find_images` gives it.

    Raises:
        GraftError: more unreadable files than max(1%, 3), or a class that loses all but one image.
    """
    from models.inputs import white_level_for  # TensorFlow

    found, dropped = drop_small_classes(found, min_per_class)
    paths = [example.path for example in found]
    facts, skipped = read_files(paths, "images")
    facts_of = {example.path: fact for example, fact in zip(found, facts) if not fact["error"]}
    multi_label = is_multi_label(found)
    kept, _ = drop_small_classes([example for example in found if example.path in facts_of], min_per_class)
    facts = [facts_of[example.path] for example in kept]

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
    inputs = [{"id": fact["id"], "path": example.path} for example, fact in zip(kept, facts)]
    rows, class_names = rows_of(kept, inputs, multi_label)
    # By content, not by path: the same images give the same batches wherever they lie.
    rows.sort(key=lambda row: (row["id"], row["path"]))
    tables = make_splits(rows, class_names, warnings)
    peak = max((fact["peak"] for fact in facts), default=0)
    kinds = {fact["plain"] for fact in facts}
    return Splits(
        **tables,
        class_names=class_names,
        fingerprint=fingerprint(tables),
        white_level=white_level_for(peak),
        skipped=skipped,
        warnings=warnings,
        plain=kinds.pop() if len(kinds) == 1 else "",
    )


# ---------------------------------------------------------------- tf.data


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of examples in an epoch: a pure function of (seed, epoch), so that a resumed run goes on from there."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def targets_of(table: pa.Table, class_count: int) -> np.ndarray:
    """The labels of a table as [n, classes] float32: 1 for each class that an example has, else 0.

    Of transcripts their characters [n, longest] float32, numbers in a vocabulary, -1 behind the end.
    """
    if "characters" in table.column_names:
        characters = table["characters"].combine_chunks()
        return characters.flatten().to_numpy().reshape(table.num_rows, -1).astype(np.float32)
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
    view: int | None = None,
    training: bool = False,
    seed: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    first_batch: int = 0,
    shard: tuple[int, int] = (0, 1),
):
    """A table as a tf.data of full batches: (inputs, targets [b, classes], weights [b], rows [b] int32), float32.

    The last batch is padded to full size by repeating its first example with weight 0 and row -1, so
    that shapes are static, any batch size works on any number of replicas, and every example counts once.

    Args:
        load: (path, seed [2] int32) -> input of one example; the seed is a function of (seed, view, example).
        class_count: width of the targets, which are as `targets_of` makes them.
        view: what augmentation is a function of; the epoch where it is not given.
        training: shuffled by `permutation`, else in the table's order.
        mixup, cutmix: A of Beta(A, A), as `pipelines.augmentation.mix_batch` takes them; 0 for off. Batches are mixed
            here, before they are shared out, so the mixture is the same on any number of replicas.
        first_batch: batches before it are left out, and cost nothing: where a resumed epoch goes on.
        shard: (number of a worker, workers): its share of each batch, [batch_size / workers].
    """
    import tensorflow as tf

    from pipelines.augmentation import mix_batch

    rows, real = epoch_batches(np.zeros(table.num_rows, int), batch_size, epoch, training, seed)
    # Mixing needs the whole batch; its share is taken afterwards.
    own = share_of(batch_size, (0, 1) if mixup or cutmix else shard)
    rows, real = rows[first_batch:, own].ravel(), real[first_batch:, own].ravel()
    targets = targets_of(table, class_count)[rows]
    weights = table["weight"].to_numpy()[rows] * real
    paths = np.array(table["path"].to_pylist(), dtype=object)[rows]
    epoch_seed = np.int32((seed * 1_000_003 + (epoch if view is None else view)) % (2**31 - 1))
    seeds = np.stack([np.full(len(rows), epoch_seed), rows], axis=1)

    @tf.autograph.experimental.do_not_convert
    def load_example(path, example_seed, target, weight, row):
        return load(path, example_seed), target, weight, row

    @tf.autograph.experimental.do_not_convert
    def mix(index, batch):
        mixed = *mix_batch(*batch, tf.stack([epoch_seed, tf.cast(index, tf.int32)]), mixup, cutmix), batch[-1]
        return tuple(x[share_of(batch_size, shard)] for x in mixed)

    slices = (
        paths.astype(str),
        seeds,
        targets,
        weights.astype(np.float32),
        np.where(real, rows, -1).astype(np.int32),
    )
    batches = (
        tf.data.Dataset.from_tensor_slices(slices)
        .map(load_example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(own.stop - own.start, drop_remainder=True)
    )
    if mixup or cutmix:
        batches = batches.enumerate(first_batch).map(mix, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return batches.prefetch(tf.data.AUTOTUNE)


def share_of(batch_size: int, shard: tuple[int, int]) -> slice:
    """Where the share of a worker lies in each batch; shard: (number of the worker, workers)."""
    index, count = shard
    return slice(batch_size * index // count, batch_size * (index + 1) // count)


def epoch_batches(part_of: np.ndarray, batch_size: int, epoch: int, training: bool, seed: int):
    """The rows of an epoch, [batches, batch_size] int32, and which of them are real: padding repeats an example.

    Args:
        part_of: [n] int, the part that each row belongs to: a batch holds rows of one part only. In training the
            batches of several parts come in random order.
    """
    order = permutation(len(part_of), seed, epoch) if training else np.arange(len(part_of))
    batches, real = [], []
    for part in np.unique(part_of):
        rows = order[part_of[order] == part]
        padding = -len(rows) % batch_size
        filler = np.full(padding, rows[len(rows) - len(rows) % batch_size] if padding else 0, rows.dtype)
        batches.append(np.concatenate([rows, filler]).reshape(-1, batch_size))
        real.append((np.arange(batches[-1].size) < len(rows)).reshape(-1, batch_size))
    several = training and len(batches) > 1
    batches, real = np.concatenate(batches).astype(np.int32), np.concatenate(real)
    if several:
        mixed = np.random.default_rng([seed, epoch, 1]).permutation(len(batches))
        batches, real = batches[mixed], real[mixed]
    return batches, real


def cached_dataset(
    table: pa.Table,
    parts: list,
    part_of: np.ndarray,
    places: np.ndarray,
    *,
    class_count: int,
    batch_size: int,
    epoch: int = 0,
    training: bool = False,
    seed: int = 0,
    trim: bool = False,
    first_batch: int = 0,
    shard: tuple[int, int] = (0, 1),
    windows: bool = False,
):
    """As `dataset`, the inputs being rows of arrays that are at hand: a tuple of tensors [b, ...].

    Args:
        parts: for each part of the examples a list of arrays [m, ...] that take an array of indices: numpy's, or
            `pipelines.cache.FileRows`. Parts may differ in shape, and a batch comes from one of them. An array of one
            row holds for all examples. Arrays with a function `load` are read in the graph, all at once:
            (parts, part, indices) -> tensors.
        part_of, places: [n] int, in which part each row of the table lies, and where in its arrays.
        trim: leave the padding out: batches that are not full, of which each part has one, are smaller. For one device.
        windows: the first axis of an example stays open, though all should have as many: others of the same phase,
            which the same step must take, may have one.
    """
    import tensorflow as tf

    load = getattr(parts[0][0], "load", None)
    rows, real = epoch_batches(part_of, batch_size, epoch, training, seed)
    own = share_of(batch_size, shard)
    rows, real, batch_size = rows[first_batch:, own], real[first_batch:, own], own.stop - own.start
    weights = (table["weight"].to_numpy()[rows] * real).astype(np.float32)
    targets = targets_of(table, class_count)[rows]
    slices = (part_of[rows[:, 0]], places[rows], targets, weights, np.where(real, rows, -1).astype(np.int32))

    def take(part, indices):
        # Python once per batch, not per example: one slice of an array, or one read per row of a file.
        return [array[indices if array.shape[0] > 1 else indices * 0] for array in parts[part]]

    @tf.autograph.experimental.do_not_convert
    def read(part, indices, targets, weights, rows):
        if trim:
            indices, targets, weights, rows = (
                x[: tf.math.count_nonzero(rows >= 0)] for x in (indices, targets, weights, rows)
            )
        inputs = load(parts, part, indices) if load else tf.numpy_function(take, [part, indices], dtypes)
        return tuple(tf.ensure_shape(x, s) for x, s in zip(inputs, shapes)), targets, weights, rows

    dtypes = [tf.as_dtype(array.dtype) for array in parts[0]]
    dimensions = [list(zip(*(array.shape[1:] for array in same))) for same in zip(*parts)]
    shapes = [
        [None if trim else batch_size, *(dim[0] if len(set(dim)) == 1 else None for dim in dims)] for dims in dimensions
    ]
    for shape in shapes if windows else ():
        if len(shape) > 2:
            shape[1] = None
    batches = tf.data.Dataset.from_tensor_slices(slices)
    return batches.map(read, num_parallel_calls=2, deterministic=True).prefetch(tf.data.AUTOTUNE)


@functools.cache
def image_loader(
    preprocess, white_level: int, augmentation: str = "none", random_erasing: float = 0.0, plain: str = ""
):
    """A `load` function for `dataset`: path -> scaled image [height, width, 3] float32.

    Args:
        white_level, plain: as in `Splits`.
        augmentation: "none", "crop", "flip-crop" or "rand-augment", which flips and crops too.
        random_erasing: probability that a random box is filled with noise.
    """
    import tensorflow as tf

    from models import inputs
    from pipelines import augmentation as random_changes

    # A random crop stands in for the backbone's central one: both would show too little of the image.
    whole = dataclasses.replace(preprocess, crop_share=1.0)

    # A tf.function is traced once, not anew for the data set of every epoch.
    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)], autograph=False)
    def load(path, seed):
        data = tf.io.read_file(path)
        if augmentation == "none":
            image = inputs.read_image(data, preprocess, white_level, plain)
        else:
            image = random_changes.random_crop(inputs.decode_image(data, white_level, plain), seed)
            image = image if augmentation == "crop" else random_changes.random_flip(image, seed)
            image = inputs.resize_image(image, whole)
        if augmentation == "rand-augment":
            image = random_changes.rand_augment(image, seed)
        if random_erasing:
            image = random_changes.random_erasing(image, seed, random_erasing)
        return inputs.scale_image(image, preprocess)

    return load
