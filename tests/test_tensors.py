"""serving/tensors.py against TensorFlow's own reading and writing of TensorProtos."""

from __future__ import annotations

import numpy as np
import pytest

from serving.runtime import DTYPES, import_protos
from serving.tensors import FIELDS, read_tensor, write_tensor

ARRAYS = {dtype.name: np.array([[0, 1, 1], [100, 7, 1]]).astype(dtype) for dtype in DTYPES.values()}
ARRAYS["float16"][0, 0] = -0.5
ARRAYS["object"] = np.array([[b"a\0", b"", bytes(range(256))], ["é".encode(), b"\0", b"\xff"]], object)


def proto(dtype: int = 1, shape=(), **fields):
    """A TensorProto; dtype as in types.proto, 1 is float32."""
    (tensor_pb2,) = import_protos("tensorflow.core.framework.tensor_pb2")
    made = tensor_pb2.TensorProto(dtype=dtype, **fields)
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ARRAYS)
def test_tensorflow_reads_what_is_written(dtype, packed):
    import tensorflow as tf

    for array in (ARRAYS[dtype], ARRAYS[dtype].T, ARRAYS[dtype][0, 1], ARRAYS[dtype][:0]):
        array = np.asarray(array, ARRAYS[dtype].dtype)
        written = proto()
        write_tensor(array, written, packed)
        assert bool(written.tensor_content) == (packed and dtype != "object" and array.size > 0)
        assert len(getattr(written, FIELDS[dtype])) == (0 if written.tensor_content else array.size)
        for back in (read_tensor(written), tf.make_ndarray(written)):
            assert back.dtype == array.dtype and back.shape == array.shape and back.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", ARRAYS)
def test_what_tensorflow_writes_is_read(dtype):
    import tensorflow as tf

    back = read_tensor(tf.make_tensor_proto(ARRAYS[dtype].tolist(), "string" if dtype == "object" else dtype))
    assert back.dtype == ARRAYS[dtype].dtype and back.tolist() == ARRAYS[dtype].tolist()


def test_values_that_are_left_out():
    assert read_tensor(proto(shape=[4], float_val=[1, 2])).tolist() == [1, 2, 2, 2]
    assert read_tensor(proto(shape=[2, 1])).tolist() == [[0], [0]]
    assert read_tensor(proto(shape=[1], float_val=[1, 2])).tolist() == [1]
    assert read_tensor(proto(7, [3], string_val=[b"a", b"b"])).tolist() == [b"a", b"b", b"b"]
    assert read_tensor(proto(7, [2])).tolist() == [b"", b""]
    assert read_tensor(proto(7)).shape == ()


def test_values_that_are_out_of_range_wrap():
    assert read_tensor(proto(6, [2], int_val=[128, -129])).tolist() == [-128, 127]  # int8
    assert read_tensor(proto(4, [2], int_val=[256, -1])).tolist() == [0, 255]  # uint8
    halves = read_tensor(proto(19, [3], half_val=[0x3C00, 0x13C00, -1]))
    assert halves[:2].tolist() == [1, 1] and np.isnan(halves[2])


def test_tensors_that_make_no_sense():
    unknown = proto()
    unknown.tensor_shape.unknown_rank = True
    for wrong in (
        proto(0),  # no dtype
        proto(14),  # bfloat16
        proto(99),
        proto(shape=[-1]),
        proto(shape=[1 << 40]),
        proto(shape=[1 << 32, 1 << 32]),
        proto(shape=[1] * 65),
        proto(shape=[2], tensor_content=b"1234567"),
        unknown,
    ):
        assert read_tensor(wrong) is None
