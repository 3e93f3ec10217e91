"""For the tests of the embedded server: small models, and a server in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
ECHOES = (
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint32",
    "uint64",
    "bool",
    "string",
    "half",
)


def write_model(folder: pathlib.Path, number: float = 0.0) -> pathlib.Path:
    """A SavedModel with a signature per thing that the interfaces may meet; `number` tells versions apart."""
    import tensorflow as tf

    def signature(function, **inputs):
        specs = [tf.TensorSpec(shape, dtype, name=name) for name, (dtype, shape) in inputs.items()]
        return tf.function(function, input_signature=specs)

    def busy(x):
        """Some tenths of a second of work."""
        square = tf.ones([300, 300]) * x[0] * 0.0
        square = tf.while_loop(lambda at, _: at < 300, lambda at, m: (at + 1, m @ m), (0, square))[1]
        return {"number": tf.fill(tf.shape(x), number + square[0, 0])}

    kernel = tf.reshape(tf.range(8, dtype=tf.float32), [4, 2])
    float_rows, text_rows = (tf.float32, [None]), (tf.string, [None])
    signatures = {
        "serving_default": signature(lambda x: {"y": 2.0 * x}, x=(tf.float32, [None, 2])),
        "number": signature(lambda x: {"number": tf.fill(tf.shape(x), number)}, x=float_rows),
        "busy": signature(busy, x=float_rows),
        "two": signature(lambda a, b: {"sum": a + b, "product": a * b}, a=float_rows, b=float_rows),
        "matmul": signature(lambda x: {"y": x @ kernel}, x=(tf.float32, [None, None])),
        "decode": signature(lambda data: {"side": tf.shape(tf.io.decode_image(data[0]))[:1]}, data=text_rows),
        "to_bytes": signature(lambda text: {"text": text, "text_bytes": text}, text=text_rows),
        "one_bytes": signature(lambda text: {"text_bytes": text}, text=text_rows),
        "uneven": signature(lambda x: {"all": x, "one": x[:1]}, x=float_rows),
        "scalar": signature(lambda x: {"sum": tf.reduce_sum(x)}, x=float_rows),
    }
    for dtype in ECHOES:
        signatures[dtype] = signature(lambda value: {"value": tf.identity(value)}, value=(tf.as_dtype(dtype), None))
    module = tf.Module()
    module.kept = signatures
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(*words, name: str = "model"):
    """A server with these flags; yields (REST port, gRPC port, process) once the model `name` answers."""
    rest, grpc = free_ports(2)
    command = [sys.executable, "-m", "serving.server", *map(str, words)]
    command += ["--rest_api_port", str(rest), "--port", str(grpc), "--file_system_poll_wait_seconds", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(rest, "GET", f"/v1/models/{name}/metadata")[0] == 200:
                    break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        yield rest, grpc, process
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def ask(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def predict(port: int, document, path: str = "/v1/models/model") -> tuple[int, bytes]:
    """(status, body) of a predict request; `document` is JSON text, bytes or a value."""
    body = document if isinstance(document, (str, bytes)) else json.dumps(document)
    return ask(port, "POST", f"{path}:predict", body)


def error_body(message: str) -> bytes:
    return b'{\n    "error": ' + json.dumps(message, ensure_ascii=False).encode() + b"\n}"
