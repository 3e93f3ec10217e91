"""Hubs by name: local caches in each hub's own layout, a Hugging Face server on this machine, and no network."""

import hashlib
import http.server
import json
import pathlib
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from models import GraftError, hubs
from models.backbone import load_backbone

NOWHERE = "https://hub.invalid"  # RFC 6761: this name is never resolved
TEXT_FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "text"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """Caches of this test alone, and Hugging Face at a host that does not exist."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put_huggingface(caches, preset, repository="models--user--tiny", revision="main", commit="abc"):
    """A repository in the layout of Hugging Face's cache, with a licence in its README.md."""
    folder = caches / "huggingface" / repository
    shutil.copytree(preset, folder / "snapshots" / commit)
    (folder / "snapshots" / commit / "README.md").write_text(
        "---\nlibrary_name: keras-hub\nlicense: mit\n---\n# Tiny\n"
    )
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def put_kaggle(caches, preset, handle="user/tiny/keras/small", version="2"):
    """A model in the layout of kagglehub's cache, marked as whole."""
    folder = caches / "kagglehub" / "models" / handle
    shutil.copytree(preset, folder / version)
    (folder / f"{version}.complete").touch()
    return folder / version


def test_the_table_of_built_in_names_is_kerashubs_own():
    import keras_hub

    own = {name: entry["kaggle_handle"] for name, entry in keras_hub.models.Backbone.presets.items()}
    read = {name: handle for name, (_, handle) in hubs.builtin_presets().items()}
    assert len(own) > 100
    assert {name: read.get(name) for name in own} == own
    assert {"resnet_50_imagenet", "efficientnet_b0_ra_imagenet", "vit_base_patch16_224_imagenet"} <= set(
        hubs.image_presets()
    )
    assert {"bert_base_en", "gpt2_base_en", "llama3_8b_en", "deberta_v3_base_en"} <= set(hubs.text_presets())


def test_a_model_in_the_cache_of_hugging_face_needs_no_network(empty_caches, tiny_preset):
    folder = put_huggingface(empty_caches, tiny_preset)
    backbone = load_backbone("hf://user/tiny")
    assert backbone.name == "tiny"
    assert backbone.source == {
        "preset": "tiny",
        "hub": "huggingface",
        "handle": "user/tiny",
        "url": f"{NOWHERE}/user/tiny",
        "folder": "abc",
        "file": "model.weights.h5",
        "sha256": hashlib.sha256((folder / "model.weights.h5").read_bytes()).hexdigest(),
        "licence": "mit",
        "architecture": "EfficientNetBackbone",
    }
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    expected = load_backbone(str(tiny_preset)).encoder(images)
    assert np.abs(np.asarray(backbone.encoder(images)) - np.asarray(expected)).max() == 0


def test_revisions_in_the_cache_of_hugging_face(empty_caches, tiny_preset):
    first = put_huggingface(empty_caches, tiny_preset, commit="abc")
    second = put_huggingface(empty_caches, tiny_preset, revision="v2", commit="def")
    assert hubs.cached_hub("hf://user/tiny") == first
    assert hubs.cached_hub("hf://user/tiny@v2") == second
    assert hubs.cached_hub("hf://user/tiny@def") == second  # a commit
    assert hubs.cached_hub("hf://user/tiny@v3") is None
    assert hubs.hub_source("hf://user/tiny@v2")["handle"] == "user/tiny@v2"
    assert hubs.cached_names() == ["hf://user/tiny"]


def test_a_model_in_the_cache_of_kagglehub_needs_no_network(empty_caches, tiny_resnet_preset):
    put_kaggle(empty_caches, tiny_resnet_preset, version="2")
    newest = put_kaggle(empty_caches, tiny_resnet_preset, version="10")
    assert hubs.cached_hub("kaggle://user/tiny/keras/small") == newest
    assert hubs.cached_hub("kaggle://user/tiny/keras/small/2") == newest.parent / "2"
    backbone = load_backbone("kaggle://user/tiny/keras/small")
    assert (backbone.name, backbone.source["hub"], backbone.source["licence"]) == ("small", "kaggle", "unknown")
    assert backbone.source["url"] == "https://www.kaggle.com/models/user/tiny/keras/small"


def test_a_built_in_name_is_found_in_the_cache_of_kagglehub(empty_caches, tiny_resnet_preset):
    handle = hubs.builtin_presets()["resnet_50_imagenet"][1].removeprefix("kaggle://")
    model, version = handle.rsplit("/", 1)
    put_kaggle(empty_caches, tiny_resnet_preset, model, version)
    backbone = load_backbone("resnet_50_imagenet")
    assert (backbone.name, backbone.source["handle"]) == ("resnet_50_imagenet", handle)
    assert backbone.source["architecture"] == "ResNetBackbone"


def test_a_folder_of_that_name_comes_before_the_built_in_preset(empty_caches, tiny_preset, monkeypatch):
    shutil.copytree(tiny_preset, empty_caches / "resnet_50_imagenet")
    monkeypatch.chdir(empty_caches)
    assert load_backbone("resnet_50_imagenet").source["architecture"] == "EfficientNetBackbone"


def test_half_a_model_in_a_cache_is_not_used(empty_caches, tiny_preset):
    folder = put_kaggle(empty_caches, tiny_preset)
    name = "kaggle://user/tiny/keras/small"
    (folder.parent / "2.complete").unlink()  # the download was stopped
    assert hubs.cached_hub(name) is None
    marks = folder.parent / ".complete" / "2"  # KerasHub fetches file by file, and each has its mark
    marks.mkdir(parents=True)
    (marks / "model.weights.h5.complete").touch()
    assert hubs.cached_hub(name) == folder
    (folder / "image_converter.json").unlink()  # which KerasHub leaves out if only the backbone was asked for
    assert hubs.cached_hub(name) is None
    assert hubs.cached_names() == []
    snapshot = put_huggingface(empty_caches, tiny_preset)
    (snapshot / "model.weights.h5").rename(snapshot / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hubs.cached_hub("hf://user/tiny") is None
    (snapshot / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert hubs.cached_hub("hf://user/tiny") == snapshot
    with pytest.raises(GraftError, match=r"'kaggle://user/tiny/keras/small' is not whole.*caches: hf://user/tiny;"):
        hubs.fetch_hub(name) if not hubs.reachable("https://api.kaggle.com") else pytest.skip("Kaggle is in reach")


def test_without_a_network_the_error_comes_soon_and_says_where_it_looked(empty_caches, tiny_preset):
    put_kaggle(empty_caches, tiny_preset)
    start = time.monotonic()
    with pytest.raises(GraftError) as caught:
        load_backbone("hf://user/absent")
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert f"looked in {empty_caches}/huggingface/models--user--absent" in message
    assert "hub.invalid could not be reached within 2 s" in message
    assert (
        "Without a network: efficientnet_lite0, minilm_l6, whisper_tiny_en; "
        "in local caches: kaggle://user/tiny/keras/small" in message
    )


@pytest.mark.parametrize("name", ["hf://one", "hf://a/b/c", "hf://", "kaggle://a/b", "kaggle://a/b/keras/c/latest"])
def test_a_name_that_is_not_of_its_hubs_form_shows_the_form(name):
    with pytest.raises(GraftError, match=r"expected (hf://USER/MODEL|kaggle://USER/MODEL/keras/VARIATION)"):
        load_backbone(name)


# ---------------------------------------------------------------- the network


def test_reachable_tries_the_host_or_the_proxy_that_leads_to_it(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        port, dead = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        assert hubs.reachable(f"http://127.0.0.1:{port}")
        assert not hubs.reachable(f"http://127.0.0.1:{dead}")
        assert not hubs.reachable(NOWHERE)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        assert hubs.reachable(NOWHERE)
        monkeypatch.setenv("NO_PROXY", "hub.invalid")
        assert not hubs.reachable(NOWHERE)
        monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("ALL_PROXY", f"127.0.0.1:{dead}")
        assert not hubs.reachable(f"https://127.0.0.1:{port}")
        assert "through the proxy 127.0.0.1" in str(hubs.no_network("hf://a/b", NOWHERE, "x"))


def test_reachable_does_not_wait_longer_than_told():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # they fill the queue, so that the next one gets no answer
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        start = time.monotonic()
        assert not hubs.reachable(f"http://127.0.0.1:{address[1]}", seconds=0.5)
        assert time.monotonic() - start < 1
        for one in waiting:
            one.close()


class HuggingFace(http.server.BaseHTTPRequestHandler):
    """As much of Hugging Face's API as listing and fetching one public repository, user/served, takes."""

    folder: pathlib.Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        files = sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())
        commit = hashlib.sha1(" ".join(files).encode()).hexdigest()
        data, headers, status = b"", {"X-Repo-Commit": commit}, 200
        if path.startswith("/api/models/user/served/tree/"):
            listed = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
            data = json.dumps(listed).encode()
        elif path.startswith("/api/models/user/served"):
            siblings = [{"rfilename": file} for file in files]
            data = json.dumps({"id": "user/served", "sha": commit, "siblings": siblings}).encode()
        elif path.startswith("/user/served/resolve/") and path.split("/", 5)[5] in files:
            file = path.split("/", 5)[5]
            data = (self.folder / file).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            self.asked.append(file) if body else None
        else:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def huggingface(tmp_path, monkeypatch, tiny_preset):
    """A repository on a server of this machine: folder to put files in, and what was downloaded."""
    HuggingFace.folder, HuggingFace.asked = tmp_path / "served", []
    shutil.copytree(tiny_preset, HuggingFace.folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HuggingFace)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield HuggingFace
    server.shutdown()
    server.server_close()


def test_a_model_of_hugging_face_is_fetched_once(huggingface, empty_caches, monkeypatch):
    (huggingface.folder / "training.log").write_text("not wanted")
    (huggingface.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    backbone = load_backbone("hf://user/served")
    assert sorted(huggingface.asked) == sorted({path.name for path in huggingface.folder.iterdir()} - {"training.log"})
    assert (backbone.name, backbone.source["licence"]) == ("served", "apache-2.0")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert load_backbone("hf://user/served").source["sha256"] == backbone.source["sha256"]


def test_pickled_weights_are_fetched_only_where_there_are_no_others(huggingface):
    (huggingface.folder / "pytorch_model.bin").write_bytes(b"pickle")
    hubs.fetch_hub("hf://user/served")
    assert "pytorch_model.bin" not in huggingface.asked
    (huggingface.folder / "model.weights.h5").unlink()
    (huggingface.folder / "image_converter.json").unlink()
    shutil.rmtree(hubs.huggingface_cache())
    folder = hubs.fetch_hub("hf://user/served")
    assert hubs.weight_files(folder) == [folder / "pytorch_model.bin"]


@pytest.mark.parametrize("name", ["biobert", "finbert", "gpt2", "t5"])
def test_a_text_model_is_fetched_with_its_vocabulary_and_pooling(name, huggingface, empty_caches, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(empty_caches / "graft"))
    shutil.rmtree(huggingface.folder)
    shutil.copytree(TEXT_FIXTURES / name, huggingface.folder)
    wanted = {file.name for file in huggingface.folder.iterdir()}
    (huggingface.folder / "1_Pooling").mkdir()
    (huggingface.folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    (huggingface.folder / "flax_model.msgpack").write_bytes(b"not wanted")
    backbone = load_backbone("hf://user/served")
    assert set(huggingface.asked) == wanted | {"1_Pooling/config.json"}
    assert (backbone.name, backbone.source["text_pooling"]) == ("served", "mean")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    folder = hubs.fetch_hub("hf://user/served")
    for file in ("vocab.txt", "vocab.json", "spiece.model"):
        (folder / file).unlink(missing_ok=True)
    assert hubs.cached_hub("hf://user/served") is None  # without its vocabulary it is not whole


def test_a_repository_without_a_model_and_an_unknown_one_say_so(huggingface):
    with pytest.raises(GraftError, match=r"'hf://user/missing' could not be fetched from http://127.*Check the name"):
        hubs.fetch_hub("hf://user/missing")
    (huggingface.folder / "model.weights.h5").unlink()
    with pytest.raises(GraftError, match=r"holds no config.json with weights .*It holds: config.json"):
        hubs.fetch_hub("hf://user/served")
