"""Names of backbones: a wrong one answers at once, without TensorFlow, and says what there is."""

import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest

from models import GraftError, names
from models.names import check_backbone_name

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """Caches of this test alone, and every host behind a proxy that is not there."""
    for name in ("HF_HUB_CACHE", "KAGGLEHUB_CACHE", "KERAS_HOME", "TFHUB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # the port of the discard service
    for name in ("https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


# Name -> what the error must say.
WRONG = {
    "resnet_50_imagent": r"is not known: .*\(efficientnet_lite0\).*Did you mean resnet_50_imagenet",
    "efficientnet_lite1": r"is not known: .*Did you mean .*efficientnet_lite0",
    "applications:ResNet": r"keras.applications has no 'ResNet' that Graft offers. There are: ResNet50, ResNet101",
    "applications:NASNetMobile": "keras.applications has no 'NASNetMobile' that Graft offers",
    "applications:ResNet50V2:absent.h5": "there is no weights file absent.h5",
    "applications:ResNet50V2": r"looked in .*resnet50v2_weights\S*.h5 or .*notop.h5\), and storage.googleapis.com",
    "bert_base_en": "a KerasHub preset of the family bert, is not an image model but a text model. Give an image model",
    "minilm_l6": "is not an image model but a text model. Give an image model, for example efficientnet_lite0, or",
    "deit_base_distilled_patch16_224_imagenet": "preset of the family deit, .*hides its units inside one layer",
    "resnet_50_imagenet": r"looked in .*resnet_50_imagenet\), and api.kaggle.com could not be reached within 2 s",
    "kaggle://user/model/keras/variation": r"looked in .*user/model/keras/variation\), and api.kaggle.com could not",
    "hf://user/model": r"models--user--model\), and huggingface.co could not .*\(through the proxy 127.0.0.1\)",
    "tfhub:https://tfhub.dev/google/x/1": "tfhub.dev could not be reached",
    "tfhub:http://tfhub.dev/google/x/1": "expected tfhub:https://",
    "tfhub:absent": "absent holds no saved_model.pb, so it is no TF-Hub module",
    "setup.cfg": "is a file. Give the folder that holds it",
    "models": "folder models holds no config.json",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_says_what_it_was_and_what_there_is(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    start = time.monotonic()
    with pytest.raises(GraftError, match=WRONG[name]):
        check_backbone_name(name)
    assert time.monotonic() - start < 5


def test_offline_names_and_local_modules_are_accepted(tmp_path):
    assert check_backbone_name("efficientnet_lite0") is None
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "saved_model.pb").touch()
    assert check_backbone_name(f"tfhub:{tmp_path / 'module'}") is None
    handle = "https://tfhub.dev/google/x/1"
    cached = tmp_path / "TFHUB_CACHE_DIR" / hashlib.sha1(handle.encode()).hexdigest()
    cached.mkdir(parents=True)
    (cached / "saved_model.pb").touch()
    assert check_backbone_name(f"tfhub:{handle}") is None
    weights = tmp_path / "KERAS_HOME" / "models" / "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert check_backbone_name("applications:ResNet50V2") is None
    assert check_backbone_name(f"applications:ResNet101:{weights}") is None


def test_a_folder_of_a_text_model_or_of_no_known_layout_is_refused(tmp_path):
    for config, message in [
        ({"registered_name": "x", "class_name": "BertBackbone", "config": {}}, "holds a BertBackbone, which is not an"),
        ({"model_type": "bert"}, "transformers model of the type 'bert'"),
        ({"a": 1}, "is of no layout that Graft knows"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(GraftError, match=message):
            check_backbone_name(str(tmp_path))


@pytest.mark.parametrize("name", ["hf://user/model", "resnet_50_imagenet", "resnet51", "applications:ResNet50V2"])
def test_the_command_answers_within_5_seconds_with_exit_code_2(name, png_folder):
    command = [sys.executable, "-m", "pipelines.image", "--data", str(png_folder), "--backbone", name]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 5 s on an idle machine: of its own it works less than that, and does not wait for retries of a hub (24 s).
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert time.monotonic() - start < 20
    assert done.returncode == 2, done.stderr
    assert f"Backbone '{name}'" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_every_suggestion_is_a_name_that_is_accepted_or_fetched():
    text = str(names.unknown("vgg_16_imagnet"))
    assert "vgg_16_imagenet" in text
    with pytest.raises(GraftError, match="api.kaggle.com could not be reached"):
        check_backbone_name("vgg_16_imagenet")
