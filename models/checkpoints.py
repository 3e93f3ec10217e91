"""PyTorch checkpoints read without PyTorch, and without executing anything that is in them; safetensors.

A checkpoint is a pickle, and a pickle may name any Python function and call it. The reader here knows
the dozen names that a plain state dict needs and refuses every other one. The two file formats are
those of `torch.save`: the one before PyTorch 1.6 (five pickles, then raw storages) and the zip
archive since then. Source of both: `torch/serialization.py` of PyTorch 2.13.
"""

from __future__ import annotations

import collections
import hashlib
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from models import GraftError, offline

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001

STORAGE_TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts put the state dict


class _Tensor(NamedTuple):
    """A tensor before its numbers are read: where it lies in which storage, in elements."""

    storage: tuple  # ("storage", type name, key, location, element count[, view])
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict into {name: array}.

    Names of nested dicts are joined with dots; a wrapper such as {"state_dict": ...} is taken off;
    values that are not tensors (epoch numbers, settings) are left out. The arrays are read-only and
    tensors that share a storage share memory. bfloat16 arrives as `ml_dtypes.bfloat16`, all other
    types as NumPy's own.

    Raises GraftError where the file is missing, damaged, not a PyTorch checkpoint, or asks for code
    to be run.
    """
    try:
        with open(path, "rb") as file:
            return _read(file)
    except GraftError as error:
        raise GraftError(f"{path}: {error}") from None
    except OSError as error:
        raise GraftError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # damaged pickles and archives raise nearly every type there is
        raise GraftError(
            f"{path}: not a whole PyTorch checkpoint ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def read_safetensors(path) -> dict[str, np.ndarray]:
    """Reads a safetensors file into {name: array}; bfloat16 arrives as `ml_dtypes.bfloat16`.

    Raises GraftError where the file is missing, damaged or no safetensors file.
    """
    try:
        return safetensors.numpy.load_file(path)
    except OSError as error:
        raise GraftError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise GraftError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def torch_to_safetensors(path, target) -> dict:
    """Writes a PyTorch checkpoint as a safetensors file, values and types as they are; tied tensors are written out.

    The file is whole or absent, whenever the process is killed.

    Returns:
        `file` and `sha256` of the checkpoint, and `tensors`, how many there are.

    Raises GraftError as `read_torch` does, and where the target cannot be written.
    """
    path, target = pathlib.Path(path), pathlib.Path(target)
    state = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in read_torch(path).items()}
    info = {"file": path.name, "sha256": file_sha256(path), "tensors": len(state)}
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        safetensors.numpy.save_file(state, temporary, {"source": path.name, "sha256": info["sha256"]})
        temporary.replace(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise GraftError(f"{target}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return info


def cached_safetensors(path) -> pathlib.Path:
    """The safetensors file of a PyTorch checkpoint: converted into the cache once, found there by SHA-256 later.

    Raises GraftError as `torch_to_safetensors` does, and where the cache cannot be written.
    """
    folder = offline.cache_folder() / "converted" / file_sha256(path)[:16]
    if not folder.is_dir():
        with offline.whole_or_nothing(folder) as temporary:
            torch_to_safetensors(path, temporary / "model.safetensors")
    return folder / "model.safetensors"


def file_sha256(path) -> str:
    """SHA-256 of a file, hexadecimal. Raises GraftError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GraftError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(file) -> dict[str, np.ndarray]:
    start = file.read(2)
    file.seek(0)
    if start == b"PK":
        tensors, arrays = _read_zip(file)
    elif start[:1] == pickle.PROTO:
        tensors, arrays = _read_old(file)
    else:
        raise GraftError("not a PyTorch checkpoint; expected a file that torch.save(model.state_dict(), path) wrote")
    return {name: _array(name, tensor, arrays[tensor.storage[2]]) for name, tensor in tensors.items()}


def _read_zip(file):
    """The format since PyTorch 1.6: NAME/data.pkl and one NAME/data/KEY per storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        found = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise GraftError("a zip archive, but not a PyTorch checkpoint: it has no data.pkl")
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise GraftError(f"{info.filename} is compressed; torch.save writes its files uncompressed")
        folder = found[0].removesuffix("data.pkl")
        swap = folder + "byteorder" in names and archive.read(folder + "byteorder") == b"big"
        tree, _ = _unpickle(io.BytesIO(archive.read(found[0])))
        tensors = _flatten(tree)
        arrays = {}
        for key, storage in {tensor.storage[2]: tensor.storage for tensor in tensors.values()}.items():
            dtype, count = np.dtype(STORAGE_TYPES[storage[1]]), storage[4]
            data = archive.read(f"{folder}data/{key}")
            if len(data) < count * dtype.itemsize:
                raise GraftError(f"storage {key} has {len(data)} bytes; expected {count * dtype.itemsize}")
            array = np.frombuffer(data, dtype, count)
            arrays[key] = array.byteswap() if swap else array
    return tensors, arrays


def _read_old(file):
    """The format before PyTorch 1.6: magic number, version, system, state dict, keys; then the storages."""
    if _unpickle(file)[0] != MAGIC_NUMBER or _unpickle(file)[0] != PROTOCOL_VERSION:
        raise GraftError("a pickle, but not a PyTorch checkpoint: the magic number is missing")
    _unpickle(file)  # the sizes of C types where it was written; storages are little-endian everywhere
    tree, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    arrays = {}
    for key in keys:
        dtype, expected = np.dtype(STORAGE_TYPES[storages[key][1]]), storages[key][4]
        (count,) = struct.unpack("<q", file.read(8))
        if count != expected:
            raise GraftError(f"storage {key} has {count} elements; expected {expected}: the file is damaged")
        data = file.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise GraftError(f"storage {key} has {len(data)} bytes; expected {count * dtype.itemsize}: cut off")
        arrays[key] = np.frombuffer(data, dtype)
    return _flatten(tree), arrays


def _unpickle(file):
    """One pickle -> (its content, {key: storage}); each name in it must be one that state dicts need."""
    storages = {}

    # The functions are made anew for each pickle, because a pickle may set attributes of what it names.
    def rebuild_tensor(storage, offset, shape, strides, *_):
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    allowed = {
        "collections.OrderedDict": collections.OrderedDict,
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.Size": lambda shape: tuple(shape),
        "torch.device": lambda *place: ":".join(map(str, place)),
    }
    allowed |= {f"torch.{name}": name for name in STORAGE_TYPES}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" not in allowed:
                raise GraftError(
                    f"the file tries to run code: it asks for `{module}.{name}`, which no plain state dict"
                    " needs. Nothing was executed. If you trust its author, load it in PyTorch and write it"
                    " again with torch.save(model.state_dict(), path)"
                )
            return allowed[f"{module}.{name}"]

        def persistent_load(self, storage):
            storages[storage[2]] = storage
            return storage

    return Unpickler(file, encoding="utf-8").load(), storages  # Python 2 wrote names as bytes


def _flatten(tree) -> dict[str, _Tensor]:
    """Takes a wrapper off and joins the names of nested dicts with dots."""
    if not isinstance(tree, dict):
        raise GraftError(f"holds a {type(tree).__name__}; expected a state dict: a dict of names and tensors")
    for key in WRAPPERS:
        if isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    tensors = {}
    for name, value in _walk(tree, ""):
        if name in tensors:
            raise GraftError(f"two tensors have the name {name}")
        tensors[name] = value
    if not tensors:
        raise GraftError("holds no tensors; expected a state dict: a dict of names and tensors")
    return tensors


def _walk(tree, prefix):
    """Yields (dotted name, tensor) for every tensor in nested dicts, lists and tuples."""
    if isinstance(tree, _Tensor):
        yield prefix, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _walk(value, f"{prefix}.{key}" if prefix else str(key))


def _array(name, tensor, storage) -> np.ndarray:
    """A read-only view of the tensor's numbers; never reads outside its storage."""
    start = tensor.offset
    view = tensor.storage[5] if len(tensor.storage) > 5 else None
    if view is not None:  # (key, offset, count): until PyTorch 0.3 a storage could be part of another
        start += view[1]
    numbers = (start, *tensor.shape, *tensor.strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(tensor.shape) != len(tensor.strides):
        raise GraftError(f"{name}: the shape {tensor.shape} with strides {tensor.strides} at {start} makes no sense")
    last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, storage.dtype)
    if last >= len(storage):
        raise GraftError(
            f"{name}: reaches element {last} of a storage that holds {len(storage)}; the file is damaged or forged"
        )
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[start:], tensor.shape, strides, writeable=False)
