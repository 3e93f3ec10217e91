"""How `serving/client.py` talks to a server: requests over HTTP with JSON, or over gRPC with the official protos."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import urllib.parse

import numpy as np
from google.protobuf import json_format

from models import GraftError
from serving.runtime import DTYPES, import_protos
from serving.session import INIT_SIGNATURE, describe_tensor

BUSY = (429, 502, 503)  # HTTP: queue limits, a proxy without a server behind it, a full queue
RECONNECT_MS = 100  # gRPC waits a second by default: longer than the client before its second try
GRPC_PORT = 8500  # the server's default

_STRING = 7  # DT_STRING
VALUE_FIELDS = {  # DataType -> field of a TensorProto (tensorflow/core/framework/types.proto and tensor.proto)
    1: "float_val",
    2: "double_val",
    **dict.fromkeys((3, 4, 5, 6), "int_val"),
    _STRING: "string_val",
    9: "int64_val",
    10: "bool_val",
    22: "uint32_val",
    23: "uint64_val",
}


class ServerError(GraftError):
    """A server refused a request or could not be reached; the message holds its own words."""


class TryAgain(Exception):
    """A server is busy or away: the same request may work in a moment."""


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


class Rest:
    """Requests as JSON over one HTTP connection that is kept open."""

    def __init__(self, which: dict, timeout_s: float):
        self._which, self._timeout_s = which, timeout_s
        kind = http.client.HTTPSConnection if which["scheme"] == "https" else http.client.HTTPConnection
        self._connection = kind(which["host"], which["port"], timeout=timeout_s)

    def _path(self) -> str:
        version, label = self._which["version"], self._which["label"]
        which = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
        return urllib.parse.quote(f"{self._which['prefix']}/v1/models/{self._which['name']}{which}", safe="/%:")

    def metadata(self) -> tuple[int, dict]:
        """The version and the signatures of the model."""
        answer = self._call("metadata", "GET", f"{self._path()}/metadata")
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
        answer = self._call("outputs", "POST", f"{self._path()}:predict", body.encode())["outputs"]
        # The server leaves the name of an only output out.
        answer = answer if len(outputs) > 1 else dict.fromkeys(outputs, answer)
        return {name: array_of_json(answer[name], dtype) for name, (dtype, _) in outputs.items()}

    def _call(self, wanted: str, method: str, path: str, body: bytes | None = None) -> dict:
        """The answer, which has the key `wanted`, or it comes from another kind of server."""
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
            answer = None
        if response.status == 200 and isinstance(answer, dict) and wanted in answer:
            return answer
        said = answer["error"] if isinstance(answer, dict) and "error" in answer else " ".join(content.split())[:200]
        said = f"HTTP {response.status}: {said}"
        if response.status in BUSY:
            raise TryAgain(said)
        if response.status == 200:
            raise ServerError(f"this is not TensorFlow Serving: its answer has no {wanted!r}, but is {said}")
        raise ServerError(f"the server refused the request with {said}")

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


class Grpc:
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
            # Else a server that is back stays unseen.
            "grpc.initial_reconnect_backoff_ms": RECONNECT_MS,
        }
        host = f"[{which['host']}]" if ":" in which["host"] else which["host"]
        self._channel = grpc.insecure_channel(f"{host}:{which['port'] or GRPC_PORT}", options=list(options.items()))
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
    proto.dtype = _STRING if strings else next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if strings:
        proto.string_val.extend(array.flat)
    else:
        proto.tensor_content = array.tobytes()
    return proto


def array_of_proto(proto) -> np.ndarray:
    """A TensorProto as an array; strings as an object array of bytes. Its last value stands for all that are left."""
    if proto.dtype not in VALUE_FIELDS:
        raise ServerError(
            f"an output has the DataType {proto.dtype}, which this client does not read. Cast it to float"
        )
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    dtype = np.dtype(object) if proto.dtype == _STRING else DTYPES[proto.dtype]
    if proto.tensor_content:
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    values = getattr(proto, VALUE_FIELDS[proto.dtype])
    array = np.empty(shape, dtype)
    if array.size:
        array.flat[:] = values[-1]
        array.flat[: len(values)] = np.array(values, dtype)
    return array
