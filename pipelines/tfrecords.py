"""TFRecord files without TensorFlow: where each record lies, one record by its place, a new file.

The format (tensorflow/core/lib/io/record_writer.h): length as uint64, its checksum, the data, its checksum; all
little-endian, checksums CRC-32C and masked.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import google_crc32c

from models import GraftError

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")


def masked_checksum(data: bytes) -> int:
    """CRC-32C of the data, rotated and shifted, so that a checksum of data with checksums in it is still good."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_records(file: BinaryIO, records: Iterable[bytes]) -> None:
    """Write records to an open binary file."""
    for data in records:
        length = struct.pack("<Q", len(data))
        file.write(length + FOOTER.pack(masked_checksum(length)) + data + FOOTER.pack(masked_checksum(data)))


def index_records(path: pathlib.Path) -> Iterator[tuple[int, int, str]]:
    """Where the records of a file lie: (place of the data, its length, ""), in order; the data is not read.

    Where the file breaks off, or a length is damaged, nothing behind can be found: one last (0, 0, reason).

    Raises:
        GraftError: the file cannot be read, or does not begin as a TFRecord file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            place = 0
            while place < size:
                header = file.read(HEADER.size)
                if len(header) < HEADER.size:
                    yield 0, 0, f"the file ends within the header of a record, at byte {size:,}"
                    return
                length, checksum = HEADER.unpack(header)
                if checksum != masked_checksum(header[:8]):
                    if place == 0:
                        raise GraftError(
                            f"{path} is no TFRecord file: the checksum of its first length is wrong. Expected "
                            f"uncompressed records of tf.train.Example; unpack a compressed file first."
                        )
                    yield 0, 0, f"damaged at byte {place:,}: records from here on cannot be found"
                    return
                start = place + HEADER.size
                place = start + length + FOOTER.size
                if place > size:
                    yield 0, 0, f"the file ends within this record, at byte {size:,}"
                    return
                yield start, length, ""
                file.seek(length + FOOTER.size, 1)
    except OSError as error:
        raise GraftError(f"{path} cannot be read: {error.strerror}.") from error


def read_record(file: BinaryIO, place: int, length: int) -> bytes | None:
    """The data of one record; None where its checksum is wrong."""
    file.seek(place)
    data = file.read(length)
    footer = file.read(FOOTER.size)
    if len(data) < length or footer != FOOTER.pack(masked_checksum(data)):
        return None
    return data


def example_protos():
    """tensorflow.core.example.example_pb2, without `import tensorflow`."""
    from serving.runtime import import_protos

    return import_protos("tensorflow.core.example.example_pb2")[0]


def features_of(data: bytes) -> dict[str, list] | None:
    """A serialized tf.train.Example as {name: values}; None where it is none."""
    from google.protobuf.message import DecodeError

    try:
        features = example_protos().Example.FromString(data).features.feature
    except DecodeError:
        return None
    values = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values[name] = list(getattr(feature, kind).value) if kind else []
    return values or None


def example_of(values: dict) -> bytes:
    """{name: a str, bytes, bool, int or float, or a list or array of them} -> a serialized tf.train.Example."""
    example = example_protos().Example()
    for name, value in values.items():
        items = [value] if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") else list(value)
        feature = example.features.feature[name]
        if all(isinstance(item, (str, bytes)) for item in items):
            feature.bytes_list.value.extend(item.encode() if isinstance(item, str) else item for item in items)
        elif all(isinstance(item, (bool, int)) for item in items):
            feature.int64_list.value.extend(map(int, items))
        else:
            feature.float_list.value.extend(items)
    return example.SerializeToString(deterministic=True)
