"""Tensors in the JSON of TF Serving's REST interface (tensorflow_serving/util/json_tensor.cc)."""

from __future__ import annotations

import base64
import binascii
import re

import numpy as np

from serving.json_text import echo, invalid, number_texts, quoted
from serving.models_table import RequestError

MOST_DIMENSIONS = 63  # numpy has 64, one of which holds the rows
FLOAT_LIMITS = {  # largest integer that is exact, largest number
    "float32": (2**24 - 1, float(np.finfo(np.float32).max)),
    "float64": (2**53 - 1, float(np.finfo(np.float64).max)),
}
INTEGER_LIMITS = {  # of the number in the JSON text; smaller types than int32 wrap around, as in the server
    "int8": (-(2**31), 2**31 - 1),
    "uint8": (-(2**31), 2**31 - 1),
    "int16": (-(2**31), 2**31 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
TYPE_NAMES = {"float32": "float", "float64": "double", "float16": "half"}  # numpy -> TensorFlow, where they differ


def read_inputs(document: dict, inputs: dict) -> tuple[dict[str, np.ndarray], bool]:
    """A request and a signature's inputs -> ({input: array}, whether it is in row format).

    inputs: {name: (dtype, shape)} as in Session.signatures. Strings become object arrays of bytes.
    """
    if "instances" in document:
        rows = document["instances"]
        if "inputs" in document:
            words = "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
            raise invalid(f"JSON Value: {echo(document)} {words}")
        if not isinstance(rows, list):
            raise invalid(f"JSON Value: {echo(document)} Excepting 'instances' to be an list/array")
        if not rows:
            raise invalid(f"JSON Value: {echo(document)} No values in 'instances' array")
        return read_rows(rows, inputs), True
    if "inputs" in document:
        return read_columns(document["inputs"], inputs), False
    raise invalid("Missing 'inputs' or 'instances' key")


def read_rows(rows: list, inputs: dict) -> dict[str, np.ndarray]:
    """The value of `instances`: plain values of a single input, or an object per row."""
    with_names = isinstance(rows[0], dict) and not is_base64(rows[0])
    if not with_names and len(inputs) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map"
        )
    leaves, shapes = {name: [] for name in inputs}, {}
    for at, row in enumerate(rows):
        named = isinstance(row, dict) and not is_base64(row)
        if with_names and not named:
            raise invalid(f"Expecting object but got list at item {at} of input list")
        if named and not with_names:
            raise invalid(f"Expecting value/list but got object at item {at} of input list")
        for name, value in row.items() if with_names else [(next(iter(inputs)), row)]:
            try:
                read_row(value, name, inputs, leaves, shapes)
            except RequestError as error:
                key = f" key: {name}" if with_names else ""
                reason = f"{error.code}: {error.message}"
                raise invalid(f"Failed to process element: {at}{key} of 'instances' list. Error: {reason}") from error
        if with_names and row.keys() != inputs.keys():
            raise invalid(
                f"Failed to process element: {at} of 'instances' list. JSON object: {echo(row)} "
                f"keys must be equal to: {','.join(sorted(inputs))}"
            )
    return {name: to_array(leaves[name], (len(rows), *shapes[name]), inputs[name][0]) for name in inputs}


def read_row(value, name: str, inputs: dict, leaves: dict, shapes: dict) -> None:
    """Add one row of one input to its leaves; every row must have the shape of the first."""
    if name not in inputs:
        raise invalid(f"JSON object: does not have named input: {name}")
    shape = nested_shape(value)
    before = len(leaves[name])
    flatten(value, shape, 0, inputs[name][0], leaves[name])
    first = shapes.setdefault(name, shape)
    if first != shape:
        size, expected = len(leaves[name]) - before, int(np.prod(first, dtype=np.int64))
        if size != expected:
            raise invalid(f"Expecting tensor size: {expected} but got: {size}")
        written = ["[" + ",".join(map(str, one)) + "]" for one in (first, shape)]
        raise invalid(f"Expecting shape {written[0]} but got: {written[1]}")


def read_columns(value, inputs: dict) -> dict[str, np.ndarray]:
    """The value of `inputs`: that of a single input, or an object with every input in it."""
    if not isinstance(value, dict) or is_base64(value):
        if len(inputs) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map"
            )
        value = dict.fromkeys(inputs, value)
    arrays = {}
    for name, (dtype, _) in inputs.items():
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        leaves, shape = [], nested_shape(value[name])
        flatten(value[name], shape, 0, dtype, leaves)
        arrays[name] = to_array(leaves, shape, dtype)
    return arrays


def nested_shape(value) -> tuple[int, ...]:
    """Lengths of a list, of its first element, and so on."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    if len(shape) > MOST_DIMENSIONS:
        raise invalid(f"{len(shape)} dimensions, more than {MOST_DIMENSIONS} are not possible here")
    return tuple(shape)


def flatten(value, shape: tuple, level: int, dtype: str, leaves: list) -> None:
    """Append the numbers or strings of a nested list to `leaves`; raises RequestError where it is ragged."""
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {echo(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        leaves.append(read_leaf(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    if level + 1 == len(shape) and is_plain(value, dtype):
        leaves.extend(value)
        return
    for item in value:
        flatten(item, shape, level + 1, dtype, leaves)


def is_plain(values: list, dtype: str) -> bool:
    """Whether a list holds only numbers that `read_leaf` takes as they are: the usual case, at the speed of C."""
    kinds = set(map(type, values))
    if dtype in FLOAT_LIMITS:
        return bool(kinds) and kinds <= {int, float} and max(map(abs, values)) <= FLOAT_LIMITS[dtype][0]
    if dtype in INTEGER_LIMITS:
        low, high = INTEGER_LIMITS[dtype]
        return kinds == {int} and low <= min(values) and max(values) <= high
    return False


def read_leaf(value, dtype: str):
    """One value of the JSON text as a Python number, bool or bytes; raises RequestError for another type."""
    kind = type(value)
    if kind is dict:
        if dtype != "string":
            raise type_error(value, dtype)
        return decode_base64(value)
    if dtype in FLOAT_LIMITS:
        if kind not in (int, float):
            raise type_error(value, dtype)
        exact, largest = FLOAT_LIMITS[dtype]
        if abs(value) > (exact if kind is int else largest) and abs(value) != float("inf"):
            to = TYPE_NAMES[dtype]
            raise invalid(f"Cannot convert JSON value: {echo(value)} to {to} without loss of precision.")
        return value
    if dtype in INTEGER_LIMITS:
        low, high = INTEGER_LIMITS[dtype]
        if kind is not int or not low <= value <= high:
            raise type_error(value, dtype)
        return value
    if dtype == "string":
        if kind is not str:
            raise type_error(value, dtype)
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise invalid("JSON Parse error: The surrogate pair in string is invalid.") from error
    if dtype == "bool":
        if kind is not bool:
            raise type_error(value, dtype)
        return value
    raise RequestError(
        "UNIMPLEMENTED", f"Conversion of JSON Value: {echo(value)} to type: {TYPE_NAMES.get(dtype, dtype)}"
    )


def type_error(value, dtype: str) -> RequestError:
    kinds = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number", type(None): "Null"}
    kind = str(value) if isinstance(value, bool) else kinds[type(value)]
    expected = TYPE_NAMES.get(dtype, dtype)
    return invalid(f"JSON Value: {echo(value)} Type: {kind} is not of expected type: {expected}")


def is_base64(value) -> bool:
    """Whether a JSON value stands for bytes: an object with b64 as its one key."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def decode_base64(value: dict) -> bytes:
    """The bytes of {"b64": text}: standard alphabet, padding or none, white space ignored."""
    if not is_base64(value):
        raise invalid(f"JSON Value: {echo(value)} not formatted correctly for base64 data")
    text = "".join(value["b64"].split()) if re.search(r"\s", value["b64"]) else value["b64"]
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid("Unable to base64 decode") from error


def to_array(leaves: list, shape: tuple, dtype: str) -> np.ndarray:
    """Leaves in order -> an array; small integers wrap around."""
    if dtype == "string":
        array = np.empty(len(leaves), object)
        array[:] = leaves
    elif dtype in ("int8", "uint8", "int16"):
        array = np.array(leaves, np.int64).astype(dtype)
    else:
        array = np.array(leaves, dtype)
    return array.reshape(shape)


def write_outputs(outputs: dict[str, np.ndarray], in_rows: bool) -> bytes:
    """A signature's outputs -> the body of the answer, laid out as the server does; RequestError where it cannot.

    The name of a single output is dropped. Strings of an output that is named ..._bytes are written in base64.
    """
    # Text of the model may be any bytes: they are carried through as Latin-1, a character per byte.
    names = sorted(outputs)
    if not in_rows:
        depth = 1 if len(names) == 1 else 2
        texts = [
            nested_text(iter(leaf_texts(name, outputs[name])), outputs[name].shape, depth, False) for name in names
        ]
        body = texts[0] if len(names) == 1 else object_text(names, texts, 1)
        return ('{\n    "outputs": ' + body + "\n}").encode("latin-1")
    count = row_count(outputs)
    depth = 2 if len(names) == 1 else 3
    leaves = {name: iter(leaf_texts(name, outputs[name])) for name in names}
    rows = []
    for _ in range(count):
        texts = [nested_text(leaves[name], outputs[name].shape[1:], depth, True) for name in names]
        rows.append(texts[0] if len(names) == 1 else object_text(names, texts, 2))
    start, separator = ("", ", ") if len(names) == 1 else ("\n        ", ",\n        ")
    body = f"[{start}{separator.join(rows)}\n    ]" if rows else "[]"
    return ('{\n    "predictions": ' + body + "\n}").encode("latin-1")


def row_count(outputs: dict) -> int:
    """The first dimension, which all outputs must share in row format."""
    count = None
    for name, values in sorted(outputs.items()):
        if values.ndim == 0:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if count is not None and values.shape[0] != count:
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {values.shape[0]} expecting: {count}")
        count = values.shape[0]
    return count


def leaf_texts(name: str, values: np.ndarray) -> list[str]:
    """The values of an output in order, as JSON; base64 without its object around it."""
    if values.dtype == object:
        if name.endswith("_bytes"):
            return [BASE64 + '"' + base64.b64encode(value).decode() + '"' for value in values.flat]
        return [quoted(value.decode("latin-1")) for value in values.flat]
    kind = values.dtype.kind
    if values.dtype.name in FLOAT_LIMITS:
        return number_texts(values)
    if kind in "iu":
        return list(map(str, values.ravel().tolist()))
    if kind == "b":
        return ["true" if value else "false" for value in values.flat]
    dtype = TYPE_NAMES.get(values.dtype.name, values.dtype.name)
    raise invalid(f"Failed to write JSON value for tensor type: {dtype}")


BASE64 = "b64:"  # begins a leaf that `nested_text` puts into an object; no other JSON value begins like this


def nested_text(leaves, shape: tuple, depth: int, one_line: bool) -> str:
    """Leaves in order as lists of this shape, at this depth of indentation."""
    if not shape:
        leaf = next(leaves)
        if leaf.startswith(BASE64):
            return object_text(["b64"], [leaf.removeprefix(BASE64)], depth)
        return leaf
    items = [nested_text(leaves, shape[1:], depth + 1, one_line) for _ in range(shape[0])]
    if one_line or not items:
        return "[" + ", ".join(items) + "]"
    pad = "\n" + "    " * (depth + 1)
    return "[" + pad + ("," + pad).join(items) + "\n" + "    " * depth + "]"


def object_text(names: list[str], texts: list[str], depth: int) -> str:
    """An object, a line per member."""
    pad = "    " * (depth + 1)
    members = [f"{pad}{quoted(name.encode().decode('latin-1'))}: {text}" for name, text in zip(names, texts)]
    return "{\n" + ",\n".join(members) + "\n" + "    " * depth + "}"
