"""Small servers for tests of what asks a server: as TensorFlow Serving, with a real version behind."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import io
import json
import pathlib
import re
import threading
from concurrent import futures

import grpc
import numpy as np
from PIL import Image

from serving.runtime import import_protos
from serving.session import Session
from serving.tensors import write_tensor
from tests.conftest import tiny_backbone

CLASSES = ["cat", "Katze auf dem Tisch", "鳥", "eel", "fox", "gnu", "hen"]
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def tiny_version(folder: pathlib.Path, seed: int, thresholds=None, class_names=CLASSES) -> pathlib.Path:
    """An exported version of a small random image model; the seed decides its answers."""
    from models.classifier import Classifier
    from serving.export import export_image_classifier

    model = Classifier(tiny_backbone(seed), len(class_names), multi_label=thresholds is not None)
    model.head.kernel.assign(model.head.kernel * 20.0)
    export_image_classifier(model, model.backbone.preprocess, class_names, folder, thresholds=thresholds)
    return folder


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8) // (seed % 3 + 1)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@dataclasses.dataclass
class Served:
    """One version behind a port; `fail` holds (status, body) of the next answers, `paths` what was asked."""

    session: Session
    port: int = 0
    version: int = 3
    fail: list = dataclasses.field(default_factory=list)
    paths: list = dataclasses.field(default_factory=list)
    rows: list = dataclasses.field(default_factory=list)

    def metagraph(self):
        """The signatures as protos."""
        (saved_model_pb2,) = import_protos("tensorflow.core.protobuf.saved_model_pb2")
        content = (self.session.folder / "saved_model.pb").read_bytes()
        return saved_model_pb2.SavedModel.FromString(content).meta_graphs[0].signature_def

    def run(self, signature: str, inputs: dict) -> dict:
        self.rows.append(len(next(iter(inputs.values()))))
        return self.session.run(signature, inputs)


class Handler(http.server.BaseHTTPRequestHandler):
    """REST: metadata and columnar predict."""

    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, *arguments):
        """Nothing: standard error is the test's."""

    def answer(self, status: int, content) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def known(self) -> bool:
        self.served.paths.append(self.path)
        if self.served.fail:
            status, body = self.served.fail.pop(0)
            if status:
                self.answer(status, body)
            else:
                self.close_connection = True  # without an answer
            return False
        if re.match(r"/v1/models/photos(/versions/3|/labels/stable)?(:predict|/metadata)$", self.path):
            return True
        self.answer(404, {"error": "Servable not found for request: Latest(nothing)"})
        return False

    def do_GET(self):
        from google.protobuf import json_format

        if self.known():
            shown = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
            signatures = {n: json_format.MessageToDict(s, **shown) for n, s in self.served.metagraph().items()}
            spec = {"name": "photos", "signature_name": "", "version": str(self.served.version)}
            self.answer(200, {"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.known():
            return
        assert request["inputs"]
        inputs = {}
        for name, (dtype, _) in self.served.session.signatures[request["signature_name"]]["inputs"].items():
            value = request["inputs"][name]
            if dtype == "string":
                value = [base64.b64decode(v["b64"], validate=True) for v in value]
            inputs[name] = value
        outputs = self.served.run(request["signature_name"], inputs)
        decoded = {n: np.vectorize(bytes.decode, "O")(v) if v.dtype == object else v for n, v in outputs.items()}
        self.answer(200, {"outputs": {name: value.tolist() for name, value in decoded.items()}})


@contextlib.contextmanager
def rest_server(version: pathlib.Path):
    with Session(version) as session:
        served = Served(session)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHandler", (Handler,), {"served": served}))
        server.daemon_threads = True
        served.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextlib.contextmanager
def grpc_server(version: pathlib.Path):
    metadata_pb2, predict_pb2, services = import_protos(
        "tensorflow_serving.apis.get_model_metadata_pb2",
        "tensorflow_serving.apis.predict_pb2",
        "tensorflow_serving.apis.prediction_service_pb2_grpc",
    )

    class Service(services.PredictionServiceServicer):
        def check(self, request, context):
            served.paths.append((request.model_spec.version.value, request.model_spec.version_label))
            if served.fail:
                context.abort(*served.fail.pop(0))
            if request.model_spec.name != "photos":
                context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(nothing)")

        def GetModelMetadata(self, request, context):
            self.check(request, context)
            signatures = metadata_pb2.SignatureDefMap()
            for name, signature in served.metagraph().items():
                signatures.signature_def[name].CopyFrom(signature)
            answer = metadata_pb2.GetModelMetadataResponse()
            answer.model_spec.version.value = served.version
            answer.metadata["signature_def"].Pack(signatures)
            return answer

        def Predict(self, request, context):
            self.check(request, context)
            inputs = {name: list(tensor.string_val) for name, tensor in request.inputs.items()}
            answer = predict_pb2.PredictResponse()
            for name, value in served.run(request.model_spec.signature_name, inputs).items():
                write_tensor(value, answer.outputs[name])
            return answer

    with Session(version) as session:
        served = Served(session)
        server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
        services.add_PredictionServiceServicer_to_server(Service(), server)
        served.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield served
        finally:
            server.stop(None).wait()
