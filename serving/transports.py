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
from serving.runtime import import_protos
from serving.session import INIT_SIGNATURE, describe_tensor
from serving.tensors import read_tensor, write_tensor

BUSY = (429, 502, 503)  # HTTP: queue limits, a proxy without a server behind it, a full queue
RECONNECT_MS = 100  # gRPC waits a second by default: longer than the client before its second try
GRPC_PORT = 8500  # the server's default


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
            if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
                raise ServerError(
                    f"what answers there does not speak HTTP. The REST port is 8501 by default; {GRPC_PORT} is gRPC's, "
                    f"for grpc://HOST:{GRPC_PORT}/NAME"
                ) from error
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
        self._metadata, self._predict, services = import_protos(
            "tensorflow_serving.apis.get_model_metadata_pb2",
            "tensorflow_serving.apis.predict_pb2",
            "tensorflow_serving.apis.prediction_service_pb2_grpc",
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
            write_tensor(array, request.inputs[name], packed=True)
        answer = self._call(self._stub.Predict, request)
        answers = {name: read_tensor(answer.outputs[name]) for name in outputs}
        for name, array in answers.items():
            if array is None:
                raise ServerError(
                    f"the output {name} cannot be read (DataType {answer.outputs[name].dtype}). Where that is a type "
                    f"which numpy lacks, such as bfloat16 (14): cast it to float in the signature"
                )
        return answers

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
