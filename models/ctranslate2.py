"""CTranslate2's model.bin, read without CTranslate2.

A file is a version number, the name of a specification ("WhisperSpec"), its revision, and variables one after the
other; last come second names of some of them. Names carry the zero byte that ends them in C. Source of the format:
python/ctranslate2/specs/model_spec.py (`ModelSpec._serialize`) of CTranslate2 4.
"""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np

from models import GraftError

VERSION = 6
# By number; 1 and 2 hold weights only where these were quantised, otherwise single settings.
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)


def read_ctranslate2(path) -> tuple[str, dict[str, np.ndarray]]:
    """(name of the specification, {variable: array}) of a model.bin; second names are among the variables.

    Raises GraftError where the file is missing, damaged, of another version or no such file.
    """
    try:
        with open(path, "rb") as file:
            data = memoryview(file.read())
    except OSError as error:
        raise GraftError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return _read(data)
    except GraftError as error:
        raise GraftError(f"{path}: {error}") from None
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise GraftError(f"{path}: not a whole CTranslate2 model ({error}); copy or convert it again") from None


def _read(data):
    place = 0

    def take(count):
        nonlocal place
        if place + count > len(data):
            raise ValueError(f"it ends after {len(data)} bytes, expected {place + count} or more")
        place += count
        return data[place - count : place]

    def number(code):
        return struct.unpack(f"<{code}", take(struct.calcsize(code)))[0]

    def name():
        return bytes(take(number("H"))).rstrip(b"\0").decode()

    version = number("I")
    if version != VERSION:
        raise GraftError(
            f"starts with the number {version}; expected {VERSION}, the version of the files of CTranslate2 3 and 4. "
            f"Convert the model again with one of these."
        )
    specification, _ = name(), number("I")
    arrays = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = np.dtype(DTYPES[number("B")]), number("I")
        arrays[key] = np.frombuffer(take(size), dtype).reshape(shape)
    for _ in range(number("I")):
        key = name()
        arrays[key] = arrays[name()]
    return specification, arrays
