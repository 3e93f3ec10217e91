"""What is frozen is computed once: activations of a frozen prefix, kept in memory or in files, found again by content.

An entry is a folder named after everything that its numbers depend on: the prefix's graph and weights, the
preprocessing, the examples' content hashes, and the augmentation with its seed. It holds one .npy file per tensor
that crosses the cut. It is written beside its place, flushed to disk and renamed, so that there is a whole entry or
none, whatever kills the writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator

import keras
import numpy as np
import psutil

from models import GraftError, offline
from models.offline import free_bytes

FORMAT = 3  # in the key: raise it when entries would be read wrongly
MEMORY_SHARE = 0.25  # of the free memory: what activations may take before they are read from files
DISK_SHARE = 0.5  # of the free disk: what one entry may take


def cache_root(folder: str = "") -> pathlib.Path:
    """Where entries lie: `folder`, else `features/` in Graft's cache."""
    return pathlib.Path(folder) if folder else offline.cache_folder() / "features"


def model_digest(model) -> str:
    """SHA-256 over the graph and the weights of a functional keras.Model."""
    digest = hashlib.sha256(graph_without_names(model).encode())
    for weight in model.weights:
        digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
    return digest.hexdigest()


def entry_key(model: str, part, preprocess, white_level: int, ids, *more) -> str:
    """SHA-256 over all that activations depend on, but for rounding.

    Args:
        model: `model_digest` of the whole encoder, as it was loaded.
        part: what of it is kept: "features", or the number of the block below which it was cut.
        preprocess, white_level: how files become its input.
        ids: content hash of each example, in the order of the rows.
        more: what else they depend on: pooling, length, augmentation, view, seed.
    """
    # A tokenizer is no data; `identity` stands for it.
    settings = {name: value for name, value in (vars(preprocess) if preprocess else {}).items() if name != "tokenizer"}
    facts = json.dumps([FORMAT, model, part, settings, white_level, more], sort_keys=True)
    return hashlib.sha256("\n".join([facts, *ids]).encode()).hexdigest()[:32]


def graph_without_names(model) -> str:
    """A functional model's graph as JSON, its layers numbered: Keras counts names on and on through a process."""
    # KerasHub's backbones say only what they were made with; a plain model of the same tensors tells the graph.
    config = keras.Model(model.inputs, model.outputs).get_config()
    numbers = {layer["name"]: index for index, layer in enumerate(config["layers"])}

    def renamed(value):
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items() if key != "build_config"}
        if isinstance(value, (list, tuple)):
            return [renamed(item) for item in value]
        return numbers.get(value, value) if isinstance(value, str) else value

    return json.dumps(renamed({**config, "name": ""}), sort_keys=True, default=str)


class FileRows:
    """Rows of a .npy file, read when they are asked for: nothing but the rows of a batch is in memory."""

    def __init__(self, path: pathlib.Path):
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, _, self.dtype = read_header[version](file)
            self.start = file.tell()
        self.file = os.open(path, os.O_RDONLY)  # open for as long as the process needs rows
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self.nbytes = self.shape[0] * self.row_bytes

    def __getitem__(self, rows) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        flat = result.reshape(len(rows), -1).view(np.uint8)
        for place, row in enumerate(rows):
            os.preadv(self.file, [flat[place]], self.start + int(row) * self.row_bytes)
        return result


class Rows:
    """Some rows of an array or of `FileRows`, in an order of their own; a slice of it reads just these."""

    def __init__(self, array, places: np.ndarray):
        self.array, self.places = array, places
        self.shape = (len(places), *array.shape[1:])

    def __getitem__(self, part) -> np.ndarray:
        return self.array[self.places[part]]


@dataclasses.dataclass
class Activations:
    """Activations of a set of examples: one array [rows, ...] per tensor, in memory or in files."""

    arrays: list  # of np.ndarray or FileRows
    where: str  # "memory" or the entry's folder
    found: bool  # written by an earlier run
    seconds: float  # to compute, or to open

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def in_memory(self) -> bool:
        return all(isinstance(array, np.ndarray) for array in self.arrays)


def activations(
    root: pathlib.Path | None,
    key: str,
    count: int,
    compute: Callable[[], Iterator[list[np.ndarray]]],
    memory_bytes: float | None = None,
) -> Activations | None:
    """Find the entry `key`, or compute and keep it; None where it fits neither memory nor disk.

    Args:
        root: folder of entries; None keeps everything in memory.
        count: examples, and rows of each array.
        compute: gives the rows in order, batch by batch: one array [b, ...] per tensor. A tensor that all
            examples share has one row in the first batch, and none in the others.
        memory_bytes: what may be held in memory (None: a quarter of what is free now).

    Raises:
        GraftError: the folder of the cache cannot be made.
    """
    started = time.perf_counter()
    if memory_bytes is None:
        memory_bytes = MEMORY_SHARE * psutil.virtual_memory().available
    if root is not None:
        remove_abandoned(root)
        arrays = open_entry(root / key, count, memory_bytes)
        if arrays:
            return Activations(arrays, str(root / key), True, time.perf_counter() - started)
    batches = compute()
    first = next(batches)
    rows = max(len(array) for array in first)
    shapes = [(count if len(array) == rows else len(array), *array.shape[1:]) for array in first]
    dtypes = [array.dtype for array in first]
    size = sum(dtype.itemsize * math.prod(shape) for shape, dtype in zip(shapes, dtypes))
    written = root is not None and size <= DISK_SHARE * free_bytes(root)
    if written and write_entry(root / key, shapes, dtypes, itertools.chain([first], batches)):
        arrays = open_entry(root / key, count, memory_bytes)
        return Activations(arrays, str(root / key), False, time.perf_counter() - started)
    if size > memory_bytes:
        return None
    if written:  # the disk filled up meanwhile, and took the rows with it
        batches = compute()
        first = next(batches)
    arrays, place = [np.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes)], 0
    for batch in itertools.chain([first], batches):
        for array, rows in zip(arrays, batch, strict=True):
            array[place : place + len(rows)] = rows
        place += max(len(rows) for rows in batch)
    return Activations(arrays, "memory", False, time.perf_counter() - started)


def open_entry(folder: pathlib.Path, count: int, memory_bytes: float) -> list | None:
    """The arrays of a whole entry of `count` rows; None where there is none, or a file is not what it must be."""
    try:
        names = json.loads((folder / "entry.json").read_text())["files"]
        arrays = [FileRows(folder / name) for name in names]
        whole = all(
            array.shape[0] in (count, 1) and (folder / name).stat().st_size == array.start + array.nbytes
            for name, array in zip(names, arrays, strict=True)
        )
    except (OSError, ValueError, KeyError):
        return None
    if not whole:
        return None
    os.utime(folder)  # so that what is used can be told from what is not
    if sum(array.nbytes for array in arrays) <= memory_bytes:
        return [np.load(folder / name) for name in names]
    return arrays


def write_entry(folder: pathlib.Path, shapes: list[tuple[int, ...]], dtypes: list[np.dtype], batches) -> bool:
    """Write the arrays of an entry and put it in its place; False where the disk refuses it.

    Raises:
        GraftError: the folder of the cache cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraftError(
            f"The cache cannot be kept in {folder.parent}: {error.strerror}. Choose another place with --cache-dir, "
            f"or --cache memory."
        ) from error
    temporary = folder.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    names = [f"{index}.npy" for index in range(len(shapes))]
    try:
        temporary.mkdir()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(temporary / name, "wb")) for name in [*names, "entry.json"]]
            for file, shape, dtype in zip(files, shapes, dtypes):
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                for file, values in zip(files, batch):
                    file.write(np.ascontiguousarray(values).data)
            files[-1].write(json.dumps({"files": names}).encode())
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            if open_entry(folder, max(shape[0] for shape in shapes), 0):
                return True  # another worker or run was quicker
            shutil.rmtree(folder)  # damaged
        temporary.rename(folder)
    except OSError:  # a full disk: training goes on without the entry
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def remove_abandoned(root: pathlib.Path) -> None:
    """Remove what writers on this machine left behind that are no longer alive (kill -9, power)."""
    for folder in root.glob(f".tmp-{socket.gethostname()}-*"):
        process = folder.name.rsplit("-", 2)[1]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
