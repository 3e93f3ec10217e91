"""Ask a served model from Python: TensorFlow Serving or Graft's own server, over REST or gRPC, without TensorFlow.

    with Client("http://localhost:8501/v1/models/photos") as client:
        answers = client.run("serving_default", {"image_bytes": [pathlib.Path("cat.jpg").read_bytes()]})

A Client answers as `serving.session.Session` does, so what asks an exported folder can ask a server.
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import re
import socket
import ssl
import time
import urllib.parse

import numpy as np
from google.protobuf import json_format

from models import GraftError
from serving.runtime import DTYPES, import_protos, input_array
from serving.session import INIT_SIGNATURE, SessionError, describe_tensor

MOST_ROWS = 32  # of a request; the most that serving/deploy/config/batching_params.pbtxt allows
MOST_BYTES = 16 << 20  # of a request's inputs, where it has more than one row
TIMEOUT_S = 30.0  # for one request; the server's own default limit over REST
TRIES = 5  # of a request to a server that is busy or away
FIRST_WAIT_S = 0.25  # before the second try, and twice as long before each next one
BUSY = (429, 502, 503)  # HTTP: queue limits, a proxy without a server behind it, a full queue

_WHICH = r"(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?(?::predict)?/?"
_PATHS = {"http": re.compile(rf"(?P<prefix>.*)/v1/models/{_WHICH}"), "grpc": re.compile(rf"(?P<prefix>)/{_WHICH}")}
_PATHS["https"] = _PATHS["http"]
_STRING_CODE = 7  # DT_STRING
_VALUES = {  # numpy kind and bytes -> field of a TensorProto (tensorflow/core/framework/tensor.proto)
    "f4": "float_val",
    "f8": "double_val",
    "i8": "int64_val",
    "u4": "uint32_val",
    "u8": "uint64_val",
    "b1": "bool_val",
    **dict.fromkeys(("i1", "i2", "i4", "u1"), "int_val"),
}


class ServerError(GraftError):
    """A server refused a request or could not be reached; the message holds its own words."""


class TryAgain(Exception):
    """A server is busy or away: the same request may work in a moment."""


class Client:
    """A served model: `run` answers a signature, as `Session.run` does. Close it, or use it in a `with` statement.

    `signatures` is as in `serving.session.Session`; `name` and `version` are those of the model that was met.
    A Client belongs to one thread: it keeps one connection.
    """

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, pinned: bool = False):
        """Meet the model: fetch its version and signatures.

        Args:
            url: http://HOST:8501/v1/models/NAME or grpc://HOST:8500/NAME, with /versions/3 or /labels/stable after
                it where a certain one is meant; https:// as well.
            pinned: ask the version that was met, even when a newer one goes live meanwhile.

        Raises:
            ServerError: the server cannot be reached, or knows no such model.
            GraftError: the URL is none of these.
        """
        self.url, self._which = url, parse_url(url)
        self.name = urllib.parse.unquote(self._which["name"])
        self._transport = (_Grpc if self._which["scheme"] == "grpc" else _Rest)(self._which, timeout_s)
        try:
            self.version, self.signatures = self._retried(self._transport.metadata)
        except BaseException:
            self.close()
            raise
        if pinned:
            self._which.update(version=str(self.version), label=None)

    def run(self, signature: str, inputs: dict) -> dict[str, np.ndarray]:
        """Answer one signature: {input name: array, or list of bytes} -> {output name: array}.

        Dimension 0 of inputs and outputs counts rows; many rows travel in several requests. Strings are bytes.

        Raises:
            ServerError: the server refused a request, or gave no answer in time.
            SessionError: unknown names and wrong dtypes, found before anything is sent.
        """
        if signature not in self.signatures:
            raise SessionError(f"{self.url}: no signature {signature!r}. Expected one of: {', '.join(self.signatures)}")
        expected, outputs = (self.signatures[signature][side] for side in ("inputs", "outputs"))
        what = f"{self.url}: signature {signature}"
        if set(inputs) != set(expected):
            raise SessionError(f"{what}: got the inputs {sorted(inputs)}, expected {sorted(expected)}")
        arrays = {name: input_array(inputs[name], *expected[name], f"{what}: input {name}") for name in inputs}
        if len({len(array) for array in arrays.values()}) > 1:
            raise SessionError(f"{what}: inputs of {[len(array) for array in arrays.values()]} rows, expected equal")
        answers = [
            self._retried(self._transport.predict, signature, {n: a[rows] for n, a in arrays.items()}, outputs)
            for rows in requests_of(list(arrays.values()))
        ]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}

    def _retried(self, call, *arguments):
        """The result of a call, tried again with growing waits while the server is busy or away."""
        for attempt in range(TRIES):
            try:
                return call(*arguments)
            except TryAgain as error:
                if attempt == TRIES - 1:
                    raise ServerError(
                        f"{self.url}: no answer in {TRIES} tries: {error}. Does the server run, and is this its port?"
                    ) from error
                # Random, or all clients of a busy server would come back at the same moment.
                time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))
            except ServerError as error:
                raise ServerError(f"{self.url}: {error}") from error.__cause__

    def close(self) -> None:
        self._transport.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def is_url(text: str) -> bool:
    """Whether a text is meant as the address of a served model."""
    return text.split("://")[0] in _PATHS and "://" in text


def parse_url(url: str) -> dict:
    """The parts of a model's address: scheme, host, port, prefix, name, version and label (None where not named)."""
    parts = urllib.parse.urlsplit(url)
    match = parts.scheme in _PATHS and parts.hostname and _PATHS[parts.scheme].fullmatch(parts.path)
    if not match:
        raise GraftError(
            f"{url}: not the address of a served model. Expected http://HOST:8501/v1/models/NAME or "
            f"grpc://HOST:8500/NAME, where wanted with /versions/3 or /labels/stable after it."
        )
    return {"scheme": parts.scheme, "host": parts.hostname, "port": parts.port, **match.groupdict()}


def requests_of(arrays: list[np.ndarray]) -> list[slice]:
    """Which rows go into which request: at most MOST_ROWS, and few enough for MOST_BYTES."""
    sizes = np.zeros(len(arrays[0]), np.int64)  # bytes of each row
    for array in arrays:
        for row, values in enumerate(array):
            sizes[row] += len(values) if isinstance(values, bytes) else values.nbytes
    slices, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        if row - start == MOST_ROWS or (row > start and total + size > MOST_BYTES):
            slices.append(slice(start, row))
            start, total = row, 0
        total += size
    return [*slices, slice(start, len(sizes))]


def describe_signatures(signatures) -> dict:
    """{name: SignatureDef} -> as `Session.signatures`."""
    return {
        name: {
            "inputs": {key: describe_tensor(info) for key, info in signature.inputs.items()},
            "outputs": {key: describe_tensor(info) for key, info in signature.outputs.items()},
        }
        for name, signature in signatures.items()
        if name != INIT_SIGNATURE
    }


class _Rest:
    """Requests as JSON over one HTTP connection that is kept open."""

    def __init__(self, which: dict, timeout_s: float):
        self._which, self._timeout_s = which, timeout_s
        kind = http.client.HTTPSConnection if which["scheme"] == "https" else http.client.HTTPConnection
        self._connection = kind(which["host"], which["port"], timeout=timeout_s)

    def _path(self) -> str:
        version, label = self._which["version"], self._which["label"]
        which = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
        return f"{self._which['prefix']}/v1/models/{self._which['name']}{which}"

    def metadata(self) -> tuple[int, dict]:
        """The version and the signatures of the model."""
        answer = self._call("GET", f"{self._path()}/metadata")
        (meta_graph_pb2,) = import_protos("tensorflow.core.protobuf.meta_graph_pb2")
        signatures = {
            name: json_format.ParseDict(content, meta_graph_pb2.SignatureDef(), ignore_unknown_fields=True)
            for name, content in answer["metadata"]["signature_def"]["signature_def"].items()
        }
        return int(answer["model_spec"]["version"]), describe_signatures(signatures)

    def predict(self, signature: str, arrays: dict, outputs: dict) -> dict[str, np.ndarray]:
        """One request and its answer; outputs: {name: (dtype, shape)}."""
        inputs = {name: json_value(array) for name, array in arrays.items()}
        body = json.dumps({"signature_name": signature, "inputs": inputs})
        answer = self._call("POST", f"{self._path()}:predict", body.encode())["outputs"]
        # The server leaves the name of an only output out.
        answer = answer if len(outputs) > 1 else dict.fromkeys(outputs, answer)
        return {name: array_of_json(answer[name], dtype) for name, (dtype, _) in outputs.items()}

    def _call(self, method: str, path: str, body: bytes | None = None) -> dict:
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = self._connection.getresponse()
            content = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next call opens it again
            if isinstance(error, TimeoutError):
                raise ServerError(f"no answer within {self._timeout_s:g} s") from error
            if isinstance(error, (socket.gaierror, ssl.SSLError)):
                raise ServerError(f"cannot be reached: {error}") from error
            raise TryAgain(f"cannot be reached ({error or type(error).__name__})") from error
        try:
            answer = json.loads(content)
        except ValueError:
            answer = {"error": " ".join(content.split())[:200]}
        said = f"HTTP {response.status}: {answer.get('error', '')}"
        if response.status in BUSY:
            raise TryAgain(said)
        if response.status != 200 or "error" in answer:
            raise ServerError(f"the server refused the request with {said}")
        return answer

    def close(self) -> None:
        self._connection.close()


def json_value(array: np.ndarray):
    """An input as the REST API takes it: bytes in base64, the standard alphabet, wrapped to tell them from text."""
    if array.dtype != object:
        return array.tolist()
    encoded = np.empty(array.shape, object)
    for index, item in enumerate(array.flat):
        encoded.flat[index] = {"b64": base64.b64encode(item).decode()}
    return encoded.tolist()


def array_of_json(value, dtype: str) -> np.ndarray:
    """An output of the REST API as an array; strings, base64 or not, as an object array of bytes."""
    if dtype != "string":
        return np.array(value, dtype)
    array = np.array(value, object)
    for index, item in enumerate(array.flat):
        array.flat[index] = base64.b64decode(item["b64"]) if isinstance(item, dict) else item.encode()
    return array


class _Grpc:
    """Requests as protos, with the official stubs."""

    def __init__(self, which: dict, timeout_s: float):
        import grpc

        self._grpc, self._which, self._timeout_s = grpc, which, timeout_s
        self._metadata, self._predict, services, self._tensor = import_protos(
            "tensorflow_serving.apis.get_model_metadata_pb2",
            "tensorflow_serving.apis.predict_pb2",
            "tensorflow_serving.apis.prediction_service_pb2_grpc",
            "tensorflow.core.framework.tensor_pb2",
        )
        options = {
            # A client receives 4 MB at most by default.
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": -1,
            # A second by default: later than the second try.
            "grpc.initial_reconnect_backoff_ms": int(FIRST_WAIT_S * 500),
        }
        host = f"[{which['host']}]" if ":" in which["host"] else which["host"]
        self._channel = grpc.insecure_channel(f"{host}:{which['port'] or 8500}", options=list(options.items()))
        self._stub = services.PredictionServiceStub(self._channel)

    def _address(self, request):
        """The request, with the model and the version that it is for."""
        request.model_spec.name = urllib.parse.unquote(self._which["name"])
        if self._which["version"]:
            request.model_spec.version.value = int(self._which["version"])
        elif self._which["label"]:
            request.model_spec.version_label = urllib.parse.unquote(self._which["label"])
        return request

    def metadata(self) -> tuple[int, dict]:
        """The version and the signatures of the model."""
        request = self._metadata.GetModelMetadataRequest(metadata_field=["signature_def"])
        answer = self._call(self._stub.GetModelMetadata, self._address(request))
        found = self._metadata.SignatureDefMap.FromString(answer.metadata["signature_def"].value)
        return answer.model_spec.version.value, describe_signatures(found.signature_def)

    def predict(self, signature: str, arrays: dict, outputs: dict) -> dict[str, np.ndarray]:
        """One request and its answer; outputs: {name: (dtype, shape)}."""
        request = self._address(self._predict.PredictRequest())
        request.model_spec.signature_name = signature
        for name, array in arrays.items():
            request.inputs[name].CopyFrom(tensor_proto(array, self._tensor.TensorProto()))
        answer = self._call(self._stub.Predict, request)
        return {name: array_of_proto(answer.outputs[name]) for name in outputs}

    def _call(self, method, request):
        try:
            return method(request, timeout=self._timeout_s)
        except self._grpc.RpcError as error:
            code, codes = error.code(), self._grpc.StatusCode
            said = f"{code.name}: {error.details()}"
            if code in (codes.UNAVAILABLE, codes.RESOURCE_EXHAUSTED):
                raise TryAgain(said) from error
            if code == codes.DEADLINE_EXCEEDED:
                raise ServerError(f"no answer within {self._timeout_s:g} s") from error
            raise ServerError(f"the server refused the request with {said}") from error

    def close(self) -> None:
        self._channel.close()


def tensor_proto(array: np.ndarray, proto):
    """Fill a TensorProto with an array; object arrays hold bytes."""
    strings = array.dtype == object
    proto.dtype = _STRING_CODE if strings else next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if strings:
        proto.string_val.extend(array.flat)
    else:
        proto.tensor_content = array.tobytes()
    return proto


def array_of_proto(proto) -> np.ndarray:
    """A TensorProto as an array; strings as an object array of bytes. Its last value stands for all that are left."""
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    strings = proto.dtype == _STRING_CODE
    dtype = np.dtype(object) if strings else DTYPES[proto.dtype]
    if proto.tensor_content:
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    values = proto.string_val if strings else getattr(proto, _VALUES[dtype.str[1:]])
    array = np.empty(shape, dtype)
    if array.size:
        array.flat[:] = values[-1]
        array.flat[: len(values)] = np.array(values, dtype)
    return array
