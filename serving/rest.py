"""TF Serving's REST interface as an ASGI application: predict, model metadata, model status, metrics.

Paths are matched before they are decoded and with their query, as the server does: `m%3Apredict` is a model's
name, and any `?x=1` is malformed. A model's name is looked up in a table and never becomes a path.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor

from google.protobuf import json_format

from serving.batching import QUEUE_FULL
from serving.json_text import echo, invalid, parse_object, quoted
from serving.metrics import Metrics
from serving.models_table import (
    DEFAULT_SIGNATURE,
    TIMED_OUT,
    ModelsTable,
    RequestError,
    refuse_examples,
    run_signature,
)
from serving.page import CONTENT_TYPE as PAGE_TYPE
from serving.page import HEADERS as PAGE_HEADERS
from serving.page import page
from serving.rest_json import read_inputs, write_outputs

PREDICT_PATH = re.compile(
    rb"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.IGNORECASE
)
MODEL_PATH = re.compile(
    rb"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE
)
HTTP_STATUS = {  # gRPC status -> HTTP status (ToHTTPStatusCode in http_server.cc); all others are 500
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "TOO_LARGE": 413,  # of ours: the real server has no limit
}
NOT_FOUND_PAGE = (
    b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n</BODY></HTML>\n"  # libevent's
)
MOST_INFLATED_BYTES = 100_000_000  # of a compressed body, as in the server


def create_app(
    table: ModelsTable,
    metrics: Metrics,
    metrics_path: str | None = None,
    threads: int = 8,
    timeout_seconds: float = 30.0,
    max_body_bytes: int = 100_000_000,
    max_waiting: int = 256,
    cors: bool = False,
):
    """The ASGI application.

    threads: requests that are worked on at once; max_waiting: more than these that may wait, further ones are
    refused as UNAVAILABLE. metrics_path: where the metrics are, None: nowhere. cors: let other sites' pages ask.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rest")
    places = threading.BoundedSemaphore(threads + max_waiting)

    async def answer(scope, receive) -> tuple[int, bytes, bytes]:
        """(HTTP status, content type, body) of one request."""
        query = scope["query_string"]
        method, path = scope["method"], scope["raw_path"] + (b"?" + query if query else b"")
        if metrics_path is not None and path == metrics_path.encode():
            return 200, b"text/plain", metrics.text().encode()
        if scope["raw_path"] == b"/" and method in ("GET", "HEAD"):  # for people; not in the real server
            return 200, PAGE_TYPE, page(table.names())
        if path[:4].lower() != b"/v1/":
            return 404, b"text/html", NOT_FOUND_PAGE
        try:
            return 200, b"application/json", await answer_api(method, path, scope, receive)
        except RequestError as error:
            return HTTP_STATUS.get(error.code, 500), b"application/json", error_body(error.message)
        except Exception:  # a bug of ours: clients read JSON, whoever runs the server reads what happened
            traceback.print_exc(file=sys.stderr)
            return 500, b"application/json", error_body("Internal error of the embedded server")

    async def answer_api(method: str, path: bytes, scope, receive) -> bytes:
        has_query = b"?" in path  # of which a name could be taken for a part
        if method == "POST" and (found := PREDICT_PATH.fullmatch(path)):
            name, number, label = model_spec(found)
            body = await read_body(scope, receive, max_body_bytes)
            if found[4].lower() != b"predict":
                return await in_pool(refuse, table, found[4].lower().decode(), name, number, label, body)
            deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
            return await in_pool(predict, table, metrics, name, number, label, body, deadline)
        if method == "GET" and not has_query and (found := MODEL_PATH.fullmatch(path)):
            name, number, label = model_spec(found)
            if not name:
                raise invalid("Missing model name in request.")
            return metadata(table, name, number, label) if found[4] else status(table, name, number)
        if method == "OPTIONS" and re.match(rb"https?://", header(scope, b"origin")):
            return b""
        raise invalid(f"Malformed request: {method} {path.decode('utf-8', 'surrogateescape')}")

    async def in_pool(function, *arguments) -> bytes:
        if not places.acquire(blocking=False):
            raise RequestError("UNAVAILABLE", QUEUE_FULL)
        future = pool.submit(function, *arguments)
        future.add_done_callback(lambda done: places.release())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_seconds or None)
        except TimeoutError as error:
            raise RequestError("DEADLINE_EXCEEDED", TIMED_OUT) from error

    async def app(scope, receive, send):
        status_code, kind, body = await answer(scope, receive)
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        if kind == PAGE_TYPE:
            headers += PAGE_HEADERS
        if status_code == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        if cors:
            headers += [(b"access-control-allow-origin", b"*"), (b"access-control-allow-methods", b"POST, GET")]
            headers.append((b"access-control-allow-headers", b"Content-Type"))
        await send({"type": "http.response.start", "status": status_code, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def model_spec(found: re.Match) -> tuple[str, int | None, str | None]:
    """(name, version number, label) of a path; raises RequestError with no message for a number past 64 bits."""
    name, number, label = (
        None if part is None else urllib.parse.unquote_to_bytes(part).decode("utf-8", "surrogateescape")
        for part in found.groups()[:3]
    )
    if number is None:
        return name, None, label
    digits = number.lstrip("0") or "0"
    if len(digits) > 19 or int(digits) >= 2**63:
        raise RequestError("INVALID_ARGUMENT", "")
    return name, int(digits), label


def error_body(message: str) -> bytes:
    """{"error": message}; nothing at all where there is no message."""
    text = message.encode("utf-8", "surrogateescape").decode("latin-1")  # a character per byte
    return f'{{\n    "error": {quoted(text)}\n}}'.encode("latin-1") if message else b""


def header(scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def read_body(scope, receive, limit: int) -> bytes:
    """The body, inflated where it is compressed; past `limit` bytes nothing more of it is read."""
    too_large = RequestError("TOO_LARGE", f"The body has more than {limit} bytes")
    announced = header(scope, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("CANCELLED", "The client has closed the connection")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            break
    if b"gzip" not in header(scope, b"content-encoding").lower():
        return bytes(body)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = inflater.decompress(bytes(body), MOST_INFLATED_BYTES)
    except zlib.error:
        return b""  # then the document is empty, says the server
    return content if inflater.eof else b""


def signature_name(document: dict) -> str:
    """The signature that a request asks for; raises RequestError."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        words = "not formatted correctly. 'signature_name' key must be a string value."
        raise invalid(f"JSON Value: {echo(document)} {words}")
    return name or DEFAULT_SIGNATURE


def refuse(table: ModelsTable, method: str, name, number, label, body: bytes) -> None:
    """Raise what a classify or regress request gets."""
    document = parse_object(body)
    signature = signature_name(document)
    examples = document.get("examples", "")
    if not isinstance(examples, list) or not examples:
        words = (
            "'examples' value is an empty array" if examples == [] else "Expecting 'examples' value to be an list/array"
        )
        if "examples" not in document:
            words = "When method is classify, key 'examples' is expected and was not found"
        raise invalid(f"JSON Value: {echo(document)} {words}")
    with table.acquire(name, number, label) as (_, version):
        if signature not in version.signature_defs:
            raise invalid(f"No signature was found with the name: {signature}")
        raise refuse_examples(version.signature_defs[signature], method)


def predict(table: ModelsTable, metrics: Metrics, name, number, label, body: bytes, deadline: float | None) -> bytes:
    """The body of the answer to a predict request; raises RequestError, DEADLINE_EXCEEDED past `deadline`."""
    started, code = time.perf_counter(), "INTERNAL"
    try:
        document = parse_object(body)
        signature = signature_name(document)
        with table.acquire(name, number, label) as (_, version):
            known = version.session.signatures
            if signature not in known:
                raise invalid(f'Serving signature name: "{signature}" not found in signature def')
            if not known[signature]["inputs"]:
                raise invalid(f"Failed to get input map for signature: {signature}")
            inputs, in_rows = read_inputs(document, known[signature]["inputs"])
            answer = write_outputs(run_signature(version, signature, inputs, deadline), in_rows)
        code = "OK"
        return answer
    except RequestError as error:
        code = error.code
        raise
    finally:
        if table.knows(name):  # anybody can think up names
            metrics.record(name, "REST", code, time.perf_counter() - started)


def status(table: ModelsTable, name: str, number) -> bytes:
    """The states of a model's versions; raises RequestError."""
    states = [
        {"version": str(at), "state": state, "status": {"error_code": code, "error_message": message}}
        for at, state, (code, message) in table.status(name, number)
    ]
    return (json.dumps({"model_version_status": states}, indent=1) + "\n").encode()


def metadata(table: ModelsTable, name: str, number, label) -> bytes:
    """The signatures of a version; raises RequestError."""
    with table.acquire(name, number, label) as (found, version):
        signatures = {
            key: json_format.MessageToDict(
                signature, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for key, signature in version.signature_defs.items()
        }
    spec = {"name": name, "signature_name": "", "version": str(found)}
    answer = {"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}}
    return (json.dumps(answer, indent=1) + "\n").encode()
