"""serving/server.py over REST, asked through real sockets: the real server's statuses and bodies."""

from __future__ import annotations

import base64
import concurrent.futures
import gzip
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from serving.warmup import WARMUP_FILE, write_requests
from tests.embedded_server import ROOT, ask, error_body, predict, running, write_model

pytestmark = pytest.mark.slow  # servers and exports of their own: minutes

MONITORING = 'prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }'
LIMIT = 200_000  # bytes of a body
UNKNOWN = error_body("Servable not found for request: Latest(other)")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of folders of versions; `model` has two, which answer 1 and 2 to the signature `number`."""
    folder = tmp_path_factory.mktemp("models")
    for number in (1, 2):
        write_model(folder / "model" / str(number), number)
    return folder


@pytest.fixture(scope="module")
def port(models):
    """A server of both versions, labelled."""
    config = models / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "model" base_path: "{models}/model" model_platform: "tensorflow" '
        'model_version_policy { all {} } version_labels { key: "stable" value: 1 } '
        'version_labels { key: "canary" value: 2 } } }'
    )
    (models / "monitoring.config").write_text(MONITORING)
    words = ["--model_config_file", config, "--monitoring_config_file", models / "monitoring.config"]
    with running(*words, "--max_body_bytes", LIMIT) as (rest, _, _):
        yield rest


@pytest.fixture(scope="module")
def refusing_port(tmp_path_factory):
    """A server, which lets other sites' pages ask, of a model that fails while it runs and answers what JSON lacks."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("refusing") / "model"
    module = tf.Module()
    module.read = tf.function(
        lambda name: {"read": tf.io.read_file(name[0])[None]},
        input_signature=[tf.TensorSpec([None], tf.string, "name")],
    )
    module.half = tf.function(
        lambda x: {"half": tf.cast(x, tf.float16)}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
    )
    tf.saved_model.save(module, str(folder / "1"), {"serving_default": module.half, "read": module.read})
    with running(folder, "--rest_api_enable_cors_support") as (rest, _, _):
        yield rest


def echoed(port, dtype: str, text: str) -> str:
    """JSON text sent as a value, and what comes back for it."""
    status, body = predict(port, f'{{"signature_name": "{dtype}", "instances": [{text}]}}')
    assert status == 200, body
    start, end = b'{\n    "predictions": [', b"\n    ]\n}"
    assert body.startswith(start) and body.endswith(end)
    return body[len(start) : -len(end)].decode()


def test_rows(port):
    assert predict(port, {"instances": [[1, 2.5], [3, 4]]}) == (
        200,
        b'{\n    "predictions": [[2.0, 5.0], [6.0, 8.0]\n    ]\n}',
    )
    assert predict(port, {"instances": [{"x": [1, 2]}]})[1] == b'{\n    "predictions": [[2.0, 4.0]\n    ]\n}'
    rows = [{"a": 1, "b": 2}, {"b": 5, "a": 3}]
    status, body = predict(port, {"signature_name": "two", "instances": rows})
    assert status == 200
    assert json.loads(body) == {"predictions": [{"sum": 3.0, "product": 2.0}, {"sum": 8.0, "product": 15.0}]}


def test_columns(port):
    status, body = predict(port, {"inputs": [[1, 2]]})
    assert (status, json.loads(body)) == (200, {"outputs": [[2.0, 4.0]]})
    assert json.loads(predict(port, {"inputs": {"x": [[1, 2]], "unknown": 1}})[1]) == {"outputs": [[2.0, 4.0]]}
    document = {"signature_name": "two", "inputs": {"a": [1, 2], "b": [3, 4]}}
    assert json.loads(predict(port, document)[1]) == {"outputs": {"sum": [4.0, 6.0], "product": [3.0, 8.0]}}
    assert json.loads(predict(port, {"signature_name": "scalar", "inputs": [1, 2]})[1]) == {"outputs": 3.0}
    assert json.loads(predict(port, {"signature_name": "int32", "inputs": 7})[1]) == {"outputs": 7}
    assert json.loads(predict(port, {"inputs": []} | {"signature_name": "number"})[1]) == {"outputs": []}


def test_base64(port):
    data = bytes(range(256))
    value = {"b64": base64.b64encode(data).decode()}
    document = {"signature_name": "one_bytes", "instances": [value]}
    assert json.loads(predict(port, document)[1]) == {"predictions": [value]}
    assert json.loads(predict(port, document | {"instances": [{"text": value}]})[1]) == {"predictions": [value]}
    columnar = {"signature_name": "one_bytes", "inputs": value}
    assert json.loads(predict(port, columnar)[1]) == {"outputs": value}
    _, body = predict(port, {"signature_name": "to_bytes", "instances": ["é\n\x01"]})
    encoded = {"b64": base64.b64encode("é\n\x01".encode()).decode()}
    assert json.loads(body) == {"predictions": [{"text": "é\n\x01", "text_bytes": encoded}]}
    assert b"\\u0001" in body and "é".encode() in body
    bad = {"signature_name": "string", "inputs": {"b64": "_-8="}}
    assert predict(port, bad) == (400, error_body("Unable to base64 decode"))


def test_strings_need_not_be_text(port):
    status, body = predict(port, b'{"signature_name": "string", "instances": ["a\xff\xfe"]}')
    assert (status, body) == (200, b'{\n    "predictions": ["a\xff\xfe"\n    ]\n}')


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        ("0.1", "0.1"),
        ("0.2", "0.2"),
        ("1e20", "1e+20"),
        ("1", "1.0"),
        ("-0.0", "-0.0"),
        ("9000000", "9e+06"),
        ("1234567.0", "1234567.0"),
        ("0.333333333333", "0.333333343"),
        ("3.4028234663852886e38", "3.40282347e+38"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("Inf", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("0.00003", "3e-05"),
    ],
)
def test_floats(port, sent, written):
    assert echoed(port, "float32", sent) == written


def test_doubles(port):
    values = {"0.1": "0.1", "1e300": "1e+300", "5e-324": "4.94066e-324"}
    assert {sent: echoed(port, "float64", sent) for sent in values} == values
    assert float(echoed(port, "float64", "0.1234567890123456")) == 0.1234567890123456
    # A float32 below the smallest normal one: kernels may flush it to zero, the text must not.
    assert echoed(port, "float32", "1e-42") in ("1.00053e-42", "0.0")


def test_integers(port):
    largest = {"int64": 2**63 - 1, "uint64": 2**64 - 1, "int32": 2**31 - 1, "uint32": 2**32 - 1}
    for dtype, value in largest.items():
        assert echoed(port, dtype, str(value)) == str(value)
    assert echoed(port, "int64", str(-(2**63))) == str(-(2**63))
    assert echoed(port, "int8", "-128") == "-128" and echoed(port, "uint8", "255") == "255"
    assert echoed(port, "uint8", "256") == "0"  # the server does not check the small ones
    assert echoed(port, "bool", "true") == "true"


@pytest.mark.parametrize(
    ("dtype", "text", "kind", "expected"),
    [
        ("float32", '"x"', "String", "float"),
        ("float32", "null", "Null", "float"),
        ("float32", "true", "True", "float"),
        ("int32", "1.0", "Number", "int32"),
        ("int32", "2147483648", "Number", "int32"),
        ("int64", "9223372036854775808", "Number", "int64"),
        ("uint64", "-1", "Number", "uint64"),
        ("bool", "1", "Number", "bool"),
        ("string", "1", "Number", "string"),
    ],
)
def test_wrong_type(port, dtype, text, kind, expected):
    message = f"JSON Value: {text} Type: {kind} is not of expected type: {expected}"
    columnar = predict(port, f'{{"signature_name": "{dtype}", "inputs": [{text}]}}')
    assert columnar == (400, error_body(message))
    row = predict(port, f'{{"signature_name": "{dtype}", "instances": [{text}]}}')
    prefix = "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: "
    assert row == (400, error_body(prefix + message))


def test_a_dtype_that_json_cannot_carry(port):
    message = "Conversion of JSON Value: 1 to type: half"
    assert predict(port, {"signature_name": "half", "inputs": [1]}) == (501, error_body(message))
    wrapped = f"Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: {message}"
    assert predict(port, {"signature_name": "half", "instances": [1]}) == (400, error_body(wrapped))


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("POST", "/v1/models/other:predict", 404, UNKNOWN),
        ("GET", "/v1/models/other/metadata", 404, UNKNOWN),
        (
            "POST",
            "/v1/models/model/versions/9:predict",
            404,
            error_body("Servable not found for request: Specific(model, 9)"),
        ),
        ("GET", "/v1/models/other", 404, error_body("Could not find any versions of model other")),
        ("GET", "/v1/models/model/versions/9", 404, error_body("Could not find version 9 of model model")),
        ("POST", "/v1/models/model/labels/x:predict", 400, error_body("Unrecognized servable version label: x")),
        ("GET", "/v1/models/model/labels/x/metadata", 400, error_body("Unrecognized servable version label: x")),
        (
            "GET",
            "/v1/models/model/versions/9/metadata",
            404,
            error_body("Servable not found for request: Specific(model, 9)"),
        ),
        ("GET", "/v1/models/model/versions/9223372036854775808/metadata", 400, b""),
        ("GET", "/v1/models/model:predict", 400, error_body("Malformed request: GET /v1/models/model:predict")),
        ("DELETE", "/v1/models/model", 400, error_body("Malformed request: DELETE /v1/models/model")),
        ("GET", "/v1/models/..", 404, error_body("Could not find any versions of model ..")),
        ("GET", "/v1/models/a%00b", 404, error_body("Could not find any versions of model a\0b")),
        ("GET", "/v1/models", 400, error_body("Missing model name in request.")),
        ("POST", "/v1/models/model/versions/9223372036854775808:predict", 400, b""),
        ("GET", f"/v1/models/model/versions/{'9' * 5000}", 400, b""),
        ("POST", "/v1/models/model", 400, error_body("Malformed request: POST /v1/models/model")),
        ("PUT", "/v1/models/model:predict", 400, error_body("Malformed request: PUT /v1/models/model:predict")),
        ("GET", "/v1/models/model?x=1", 400, error_body("Malformed request: GET /v1/models/model?x=1")),
        ("POST", "/v1/models/model:run", 400, error_body("Malformed request: POST /v1/models/model:run")),
        ("GET", "/v1/models/m/../model", 400, error_body("Malformed request: GET /v1/models/m/../model")),
        ("POST", "/v1/models/model%3Apredict", 400, error_body("Malformed request: POST /v1/models/model%3Apredict")),
    ],
)
def test_errors_of_the_path(port, method, path, status, body):
    assert ask(port, method, path, b'{"instances": [[1, 2]]}' if method == "POST" else None) == (status, body)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON Parse error: The document is empty"),
        ("x", "JSON Parse error: Invalid value. at offset: 0"),
        ('{"a" 1}', "JSON Parse error: Missing a colon after a name of object member. at offset: 5"),
        ('{"a": [1 2]}', "JSON Parse error: Missing a comma or ] after an array element. at offset: 9"),
        ('{"a": "]" "b"}', "JSON Parse error: Missing a comma or } after an object member. at offset: 10"),
        ('{"instances": [1e999]}', "JSON Parse error: Number too big to be stored in double. at offset: 15"),
        ("[1]", "JSON Value: [\n    1\n] Is not object"),
        ("{}", "Missing 'inputs' or 'instances' key"),
        (
            '{"inputs": 1, "instances": [1]}',
            'JSON Value: {\n    "inputs": 1,\n    "instances": [\n        1\n    ]\n} '
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ",
        ),
        (
            '{"instances": 1}',
            "JSON Value: {\n    \"instances\": 1\n} Excepting 'instances' to be an list/array",
        ),
        ('{"instances": []}', "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array"),
        ('{"signature_name": "x", "instances": [1]}', 'Serving signature name: "x" not found in signature def'),
        (
            '{"signature_name": 1, "instances": [1]}',
            'JSON Value: {\n    "signature_name": 1,\n    "instances": [\n        1\n    ]\n} '
            "not formatted correctly. 'signature_name' key must be a string value.",
        ),
        (
            '{"instances": [[1, 2], [1]]}',
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
            "Expecting tensor size: 2 but got: 1",
        ),
        ('{"inputs": [[1, 2], [1]]}', "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        ('{"inputs": [[1, 2], 1]}', "JSON Value: 1 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ('{"inputs": [1, [1]]}', "Encountered list at unexpected level: 1 expected < 1"),
        ('{"signature_name": "two", "inputs": {"a": [1]}}', "Missing named input: b in 'inputs' object."),
        (
            '{"signature_name": "two", "instances": [{"a": 1}]}',
            "Failed to process element: 0 of 'instances' list. JSON object: {\n    \"a\": 1\n} "
            "keys must be equal to: a,b",
        ),
        (
            '{"signature_name": "two", "instances": [{"a": 1, "c": 1}]}',
            "Failed to process element: 0 key: c of 'instances' list. Error: INVALID_ARGUMENT: "
            "JSON object: does not have named input: c",
        ),
        (
            '{"signature_name": "two", "inputs": [1]}',
            "inputs is a plain value/list, but expecting an object as multiple "
            "input tensors required as per tensorinfo_map",
        ),
        ('{"instances": [{"x": [1, 2]}, [1, 2]]}', "Expecting object but got list at item 1 of input list"),
        ('{"instances": [[1, 2], {"x": [1, 2]}]}', "Expecting value/list but got object at item 1 of input list"),
        (
            '{"instances": [[[1, 2]], [[1], [2]]]}',
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
            "Expecting shape [1,2] but got: [2,1]",
        ),
        (
            '{"signature_name": "string", "inputs": [{"b64": "", "x": 1}]}',
            'JSON Value: {\n    "b64": "",\n    "x": 1\n} not formatted correctly for base64 data',
        ),
        (
            '{"signature_name": "two", "instances": [1]}',
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map",
        ),
        ('{"inputs": [16777217]}', "Cannot convert JSON value: 16777217 to float without loss of precision."),
        ('{"signature_name": "scalar", "instances": [1]}', "Tensor name: sum has no shape information "),
        (
            '{"signature_name": "uneven", "instances": [1, 2]}',
            "Tensor name: one has inconsistent batch size: 1 expecting: 2",
        ),
    ],
)
def test_errors_of_the_body(port, text, message):
    assert predict(port, text) == (400, error_body(message))


def test_the_body_is_read_before_the_model_is_looked_up(port):
    message = error_body("JSON Parse error: Invalid value. at offset: 0")
    assert predict(port, "x", "/v1/models/other") == (400, message)
    assert predict(port, '{"instances": [[1, 2]]} and more')[0] == 200  # bytes after the object


def test_what_the_kernels_refuse(port):
    status, body = predict(port, {"signature_name": "matmul", "inputs": [[1, 2, 3, 4, 5]] * 2})
    assert status == 400
    assert json.loads(body)["error"].startswith("Matrix size-incompatible: In[0]: [2,5], In[1]: [4,2]")
    status, body = predict(port, {"signature_name": "decode", "instances": ["no image"]})
    assert status == 400 and "Unknown image file format. One of JPEG, " in json.loads(body)["error"]


def test_the_code_of_a_kernel_becomes_the_status(refusing_port):
    """A file that is not there is NOT_FOUND to the runtime, so 404."""
    status, body = predict(refusing_port, {"signature_name": "read", "instances": ["/nowhere/at/all"]})
    assert status == 404 and "/nowhere/at/all; No such file" in json.loads(body)["error"]


def test_an_output_that_json_cannot_carry(refusing_port):
    message = "Failed to write JSON value for tensor type: half"
    assert predict(refusing_port, {"instances": [1]}) == (400, error_body(message))


@pytest.mark.parametrize(("fixture", "allowed"), [("port", None), ("refusing_port", "*")])
def test_headers(request, fixture, allowed):
    """Whatever the client says it sends; other sites' pages may ask only where a flag lets them."""
    connection = http.client.HTTPConnection("127.0.0.1", request.getfixturevalue(fixture), timeout=60)
    connection.request("POST", "/v1/models/model:predict", b'{"inputs": []}', {"Content-Type": "text/plain"})
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "application/json"
    assert answer.getheader("Access-Control-Allow-Origin") == allowed
    assert answer.getheader("Access-Control-Allow-Methods") == (allowed and "POST, GET")
    connection.close()


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("classify", "", "JSON Parse error: The document is empty"),
        ("classify", '{"signature_name": "x", "examples": [{}]}', "No signature was found with the name: x"),
        ("regress", '{"signature_name": "two", "examples": [{}]}', "Expected one input Tensor."),
        ("regress", '{"signature_name": "to_bytes", "examples": [{}]}', "Expected one output Tensor."),
        ("classify", '{"examples": []}', "JSON Value: {\n    \"examples\": []\n} 'examples' value is an empty array"),
    ],
)
def test_methods_for_examples(port, method, text, message):
    """No signature of these models is made for tf.Example: refused as the real server does."""
    answer = ask(port, "POST", f"/v1/models/model:{method}", text)
    assert answer == (400, error_body(message))


def test_deep_and_wide_values_are_refused(port):
    for depth in (100, 900, 5000, 90_000):
        status, body = predict(port, '{"inputs": ' + "[" * depth + "]" * depth + "}")
        assert status == 400 and "error" in json.loads(body), depth
    echo = json.loads(predict(port, {"instances": "x" * 1000})[1])["error"]
    assert 256 <= len(echo) < 350


def test_versions_and_labels(port):
    document = {"signature_name": "number", "instances": [0]}
    for path, number in [
        ("", 2),
        ("/versions/1", 1),
        ("/versions/02", 2),
        ("/labels/stable", 1),
        ("/labels/canary", 2),
    ]:
        status, body = predict(port, document, f"/v1/models/model{path}")
        assert (status, json.loads(body)) == (200, {"predictions": [number]})
    assert predict(port, document, "/V1/Models/%6dodel")[0] == 200  # a name is decoded; the rest has no case


def test_status(port):
    def state(version):
        return {"version": version, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}

    status, body = ask(port, "GET", "/v1/models/model")
    assert (status, json.loads(body)) == (200, {"model_version_status": [state("2"), state("1")]})
    assert json.loads(ask(port, "GET", "/v1/models/model/versions/1")[1]) == {"model_version_status": [state("1")]}
    assert ask(port, "GET", "/v1/models/model/labels/stable") == (200, body)  # a label is ignored


def test_metadata(port):
    status, body = ask(port, "GET", "/v1/models/model/labels/stable/metadata")
    answer = json.loads(body)
    assert status == 200
    assert answer["model_spec"] == {"name": "model", "signature_name": "", "version": "1"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert "__saved_model_init_op" in signatures
    x = signatures["serving_default"]["inputs"]["x"]
    size = [{"size": "-1", "name": ""}, {"size": "2", "name": ""}]
    assert x["dtype"] == "DT_FLOAT" and x["tensor_shape"] == {"dim": size, "unknown_rank": False}
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"


def test_outside_the_interface(port):
    status, body = ask(port, "GET", "/other")
    assert status == 404 and body.startswith(b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>")
    assert ask(port, "GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd")[0] == 404
    assert ask(port, "GET", "/v1/models/model/versions/..%2f1")[0] == 400
    assert ask(port, "OPTIONS", "/v1/models/model", headers={"Origin": "https://here"})[0] == 200
    assert ask(port, "OPTIONS", "/v1/models/model")[0] == 400


def test_metrics(port):
    predict(port, {"instances": [[1, 2]]})
    status, body = ask(port, "GET", "/monitoring/prometheus/metrics")
    lines = body.decode().splitlines()
    assert status == 200 and "# TYPE :tensorflow:serving:request_count counter" in lines
    counts = [line for line in lines if line.startswith(':tensorflow:serving:request_count{model_name="model",')]
    assert any('status="OK"' in line and int(line.split()[-1]) >= 1 for line in counts)
    assert not [line for line in lines if "other" in line]  # names that somebody has thought up


def test_compressed_bodies(port):
    body = gzip.compress(b'{"instances": [[1, 2]]}')
    assert ask(port, "POST", "/v1/models/model:predict", body, {"Content-Encoding": "gzip"})[0] == 200
    bad = ask(port, "POST", "/v1/models/model:predict", b"no gzip", {"Content-Encoding": "gzip"})
    assert bad == (400, error_body("JSON Parse error: The document is empty"))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_past_the_limit_is_refused_unread(port, chunked):
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(b"POST /v1/models/model:predict HTTP/1.1\r\nHost: here\r\n")
        if chunked:
            connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            chunk = b"%x\r\n%s\r\n" % (LIMIT // 2, b" " * (LIMIT // 2))
            connection.sendall(chunk * 2 + b"%x\r\n " % LIMIT)
        else:
            connection.sendall(b"Content-Length: 100000000000\r\n\r\n ")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.endswith(error_body(f"The body has more than {LIMIT} bytes"))


def test_hot_swap_and_rollback_under_load(models, tmp_path):
    """Every request is answered, by a version that is there; the newest folder wins, and back again."""
    name = tmp_path / "swapped"
    shutil.copytree(models / "model" / "1", name / "1")
    document = json.dumps({"signature_name": "busy", "instances": [0]})
    with running(name, name="swapped") as (port, _, _):

        def number():
            status, body = predict(port, document, "/v1/models/swapped")
            assert status == 200, body
            return json.loads(body)["predictions"][0]

        def ask_until(stop):
            seen = []
            while not stop.is_set():
                seen.append(number())
            return seen

        def wait_for(expected):
            end = time.monotonic() + 30
            while number() != expected:
                assert time.monotonic() < end

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            stop = threading.Event()
            clients = [pool.submit(ask_until, stop) for _ in range(3)]
            try:
                shutil.copytree(models / "model" / "2", name / ".tmp")
                (name / ".tmp").rename(name / "2")
                wait_for(2.0)
                (name / "2").rename(name / ".gone")
                wait_for(1.0)
                shutil.copytree(models / "model" / "2", name / ".tmp")
                (name / ".tmp" / "saved_model.pb").write_bytes(b"broken")
                (name / ".tmp").rename(name / "3")
                end = time.monotonic() + 30
                while b"LOADING" not in ask(port, "GET", "/v1/models/swapped/versions/3")[1]:
                    assert time.monotonic() < end
            finally:
                stop.set()
        seen = [one for client in clients for one in client.result()]
        assert set(seen) == {1.0, 2.0} and number() == 1.0
        states = json.loads(ask(port, "GET", "/v1/models/swapped")[1])["model_version_status"]
        assert [(one["version"], one["state"]) for one in states] == [
            ("3", "LOADING"),
            ("2", "END"),
            ("1", "AVAILABLE"),
        ]


def test_batches(models, tmp_path):
    """Requests that come together share a run; each gets its own rows; a full queue answers as unavailable."""
    (tmp_path / "batching").write_text(
        "max_batch_size { value: 4 } batch_timeout_micros { value: 100000 } max_enqueued_batches { value: 1 } "
        "num_batch_threads { value: 1 } allowed_batch_sizes: 2 allowed_batch_sizes: 4"
    )
    words = [models / "model", "--enable_batching", "--batching_parameters_file", tmp_path / "batching"]
    with running(*words, "--rest_api_num_threads", 16) as (port, _, _):
        assert json.loads(predict(port, {"instances": [[1, 2]] * 3})[1]) == {"predictions": [[2.0, 4.0]] * 3}
        too_large = "Task size 5 is larger than maximum input batch size 4"
        assert predict(port, {"instances": [[1, 2]] * 5}) == (400, error_body(too_large))
        busy = json.dumps({"signature_name": "busy", "instances": [0] * 4})
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: predict(port, busy), range(12)))
        full = error_body("The batch scheduling queue to which this task was submitted is full")
        assert {status for status, _ in answers} == {200, 503}
        assert {body for status, body in answers if status == 503} == {full}


def test_padding_in_batches(models, tmp_path):
    """Rows of different lengths share a batch where that is asked for: padded with their own first value."""
    (tmp_path / "batching").write_text(
        "max_batch_size { value: 4 } batch_timeout_micros { value: 2000000 } pad_variable_length_inputs: true"
    )
    words = [models / "model", "--enable_batching", "--batching_parameters_file", tmp_path / "batching"]
    with running(*words) as (port, _, _), concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = [[[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 10]]]  # four rows: full, so the timeout is not waited for
        documents = [{"signature_name": "float32", "instances": one} for one in rows]
        answers = list(pool.map(lambda one: json.loads(predict(port, one)[1]), documents))
    assert answers == [{"predictions": [[1, 2, 1], [3, 4, 1]]}, {"predictions": rows[1]}]


def test_a_request_that_takes_too_long_and_a_full_queue(models):
    words = ["--rest_api_timeout_in_ms", 20, "--rest_api_num_threads", 1, "--max_waiting_requests", 1]
    busy = json.dumps({"signature_name": "busy", "instances": [0]})
    with running(models / "model", *words) as (port, _, _):
        assert predict(port, busy) == (504, error_body("Timed out waiting for notification"))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: predict(port, busy)[0], range(8)))
        assert 503 in answers and set(answers) <= {503, 504}


def test_start_and_end(models):
    """Without TensorFlow, a word about production, and in order at a signal; what is wrong is said."""
    started = time.monotonic()
    with running(models / "model") as (rest, grpc, process):
        seconds = time.monotonic() - started
        maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text() if os.path.exists("/proc/self/maps") else ""
        assert "_pywrap_tensorflow" not in maps and seconds < 30
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        said = process.stdout.read()
        assert "For production use TensorFlow Serving" in said
        assert f"model, version 2: http://127.0.0.1:{rest}/v1/models/model   grpc://127.0.0.1:{grpc}/model\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model, or two: expected one of FOLDER, --model_base_path and --model_config_file"),
        (["/nowhere"], "/nowhere: no such folder. Expected a model's"),
        (["--model_config_file", "/nowhere"], "/nowhere: cannot be read as the server's ModelServerConfig"),
        (["--enable_model_warmup=true"], "--enable_model_warmup: a flag of TF Serving that the embedded server does"),
        (["--ssl_config_file", "x"], "--ssl_config_file: the embedded server does not encrypt"),
        (["--model_nam", "x"], "unrecognized arguments: --model_nam"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    command = [sys.executable, "-m", "serving.server", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("flag", ["--port", "--rest_api_port"])
def test_a_port_that_is_taken(models, flag):
    """Said at once, before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = [models / "model", "--port", 0, "--rest_api_port", 0, flag, other.getsockname()[1]]
        command = [sys.executable, "-m", "serving.server", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    message = f"{flag} {words[-1]}: cannot listen on 127.0.0.1 (Address already in use). Does another server run there?"
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stdout == ""


def test_a_version_that_cannot_be_loaded(tmp_path):
    (tmp_path / "model" / "1").mkdir(parents=True)
    (tmp_path / "model" / "1" / "saved_model.pb").write_bytes(b"broken")
    command = [sys.executable, "-m", "serving.server", tmp_path / "model", "--max_num_load_retries", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot load version 1 of model model: " in done.stderr


def test_a_run_folder_and_warmup_requests(models, tmp_path):
    """The model of a run is found in it, and a version answers its warm-up requests before it answers others."""
    version = tmp_path / "photos" / "serving" / "model" / "1"
    shutil.copytree(models / "model" / "1", version)
    (version / WARMUP_FILE).parent.mkdir(exist_ok=True)
    write_requests(version / WARMUP_FILE, [("number", {"x": np.zeros(2, np.float32)})])
    with running(tmp_path / "photos") as (rest, _, _):
        status, body = predict(rest, {"signature_name": "number", "instances": [0]})
        assert status == 200 and json.loads(body) == {"predictions": [1.0]}
    write_requests(version / WARMUP_FILE, [("number", {"x": np.zeros(2, np.int32)})])
    command = [sys.executable, "-m", "serving.server", str(tmp_path / "photos"), "--max_num_load_retries", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot load version 1 of model model: warm-up request 0 of 1: inputs" in done.stderr
