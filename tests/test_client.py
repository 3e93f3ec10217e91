"""serving/client.py and `graft ask`: real sockets, a server that speaks as TensorFlow Serving does, a real export."""

from __future__ import annotations

import json
import pathlib
import re
import socket
import subprocess
import sys

import grpc
import numpy as np
import pytest

from models import GraftError
from pipelines.__main__ import guarded
from pipelines.ask import ask_server
from serving import client as client_module
from serving.client import Client, ServerError, is_url, parse_url, requests_of
from serving.export_text import export_text_classifier
from serving.session import Session, SessionError
from tests.stub_servers import CLASSES, grpc_server, png, rest_server, tiny_version
from tests.test_export_text import FIXTURES, tiny_classifier

pytestmark = pytest.mark.slow  # servers and exports of their own: minutes

ROOT = pathlib.Path(__file__).resolve().parents[1]

SERVERS = {
    "rest": (rest_server, "http://127.0.0.1:{}/v1/models/photos"),
    "grpc": (grpc_server, "grpc://127.0.0.1:{}/photos"),
}


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return tiny_version(tmp_path_factory.mktemp("client") / "photos" / "3", seed=0)


@pytest.fixture(params=SERVERS)
def served(request, version, monkeypatch):
    """(a server, the address of its model), once for each API."""
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    open_server, address = SERVERS[request.param]
    with open_server(version) as server:
        yield server, address.format(server.port)


@pytest.fixture
def rest(version, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    with rest_server(version) as server:
        yield server, f"http://127.0.0.1:{server.port}/v1/models/photos"


@pytest.fixture(scope="module")
def expected(version):
    """The answers of the version itself for 40 images, one of which is none."""
    images = [*(png(seed) for seed in range(39)), b"no image"]
    with Session(version) as session:
        return images, session.run("serving_default", {"image_bytes": images})


# ---- answers


def test_answers_equal_the_versions_own(served, expected):
    server, url = served
    images, own = expected
    with Client(url) as client:
        assert (client.name, client.version) == ("photos", 3)
        assert client.signatures == server.session.signatures
        answers = client.run("serving_default", {"image_bytes": images})
    assert server.rows == [32, 8]
    for name, values in own.items():
        assert answers[name].dtype == values.dtype and answers[name].shape == values.shape
        if values.dtype == object:
            assert answers[name].tolist() == values.tolist()
        else:
            np.testing.assert_allclose(answers[name], values, atol=1e-6)
    assert answers["error"][-1] and not answers["error"][0]


def test_other_signatures_and_single_outputs(rest, expected):
    images, _ = expected
    server, url = rest
    with Client(url) as client:
        features = client.run("features", {"image_bytes": images[:2]})
        assert features["features"].shape == (2, 8) and features["features"].dtype == np.float32
        pixels = np.full((2, 9, 5, 3), 127.5, np.float32)
        from_pixels = client.run("pixels", {"pixels": pixels})
    own = server.session.run("pixels", {"pixels": pixels})
    np.testing.assert_allclose(from_pixels["probabilities"], own["probabilities"], atol=1e-6)


def test_versions_and_labels(served, expected):
    server, url = served
    row = {"image_bytes": expected[0][:1]}
    for which in ("/versions/3", "/labels/stable"):
        with Client(url + which) as client:
            client.run("serving_default", row)
    with Client(url, pinned=True) as client:
        client.run("serving_default", row)
    asked = ["/versions/3", "/labels/stable", ""]
    if url.startswith("http"):
        wanted = [[f"/v1/models/photos{w}/metadata", f"/v1/models/photos{w}:predict"] for w in asked[:2]]
        wanted += [["/v1/models/photos/metadata", "/v1/models/photos/versions/3:predict"]]
    else:
        wanted = [[(3, ""), (3, "")], [(0, "stable"), (0, "stable")], [(0, ""), (3, "")]]
    assert server.paths == [path for paths in wanted for path in paths]


def test_more_than_four_megabytes_over_grpc(version):
    """Past gRPC's default limit, both ways."""
    with grpc_server(version) as server, Client(f"grpc://127.0.0.1:{server.port}/photos") as client:
        big = client.run("serving_default", {"image_bytes": [b"x" * (6 << 20)]})
        assert b"not an image" in big["error"][0]
        server.run = lambda signature, inputs: {**big, "error": np.array([b"y" * (6 << 20)], object)}
        assert client.run("serving_default", {"image_bytes": [b""]})["error"][0] == b"y" * (6 << 20)


def test_large_files_travel_in_several_requests():
    rows = np.empty(5, object)
    rows[:] = [b"x" * (7 << 20), b"", b"y" * (12 << 20), b"z" * (40 << 20), b"end"]
    assert requests_of([rows]) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert requests_of([np.zeros((70, 2), np.float32)]) == [slice(0, 32), slice(32, 64), slice(64, 70)]
    assert requests_of([rows[:0]]) == [slice(0, 0)]


# ---- what goes wrong


def test_a_busy_server_is_asked_again(served, expected):
    server, url = served
    busy = [(503, {"error": "queue full"}), (429, {}), (0, b""), (502, b"<html>no server</html>")]
    if url.startswith("grpc"):
        busy = [(grpc.StatusCode.UNAVAILABLE, "queue full"), (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")] * 2
    with Client(url) as client:
        server.fail[:] = busy
        answers = client.run("serving_default", {"image_bytes": expected[0][:1]})
        assert not server.fail
        assert answers["labels"].tolist() == expected[1]["labels"][:1].tolist()
        server.fail[:] = busy * 2
        with pytest.raises(ServerError, match="no answer in 5 tries: .*queue full"):
            client.run("serving_default", {"image_bytes": expected[0][:1]})
        assert len(server.fail) == 3


def test_a_refusal_is_final_and_says_why(served):
    server, url = served
    with pytest.raises(ServerError, match=r"nothing.*(HTTP 404|NOT_FOUND): Servable not found for request: Latest"):
        Client(url.replace("photos", "nothing"))
    assert len(server.paths) == 1
    with Client(url) as client:
        refused = (
            (400, {"error": "bad row"}) if url.startswith("http") else (grpc.StatusCode.INVALID_ARGUMENT, "bad row")
        )
        server.fail[:] = [refused]
        with pytest.raises(ServerError, match="bad row"):
            client.run("serving_default", {"image_bytes": [b""]})
        asked = len(server.paths)
        for signature, inputs, message in (
            ("nothing", {}, "no signature 'nothing'. Expected one of: .*serving_default"),
            ("serving_default", {"image": [b""]}, r"got the inputs \['image'\], expected \['image_bytes'\]"),
            ("serving_default", {"image_bytes": ["text"]}, "got str 'text', expected bytes"),
        ):
            with pytest.raises(SessionError, match=message):
                client.run(signature, inputs)
        assert len(server.paths) == asked


def test_something_else_at_the_address(rest):
    server, url = rest
    for status, body, message in (
        (200, [1, 2], r"not TensorFlow Serving: its answer has no 'metadata', but is HTTP 200: \[1, 2\]"),
        (200, b"<html>\nWelcome</html>", r"not TensorFlow Serving: .* HTTP 200: <html> Welcome</html>"),
        (404, b"<html>nothing here</html>", r"refused the request with HTTP 404: <html>nothing here</html>"),
        (400, {"error": "Malformed request"}, r"refused the request with HTTP 400: Malformed request"),
    ):
        server.fail[:] = [(status, body)]
        with pytest.raises(ServerError, match=message):
            Client(url)


def test_the_port_of_the_other_interface(version):
    said = "does not speak HTTP. The REST port is 8501 by default; 8500 is gRPC's"
    with grpc_server(version) as server, pytest.raises(ServerError, match=said):
        Client(f"http://127.0.0.1:{server.port}/v1/models/photos")


def test_an_output_that_is_not_sent(version):
    with grpc_server(version) as server, Client(f"grpc://127.0.0.1:{server.port}/photos") as client:
        server.run = lambda signature, inputs: {}
        with pytest.raises(ServerError, match=r"photos: the output \w+ cannot be read \(DataType 0\)"):
            client.run("serving_default", {"image_bytes": [b""]})


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    for url in ("http://127.0.0.1:1/v1/models/photos", "grpc://127.0.0.1:1/photos"):
        with pytest.raises(ServerError, match=rf"^{url}: no answer in 5 tries: .*Does the server run"):
            Client(url)


def test_a_server_that_hangs():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}/v1/models/photos", f"grpc://127.0.0.1:{port}/photos"):
            with pytest.raises(ServerError, match=r"no answer (within 0.3 s|in 5 tries)"):
                Client(url, timeout_s=0.3)


def test_addresses():
    parts = parse_url("https://models.example/a/v1/models/m%2Fn/labels/stable:predict")
    assert parts == {
        "scheme": "https",
        "host": "models.example",
        "port": None,
        "prefix": "/a",
        "name": "m%2Fn",
        "version": None,
        "label": "stable",
    }
    assert parse_url("grpc://[::1]:8500/photos/versions/12")["version"] == "12"
    wrong = [
        "http://localhost:8501",
        "http://localhost:8501/photos",
        "grpc://localhost",
        "ftp://h/v1/models/m",
        "photos",
    ]
    wrong += ["http://localhost:port/v1/models/m", "http://h/v1/models/m?x=1", "http:///v1/models/m", "grpc://h/a/b"]
    for url in wrong:
        with pytest.raises(GraftError, match="not the address of a served model. Expected http://HOST:8501"):
            parse_url(url)
    assert is_url("grpc://h/m") and not is_url("runs/photos") and not is_url("http")


# ---- graft ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory, expected):
    folder = tmp_path_factory.mktemp("new")
    for index, content in enumerate([*expected[0][:3], b"no image"]):
        (folder / f"{index}.png").write_bytes(content)
    return folder


def test_ask_prints_a_table(served, folder, expected, capsys, monkeypatch):
    monkeypatch.chdir(folder)  # short names, in a table of 80 columns
    assert ask_server([served[1], *sorted(p.name for p in folder.iterdir())]) == 0
    shown = capsys.readouterr().out
    for index in range(3):
        label, score = expected[1]["labels"][index][0].decode(), expected[1]["scores"][index][0]
        assert re.search(rf"\b{index}\.png +{label} +{score:.3f} ", shown), shown
    assert re.search(r"\b3\.png +no answer +", shown)
    assert re.search(r"photos, version 3: 4 answers in \d+\.\d\d s, \d+\.\d ms each, 1 without an answer", shown)


def test_ask_prints_json(served, folder, expected, capsys):
    assert ask_server([served[1], str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model"], shown["version"], len(shown["answers"])) == ("photos", 3, 4)
    first = shown["answers"][0]
    assert first["labels"] == [label.decode() for label in expected[1]["labels"][0]]
    assert first["label"] == first["labels"][0] and first["path"].endswith("/0.png")
    np.testing.assert_allclose(first["scores"], expected[1]["scores"][0], atol=1e-6)
    assert set(shown["answers"][3]) == {"path", "error"}


def test_ask_names_the_chosen_classes_of_several(tmp_path, capsys, folder):
    thresholds = np.full(len(CLASSES), 0.5)
    with rest_server(tiny_version(tmp_path / "photos" / "3", seed=1, thresholds=thresholds)) as server:
        words = [f"http://127.0.0.1:{server.port}/v1/models/photos", *(str(folder / f"{i}.png") for i in range(3))]
        assert ask_server([*words, "--json"]) == 0
        own = server.session.run("serving_default", {"image_bytes": [png(seed) for seed in range(3)]})
    for answer, chosen, labels in zip(json.loads(capsys.readouterr().out)["answers"], own["chosen"], own["labels"]):
        known = [name for name, is_chosen in zip(CLASSES, chosen) if is_chosen and name.encode() in labels]
        assert known and set(known) <= set(answer["chosen"]) and len(answer["chosen"]) == chosen.sum()
        assert answer["label"] == "|".join(answer["chosen"])


def test_ask_texts(tmp_path, capsys):

    classes = ["Frage", "answer", "回答"]
    export_text_classifier(*tiny_classifier(FIXTURES / "text" / "bert"), classes, tmp_path / "photos" / "3")
    (tmp_path / "one.txt").write_text("How do I sort a list?")
    with rest_server(tmp_path / "photos" / "3") as server:
        url = f"http://127.0.0.1:{server.port}/v1/models/photos"
        assert ask_server([url, str(tmp_path / "one.txt"), "--text", "日本 [red]", "--json"]) == 0
        own = server.session.run("serving_default", {"text": ["日本 [red]".encode(), b"How do I sort a list?"]})
        answers = json.loads(capsys.readouterr().out)["answers"]
        assert [answer["label"] for answer in answers] == [labels[0].decode() for labels in own["labels"]]
        assert answers[0]["text"] == "日本 [red]" and answers[1]["path"].endswith("one.txt")
        assert guarded(ask_server, [url]) == 2
    assert "Nothing to label: give --text" in capsys.readouterr().err


def test_mistakes_of_ask(rest, capsys, tmp_path):
    server, url = rest
    for words, message in (
        (["photos/new"], "photos/new: not the address of a served model"),
        ([url], "Nothing to label: give image files"),
        ([url, "--text", "hello"], "--text: this model takes images"),
        ([url, str(tmp_path / "gone.png")], "gone.png: there is no such file"),
    ):
        assert guarded(ask_server, words) == 2
        assert message in capsys.readouterr().err
    assert not server.rows


def test_without_importing_tensorflow():
    code = "import sys; from serving.client import Client, Grpc, parse_url\n"
    code += "Grpc(parse_url('grpc://localhost:1/m'), 1.0).close()\n"
    code += "import pipelines.ask, pipelines.compare\n"
    code += "assert not {'tensorflow', 'keras', 'sklearn', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
