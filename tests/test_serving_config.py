"""serving/config.py: the server's own files, written and read by the server's own protos."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models import GraftError
from serving.client import MOST_ROWS
from serving.config import (
    BATCH_SIZES,
    batching_parameters,
    check_name,
    chosen_versions,
    find_model,
    labels_of,
    locked,
    message,
    monitoring_config,
    read_config,
    read_models,
    set_labels,
    write_config,
)

ROOT = Path(__file__).resolve().parents[1]


def test_batching_parameters(tmp_path):
    write_config(tmp_path / "batching_params.pbtxt", batching_parameters([1, 4, 16]))
    text = (tmp_path / "batching_params.pbtxt").read_text()
    assert "max_batch_size {\n  value: 16\n}" in text and "allowed_batch_sizes: 4\n" in text
    parameters = read_config(tmp_path / "batching_params.pbtxt", "BatchingParameters")
    assert list(parameters.allowed_batch_sizes) == [1, 4, 16]
    assert (parameters.max_batch_size.value, parameters.batch_timeout_micros.value) == (16, 0)
    assert parameters.max_enqueued_batches.value == 100 and not parameters.HasField("num_batch_threads")
    any_size = batching_parameters(threads=3)
    assert not any_size.allowed_batch_sizes and any_size.num_batch_threads.value == 3
    # Graft's client, the warm-up requests and the server agree on the largest.
    assert any_size.max_batch_size.value == MOST_ROWS == BATCH_SIZES[-1]


def test_the_contracts_own_batching_line_is_read(tmp_path):
    text = "max_batch_size { value: 32 } batch_timeout_micros { value: 1000 } num_batch_threads { value: 4 } "
    text += "max_enqueued_batches { value: 100 } allowed_batch_sizes: 1 pad_variable_length_inputs: true"
    (tmp_path / "batching.txt").write_text(text)
    parameters = read_config(tmp_path / "batching.txt", "BatchingParameters")
    assert parameters.num_batch_threads.value == 4 and parameters.pad_variable_length_inputs


@pytest.mark.parametrize("sizes", [[0, 1], [1, 4, 2], [1, 2, 2]])
def test_batch_sizes_that_the_server_would_refuse(sizes):
    with pytest.raises(GraftError, match=r"batch sizes \[.*\]: expected increasing numbers from 1 on"):
        batching_parameters(sizes)


def test_monitoring(tmp_path):
    write_config(tmp_path / "monitoring.config", monitoring_config())
    config = read_config(tmp_path / "monitoring.config", "MonitoringConfig").prometheus_config
    assert config.enable and config.path == "/monitoring/prometheus/metrics"


def test_labels_are_set_and_other_models_stay(tmp_path):
    (tmp_path / "models.config").write_text(
        'model_config_list { config { name: "other" base_path: "/models/other" model_platform: "tensorflow" '
        "model_version_policy { latest { num_versions: 2 } } } }"
    )
    models = read_models(tmp_path)
    set_labels(models, "photos", "/models/photos", {"stable": 3, "canary": 4})
    write_config(tmp_path / "models.config", models)
    models = read_models(tmp_path)
    photos, other = find_model(models, "photos"), find_model(models, "other")
    assert (photos.base_path, photos.model_platform) == ("/models/photos", "tensorflow")
    assert photos.model_version_policy.HasField("all")  # or the server would never accept a label that moves
    assert labels_of(photos) == {"stable": 3, "canary": 4} and labels_of(other) == labels_of(None) == {}
    assert chosen_versions(other, [1, 2, 3]) == {2, 3}
    assert find_model(models, "nothing") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.config"]


def test_labels_move_and_the_policy_stays():
    models = message("ModelServerConfig")
    model = models.model_config_list.config.add(name="photos", base_path="/elsewhere")
    model.model_version_policy.latest.num_versions = 3
    set_labels(models, "photos", "/models/photos", {"stable": 3})
    set_labels(models, "photos", "/models/photos", {"stable": 4, "canary": 5})
    assert labels_of(model) == {"stable": 4, "canary": 5} and model.base_path == "/elsewhere"
    assert model.model_version_policy.latest.num_versions == 3


def test_which_versions_a_policy_chooses():
    models = message("ModelServerConfig")
    model = models.model_config_list.config.add(name="m")
    assert chosen_versions(None, [1, 9, 3]) == chosen_versions(model, [1, 9, 3]) == {9}
    assert chosen_versions(None, []) == set()
    model.model_version_policy.specific.versions.extend([1, 7])
    assert chosen_versions(model, [1, 9, 3]) == {1}
    model.model_version_policy.all.SetInParent()
    assert chosen_versions(model, [1, 9, 3]) == {1, 3, 9}


def test_a_file_that_the_server_could_not_read(tmp_path):
    (tmp_path / "models.config").write_text("model_config_list { confg { } }")
    with pytest.raises(GraftError, match=r"models\.config: cannot be read as the server's ModelServerConfig \(.*confg"):
        read_models(tmp_path)
    assert not read_models(tmp_path / "empty").HasField("model_config_list")


def test_relative_base_path():
    with pytest.raises(GraftError, match=r"base path 'models/m' of model m: the server takes absolute paths only"):
        set_labels(message("ModelServerConfig"), "m", "models/m", {"stable": 1})


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a:predict", "ä", "a\n"])
def test_names_that_are_no_part_of_a_url(name):
    with pytest.raises(GraftError, match=r"model name '.*': it is part of a URL and names a folder"):
        check_name(name)


def test_names():
    assert [check_name(name) for name in ("photos", "v1.2_a-b", "7")] == ["photos", "v1.2_a-b", "7"]


def test_writers_take_turns(tmp_path):
    """Ten writers at once add a model each; none is lost."""

    def add(number):
        with locked(tmp_path):
            models = read_models(tmp_path)
            set_labels(models, f"m{number}", f"/models/m{number}", {"stable": 1})
            write_config(tmp_path / "models.config", models)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(add, range(10)))
    names = {model.name for model in read_models(tmp_path).model_config_list.config}
    assert names == {f"m{number}" for number in range(10)}


def test_no_tensorflow_is_imported():
    code = "import sys; from serving.config import message; message('ModelServerConfig'); message('MonitoringConfig'); "
    code += "assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
