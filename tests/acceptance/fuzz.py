"""Malformed requests to the embedded server: `python -m tests.acceptance.fuzz --count 50000`.

Valid REST bodies, HTTP requests and gRPC messages are broken at random, seeded. Every one must get a proper error or
an answer in time; afterwards the server must still answer a valid request, and must have printed no traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import http.client
import json
import pathlib
import random
import re
import socket
import sys
import tempfile
import threading

import grpc
import psutil

from serving.runtime import import_protos
from tests.embedded_server import ask, running, write_model

SECONDS = 30  # an answer that takes longer is a hang
LIMIT = 2_000_000  # bytes of a body
REST_PATH = "/v1/models/model:predict"
SHARES = {"body": 0.6, "path": 0.1, "http": 0.05, "grpc": 0.25}
BODIES = [
    b'{"instances": [[1, 2.5], [3, 4]]}',
    b'{"instances": [{"x": [1, 2]}]}',
    b'{"inputs": {"x": [[1, 2]]}, "signature_name": "serving_default"}',
    b'{"signature_name": "two", "instances": [{"a": 1, "b": 2}, {"b": 5, "a": 3}]}',
    b'{"signature_name": "matmul", "inputs": [[1, 2, 3, 4]]}',
    b'{"signature_name": "decode", "instances": [{"b64": "iVBORw0KGgo="}]}',
    b'{"signature_name": "to_bytes", "instances": ["\xc3\xa9\\u0001", {"b64": "AAEC"}]}',
    b'{"signature_name": "string", "inputs": [["a", "b"], ["c", "d"]]}',
    *(b'{"signature_name": "%s", "inputs": [0, 1, 100]}' % kind for kind in (b"int8", b"int64", b"uint64", b"float64")),
    b'{"signature_name": "bool", "instances": [true, false]}',
]
TOKEN = re.compile(rb'"[^"]*"|-?\d[\d.eE+-]*|[][{}:,]|true|false')
ODD_TOKENS = [
    *(b"1e999", b"-1e400", b"1e-400", b"9" * 400, b"18446744073709551616", b"-9223372036854775809", b"0x10", b"-"),
    *(b"NaN", b"-Infinity", b"Inf", b"null", b"true", b'""', b"{}", b"[]", b"[[],[1]]", b"1" + b"0" * 5000),
    *(b'{"b64": "_-=="}', b'{"b64": "A"}', b'{"b64": 1}', b'{"b64": "AA==", "x": 1}', b'{"b64": "\xff"}'),
    *(b'"\xff\xfe"', b'"\\ud800"', b'"\\u12"', b'"\x00"', b'"' + b"x" * 5000 + b'"', b'"instances"', b'"inputs"'),
    *(b"[" * depth + b"]" * depth for depth in (63, 64, 300, 1000, 10_000)),
    *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (300, 10_000)),
]
NAMES = [
    "..",
    "%2e%2e",
    "%2e%2e%2fetc%2fpasswd",
    "..%2fmodel",
    "model%2f..%2fmodel",
    "model/../model",
    "model%00",
    "%00",
    "%ff%fe",
    "%",
    "%zz",
    "%25",
    "model%0d%0aX:y",
    "model;",
    "model\\..",
    "~",
    "$HOME",
    "{}",
    "model::predict",
    "//model",
    ":predict",
] + ["x" * 8000, "%2e" * 5000]
SUFFIXES = [
    "",
    ":predict",
    "/metadata",
    "/versions/1:predict",
    "/versions/-1",
    "/versions/99999999999999999999",
    "/versions/1/metadata",
    "/labels/..%2f..:predict",
    "/labels/%00/metadata",
    "?x=1",
    "/..",
    ":classify",
    ":run",
]
METHODS = {  # of the services -> their requests
    "PredictionService/Predict": ("predict_pb2", "PredictRequest"),
    "PredictionService/GetModelMetadata": ("get_model_metadata_pb2", "GetModelMetadataRequest"),
    "PredictionService/Classify": ("classification_pb2", "ClassificationRequest"),
    "PredictionService/Regress": ("regression_pb2", "RegressionRequest"),
    "PredictionService/MultiInference": ("inference_pb2", "MultiInferenceRequest"),
    "ModelService/GetModelStatus": ("get_model_status_pb2", "GetModelStatusRequest"),
    "ModelService/HandleReloadConfigRequest": ("model_management_pb2", "ReloadConfigRequest"),
}
SIZES = (-1, 0, 1, 1, 2, 3, 7, 2**20, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
FIELDS = ["float_val", "double_val", "int_val", "int64_val", "uint32_val", "uint64_val", "bool_val", "half_val"]
PROPER_CODES = ["OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to three random changes of bytes: cut, flip, insert, delete, repeat."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.randint(1, 20))
        inserted = rng.randbytes(rng.randint(1, 8))
        content = rng.choice(
            [
                content[:start],
                content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :],
                content[:start] + inserted + content[start:],
                content[:start] + content[end:],
                content[:end] + content[start:end] * rng.choice([1, 2, 500]) + content[end:],
            ]
        )
    return content


def broken_body(rng: random.Random) -> bytes:
    """A JSON body with an odd token, a second key of the same name, or changed bytes; rarely a long one."""
    body = rng.choice(BODIES)
    kind = rng.random()
    if kind < 0.5:
        found = rng.choice(list(TOKEN.finditer(body)))
        return body[: found.start()] + rng.choice(ODD_TOKENS) + body[found.end() :]
    if kind < 0.6:
        return body.replace(b"{", rng.choice([b'{"instances": [1], ', b'{"inputs": 1, ', b'{"a": 1, "a": 2, ']), 1)
    if kind < 0.61:
        token = rng.choice(ODD_TOKENS[:20])
        times = min(rng.randint(1000, 20_000), LIMIT // (len(token) + 1) - 100)  # inside the limit
        return b'{"instances": [' + b",".join([token] * times) + b"]}"
    return mutate(rng, body)


def check_json(status: int, body: bytes) -> str | None:
    """What is wrong with an answer of the REST interface; None where it is proper."""
    try:
        content = json.loads(body.decode("latin-1"), strict=False) if body else None
    except ValueError:
        return "no JSON"
    if status == 200:
        return None if content else "an empty answer"
    if status == 400 and not body:
        return None  # a version past 64 bits: so does the real server
    if not 400 <= status < 600 or status == 500:
        return "no proper status"
    return None if list(content) == ["error"] and content["error"] else "no error message"


def fuzz_body(rng: random.Random, connection: http.client.HTTPConnection) -> tuple[str, str | None]:
    """Send one body; returns (kind of answer, what is wrong with it or None)."""
    body, headers = broken_body(rng), {}
    if rng.random() < 0.05:
        headers = {"Content-Encoding": "gzip"}
        body = body if rng.random() < 0.5 else mutate(rng, gzip.compress(body))
    chunks = iter([body[:10], body[10:]]) if rng.random() < 0.1 else body  # an iterator is sent in chunks
    status, answer = request(connection, "POST", REST_PATH, chunks, headers)
    wrong = check_json(status, answer)
    return f"{status}", wrong and f"{wrong}: {status} {answer[:300]!r} for {body[:300]!r}"


def fuzz_path(rng: random.Random, connection: http.client.HTTPConnection) -> tuple[str, str | None]:
    """Ask for a model that cannot be."""
    path = f"/v1/models/{rng.choice(NAMES)}{rng.choice(SUFFIXES)}"
    method = rng.choice(["GET", "POST", "PUT", "OPTIONS"])
    status, answer = request(connection, method, path, rng.choice(BODIES) if method == "POST" else None, {})
    wrong = check_json(status, answer) if status in (400, 404) else "it went somewhere"
    return f"{status}", wrong and f"{wrong}: {status} {answer[:300]!r} for {method} {path[:300]}"


def request(connection, method, path, body, headers) -> tuple[int, bytes]:
    """(status, body); a connection that the server has closed is opened again by the next request."""
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def fuzz_http(rng: random.Random, port: int) -> tuple[str, str | None]:
    """Send a broken HTTP request on a connection of its own; it may be closed without an answer."""
    body = rng.choice(BODIES)
    head = f"POST {REST_PATH} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n".encode()
    if rng.random() < 0.5:
        content = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    else:
        content = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    content = mutate(rng, content)
    with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
        with contextlib.suppress(ConnectionError):  # closed before all was sent
            raw.sendall(content)
            raw.shutdown(socket.SHUT_WR)
        try:
            answer = raw.makefile("rb").read()
        except ConnectionError:
            answer = b""
    found = re.match(rb"HTTP/1\.[01] (\d+) ", answer)
    if not answer:
        return "closed", None
    wrong = None if found and found[1] != b"500" else f"no proper answer: {answer[:300]!r} for {content!r}"
    return found[1].decode() if found else "other", wrong


def broken_message(rng: random.Random, modules: dict) -> tuple[str, bytes]:
    """(method, serialized request): a wrong tensor, changed bytes, or nothing but random ones."""
    method = rng.choice(list(METHODS)) if rng.random() < 0.3 else "PredictionService/Predict"
    module, name = METHODS[method]
    message = getattr(modules[module], name)()
    if "model_spec" in message.DESCRIPTOR.fields_by_name:
        message.model_spec.name = rng.choice(["model", "model", "model", "", "../model", "a\0b", "x" * 5000])
        signatures = ["", "two", "matmul", "string", "float32", "int64", "uint8", "half", "bool", "\0"]
        message.model_spec.signature_name = rng.choice(signatures)
    if method.endswith("Metadata"):
        message.metadata_field.append(rng.choice(["signature_def", "", "\0", "x" * 5000]))
    if method.endswith("/Predict"):
        for alias in rng.sample(["x", "value", "a", "b", "", "\0"], rng.randint(0, 2)):
            fill_tensor(rng, message.inputs[alias])
        if message.model_spec.signature_name == "two":
            fill_tensor(rng, message.inputs["a"])
            fill_tensor(rng, message.inputs["b"])
    content = message.SerializeToString()
    kind = rng.random()
    if kind < 0.4:
        return method, content
    return method, mutate(rng, content) if kind < 0.95 else rng.randbytes(rng.randint(0, 3000))


def fill_tensor(rng: random.Random, tensor) -> None:
    """A dtype, a shape and values that need not fit each other."""
    tensor.dtype = rng.choice([1, 1, 1, 2, 3, 4, 6, 7, 9, 10, 14, 19, 22, 23, 0, 8, 21, 101, 2**30])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 65, 300])):
        tensor.tensor_shape.dim.add(size=rng.choice(SIZES[1:6] if rng.random() < 0.8 else SIZES))
    tensor.tensor_shape.unknown_rank = rng.random() < 0.02
    for field in rng.sample(FIELDS, rng.randint(0, 2)):
        getattr(tensor, field).extend([rng.randint(0, 1)] * rng.choice([0, 1, 2, 6, 1000]))
    if rng.random() < 0.3:
        tensor.string_val.extend([rng.randbytes(rng.randint(0, 10))] * rng.randint(0, 9))
    if rng.random() < 0.3:
        tensor.tensor_content = rng.randbytes(rng.choice([0, 1, 4, 7, 8, 16, 1000]))


def fuzz_grpc(rng: random.Random, channel, modules: dict) -> tuple[str, str | None]:
    """Send one message; returns (code, what is wrong with it or None)."""
    method, content = broken_message(rng, modules)
    try:
        channel.unary_unary(f"/tensorflow.serving.{method}")(content, timeout=SECONDS)
        return "OK", None
    except grpc.RpcError as error:
        code, message = error.code().name, error.details()
    # So does gRPC answer bytes that are no message at all.
    proper = code in PROPER_CODES or (code == "INTERNAL" and message == "Exception deserializing request!")
    return code, None if proper else f"{code} {message} for {method} {content[:300]!r}"


def bytes_before_refusal(port: int) -> int:
    """Bytes of a body without end that the server took before it refused it."""
    sent, chunk = 0, b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
        raw.sendall(f"POST {REST_PATH} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30:
                raw.sendall(chunk)
                sent += len(chunk)
    return sent


def fuzz(count: int, seed: int, folder: pathlib.Path, report=print) -> list[str]:
    """Send `count` malformed requests to a server of its own; report counts per kind of answer; return faults."""
    rng, wrong, answers = random.Random(seed), [], collections.Counter()
    names = [f"tensorflow_serving.apis.{module}" for module in {module for module, _ in METHODS.values()}]
    modules = {module.__name__.rpartition(".")[2]: module for module in import_protos(*names)}
    write_model(folder / "model" / "1", 1)
    with running(folder / "model", "--max_body_bytes", LIMIT) as (rest, port, process):
        printed = []
        reader = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
        reader.start()
        connection = http.client.HTTPConnection("127.0.0.1", rest, timeout=SECONDS)
        server, before = psutil.Process(process.pid), None
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            send = {
                "body": lambda: fuzz_body(rng, connection),
                "path": lambda: fuzz_path(rng, connection),
                "http": lambda: fuzz_http(rng, rest),
                "grpc": lambda: fuzz_grpc(rng, channel, modules),
            }
            for at in range(count):
                kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
                try:
                    answer, problem = send[kind]()
                except (OSError, http.client.HTTPException) as error:  # a hang ends as a timeout, a crash as a reset
                    connection.close()
                    answer, problem = type(error).__name__, f"{kind}, request {at}: {error!r}"
                answers[kind, answer] += 1
                wrong += [problem[:300]] if problem else []
                if at == count // 10:
                    before = server.memory_info().rss
                if at % 500 == 0 or at == count - 1:
                    status, body = ask(rest, "POST", REST_PATH, BODIES[0])
                    if status != 200 or json.loads(body) != {"predictions": [[2.0, 5.0], [6.0, 8.0]]}:
                        wrong.append(f"after request {at} a valid one gets {status} {body!r}")
        sent = bytes_before_refusal(rest)
        if sent > LIMIT + (32 << 20):  # what the sockets hold on both sides
            wrong.append(f"{sent} bytes were taken of a body that may have {LIMIT}")
        after = server.memory_info().rss
        connection.close()
        process.terminate()
        process.wait(20)
        reader.join(20)
    if any("Traceback" in line for line in printed):
        wrong.append("the server printed: " + "".join(printed)[:2000])
    for (kind, answer), number in sorted(answers.items()):
        report(f"{kind:5} {answer:22} {number:7}")
    report(f"resident memory: {before / 2**20:.0f} MiB after a tenth, {after / 2**20:.0f} MiB at the end")
    report(f"a body without end: refused after {sent} bytes were sent, the limit being {LIMIT}")
    report(f"{count} requests, {len(wrong)} without a proper answer")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = fuzz(options.count, options.seed, pathlib.Path(folder))
    print("\n".join(wrong[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
