"""serving/server.py over gRPC, asked with the official stubs: the real server's statuses and messages."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys

import grpc
import numpy as np
import pytest

from serving.runtime import import_protos
from tests.embedded_server import ROOT, predict, running, write_model
from tests.embedded_server import ask as ask_rest
from tests.test_export import encoded_image

pytestmark = pytest.mark.slow  # servers and exports of their own: minutes

STATUS = grpc.StatusCode


@pytest.fixture(scope="module")
def protos():
    """The official modules: predict, metadata, status, stubs of both services, tensors."""
    names = ["predict_pb2", "get_model_metadata_pb2", "get_model_status_pb2"]
    names += ["prediction_service_pb2_grpc", "model_service_pb2_grpc"]
    modules = import_protos(*(f"tensorflow_serving.apis.{name}" for name in names))
    return dict(zip(["predict", "metadata", "status", "prediction", "model"], modules))


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    """(REST port, gRPC port) of a server of two versions, labelled."""
    folder = tmp_path_factory.mktemp("models")
    for number in (1, 2):
        write_model(folder / "model" / str(number), number)
    config = folder / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "model" base_path: "{folder}/model" model_platform: "tensorflow" '
        'model_version_policy { all {} } version_labels { key: "stable" value: 1 } } }'
    )
    with running("--model_config_file", config) as (rest, port, _):
        yield rest, port


@pytest.fixture(scope="module")
def ask(ports, protos):
    """ask(signature, {input: array}, **model_spec) -> PredictResponse."""
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        stub = protos["prediction"].PredictionServiceStub(channel)

        def ask(signature="", inputs=None, output_filter=(), **spec):
            request = protos["predict"].PredictRequest(output_filter=output_filter)
            request.model_spec.name = spec.get("name", "model")
            request.model_spec.signature_name = signature
            if "version" in spec:
                request.model_spec.version.value = spec["version"]
            if "label" in spec:
                request.model_spec.version_label = spec["label"]
            for name, value in (inputs or {}).items():
                request.inputs[name].CopyFrom(value if hasattr(value, "DESCRIPTOR") else tensor(value))
            return stub.Predict(request, timeout=60)

        yield ask


def tensor(value):
    """A TensorProto, made by TensorFlow itself."""
    import tensorflow as tf

    return tf.make_tensor_proto(value)


def array(proto) -> np.ndarray:
    import tensorflow as tf

    return tf.make_ndarray(proto)


def refusal(function, *arguments, **named):
    """(status code, message) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        function(*arguments, **named)
    return caught.value.code(), caught.value.details()


def test_predict(ask):
    response = ask(inputs={"x": np.float32([[1, 2.5], [3, 4]])})
    assert (response.model_spec.name, response.model_spec.signature_name) == ("model", "serving_default")
    assert response.model_spec.version.value == 2
    assert list(response.outputs["y"].float_val) == [2.0, 5.0, 6.0, 8.0]  # typed fields, no tensor_content
    np.testing.assert_array_equal(array(response.outputs["y"]), [[2, 5], [6, 8]])
    empty = ask(inputs={"x": np.zeros([0, 2], np.float32)}).outputs["y"]
    assert array(empty).shape == (0, 2)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"]
)
def test_dtypes(ask, dtype):
    value = np.array([[0, 1], [100, 7]], dtype)
    answer = array(ask(dtype, {"value": value}).outputs["value"])
    assert answer.dtype == value.dtype
    np.testing.assert_array_equal(answer, value)


def test_bool_string_and_half(ask):
    import tensorflow as tf

    assert array(ask("bool", {"value": np.array([True, False])}).outputs["value"]).tolist() == [True, False]
    strings = np.array([[b"a\0", b""], [bytes(range(256)), "é".encode()]], object)
    assert array(ask("string", {"value": strings}).outputs["value"]).tolist() == strings.tolist()
    half = np.float16([1.5, -2])
    np.testing.assert_array_equal(array(ask("half", {"value": half}).outputs["value"]), half)
    filled = tf.make_tensor_proto(0.0, shape=[3])  # one value for three elements
    np.testing.assert_array_equal(array(ask("float32", {"value": filled}).outputs["value"]), [0, 0, 0])
    typed = type(filled)(dtype=filled.dtype, float_val=[1, 2])
    typed.tensor_shape.dim.add(size=4)
    np.testing.assert_array_equal(array(ask("float32", {"value": typed}).outputs["value"]), [1, 2, 2, 2])


def test_versions_and_labels(ask):
    def number(**spec):
        return array(ask("number", {"x": np.float32([0])}, **spec).outputs["number"])[0]

    assert (number(), number(version=1), number(label="stable")) == (2, 1, 1)


def test_output_filter(ask):
    inputs = {"a": np.float32([2]), "b": np.float32([5])}
    assert set(ask("two", inputs).outputs) == {"sum", "product"}
    assert set(ask("two", inputs, ["sum"]).outputs) == {"sum"}
    code, message = refusal(ask, "two", inputs, ["other"])
    assert code == STATUS.INVALID_ARGUMENT and message.startswith("output tensor alias not found in signature: other ")
    duplicate = (STATUS.INVALID_ARGUMENT, "duplicate output tensor alias: sum")
    assert refusal(ask, "two", inputs, ["sum", "sum"]) == duplicate


def test_what_is_not_there(ask, protos, ports):
    inputs = {"x": np.float32([[1, 2]])}
    assert refusal(ask, "", inputs, name="m") == (STATUS.NOT_FOUND, "Servable not found for request: Latest(m)")
    message = "Servable not found for request: Specific(model, 9)"
    assert refusal(ask, "", inputs, version=9) == (STATUS.NOT_FOUND, message)
    message = "Unrecognized servable version label: x"
    assert refusal(ask, "", inputs, label="x") == (STATUS.INVALID_ARGUMENT, message)
    message = 'Serving signature key "x" not found.'
    assert refusal(ask, "x", inputs) == (STATUS.FAILED_PRECONDITION, message)
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        stub = protos["prediction"].PredictionServiceStub(channel)
        message = (STATUS.INVALID_ARGUMENT, "Missing ModelSpec")
        assert refusal(stub.Predict, protos["predict"].PredictRequest()) == message


def test_wrong_inputs(ask):
    x = np.float32([1])
    code, message = refusal(ask, "two", {"a": x})
    assert code == STATUS.INVALID_ARGUMENT
    assert message == (
        "input size does not match signature: 1!=2 len({a}) != len({a,b}). Sent extra: {}. Missing but required: {b}."
    )
    code, message = refusal(ask, "two", {"a": x, "c": x})
    assert code == STATUS.INVALID_ARGUMENT and message.startswith(
        "Signature input alias: b(feed name: two_b:0) not found"
    )
    code, message = refusal(ask, "two", {"a": np.int32([1]), "b": x})
    assert (code, message) == (STATUS.INVALID_ARGUMENT, "Expects arg[0] to be float but int32 is provided")
    broken = tensor(np.float32([1, 2]))
    broken.tensor_shape.dim[0].size = 3
    assert refusal(ask, "two", {"a": broken, "b": x}) == (STATUS.INVALID_ARGUMENT, "tensor parsing error: a")
    for size in (-1, 1 << 40):
        huge = type(broken)(dtype=broken.dtype)
        huge.tensor_shape.dim.add(size=size)
        assert refusal(ask, "two", {"a": huge, "b": x})[1] == "tensor parsing error: a"
    code, message = refusal(ask, "matmul", {"x": np.ones([2, 5], np.float32)})
    assert code == STATUS.INVALID_ARGUMENT and message.startswith("Matrix size-incompatible: In[0]: [2,5]")


def test_a_few_bytes_cannot_ask_for_gigabytes(ask):
    """Missing values repeat the last one, but not without end."""
    tiny = tensor(np.float32([1]))
    tiny.tensor_shape.dim[0].size = 200_000_000
    assert refusal(ask, "float32", {"value": tiny}) == (STATUS.INVALID_ARGUMENT, "tensor parsing error: value")
    empty = type(tiny)(dtype=tiny.dtype)
    for size in (0, 2**62, 2**62):
        empty.tensor_shape.dim.add(size=size)
    assert refusal(ask, "float32", {"value": empty}) == (STATUS.INVALID_ARGUMENT, "tensor parsing error: value")


@pytest.mark.parametrize(
    ("method", "signature", "expected"),
    [
        ("Classify", "x", (STATUS.INVALID_ARGUMENT, "No signature was found with the name: x")),
        ("Regress", "x", (STATUS.INVALID_ARGUMENT, "No signature was found with the name: x")),
        ("Classify", "two", (STATUS.INVALID_ARGUMENT, "Expected one input Tensor.")),
        ("Regress", "uneven", (STATUS.INVALID_ARGUMENT, "Expected one output Tensor.")),
        ("MultiInference", "x", (STATUS.INVALID_ARGUMENT, "Requested signature not found in model graph: x")),
        ("MultiInference", "two", (STATUS.UNIMPLEMENTED, "Unsupported signature method_name: ")),
    ],
)
def test_methods_for_examples(ports, protos, method, signature, expected):
    """No signature of these models is made for tf.Example: refused as the real server does."""
    classification, regression, inference = import_protos(
        *(f"tensorflow_serving.apis.{name}_pb2" for name in ("classification", "regression", "inference"))
    )
    requests = {
        "Classify": classification.ClassificationRequest(),
        "Regress": regression.RegressionRequest(),
        "MultiInference": inference.MultiInferenceRequest(),
    }
    request = requests[method]
    spec = request.tasks.add().model_spec if method == "MultiInference" else request.model_spec
    spec.name, spec.signature_name = "model", signature
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        call = getattr(protos["prediction"].PredictionServiceStub(channel), method)
        refused = refusal(call, request)
        nothing = refusal(call, type(request)())
    assert refused == expected
    message = "ModelSpec has no name specified." if method == "MultiInference" else "Missing ModelSpec"
    assert nothing == (STATUS.INVALID_ARGUMENT, message)


def test_nobody_computes_past_the_deadline(tmp_path, protos):
    """The client's deadline stops the run, and a request whose turn comes too late is not begun."""
    write_model(tmp_path / "model" / "1", 1)
    (tmp_path / "monitoring.config").write_text('prometheus_config { enable: true path: "/metrics" }')
    words = ["--grpc_max_threads", 1, "--monitoring_config_file", tmp_path / "monitoring.config"]
    request = protos["predict"].PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "model", "busy"
    request.inputs["x"].CopyFrom(tensor(np.zeros([1], np.float32)))
    with running(tmp_path / "model", *words) as (rest, port, _), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = protos["prediction"].PredictionServiceStub(channel)
        calls = [stub.Predict.future(request, timeout=0.02) for _ in range(5)]
        codes = {call.exception().code() for call in calls}
        request.model_spec.signature_name = "number"
        answer = stub.Predict(request, timeout=60)
        metrics = ask_rest(rest, "GET", "/metrics")[1].decode()
    assert codes == {STATUS.DEADLINE_EXCEEDED} and array(answer.outputs["number"]).tolist() == [1]
    assert ':request_count{model_name="model",status="OK"} 1\n' in metrics  # the last one


def test_long_messages_are_cut(ask):
    code, message = refusal(ask, "x" * 2000, {})
    assert code == STATUS.FAILED_PRECONDITION and len(message) == 1024 + len("...TRUNCATED")
    assert message.endswith("x...TRUNCATED")


def test_metadata(ports, protos):
    request = protos["metadata"].GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "model"
    request.model_spec.version_label = "stable"
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        call = protos["prediction"].PredictionServiceStub(channel).GetModelMetadata
        response = call(request)
        request.metadata_field.append("other")
        refused = refusal(call, request)
        no_spec = refusal(call, protos["metadata"].GetModelMetadataRequest(metadata_field=["signature_def"]))
        request.ClearField("metadata_field")
        no_field = refusal(call, request)
        request.metadata_field.append("signature_def")
        request.model_spec.Clear()
        request.model_spec.SetInParent()
        no_name = refusal(call, request)
        request.model_spec.name = "other"
        unknown = refusal(call, request)
    assert (response.model_spec.name, response.model_spec.version.value) == ("model", 1)
    signatures = protos["metadata"].SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert signatures.signature_def["two"].inputs["a"].dtype == 1
    assert refused == (STATUS.INVALID_ARGUMENT, "Metadata field other is not supported")
    assert no_spec == (STATUS.INVALID_ARGUMENT, "Missing ModelSpec")
    message = "GetModelMetadataRequest must specify at least one metadata_field"
    assert no_field == (STATUS.INVALID_ARGUMENT, message)
    assert no_name == (STATUS.INVALID_ARGUMENT, "ModelSpec has no name specified.")
    assert unknown == (STATUS.NOT_FOUND, "Servable not found for request: Latest(other)")


def test_status(ports, protos):
    request = protos["status"].GetModelStatusRequest()
    request.model_spec.name = "model"
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        call = protos["model"].ModelServiceStub(channel).GetModelStatus
        states = [(one.version, one.state, one.status.error_code) for one in call(request).model_version_status]
        request.model_spec.version.value = 9
        missing = refusal(call, request)
        request.model_spec.Clear()
        request.model_spec.name = "other"
        unknown = refusal(call, request)
        no_spec = refusal(call, protos["status"].GetModelStatusRequest())
    assert no_spec == (STATUS.INVALID_ARGUMENT, "Missing ModelSpec")
    assert states == [(2, 30, 0), (1, 30, 0)]
    assert missing == (STATUS.NOT_FOUND, "Could not find version 9 of model model")
    assert unknown == (STATUS.NOT_FOUND, "Could not find any versions of model other")


def test_both_interfaces_give_the_same_numbers(ask, ports):
    values = np.random.default_rng(0).normal(size=[50]).astype(np.float32)
    status, body = predict(ports[0], {"signature_name": "float32", "instances": values.tolist()})
    served = np.float32(json.loads(body)["predictions"])
    assert status == 200
    np.testing.assert_array_equal(served, array(ask("float32", {"value": values}).outputs["value"]))
    np.testing.assert_array_equal(served, values)  # the shortest text that reads back as the same number


def export_image(folder):
    """An untrained model of images; returns its input's name and what to ask, the last one no image."""
    from serving.export import export_image_classifier
    from tests.test_export import CLASSES, tiny_classifier

    model = tiny_classifier(len(CLASSES))
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder)
    return "image_bytes", [encoded_image(seed, kind) for seed, kind in enumerate(["png", "jpeg"])] + [b"no image"]


def export_text(folder):
    """The same for texts, the last one no UTF-8."""
    from serving.export_text import export_text_classifier
    from tests.test_export_text import CLASSES, FIXTURES, tiny_classifier

    model, preprocess = tiny_classifier(FIXTURES / "text" / "bert")
    export_text_classifier(model, preprocess, CLASSES, folder)
    return "text", [b"The quick brown fox", "Füchse 回答".encode(), b"", b"a\xff"]


LOAD_AND_RUN = """
import pickle, sys
from serving.session import Session
folder, name = sys.argv[1:]
with Session(folder) as session:
    answers = session.run("serving_default", {name: pickle.load(sys.stdin.buffer)})
pickle.dump({key: value.tolist() for key, value in answers.items()}, sys.stdout.buffer)
"""


@pytest.mark.parametrize("export", [export_image, export_text])
def test_answers_are_those_of_the_loader_in_another_process(tmp_path, protos, export):
    """REST in rows and in columns, and gRPC; for an image and a text model."""
    name, values = export(tmp_path / "exported" / "1")
    command = [sys.executable, "-c", LOAD_AND_RUN, tmp_path / "exported" / "1", name]
    loaded = subprocess.run(command, input=pickle.dumps(values), cwd=ROOT, stdout=subprocess.PIPE, check=True)
    expected = {key: np.array(value) for key, value in pickle.loads(loaded.stdout).items()}
    request = protos["predict"].PredictRequest()
    request.model_spec.name = "exported"
    request.inputs[name].CopyFrom(tensor(values))
    coded = [{"b64": base64.b64encode(value).decode()} for value in values]
    channel_to, path = grpc.insecure_channel, "/v1/models/exported"
    with running(tmp_path, name="exported") as (rest, port, _), channel_to(f"127.0.0.1:{port}") as channel:
        rows = json.loads(predict(rest, {"instances": coded}, path)[1])["predictions"]
        columns = json.loads(predict(rest, {"inputs": coded}, path)[1])["outputs"]
        response = protos["prediction"].PredictionServiceStub(channel).Predict(request, timeout=60)
    answers = [
        {key: [row[key] for row in rows] for key in rows[0]},
        columns,
        {key: array(value).tolist() for key, value in response.outputs.items()},
    ]
    for answer in answers:
        assert answer.keys() == expected.keys()
        for key, value in expected.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(answer[key], value, rtol=0, atol=1e-6)
            else:
                given = [part.encode() if isinstance(part, str) else part for part in np.ravel(answer[key])]
                assert given == value.ravel().tolist(), key
