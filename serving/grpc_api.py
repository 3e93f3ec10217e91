"""TF Serving's gRPC interface: Predict, GetModelMetadata and GetModelStatus, with the official protos.

The other methods answer UNIMPLEMENTED.
"""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from serving.metrics import Metrics
from serving.models_table import DEFAULT_SIGNATURE, ModelsTable, RequestError, run_signature
from serving.rest_json import MOST_DIMENSIONS, TYPE_NAMES
from serving.runtime import DTYPES, import_protos

MOST_MESSAGE_CHARACTERS = 1024  # of an error, as in the server
MOST_TENSOR_BYTES = 1 << 30  # a shape may ask for more than its message holds: missing values are filled in
FIELDS = {  # numpy dtype -> field of TensorProto (tensorflow/core/framework/tensor.proto)
    "float32": "float_val",
    "float64": "double_val",
    "float16": "half_val",
    "int32": "int_val",
    "int16": "int_val",
    "int8": "int_val",
    "uint8": "int_val",
    "int64": "int64_val",
    "uint32": "uint32_val",
    "uint64": "uint64_val",
    "bool": "bool_val",
    "object": "string_val",
}
STRING = 7  # DT_STRING


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
                return predict(table, metrics, request, predict_pb2.PredictResponse())

        def GetModelMetadata(self, request, context):
            with errors_as_status(context):
                return metadata(table, request, metadata_pb2)

    class Model(model.ModelServiceServicer):
        def GetModelStatus(self, request, context):
            with errors_as_status(context):
                return status(table, request, status_pb2.GetModelStatusResponse())

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


def predict(table: ModelsTable, metrics: Metrics, request, response):
    """Fill a PredictResponse; raises RequestError."""
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
            outputs = run_signature(version, signature, inputs)
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
        arrays[name] = read_tensor(tensors[name])
        if arrays[name] is None:
            raise invalid(f"tensor parsing error: {name}")
        given = "string" if arrays[name].dtype.kind == "O" else arrays[name].dtype.name
        if given != inputs[name][0]:
            expected, given = (TYPE_NAMES.get(dtype, dtype) for dtype in (inputs[name][0], given))
            raise invalid(f"Expects arg[{at}] to be {expected} but {given} is provided")
    return arrays


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


def read_tensor(tensor) -> np.ndarray | None:
    """A TensorProto -> an array, strings as objects; None for one that makes no sense (Tensor::FromProto)."""
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    dtype = np.dtype(object) if tensor.dtype == STRING else DTYPES.get(tensor.dtype)
    if dtype is None or tensor.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        return None
    count = math.prod(shape)
    if count * dtype.itemsize > MOST_TENSOR_BYTES or len(shape) > MOST_DIMENSIONS:
        return None
    if tensor.tensor_content and dtype.kind != "O":
        if len(tensor.tensor_content) != count * dtype.itemsize:
            return None
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    values = list(getattr(tensor, FIELDS[dtype.name])[:count])
    # Values that are missing repeat the last one; where there is none at all they are zero.
    missing = count - len(values)
    last = values[-1:] or [b"" if dtype.kind == "O" else 0]
    if dtype.kind == "O":
        array = np.empty(count, object)
        array[:] = values + last * missing
        return array.reshape(shape)
    carrier = {"half_val": np.uint16, "int_val": np.int64}.get(FIELDS[dtype.name], dtype)
    array = np.concatenate([np.array(values, carrier), np.full(missing, last[0], carrier)])
    return (array.view(dtype) if dtype == np.float16 else array.astype(dtype)).reshape(shape)


def write_tensor(array: np.ndarray, tensor) -> None:
    """Fill a TensorProto with an array, in typed fields as the server does."""
    names = {dtype: code for code, dtype in DTYPES.items()}
    tensor.dtype = STRING if array.dtype.kind == "O" else names[array.dtype]
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    getattr(tensor, FIELDS[array.dtype.name]).extend(values.ravel().tolist())


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
