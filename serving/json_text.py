"""JSON text as TF Serving reads and writes it (tensorflow_serving/util/json_tensor.cc, rapidjson).

Numbers keep their kind: a float always has a point or an exponent. Text is neither decoded nor checked on the way.
"""

from __future__ import annotations

import json
import re

import numpy as np
import orjson

from serving.models_table import RequestError

ECHO_BYTES = 256  # of a value that is repeated in an error message
PARSE_ERRORS = {  # beginning of Python's message -> rapidjson's (rapidjson/error/en.h)
    "Expecting value": "Invalid value.",
    "Expecting property name": "Missing a name for object member.",
    "Illegal trailing comma before end of object": "Missing a name for object member.",
    "Expecting ':'": "Missing a colon after a name of object member.",
    "Unterminated string": "Missing a closing quotation mark in string.",
    "Invalid control character": "Invalid encoding in string.",
    "Invalid \\u": "Incorrect hex digit after \\u escape in string.",
    "Invalid \\": "Invalid escape character in string.",
}
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'  # a JSON string
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.S)
_TO_ESCAPE = re.compile(r'["\\\x00-\x1f]')
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)


def parse_object(body: bytes) -> dict:
    """The JSON object in a request's body; NaN and infinities are numbers, bytes after the object are ignored."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = parse_leniently(body)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {echo(document)} Is not object")
    return document


def parse_leniently(body: bytes):
    """Python's own parser for what orjson refuses and the server takes; RequestError for what neither takes."""
    text = body.decode("utf-8", "surrogateescape")
    if "Inf" in text:
        text = re.sub(
            _STRING + r"|\bInf\b", lambda found: {"Inf": "Infinity"}.get(found[0], found[0]), text, flags=re.S
        )

    def too_big(digits):
        return parse_error("Number too big to be stored in double.", text, text.index(digits))

    def read_float(digits):
        value = float(digits)
        if np.isinf(value):
            raise too_big(digits)
        return value

    def read_integer(digits):
        value = int(digits) if len(digits) <= 20 else 2**64
        return value if -(2**63) <= value < 2**64 else read_float(digits)

    start = len(text) - len(text.lstrip(" \t\r\n"))
    if start == len(text):
        raise parse_error("The document is empty.", text, start)
    check_surrogates(text)
    decoder = json.JSONDecoder(parse_float=read_float, parse_int=read_integer)
    try:
        return decoder.raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        position = len(text) if error.msg.startswith("Unterminated") else error.pos
        raise parse_error(server_words(error.msg, text, position), text, position) from error
    except RecursionError as error:
        raise invalid("JSON Parse error: lists or objects are nested too deeply") from error


def check_surrogates(text: str) -> None:
    """RequestError for half of a pair of escapes: no character, and no bytes that an answer could repeat."""
    high = None  # the first half, where the second must follow
    for found in _ESCAPE.finditer(text):
        code = int(found[1], 16) if found[1] else 0
        is_low = 0xDC00 <= code <= 0xDFFF
        if high and not (is_low and found.start() == high.end()):
            break
        if is_low and not high:
            high = found
            break
        high = found if 0xD800 <= code < 0xDC00 else None
    if high:
        raise parse_error("The surrogate pair in string is invalid.", text, high.start())


def server_words(message: str, text: str, position: int) -> str:
    """Python's message for a mistake in `text` at `position` -> that of the server's parser."""
    if message.startswith("Expecting ',' delimiter"):
        opened = []  # brackets that are open there
        for found in re.finditer(_STRING + r"|[][{}]", text[:position], flags=re.S):
            if found[0] in "[{":
                opened.append(found[0])
            elif found[0] in "]}" and opened:
                opened.pop()
        wanted = "] after an array element." if opened[-1:] == ["["] else "} after an object member."
        return f"Missing a comma or {wanted}"
    return next((words for start, words in PARSE_ERRORS.items() if message.startswith(start)), "Invalid value.")


def parse_error(words: str, text: str, position: int) -> RequestError:
    offset = len(text[:position].encode("utf-8", "surrogateescape"))
    return invalid(f"JSON Parse error: {words} at offset: {offset}")


def echo(value) -> str:
    """A value as the server repeats it in a message: indented, cut near 256 bytes."""
    text = ""
    for piece in pretty_pieces(value, 0):
        text += piece
        if len(text) > ECHO_BYTES:
            return text[:ECHO_BYTES] + "..."
    return text


def pretty_pieces(value, depth: int):
    """The pieces of a JSON value indented by four spaces; as many as are asked for are made."""
    if isinstance(value, (list, dict)) and value:
        brackets = "[]" if isinstance(value, list) else "{}"
        yield brackets[0]
        for at, item in enumerate(value):
            yield f"{',' if at else ''}\n{'    ' * (depth + 1)}"
            if isinstance(value, dict):
                yield f"{quoted(item)}: "
                item = value[item]
            yield from pretty_pieces(item, depth + 1)
        yield f"\n{'    ' * depth}{brackets[1]}"
    elif isinstance(value, str):
        yield quoted(value)
    elif isinstance(value, float):
        yield number_texts(np.array([value]))[0]
    else:
        yield json.dumps(value)


def quoted(text: str) -> str:
    """A JSON string; only what must be escaped is."""
    return '"' + _TO_ESCAPE.sub(lambda found: _ESCAPES.get(found[0]) or f"\\u{ord(found[0]):04X}", text) + '"'


def number_texts(values: np.ndarray) -> list[str]:
    """Floats as text: six digits where that is exact, else as many as it takes; always a point or an exponent."""
    flat = values.ravel()
    texts = [f"{value:g}" for value in flat.tolist()]
    with np.errstate(over="ignore"):
        back = np.array(texts, np.float64).astype(flat.dtype)
    digits = 9 if flat.dtype == np.float32 else 17
    for at in np.flatnonzero((back != flat) & ~np.isnan(flat)):
        texts[at] = f"{flat[at]:.{digits}g}"
    special = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return [text if "." in text or "e" in text else special.get(text, f"{text}.0") for text in texts]
