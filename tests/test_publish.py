"""serving/publish.py and serving/warmup.py, and the commands: what a server's folder holds, whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from pipelines.publish import about_version, print_versions, publish_run, rollback_version
from serving.config import find_model, labels_of, message, read_config, read_models, set_labels, write_config
from serving.export import export_image_classifier
from serving.publish import list_versions, publish, read_about, rollback
from serving.repository import delete_older, remove_leftovers
from serving.session import Session
from serving.static_checks import CheckFailed
from serving.verify import VerificationError
from serving.warmup import WARMUP_FILE, read_requests, replay_warmup, write_requests, write_warmup
from tests.test_export import CLASSES, encoded_image, tiny_classifier

pytestmark = pytest.mark.slow  # servers and exports of their own: minutes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A version folder with two classes' worth of a tiny model; read only."""
    model = tiny_classifier(len(CLASSES))
    folder = tmp_path_factory.mktemp("exported") / "1"
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder)
    return folder


def write_run(folder: Path, exported: Path, accuracy: float, test_ids="abc") -> Path:
    """A run folder as training leaves it: the parts that publishing reads."""
    shutil.copytree(exported, folder / "serving" / "photos" / "1")
    headline = {"metric": "accuracy", "value": accuracy, "half_width": 0.02, "interval": [0, 1]}
    metrics = {"created": "2026-01-02T03:04:05+00:00", "backbone": {"name": "tiny"}}
    metrics["test"] = {"examples": len(test_ids), "headline": headline}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [f"test,cat,0,,{name},{name}.png\n" for name in test_ids] + ["train,dog,1,,z,z.png\n"]
    (folder / "splits.csv").write_text("split,class,label,group,id,path\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def two_versions(exported, tmp_path_factory):
    """A repository with two versions of `photos`, published by the command; read only."""
    folder = tmp_path_factory.mktemp("two")
    for accuracy in (0.8, 0.9):
        run = write_run(folder / f"run{accuracy}", exported, accuracy)
        assert publish_run([str(run), "--to", str(folder / "repository")]) == 0
    return folder / "repository"


@pytest.fixture
def repository(two_versions, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(two_versions, tmp_path / "repository"))


def visible(name_folder: Path) -> list[str]:
    """What a server sees: it takes every name that is a number."""
    return sorted((path.name for path in name_folder.glob("*") if path.name.isdecimal()), key=int)


# Publishing.


def test_a_published_version_is_complete(two_versions, exported):
    version = two_versions / "photos" / "2"
    assert visible(two_versions / "photos") == ["1", "2"] and len(list((two_versions / "photos").iterdir())) == 2
    for file in exported.rglob("*"):
        if file.is_file():
            assert (version / file.relative_to(exported)).read_bytes() == file.read_bytes()
    parameters = read_config(version / "batching_params.pbtxt", "BatchingParameters")
    assert parameters.max_batch_size.value == 32 and not parameters.allowed_batch_sizes
    assert replay_warmup(version) == 6 + 2  # 1, 2, 4 ... 32 rows of serving_default, and features and pixels once
    about = read_about(version)
    assert (about["run"], about["backbone"]) == ("run0.9", "tiny") and about["test"]["headline"]["value"] == 0.9
    assert str(two_versions.parent) not in (version / "assets.extra" / "run.json").read_text()


def test_versions_are_listed(two_versions, capsys):
    assert print_versions([str(two_versions), "photos"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["number", "published", "(UTC)", "accuracy", "backbone", "labels", "size"]
    assert [line[0] for line in lines[1:]] == ["1", "2"]
    assert "0.900" in lines[2] and "tiny" in lines[2] and "served" in lines[2] and "served" not in lines[1]
    assert list_versions(two_versions, "photos")[0]["bytes"] > 100_000


def test_the_commands_of_a_shell_import_no_tensorflow(repository):
    """Publishing what is published elsewhere, going back, listing and a mistake: as `graft` runs them."""
    code = "import sys; from pipelines.__main__ import main; print([main(line.split()) for line in sys.argv[1:]]); "
    code += "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    lines = [f"publish {repository}/photos/1 --to {repository} --name other --batch-sizes 1"]
    lines += [f"rollback {repository} photos", f"versions {repository} other", f"versions {repository} nothing"]
    done = subprocess.run([sys.executable, "-c", code, *lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"3 warm-up requests   {repository}/other/1" in done.stdout and "served again" in done.stdout
    assert "[0, 0, 0, 2]" in done.stdout and "nothing: no version is published there" in done.stderr


def test_what_is_worse_on_the_same_test_set_is_refused(repository, exported, tmp_path, capsys):
    worse = write_run(tmp_path / "worse", exported, 0.85, test_ids="cab")  # the same examples in another order
    message = r"photos: the new version is worse than version 2, which is served: accuracy 0\.850 ± 0\.020 instead of "
    with pytest.raises(GraftError, match=message + r"0\.900 ± 0\.020 on the same 3 test examples\. .*--accept-worse"):
        publish_run([str(worse), "--to", str(repository)])
    assert visible(repository / "photos") == ["1", "2"]
    assert publish_run([str(worse), "--to", str(repository), "--accept-worse", "--keep", "2"]) == 0
    said = capsys.readouterr().out
    assert "Note" not in said and "Deleted version 1." in said
    assert visible(repository / "photos") == ["2", "3"]


def test_a_published_version_can_be_published_elsewhere(two_versions, tmp_path):
    about = about_version(two_versions / "photos" / "2", {})
    assert about["run"] == "run0.9" and about["test"]["examples"] == 3 and "published" not in about
    assert about == {key: value for key, value in read_about(two_versions / "photos" / "2").items() if key in about}


def broken(exported, tmp_path, damage):
    folder = Path(shutil.copytree(exported, tmp_path / "run" / "serving" / "photos" / "1"))
    damage(folder)
    return folder


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "saved_model.pb").unlink(), "layout: .*saved_model.pb: missing"),
        (lambda folder: (folder / "assets.extra" / "labels.txt").write_text("cat\n"), "answers|rows"),
    ],
)
def test_what_fails_verification_is_not_published(exported, tmp_path, damage, message):
    source = broken(exported, tmp_path, damage)
    with pytest.raises(VerificationError, match=f"verification failed at step . of .*{message}") as caught:
        publish(source, tmp_path / "repository", "photos", {}, {})
    assert caught.value.exit_code == 4 and not (tmp_path / "repository").exists()


def test_mistakes_answer_at_once(two_versions, exported, tmp_path):
    with pytest.raises(GraftError, match=r"model name '\.\./x': it is part of a URL"):
        publish(exported, tmp_path, "../x", {}, {})
    with pytest.raises(GraftError, match=r"keep 1: a server answers with the version before until .* Keep 2 or more"):
        publish(exported, tmp_path, "photos", {}, {}, keep=1)
    with pytest.raises(GraftError, match="nowhere: there is no such run folder"):
        publish_run([str(tmp_path / "nowhere"), "--to", str(tmp_path)])
    with pytest.raises(GraftError, match="nothing: no version is published there"):
        list_versions(two_versions, "nothing")
    with pytest.raises(GraftError, match="nothing: nothing is published there"):
        rollback(two_versions, "nothing")
    assert list(tmp_path.iterdir()) == []


def test_publishers_at_once(exported, tmp_path):
    def publish_one(run):
        return publish(exported, tmp_path, "photos", {"run": run}, {}, batch_sizes=[1])

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(publish_one, ["a", "b"]))
    assert sorted(version.name for version, _ in done) == ["1", "2"]
    assert [read_about(version)["run"] for version, _ in done] == ["a", "b"]
    assert len(list((tmp_path / "photos").iterdir())) == 2


def test_full_disk(exported, small_disk):
    big = Path(shutil.copytree(exported, small_disk.parent / "big"))
    (big / "assets.extra" / "big").write_bytes(bytes(2_000_000))
    for source in (exported, big):  # the one leaves no room for warm-up requests, the other none for itself
        with pytest.raises(GraftError, match=r"photos: the disk is full: a version needs more than the [\d.]+ MB"):
            publish(source, small_disk / "repository", "photos", {}, {}, batch_sizes=[1, 64])
        assert list(small_disk.iterdir()) == []


# Keeping the latest.


def numbers(repository: Path, count: int) -> Path:
    for number in range(1, count + 1):
        (repository / "photos" / str(number) / "variables").mkdir(parents=True)
    return repository


def test_only_the_latest_are_kept_and_what_has_a_label(tmp_path):
    numbers(tmp_path, 6)
    models = message("ModelServerConfig")
    set_labels(models, "photos", "/models/photos", {"stable": 2})
    write_config(tmp_path / "models.config", models)
    assert delete_older(tmp_path, "photos", 2) == [1, 3, 4]
    assert visible(tmp_path / "photos") == ["2", "5", "6"] and len(list((tmp_path / "photos").iterdir())) == 3


def test_what_the_servers_policy_names_is_kept(tmp_path):
    numbers(tmp_path, 6)
    models = message("ModelServerConfig")
    model = models.model_config_list.config.add(name="photos", base_path="/models/photos")
    model.model_version_policy.specific.versions.extend([1, 3])
    write_config(tmp_path / "models.config", models)
    assert delete_older(tmp_path, "photos", 2) == [2, 4]
    model.model_version_policy.latest.num_versions = 3
    write_config(tmp_path / "models.config", models)
    assert delete_older(tmp_path, "photos", 2) == [1]
    assert visible(tmp_path / "photos") == ["3", "5", "6"]


def test_leftovers_of_killed_publishers_go(exported, tmp_path):
    """By their age since they were made: a copy looks as old as what it was copied from."""
    shutil.copytree(exported, tmp_path / ".tmp-1-copy")
    os.utime(tmp_path / ".tmp-1-copy", (0, 0))
    (tmp_path / "1").mkdir()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    time.sleep(0.1)
    remove_leftovers(tmp_path, age_seconds=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Going back.


def test_rollback_publishes_the_old_version_again(repository, capsys):
    before = {file: file.read_bytes() for file in (repository / "photos").rglob("*") if file.is_file()}
    assert rollback_version([str(repository), "photos"]) == 0
    assert "Version 1 is served again, as the newest version" in capsys.readouterr().out
    old, new = repository / "photos" / "1", repository / "photos" / "3"
    assert (new / "saved_model.pb").samefile(old / "saved_model.pb")  # no space is needed
    assert read_about(new)["copy_of"] == 1 and read_about(new)["test"] == read_about(old)["test"]
    assert all(file.read_bytes() == content for file, content in before.items())  # versions are never rewritten
    assert [row["served"] for row in list_versions(repository, "photos")] == [False, False, True]
    with pytest.raises(GraftError, match=r"photos: there is no version before 1\. There are 1, 2, 3") as caught:
        rollback(repository, "photos")
    assert caught.value.exit_code == 2
    assert rollback(repository, "photos", to=2) == (repository / "photos" / "4", 2)
    assert read_about(repository / "photos" / "4")["copy_of"] == 2


def test_a_version_that_broke_is_not_gone_back_to(repository):
    (repository / "photos" / "1" / "saved_model.pb").unlink()
    with pytest.raises(VerificationError, match=r"saved_model\.pb: missing"):
        rollback(repository, "photos")
    assert visible(repository / "photos") == ["1", "2"]


def test_labels_and_a_version_that_cannot_be_compared(repository, exported, tmp_path, capsys):
    other = write_run(tmp_path / "other", exported, 0.1, test_ids="abd")
    words = [str(other), "--to", str(repository), "--label", "canary"]
    words += ["--server-folder", "/srv/", "--batch-sizes", "1", "4"]
    assert publish_run(words) == 0
    said = capsys.readouterr().out
    assert "models.config keeps another version as the one that answers" in said
    assert "this or version 2, is not known: they were not measured on the same test set" in said
    parameters = read_config(repository / "photos" / "3" / "batching_params.pbtxt", "BatchingParameters")
    assert list(parameters.allowed_batch_sizes) == [1, 4] and replay_warmup(repository / "photos" / "3") == 2 + 2
    model = find_model(read_models(repository), "photos")
    assert labels_of(model) == {"stable": 2, "canary": 3} and model.base_path == "/srv/photos"
    assert read_config(repository / "monitoring.config", "MonitoringConfig").prometheus_config.enable
    assert print_versions([str(repository), "photos"]) == 0
    assert ["stable," in line for line in capsys.readouterr().out.splitlines()] == [False, False, True, False]
    assert rollback(repository, "photos", to=3) == (repository / "photos" / "3", 3)
    assert labels_of(find_model(read_models(repository), "photos")) == {"stable": 3, "canary": 3}
    assert rollback_version([str(repository), "photos"]) == 0
    assert "stable is version 2 now" in capsys.readouterr().out
    assert labels_of(find_model(read_models(repository), "photos")) == {"stable": 2, "canary": 3}
    assert visible(repository / "photos") == ["1", "2", "3"]


def test_a_policy_that_names_versions_is_not_overridden(repository, exported):
    models = message("ModelServerConfig")
    model = models.model_config_list.config.add(name="photos", base_path="/models/photos")
    model.model_version_policy.specific.versions.extend([1])
    write_config(repository / "models.config", models)
    said = (
        r"but of the versions of photos it has the server load 1 and no others\. Make that line: model_version_policy"
    )
    with pytest.raises(GraftError, match=rf"models\.config: another is to be served, {said}"):
        rollback(repository, "photos", to=2)
    with pytest.raises(GraftError, match=f"stable is to be version 2, {said}"):
        publish(exported, repository, "photos", {}, {}, label="canary")
    assert visible(repository / "photos") == ["1", "2"]


def test_a_label_needs_a_version_that_the_server_loads(repository):
    models = message("ModelServerConfig")
    set_labels(models, "photos", "/models/photos", {"stable": 2})
    find_model(models, "photos").model_version_policy.latest.num_versions = 1
    write_config(repository / "models.config", models)
    with pytest.raises(GraftError, match="stable is to be version 1, but of the versions of photos it .* load 2 and"):
        rollback(repository, "photos", to=1)
    assert read_models(repository) == models


# Warm-up.


def test_warmup_is_what_tensorflow_reads(two_versions):
    """TensorFlow's own reader, which checks the checksums, and its own decoder of tensors and of JPEG."""
    from tensorflow_serving.apis import prediction_log_pb2

    records = tf.data.TFRecordDataset(str(two_versions / "photos" / "1" / WARMUP_FILE)).as_numpy_iterator()
    requests = [prediction_log_pb2.PredictionLog.FromString(record).predict_log.request for record in records]
    shapes = {}
    for request in requests:
        (tensor,) = request.inputs.values()
        value = tf.make_ndarray(tensor)
        shapes.setdefault(request.model_spec.signature_name, []).append(value.shape)
        if value.dtype == object:
            assert tf.io.decode_jpeg(value[0]).shape == (375, 500, 3)
    assert shapes["serving_default"] == [(1,), (2,), (4,), (8,), (16,), (32,)]
    assert shapes["features"] == [(1,)] and shapes["pixels"] == [(1, 16, 16, 3)]


def test_real_warmup_inputs(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "1")
    samples = [encoded_image(seed) for seed in range(3)]
    assert write_warmup(folder, {}, samples, [1, 4]) == 4
    requests = dict(read_requests(folder / WARMUP_FILE))
    assert list(requests["serving_default"]["image_bytes"]) == [*samples, samples[0]]
    assert replay_warmup(folder) == 4


def test_warmup_of_pairs_of_texts(tmp_path):
    module = tf.Module()
    texts = [tf.TensorSpec([None], tf.string, name=name) for name in ("text_b", "text_a")]
    module.answer = tf.function(lambda b, a: {"error": tf.strings.substr(a, 0, 0)}, input_signature=texts)
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.answer})
    assert write_warmup(tmp_path / "1", {"preprocess": {"sequence_length": 24}}, (), [1, 3]) == 2
    requests = [inputs for _, inputs in read_requests(tmp_path / "1" / WARMUP_FILE)]
    assert [inputs["text_a"].shape for inputs in requests] == [(1,), (3,)]
    assert {len(text.split()) for text in requests[1]["text_a"]} == {6} and len(set(requests[1]["text_a"])) == 3
    assert replay_warmup(tmp_path / "1") == 2
    assert write_warmup(tmp_path / "1", {}, [(b"first", b"second")], [2]) == 1
    ((_, inputs),) = read_requests(tmp_path / "1" / WARMUP_FILE)
    assert list(inputs["text_a"]) == [b"first"] * 2 and list(inputs["text_b"]) == [b"second"] * 2


@pytest.mark.parametrize(
    "requests, said",
    [
        ([("other", {"image_bytes": [b""]})], "request 0 of 1: the model has no signature 'other'"),
        ([("serving_default", {"image_bytes": np.zeros(1, np.float32)})], "inputs {'image_bytes': 'float32'}, but"),
        ([("serving_default", {"images": [b""]})], "inputs {'images': 'string'}, but signature serving_default takes"),
        ([("serving_default", {"image_bytes": [b"no image"]})], "the model answers with the error: not an image"),
    ],
)
def test_wrong_warmup_requests(exported, tmp_path, requests, said):
    folder = Path(shutil.copytree(exported, tmp_path / "1"))
    requests = [
        (name, {key: np.array(value, object if isinstance(value, list) else None) for key, value in inputs.items()})
        for name, inputs in requests
    ]
    write_requests(folder / WARMUP_FILE, requests)
    with pytest.raises(CheckFailed, match=said):
        replay_warmup(folder)


def test_a_warmup_file_that_is_damaged(two_versions, tmp_path):
    content, file = (two_versions / "photos" / "1" / WARMUP_FILE).read_bytes(), tmp_path / "requests"
    with pytest.raises(CheckFailed, match="requests: record 0 cannot be read .*No such file"):
        read_requests(file)
    for damaged in (content[:-3], content[:5000] + b"x" + content[5001:], b"no records at all"):
        file.write_bytes(damaged)
        with pytest.raises(CheckFailed, match=r"requests: record \d+ cannot be read"):
            read_requests(file)


def test_warmup_records_that_make_no_sense(tmp_path):
    from tensorflow_serving.apis import prediction_log_pb2

    log, file = prediction_log_pb2.PredictionLog(), str(tmp_path / "requests")
    log.predict_log.request.inputs["x"].dtype = 14  # bfloat16
    other = prediction_log_pb2.PredictionLog()
    other.session_run_log.SetInParent()
    for record, said in (
        (log.SerializeToString(), "record 0: the tensor of the input x makes no sense"),
        (other.SerializeToString(), "record 0 is no predict request"),
        (b"no proto", "record 0 cannot be read"),
    ):
        with tf.io.TFRecordWriter(file) as writer:
            writer.write(record)
        with pytest.raises(CheckFailed, match=said):
            read_requests(file)


# What happens to a publisher.

PUBLISHER = """
import sys
from serving.publish import publish
while True:
    publish(sys.argv[1], sys.argv[2], "photos", {}, {}, keep=2)
"""


def kill_publishers(exported, repository, kills: int, seed: int) -> int:
    """Kill publishers at random moments while a reader checks what it sees; returns the versions it saw."""
    expected = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    expected |= {WARMUP_FILE, "batching_params.pbtxt", "assets.extra/run.json"}
    started = time.monotonic()
    publish(exported, repository, "photos", {}, {})
    one_takes = time.monotonic() - started
    partial, seen, ended = [], set(), threading.Event()

    def read():
        while not ended.is_set():
            for name in visible(repository / "photos"):
                folder = repository / "photos" / name
                walked = os.walk(folder)  # not rglob, which fails where a folder goes meanwhile
                found = {os.path.relpath(os.path.join(at, file), folder) for at, _, files in walked for file in files}
                if folder.is_dir() and found != expected:  # else deleted meanwhile, in one step
                    partial.append((name, expected - found))
                seen.add(name)

    reader, draw = threading.Thread(target=read), random.Random(seed)
    reader.start()
    try:
        for _ in range(kills):
            command = [sys.executable, "-c", PUBLISHER, str(exported), str(repository)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                known = set((repository / "photos").glob(".tmp-*"))
                while process.poll() is None and not set((repository / "photos").glob(".tmp-*")) - known:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 2 * one_takes))
            finally:
                process.send_signal(signal.SIGKILL)  # it would publish for ever
            assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
            process.stderr.close()
    finally:
        ended.set()
        reader.join()
    assert not partial
    return len(seen)


def check_next_publish(exported, repository):
    last = int(max(visible(repository / "photos"), key=int, default=0))
    version, _ = publish(exported, repository, "photos", {}, {})
    assert int(version.name) == last + 1
    with Session(version) as session:
        assert session.run("serving_default", {"image_bytes": [encoded_image(0)]})["error"][0] == b""


@pytest.mark.slow
def test_a_killed_publisher_leaves_nothing_partial(exported, tmp_path):
    kill_publishers(exported, tmp_path, kills=1, seed=0)
    check_next_publish(exported, tmp_path)
    assert all(name.name.isdecimal() or name.name.startswith(".tmp-") for name in (tmp_path / "photos").iterdir())


@pytest.mark.acceptance
def test_thirty_killed_publishers(exported, tmp_path):
    assert kill_publishers(exported, tmp_path, kills=30, seed=1) >= 5
    check_next_publish(exported, tmp_path)
