"""TensorProto <-> numpy, for all that speaks gRPC or writes warm-up requests. Strings are object arrays of bytes."""

from __future__ import annotations

import math

import numpy as np

from serving.runtime import DTYPES

MOST_DIMENSIONS = 64  # of a numpy array
MOST_BYTES = 1 << 30  # a shape may ask for more than its message holds: missing values are filled in
STRING = 7  # DT_STRING (tensorflow/core/framework/types.proto)
FIELDS = {  # numpy dtype -> field of TensorProto (tensorflow/core/framework/tensor.proto)
    "float32": "float_val",
    "float64": "double_val",
    "float16": "half_val",
    "int32": "int_val",
    "int16": "int_val",
    "int8": "int_val",
    "uint8": "int_val",
    "int64": "int64_val",
    "uint32": "uint32_val",
    "uint64": "uint64_val",
    "bool": "bool_val",
    "object": "string_val",
}


def read_tensor(tensor) -> np.ndarray | None:
    """A TensorProto -> an array; None for one that makes no sense (Tensor::FromProto), or whose dtype numpy lacks."""
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    dtype = np.dtype(object) if tensor.dtype == STRING else DTYPES.get(tensor.dtype)
    if dtype is None or tensor.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        return None
    count = math.prod(shape)
    if count * dtype.itemsize > MOST_BYTES or len(shape) > MOST_DIMENSIONS:
        return None
    if tensor.tensor_content and dtype.kind != "O":
        if len(tensor.tensor_content) != count * dtype.itemsize:
            return None
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    values = list(getattr(tensor, FIELDS[dtype.name])[:count])
    # Values that are missing repeat the last one; where there is none at all they are zero.
    missing = count - len(values)
    last = values[-1:] or [b"" if dtype.kind == "O" else 0]
    if dtype.kind == "O":
        array = np.empty(count, object)
        array[:] = values + last * missing
        return array.reshape(shape)
    # Small integers and the bits of halves travel as int32; what is out of range wraps, as the server's casts do.
    carrier = np.dtype(np.int64) if FIELDS[dtype.name] in ("int_val", "half_val") else dtype
    array = np.concatenate([np.array(values, carrier), np.full(missing, last[0], carrier)])
    if dtype == np.float16:
        return array.astype(np.uint16).view(dtype).reshape(shape)
    return array.astype(dtype, copy=False).reshape(shape)


def write_tensor(array: np.ndarray, tensor, packed: bool = False) -> None:
    """Fill an empty TensorProto with an array.

    Args:
        packed: numbers as `tensor_content`, their bytes, which is fast; else in typed fields, as the server answers.
    """
    strings = array.dtype == object
    tensor.dtype = STRING if strings else next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if packed and not strings:
        tensor.tensor_content = array.tobytes()
        return
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    getattr(tensor, FIELDS[array.dtype.name]).extend(values.ravel().tolist())
