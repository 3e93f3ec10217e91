"""Batch jobs: shards, dead letters and restarts, over every kind of input; Beam's part is in tests/test_beam.py."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.__main__ import main
from pipelines.tfrecords import example_of, features_of, index_records, masked_checksum, read_record, write_records
from tests.stub_servers import png, tiny_version

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert message.startswith("graft: ") and "Traceback" not in message
    return message


def answers_of(output) -> dict[str, dict]:
    """Rows of all shards by id; an id twice is an error."""
    rows = parquet.read_table(pathlib.Path(output) / "answers").to_pylist()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def failed_of(output) -> dict[str, str]:
    found = {}
    for path in sorted((pathlib.Path(output) / "failed").iterdir()):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                assert row["id"] not in found
                found[row["id"]] = row["reason"]
    return found


def predictions_of(version, inputs, out) -> dict[str, dict]:
    """What `graft predict --out` says, by path."""
    assert run("predict", version, *inputs, "--out", out, "--probabilities") == 0
    with open(out, newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def check_equal(answers: dict, failed: dict, predictions: dict) -> None:
    """Everything that `graft predict` answers is answered, and so; everything else is in the dead letter, and why."""
    assert failed == {name: row["error"] for name, row in predictions.items() if row["error"]}
    good = {name: row for name, row in predictions.items() if not row["error"]}
    assert set(answers) == set(good)
    for name, row in good.items():
        assert answers[name]["label"] == row["label"] == answers[name]["labels"][0]
        wanted = [float(value) for key, value in row.items() if key.startswith("p(")]
        np.testing.assert_allclose(answers[name]["probabilities"], wanted, atol=2e-6)


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return tiny_version(tmp_path_factory.mktemp("model") / "photos" / "1", seed=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """37 files in two folders, four of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(33):
        path = folder / f"folder{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(number))
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("no image")
    (folder / "half.png").write_bytes(png(1)[:200])
    (folder / "sound.gif").write_bytes(b"RIFF....WAVE")
    return folder


# ---- TFRecords


def test_records_are_those_of_tensorflow(tmp_path):
    import tensorflow as tf

    records = [b"", b"x", os.urandom(100_000)]
    with open(tmp_path / "ours.tfrecord", "wb") as file:
        write_records(file, records)
    assert [r.numpy() for r in tf.data.TFRecordDataset(str(tmp_path / "ours.tfrecord"))] == records
    with tf.io.TFRecordWriter(str(tmp_path / "theirs.tfrecord")) as writer:
        for record in records:
            writer.write(record)
    assert (tmp_path / "ours.tfrecord").read_bytes() == (tmp_path / "theirs.tfrecord").read_bytes()
    places = list(index_records(tmp_path / "theirs.tfrecord"))
    with open(tmp_path / "theirs.tfrecord", "rb") as file:
        assert [read_record(file, place, length) for place, length, error in places] == records
    assert masked_checksum(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_examples_are_those_of_tensorflow():
    import tensorflow as tf

    content = {"id": "ä", "scores": np.array([0.5, 0.25], np.float32), "labels": ["a", "b"], "unsure": True, "n": 3}
    example = tf.train.Example.FromString(example_of(content))
    assert example.features.feature["id"].bytes_list.value == ["ä".encode()]
    assert example.features.feature["scores"].float_list.value == [0.5, 0.25]
    assert example.features.feature["unsure"].int64_list.value == [1]
    assert features_of(example.SerializeToString())["labels"] == [b"a", b"b"]
    assert features_of(b"\xff\xff") is None and features_of(png(0)) is None


def record_file(path: pathlib.Path, count: int, feature: str = "image/encoded") -> pathlib.Path:
    with open(path, "wb") as file:
        write_records(file, (example_of({feature: png(number), "label": number}) for number in range(count)))
    return path


# ---- jobs


@pytest.mark.parametrize("form", ["folder", "manifest"])
def test_a_job_gives_what_predict_gives(version, pictures, tmp_path, form):
    asked, column, broken = pictures, "path", 4
    if form == "manifest":
        files = sorted(path for path in pictures.rglob("*.*"))
        column, broken = "picture", 5
        for name, title in (("job.csv", column), ("plain.csv", "path")):
            with open(tmp_path / name, "w", newline="") as file:
                csv.writer(file).writerows([(title,), *((path,) for path in files), ("nowhere.png",)])
        asked = tmp_path / "job.csv"
    words = ("predict", version, "--input", asked, "--output", tmp_path / "job", "--path-column", column)
    assert run(*words, "--shard-size", 16) == 0
    plain = tmp_path / "plain.csv" if form == "manifest" else pictures
    predictions = predictions_of(version, [plain], tmp_path / "predictions.csv")
    check_equal(answers_of(tmp_path / "job"), failed_of(tmp_path / "job"), predictions)
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary == {"answered": 33, "failed": broken, "shards": 3}
    assert not (tmp_path / "job" / "inputs").exists() and not list((tmp_path / "job").rglob(".tmp-*"))


@pytest.mark.slow
def test_records_and_tfds_sets(version, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "records"
    folder.mkdir()
    record_file(folder / "a.tfrecord-00000-of-00002", 5)
    damaged = bytearray(record_file(folder / "a.tfrecord-00001-of-00002", 5).read_bytes())
    place, length, _ = list(index_records(folder / "a.tfrecord-00001-of-00002"))[2]
    damaged[place + length // 2] ^= 1
    (folder / "a.tfrecord-00001-of-00002").write_bytes(damaged[:-10])
    (tmp_path / "files").mkdir()
    for number in range(5):
        (tmp_path / "files" / f"{number + 1}.png").write_bytes(png(number))
    assert run("predict", version, "--input", folder, "--output", tmp_path / "job", "--format", "tfrecord") == 0
    predictions = predictions_of(version, [tmp_path / "files"], tmp_path / "plain.csv")
    answers = {}
    for path in (tmp_path / "job" / "answers").iterdir():
        with open(path, "rb") as file:
            for place, length, _ in index_records(path):
                row = features_of(read_record(file, place, length))
                answers[row["id"][0].decode()] = row
    assert sorted(answers) == [
        f"a.tfrecord-0000{f}-of-00002#{n}" for f, n in [(0, n) for n in range(1, 6)] + [(1, 1), (1, 2), (1, 4)]
    ]
    for name, row in answers.items():
        same = predictions[str(tmp_path / "files" / f"{name.rpartition('#')[2]}.png")]
        assert row["label"] == [same["label"].encode()]
        assert row["score"][0] == pytest.approx(float(same["score"]), abs=2e-6)
    assert failed_of(tmp_path / "job") == {
        "a.tfrecord-00001-of-00002#3": "is damaged: its checksum is wrong",
        "a.tfrecord-00001-of-00002#5": f"the file ends within this record, at byte {len(damaged) - 10:,}",
    }

    # A set that TFDS prepared is a folder of such files.
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiles",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(20, 20, 3), encoding_format="png")}),
        split_datasets={"train": [(n, {"image": np.full((20, 20, 3), 40 * n, np.uint8)}) for n in range(6)]},
        data_dir=tmp_path / "tfds",
    )
    words = ("predict", version, "--input", "tfds:tiles", "--data-dir", tmp_path / "tfds")
    assert run(*words, "--output", tmp_path / "set") == 0
    assert len(answers_of(tmp_path / "set")) == 6
    assert "holds no such prepared set" in refused(capsys, *words[:3], "tfds:beans", *words[4:], "--output", "x")


def test_embed_alone_and_as_a_job(version, pictures, tmp_path, capsys):
    assert run("embed", version, pictures, "--out", tmp_path / "features.parquet") == 0
    assert "4 of 37 files have no answer" in capsys.readouterr().out
    rows = {row["path"]: row for row in parquet.read_table(tmp_path / "features.parquet").to_pylist()}
    assert run("embed", version, "--input", pictures, "--output", tmp_path / "job") == 0
    answers = answers_of(tmp_path / "job")
    assert len(answers) == 33 and failed_of(tmp_path / "job") == {n: r["error"] for n, r in rows.items() if r["error"]}
    for name, row in answers.items():
        assert len(row["features"]) == 8 and row["features"] == rows[name]["features"]
    assert "expected the name of a file such as features.parquet" in refused(capsys, "embed", version, pictures)


@pytest.mark.slow
def test_texts(tmp_path, tmp_path_factory):
    from serving.export_text import export_text_classifier
    from tests.test_export_text import CLASSES, FIXTURES, tiny_classifier

    model, preprocess = tiny_classifier(FIXTURES / "text" / "bert")
    folder = tmp_path / "reviews" / "1"
    export_text_classifier(model, preprocess, CLASSES, folder)
    texts = [f"word {n} and more of it" * (1 + n % 3) for n in range(40)]
    texts[7], texts[9] = "", None
    with open(tmp_path / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    words = ("predict", folder, "--input", tmp_path / "texts.jsonl", "--text-column", "body")
    assert run(*words, "--output", tmp_path / "job", "--shard-size", 32) == 0
    reasons = {f"texts.jsonl#{row}": "the text is empty" for row in (8, 10)}
    assert failed_of(tmp_path / "job") == reasons
    answers = answers_of(tmp_path / "job")
    good = [text for text in texts if text]
    assert run("predict", folder, "--text", *good, "--out", tmp_path / "plain.csv") == 0
    with open(tmp_path / "plain.csv", newline="") as file:
        plain = {row["text"]: row for row in csv.DictReader(file)}
    for number, text in enumerate(texts, 1):
        if text:
            answer = answers[f"texts.jsonl#{number}"]
            assert answer["label"] == plain[text]["label"]
            assert answer["score"] == pytest.approx(float(plain[text]["score"]), abs=2e-6)

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_bytes(b"\xef\xbb\xbf" + good[0].encode() + b"\n")
    (tmp_path / "notes" / "b.txt").write_bytes(b"gr\xfcn")
    assert run("predict", folder, "--input", tmp_path / "notes", "--output", tmp_path / "files") == 0
    (answer,) = answers_of(tmp_path / "files").values()
    assert answer["probabilities"] == pytest.approx(answers["texts.jsonl#1"]["probabilities"], abs=2e-6)
    assert failed_of(tmp_path / "files") == {str(tmp_path / "notes" / "b.txt"): "not UTF-8: byte 0xfc at place 3"}

    records = tmp_path / "texts.tfrecord"
    with open(records, "wb") as file:
        write_records(file, (example_of({"text": text or ""}) for text in texts))
    assert run("embed", folder, "--input", records, "--output", tmp_path / "vectors") == 0
    assert len(answers_of(tmp_path / "vectors")) == 38 and len(failed_of(tmp_path / "vectors")) == 2


# ---- restarts


def test_only_what_is_not_done_is_done_again(version, pictures, tmp_path, capsys):
    words = ("predict", version, "--input", pictures, "--output", tmp_path / "job", "--shard-size", 10)
    assert run(*words) == 0
    before = answers_of(tmp_path / "job"), failed_of(tmp_path / "job")
    parts = sorted((tmp_path / "job" / "answers").iterdir())
    stamps = [part.stat().st_mtime_ns for part in parts]
    capsys.readouterr()
    assert run(*words) == 0
    assert "4 of 4 shards are done already" in capsys.readouterr().out
    # Killed after the answers of shard 2 were there, and before its mark; shard 3 is half written.
    (tmp_path / "job" / "done" / "part-00002.json").unlink()
    (tmp_path / "job" / "done" / "part-00003.json").unlink()
    parts[3].rename(parts[3].with_name(".tmp-1-part-00003.parquet"))
    (tmp_path / "job" / "summary.json").unlink()
    assert run(*words) == 0
    assert "2 of 4 shards are done already" in capsys.readouterr().out
    assert (answers_of(tmp_path / "job"), failed_of(tmp_path / "job")) == before
    again = [part.stat().st_mtime_ns for part in sorted((tmp_path / "job" / "answers").iterdir())]
    assert again[:2] == stamps[:2] and again[2] > stamps[2] and len(again) == 4


@pytest.mark.slow
def test_killed_and_run_again(version, pictures, tmp_path):
    many = tmp_path / "many.csv"
    files = sorted(path for path in pictures.rglob("*.*"))
    with open(many, "w", newline="") as file:
        csv.writer(file).writerows([("path",), *((str(files[n % len(files)]),) for n in range(1500))])
    words = [sys.executable, "-m", "pipelines", "predict", version, "--input", many, "--output", tmp_path / "job"]
    words += ["--shard-size", "50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    done = tmp_path / "job" / "done"
    deadline = time.monotonic() + 60
    while not (done.is_dir() and len(list(done.glob("part-*"))) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    marks = len(list(done.glob("part-*")))
    assert marks < 30
    assert subprocess.run(words, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    rows = parquet.read_table(tmp_path / "job" / "answers").num_rows
    with_reason = sum(path.read_text().count("\n") - 1 for path in (tmp_path / "job" / "failed").iterdir())
    assert rows + with_reason == 1500
    assert rows == sum(1 for n in range(1500) if "folder" in files[n % len(files)].parent.name)


def test_another_job_is_not_continued(version, pictures, tmp_path, capsys):
    words = ("predict", version, "--input", pictures, "--output", tmp_path / "job")
    assert run(*words) == 0
    assert "shard_size was 1024, is 7" in refused(capsys, *words, "--shard-size", 7)
    assert "signature was serving_default, is features" in refused(capsys, "embed", *words[1:])
    other = pathlib.Path(shutil.copytree(version, tmp_path / "other" / "1"))
    with open(other / "saved_model.pb", "ab") as file:
        file.write(b"\0")
    assert "model_digest was" in refused(capsys, "predict", other, *words[2:])
    extra = pictures / "zz.png"
    extra.write_bytes(png(5))
    try:
        assert "inputs was 37, is 38" in refused(capsys, *words)
    finally:
        extra.unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    assert "holds other files (letter.txt)" in refused(capsys, *words[:4], "--output", tmp_path / "mine")


def test_mistakes(version, pictures, tmp_path, capsys):
    (tmp_path / "no-images").mkdir()
    (tmp_path / "table.csv").write_text("file\na.png\n")
    (tmp_path / "notes.md").write_text("x")
    record_file(tmp_path / "other.tfrecord", 1, feature="jpeg")
    buffer = io.BytesIO()
    write_records(buffer, [b"x"])
    (tmp_path / "packed.tfrecord").write_bytes(gzip.compress(buffer.getvalue()))
    out = ("--output", tmp_path / "job")
    for words, message in {
        ("--input", pictures): "--input needs --output too",
        out: "--output needs --input too",
        ("--input", pictures, *out, "--shard-size", 0): "--shard-size is 0",
        ("--input", pictures, *out, "--out", "a.csv"): "--input goes without files",
        ("--runner", "FnApiRunner"): "--runner FnApiRunner needs --input and --output",
        ("--input", tmp_path / "nowhere", *out): "there is no such file or folder",
        ("--input", "gs://bucket/x", *out): "only paths are read",
        ("--input", tmp_path / "no-images", *out): "no .avif, .bmp",
        (
            "--input",
            tmp_path / "table.csv",
            *out,
        ): "has no column 'path'; it has: file. Name the right one: --path-column",
        ("--input", tmp_path / "notes.md", *out): "the kind of this file is not known",
        (
            "--input",
            tmp_path / "other.tfrecord",
            *out,
        ): "has no feature image_bytes or image/encoded or image; it has jpeg, label",
        ("--input", tmp_path / "packed.tfrecord", *out): "is no TFRecord file",
        ("--input", pictures, "--output", tmp_path / "notes.md"): "is a file",
    }.items():
        assert message in refused(capsys, "predict", version, *words), words
    assert not (tmp_path / "job").exists()


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed")
def test_without_beam_its_flags_say_what_to_install(version, pictures, tmp_path, capsys):
    words = ("predict", version, "--input", pictures, "--output", tmp_path / "job", "--runner", "FnApiRunner")
    message = refused(capsys, *words, "--direct_num_workers", "2")
    assert "needs Apache Beam, which is not installed" in message
    assert "pip install -e '.[beam]' -c constraints-beam.txt" in message
    assert not (tmp_path / "job").exists()
    with pytest.raises(SystemExit) as ended:  # a mistyped flag of ours stays a mistake
        run(*words[:-2], "--direct_num_workers", "2")
    assert ended.value.code == 2


def test_an_input_that_stops_the_whole_call_is_found(tmp_path):
    """The runtime refuses a batch with one input that it cannot compute: that one is the dead letter."""
    import tensorflow as tf

    from pipelines.batch_job import Job, answers_of_batch
    from serving.session import Session

    class Strict(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def features(self, text):
            numbers = tf.strings.to_number(text)[:, None]
            return {"features": numbers, "error": tf.fill(tf.shape(text), "")}

    module = Strict()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"features": module.features})
    job = Job(str(tmp_path / "1"), str(tmp_path), "features", "parquet", ("text",), (("text",),), ())
    with Session(tmp_path / "1") as session:
        answers = answers_of_batch(session, job, {"text": [b"1", b"two", b"3"]}, ["", "", ""])
    assert [list(answer.get("features", ())) for answer in answers] == [[1.0], [], [3.0]]
    assert "could not be converted to number" in answers[1]["error"] or "StringToNumberOp" in answers[1]["error"]


def test_a_shard_without_answers_has_the_columns_all_the_same(version, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    assert run("predict", version, "--input", tmp_path / "bad", "--output", tmp_path / "job") == 0
    table = parquet.read_table(tmp_path / "job" / "answers")
    assert table.num_rows == 0 and table.schema.field("probabilities").type == pa.list_(pa.float32())
