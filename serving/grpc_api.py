"""TF Serving's gRPC interface: Predict, GetModelMetadata and GetModelStatus, with the official protos.

Classify, Regress and MultiInference refuse what the real server refuses: every signature that is not made for them.
The other methods answer UNIMPLEMENTED.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from serving.metrics import Metrics
from serving.models_table import (
    DEFAULT_SIGNATURE,
    NO_NAME,
    ModelsTable,
    RequestError,
    refuse_examples,
    run_signature,
)
from serving.rest_json import TYPE_NAMES
from serving.runtime import import_protos
from serving.tensors import STRING, read_tensor, write_tensor

MOST_MESSAGE_CHARACTERS = 1024  # of an error, as in the server
# Of a tensor that has more values than its message has bytes: a few bytes must not ask for gigabytes, or seconds.
MOST_FILLED_NUMBERS, MOST_FILLED_STRINGS = 1 << 24, 1 << 16
LARGEST_SHAPE = 1 << 59  # values; more overflow the bytes of an array, even of one that is empty
LONGEST_DEADLINE_SECONDS = 1e9  # gRPC's own word for none is further away
EXAMPLE_METHODS = {"tensorflow/serving/classify": "classify", "tensorflow/serving/regress": "regress"}


def start_grpc(
    table: ModelsTable,
    metrics: Metrics,
    address: str,
    threads: int = 8,
    max_body_bytes: int = 100_000_000,
    max_waiting: int = 256,
) -> tuple[grpc.Server, int]:
    """A running server at `address`, such as "127.0.0.1:8500", and its port; arguments as in serving/rest.py.

    Raises RuntimeError where the port is taken.
    """
    prediction, model, predict_pb2, metadata_pb2, status_pb2 = import_protos(
        "tensorflow_serving.apis.prediction_service_pb2_grpc",
        "tensorflow_serving.apis.model_service_pb2_grpc",
        "tensorflow_serving.apis.predict_pb2",
        "tensorflow_serving.apis.get_model_metadata_pb2",
        "tensorflow_serving.apis.get_model_status_pb2",
    )

    class Prediction(prediction.PredictionServiceServicer):
        def Predict(self, request, context):
            with errors_as_status(context):
                return predict(table, metrics, request, predict_pb2.PredictResponse(), deadline_of(context))

        def Classify(self, request, context):
            with errors_as_status(context):
                refuse_task(table, request, "classify")

        def Regress(self, request, context):
            with errors_as_status(context):
                refuse_task(table, request, "regress")

        def MultiInference(self, request, context):
            with errors_as_status(context):
                refuse_tasks(table, request)

        def GetModelMetadata(self, request, context):
            with errors_as_status(context):
                return metadata(table, request, metadata_pb2)

    class Model(model.ModelServiceServicer):
        def GetModelStatus(self, request, context):
            with errors_as_status(context):
                return status(table, request, status_pb2.GetModelStatusResponse())

    logging.getLogger("grpc._common").setLevel(logging.CRITICAL)  # else bytes that are no message print a traceback
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # else a second server would share the port in silence
        ],
        maximum_concurrent_rpcs=threads + max_waiting,
    )
    prediction.add_PredictionServiceServicer_to_server(Prediction(), server)
    model.add_ModelServiceServicer_to_server(Model(), server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port


@contextlib.contextmanager
def errors_as_status(context):
    """A RequestError inside becomes the call's status."""
    try:
        yield
    except RequestError as error:
        message = error.message
        if len(message) > MOST_MESSAGE_CHARACTERS:
            message = message[:MOST_MESSAGE_CHARACTERS] + "...TRUNCATED"
        context.abort(grpc.StatusCode[error.code], message)


def deadline_of(context) -> float | None:
    """When the client stops waiting, as time.monotonic(); None where it never does."""
    remaining = context.time_remaining()
    if remaining is None or remaining > LONGEST_DEADLINE_SECONDS:
        return None
    return time.monotonic() + remaining


def invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)


def model_spec(request) -> tuple[str, int | None, str | None]:
    """(name, version number, label) that a request names."""
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    spec = request.model_spec
    choice = spec.WhichOneof("version_choice")
    number = spec.version.value if choice == "version" else None
    return spec.name, number, spec.version_label if choice == "version_label" else None


def predict(table: ModelsTable, metrics: Metrics, request, response, deadline: float | None = None):
    """Fill a PredictResponse; raises RequestError, DEADLINE_EXCEEDED where it is not done by `deadline`."""
    started, code = time.perf_counter(), "INTERNAL"
    try:
        name, number, label = model_spec(request)
        with table.acquire(name, number, label) as (found, version):
            signature = request.model_spec.signature_name or DEFAULT_SIGNATURE
            if signature not in version.session.signatures:
                raise RequestError("FAILED_PRECONDITION", f'Serving signature key "{signature}" not found.')
            known = version.session.signatures[signature]
            feeds = {key: info.name for key, info in version.signature_defs[signature].inputs.items()}
            inputs = read_inputs(request.inputs, known["inputs"], feeds)
            wanted = chosen_outputs(request.output_filter, known["outputs"])
            outputs = run_signature(version, signature, inputs, deadline)
        response.model_spec.name, response.model_spec.signature_name = name, signature
        response.model_spec.version.value = found
        for key in wanted:
            write_tensor(outputs[key], response.outputs[key])
        code = "OK"
        return response
    except RequestError as error:
        code = error.code
        raise
    finally:
        if table.knows(request.model_spec.name):  # anybody can think up names
            metrics.record(request.model_spec.name, "GRPC", code, time.perf_counter() - started)


def read_inputs(tensors, inputs: dict, feeds: dict[str, str]) -> dict[str, np.ndarray]:
    """{name: TensorProto} -> arrays, checked against a signature as in predict_util.cc; feeds: the graph's names."""
    sent, needed = set(tensors), set(inputs)
    if len(sent) != len(needed):
        listed = ["{" + ",".join(sorted(names)) + "}" for names in (sent, needed, sent - needed, needed - sent)]
        raise invalid(
            f"input size does not match signature: {len(sent)}!={len(needed)} len({listed[0]}) != len({listed[1]}). "
            f"Sent extra: {listed[2]}. Missing but required: {listed[3]}."
        )
    arrays = {}
    for at, name in enumerate(sorted(inputs)):
        if name not in sent:
            raise invalid(
                f"Signature input alias: {name}(feed name: {feeds[name]}) not found in request and no default value "
                f"provided. Inputs expected to be in the request {{{','.join(sorted(sent))}}}, or default input alias "
                f"set: "
            )
        arrays[name] = None if asks_too_much(tensors[name]) else read_tensor(tensors[name])
        if arrays[name] is None:
            raise invalid(f"tensor parsing error: {name}")
        given = "string" if arrays[name].dtype.kind == "O" else arrays[name].dtype.name
        if given != inputs[name][0]:
            expected, given = (TYPE_NAMES.get(dtype, dtype) for dtype in (inputs[name][0], given))
            raise invalid(f"Expects arg[{at}] to be {expected} but {given} is provided")
    return arrays


def asks_too_much(tensor) -> bool:
    """Whether a shape overflows, or has more values than the message bytes: those that are missing repeat the last."""
    sizes = [dimension.size for dimension in tensor.tensor_shape.dim]
    if math.prod(max(size, 1) for size in sizes) > LARGEST_SHAPE:
        return True
    most = MOST_FILLED_STRINGS if tensor.dtype == STRING else MOST_FILLED_NUMBERS
    return math.prod(sizes) > max(most, tensor.ByteSize())


def refuse_task(table: ModelsTable, request, method: str) -> None:
    """Raise what a request with tf.Example gets; method: "classify" or "regress"."""
    signature = request.model_spec.signature_name or DEFAULT_SIGNATURE
    with table.acquire(*model_spec(request)) as (_, version):
        if signature not in version.signature_defs:
            raise invalid(f"No signature was found with the name: {signature}")
        raise refuse_examples(version.signature_defs[signature], method)


def refuse_tasks(table: ModelsTable, request) -> None:
    """Raise what a MultiInferenceRequest gets (multi_inference.cc)."""
    if not request.tasks or not request.tasks[0].HasField("model_spec"):
        raise invalid(NO_NAME)
    task = request.tasks[0]
    with table.acquire(*model_spec(task)) as (_, version):
        signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if signature not in version.signature_defs:
            raise invalid(f"Requested signature not found in model graph: {signature}")
        if task.method_name not in EXAMPLE_METHODS:
            raise RequestError("UNIMPLEMENTED", f"Unsupported signature method_name: {task.method_name}")
        raise refuse_examples(version.signature_defs[signature], EXAMPLE_METHODS[task.method_name])


def chosen_outputs(output_filter, outputs: dict) -> list[str]:
    """The outputs that a request asks for: all where it names none."""
    chosen = []
    for name in output_filter:
        if name not in outputs:
            raise invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{{{','.join(sorted(outputs))}}}."
            )
        if name in chosen:
            raise invalid(f"duplicate output tensor alias: {name}")
        chosen.append(name)
    return chosen or sorted(outputs)


def metadata(table: ModelsTable, request, metadata_pb2):
    """A GetModelMetadataResponse; raises RequestError."""
    name, number, label = model_spec(request)
    if not request.metadata_field:
        raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != "signature_def":
            raise invalid(f"Metadata field {field} is not supported")
    signatures = metadata_pb2.SignatureDefMap()
    with table.acquire(name, number, label) as (found, version):
        for key, signature in version.signature_defs.items():
            signatures.signature_def[key].MergeFrom(signature)
    response = metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = name
    response.model_spec.version.value = found
    response.metadata["signature_def"].Pack(signatures)
    return response


def status(table: ModelsTable, request, response):
    """Fill a GetModelStatusResponse; raises RequestError."""
    name, number, _ = model_spec(request)
    for at, state, (code, message) in table.status(name, number):
        one = response.model_version_status.add(version=at)
        one.state = one.DESCRIPTOR.enum_types_by_name["State"].values_by_name[state].number
        one.status.error_code = grpc.StatusCode[code].value[0]
        one.status.error_message = message
    return response
