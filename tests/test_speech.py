"""Speech recognition: transcripts, CTC, error rates, and a run from a manifest to a served model."""

import csv
import itertools
import json
import os
import signal

import numpy as np
import pytest
import tensorflow as tf
from pyarrow import parquet

from models import GraftError
from models.backbone import load_backbone
from models.offline_sounds import wav_bytes
from models.recogniser import CERTAIN, Recogniser, ctc_losses, frame_counts, greedy, transcripts
from pipelines import callbacks
from pipelines.__main__ import main
from pipelines.batch import read_details
from pipelines.config import parse_config
from pipelines.options import SpeechConfig
from pipelines.publish import about_version
from pipelines.speech_training import speech_objective, written
from pipelines.transcript_scores import align, distance, error_rates, worst_transcripts
from pipelines.transcripts import count_characters, find_transcripts, load_transcripts, normalised
from serving import verify
from serving.answer_checks import check_answers, check_contract, check_transcripts
from serving.batch_checks import made_wav
from serving.session import Session
from serving.static_checks import CheckFailed
from serving.steps import STEPS
from serving.warmup import noise_samples
from tests.embedded_server import running
from tests.test_page import answers as cards
from tests.test_page import browser, drop, opened  # noqa: F401 (a fixture)
from tests.test_recovery import without_seconds
from tests.tiny_speech import write_transcripts, write_wav2vec2


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# ---------------------------------------------------------------- transcripts


def test_normalised_transcripts():
    assert normalised("  It\u2019s 3 O'Clock,\n now! ", "letters") == "it's 3 o'clock now"
    assert normalised("Caf\u0065\u0301 \u0417\u0434\u0440\u0430!", "letters") == "caf\u00e9 \u0437\u0434\u0440\u0430"
    assert normalised("Yes,  No", "lower") == "yes, no"
    assert normalised("Yes,  No", "none") == "Yes, No"
    assert count_characters(["ab a", "b"]) == {" ": 1, "a": 2, "b": 2}


def test_transcripts_are_split_and_numbered(tmp_path):
    file = write_transcripts(tmp_path / "clips")
    splits, counts = load_transcripts(find_transcripts(str(file)), "letters", 30.0)
    assert list(counts) == [" ", "a", "b", "c"]
    assert sum(table.num_rows for table in splits) == 48 and all(table.num_rows for table in splits)
    for table in splits:
        for text, places in zip(table["text"].to_pylist(), table["characters"].to_pylist()):
            assert "".join(" abc"[place] for place in places if place >= 0) == text
    again, _ = load_transcripts(find_transcripts(str(file)), "letters", 0.5)
    assert "longer than --longest-seconds 0.5" in " ".join(again.warnings)
    with pytest.raises(GraftError, match="0 of 48 clips can be used"):
        load_transcripts(find_transcripts(str(file)), "letters", 0.1)
    with pytest.raises(GraftError, match="expected a manifest of transcripts"):
        find_transcripts("")
    with pytest.raises(GraftError, match="no column 'said'.*--text-column"):
        find_transcripts(str(file), text_column="said")


# ---------------------------------------------------------------- CTC and scores


def test_the_loss_is_that_of_all_alignments():
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 5, 3)).astype(np.float32)
    logits[1, 3:] = [CERTAIN, CERTAIN, 0]  # padding
    targets = np.float32([[0, 1, -1], [1, 1, -1]])
    assert frame_counts(logits).numpy().tolist() == [5, 3]

    def collapsed(path):
        return [place for place, _ in itertools.groupby(path) if place != 2]

    for row, (frames, said) in enumerate([(5, [0, 1]), (3, [1, 1])]):
        probabilities = np.exp(logits[row]) / np.exp(logits[row]).sum(-1, keepdims=True)
        paths = [path for path in itertools.product(range(3), repeat=frames) if collapsed(path) == said]
        total = sum(np.prod([probabilities[frame, place] for frame, place in enumerate(path)]) for path in paths)
        np.testing.assert_allclose(ctc_losses(targets, logits)[row], -np.log(total) / 2, rtol=1e-4)


def test_greedy_reading_and_confidence():
    def sure(*places):
        return 20.0 * np.eye(4, dtype=np.float32)[list(places)]

    logits = np.stack([sure(0, 0, 3, 0, 1, 1), sure(3, 3, 3, 3, 3, 3), np.full((6, 4), CERTAIN, np.float32)])
    logits[2, :, 3] = 0
    places, confidence = greedy(logits)
    assert places.to_list() == [[0, 0, 1], [], []]
    np.testing.assert_allclose(confidence, [1, 1, 0], atol=1e-4)
    texts, _ = transcripts(tf.constant(logits), "ab ")
    assert [text.decode() for text in texts.numpy()] == ["aab", "", ""]


def test_objective_counts_what_it_reads():
    objective = speech_objective(6)
    logits = 20.0 * np.eye(4, dtype=np.float32)[[[0, 3, 1, 2, 3, 3], [0, 3, 0, 3, 3, 3]]]
    targets = np.float32([[0, 1, 2], [0, 1, -1]])
    outputs = objective.outputs(targets, logits).numpy()
    assert outputs.shape == (2, 8)
    assert written(outputs, "abc")[0] == ["abc", "aa"]
    np.testing.assert_allclose(objective.right(targets, logits), [1.0, 0.5])
    np.testing.assert_allclose(objective.shares(targets, outputs), [1.0, 0.5])
    nothing = 20.0 * np.eye(4, dtype=np.float32)[[[3] * 6] * 2]
    np.testing.assert_allclose(objective.right(targets, nothing), [0.0, 0.0])
    assert written(objective.outputs(targets, nothing).numpy(), "abc")[0] == ["", ""]
    loss, share = objective.figures(targets, outputs)
    assert share == 0.75 and loss == pytest.approx(float(objective.losses(targets, logits, 0.0).numpy().mean()))


def test_error_rates_and_alignment():
    assert distance("kitten", "sitting") == 3 and distance([], "ab") == 2 and distance("ab", []) == 2
    words = align(["one", "two", "three"], ["one", "too", "three", "four"])
    assert words == [("one", "one"), ("two", "too"), ("three", "three"), (None, "four")]
    pairs = align(list("abc"), list("xac"))
    assert sum(a != b for a, b in pairs) == 2
    assert [a for a, _ in pairs if a] == list("abc") and [b for _, b in pairs if b] == list("xac")
    rates = error_rates(["one two", "three"], ["one too", "three"])
    assert rates["word_error_rate"] == pytest.approx(1 / 3)
    assert rates["character_error_rate"] == pytest.approx(1 / 12)
    assert rates["exact"] == 0.5 and rates["words"] == 3
    low, high = rates["word_interval"]
    assert low <= 1 / 3 <= high <= 0.5
    (worst,) = worst_transcripts(["one two", "three"], ["one too", "three"], [0.5, 0.9])
    assert worst["words"] == [("one", "one"), ("two", "too")] and worst["errors"] == 1


# ---------------------------------------------------------------- end to end


def test_padding_beside_a_longer_clip_changes_no_logit(tmp_path):
    backbone = load_backbone(str(write_wav2vec2(tmp_path / "tiny")), "frames")
    model = Recogniser(backbone, "abc")
    random = np.random.default_rng(0)
    waveform, mask = random.normal(size=(2, 6000)).astype(np.float32), np.ones((2, 6000), np.int32)
    mask[0, 4000:] = 0
    alone = np.asarray(model([waveform[:1, :4000], mask[:1, :4000]]))
    together = np.asarray(model([waveform, mask]))
    np.testing.assert_allclose(together[0, : alone.shape[1]], alone[0], atol=1e-4)
    assert (together[0, alone.shape[1] :, :-1] == CERTAIN).all()


def run(folder, out):
    """`graft speech` on few clips with a small encoder, long enough that it writes something; the exit code."""
    words = f"--data {folder}/clips/transcripts.csv --backbone {folder}/tiny --out {out} --batch-size 4 --wise-ft"
    words += " --head-epochs 2 --fine-tune-epochs 15 --fine-tune-learning-rate 0.02 --head-learning-rate 0.02"
    return main(["speech", *words.split(), "--depth", "auto", "--light-blocks", "1"])


def metrics_of(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_transcripts(folder / "clips")
    write_wav2vec2(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def run_dir(folder):
    assert run(folder, folder / "run") == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_from_manifest_to_served_transcripts(run_dir):
    metrics = metrics_of(run_dir)
    assert metrics["serving"]["files"] == metrics["examples"]["test"] == metrics["test"]["examples"]
    assert metrics["serving"]["input_contract"]["samples"] == 3_200
    head, light, full = metrics["phases"]
    trains = [[row["trainable_parameters"] > 0 for row in phase["blocks"]] for phase in (head, light, full)]
    assert trains == [[False] * 4 + [True], [False] * 3 + [True] * 2, [False] + [True] * 4]
    losses = {phase["name"]: phase["climb"]["val_loss"] for phase in (head, light, full)}
    assert min(losses, key=losses.get) == metrics["climb"]["best"] == "full"
    assert metrics["climb"]["sentence"] == metrics["verdicts"][0] and 0 <= full["wise_ft"]["share"] <= 1
    assert 0 < full["history"][0]["cka"] <= 1
    assert "Worst mistakes" in (run_dir / "report.html").read_text()
    version = run_dir / metrics["serving"]["folder"]
    details = json.loads((version / "assets.extra" / "graft.json").read_text())
    assert details["normalise"] == "letters" and details["characters"] == " abc"
    with Session(version) as session:
        long = wav_bytes(np.zeros(31 * 8_000, np.int16), 8_000)
        short = wav_bytes(np.ones(1, np.int16), 44_100)
        asked = [b"no sound", b"", long, wav_bytes(np.zeros(0, np.int16), 16_000), short]
        answer = session.run("serving_default", {"audio_bytes": asked})
        assert [bool(error) for error in answer["error"]] == [True] * 4 + [False]
        assert b"longer than 30 s" in answer["error"][2]
        assert np.isfinite(answer["confidence"]).all() and not answer["confidence"][:4].any()
        assert session.run("serving_default", {"audio_bytes": []})["transcript"].shape == (0,)


@pytest.mark.slow
def test_verification_of_a_recogniser(run_dir, capsys):
    version, files = run_dir / metrics_of(run_dir)["serving"]["folder"], [made_wav(row) for row in range(3)]
    assert verify.main([str(version)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(STEPS)
    found, expected = verify.made_samples(version)
    assert found == files and list(expected) == ["transcript", "confidence"]
    with Session(version) as session:
        assert check_answers(session, files, expected, 1e-5, []) == (pytest.approx(0, abs=1e-5), files)
        for wrong, message in (
            (expected | {"transcript": ["", "abc a", ""]}, "item [012] of 3: .* is '.*', expected '"),
            (expected | {"confidence": expected["confidence"] - 0.25}, "confidence is .*difference 0.25, allowed"),
            (np.zeros((3, 4)), r"outputs \['confidence', .*\], expected probabilities"),
        ):
            with pytest.raises(CheckFailed, match=message):
                check_answers(session, files, wrong, 1e-5, [])
    contract = metrics_of(run_dir)["serving"]["input_contract"]
    check_contract(version, contract)
    with pytest.raises(CheckFailed, match="samples of the probe, a fifth of a second: 1600 in training, 3200 when"):
        check_contract(version, {**contract, "samples": 1600})
    with pytest.raises(CheckFailed, match="row 1: transcript b'a', confidence 1.5 and error b'' do not fit"):
        check_transcripts("s", {"transcript": [b"", b"a"], "confidence": [0.0, 1.5], "error": [b"no sound", b""]})


@pytest.mark.slow
def test_commands_on_a_recogniser(folder, run_dir, tmp_path, capsys):
    """predict, evaluate, ask, export; and what cannot be done says so."""
    clips = folder / "clips"
    assert main(["predict", str(run_dir), str(clips / "000.wav"), str(clips / "transcripts.csv")]) == 0
    said = capsys.readouterr().out
    assert "confidence" in said and "not a WAV file" in said
    assert main(["predict", str(run_dir), str(clips), "--out", str(tmp_path / "out.csv")]) == 0
    assert main(["evaluate", str(run_dir), "--data", str(clips / "transcripts.csv"), "--out", str(tmp_path / "e")]) == 0
    answers, scored = (
        {row["path"]: row["transcript"] for row in csv.DictReader(path.open())}
        for path in (tmp_path / "out.csv", tmp_path / "e" / "predictions.csv")
    )
    assert answers == scored and len(answers) == 48
    rates = json.loads((tmp_path / "e" / "metrics.json").read_text())["test"]
    assert rates["examples"] == 48 and 0 < rates["character_error_rate"] < 0.7  # it has seen most of them
    assert "<audio" in (tmp_path / "e" / "report.html").read_text()
    shards = ["--input", str(clips / "transcripts.csv"), "--output", str(tmp_path / "shards")]
    assert main(["predict", str(run_dir), *shards]) == 0
    table = parquet.read_table(tmp_path / "shards" / "answers").to_pydict()
    assert table["transcript"] == [answers[path] for path in sorted(answers)] and len(table["confidence"]) == 48

    with running("--model_base_path", run_dir / "serving" / "run", "--model_name", "run", name="run") as (rest, *_):
        capsys.readouterr()
        clip = str(clips / "003.wav")
        assert main(["ask", f"http://127.0.0.1:{rest}/v1/models/run", clip, "--json"]) == 0
        (said,) = json.loads(capsys.readouterr().out)["answers"]
        assert said["transcript"] == answers[clip] and 0 <= said["confidence"] <= 1

    assert main(["export", str(run_dir)]) == 0
    version = run_dir / "serving" / "run" / "2"
    assert f"to {version}" in capsys.readouterr().out.replace("\n", "")
    figure = about_version(version, read_details(version))["test"]["headline"]  # by which `graft publish` compares
    assert figure["metric"] == "words_right" and figure["value"] == 1 - metrics_of(run_dir)["test"]["word_error_rate"]
    assert len(noise_samples(0, {"longest_seconds": 0.5})) == 8_000  # warm-up requests that the model does not refuse
    for words, message in (
        (["embed", run_dir, clips, "--out", tmp_path / "v.parquet"], "a recogniser has a vector for every few"),
        (["predict", run_dir, clips, "--probabilities"], "each with a confidence"),
        (["evaluate", run_dir, "--data", clips / "transcripts.csv", "--positive", "a"], "has no classes"),
        (["compare", run_dir, version, "--data", clips / "transcripts.csv"], "transcripts, which are not compared"),
    ):
        assert main(list(map(str, words))) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_page_shows_what_was_said(folder, run_dir, browser):  # noqa: F811
    clips = [path.read_bytes() for path in sorted((folder / "clips").glob("*.wav"))]
    with Session(run_dir / "serving" / "run" / "1") as session:
        heard = [text.decode() for text in session.run("serving_default", {"audio_bytes": clips})["transcript"]]
    # So small a network may hear nothing in a clip, and in which one differs between machines.
    place, said = next((place, text) for place, text in enumerate(heard) if text)
    words = ("--model_base_path", run_dir / "serving" / "run", "--model_name", "photos")
    with running(*words, name="photos") as (rest, *_), opened(browser, rest) as page:
        drop(page, "a.wav", clips[place])
        (card,) = cards(page)
        assert card.locator("blockquote").inner_text() == said
        assert "confidence" in card.inner_text() and "transcript" not in card.inner_text()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(folder, run_dir, tmp_path, monkeypatch, capsys):
    class Stopping(callbacks.ProgressPrinter):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            if (self.params["epochs"], self.epochs_done, batch) == (15, 1, 1):  # light, amid its second epoch
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "ProgressPrinter", Stopping)
        assert run(folder, tmp_path / "run") == 75
    assert f"`graft resume {tmp_path / 'run'}` goes on from there" in " ".join(capsys.readouterr().err.split())
    manifest = folder / "clips" / "transcripts.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace("A", "B"))
    assert main(["resume", str(tmp_path / "run")]) == 2
    manifest.write_text(text)
    assert "the data changed since it began" in " ".join(capsys.readouterr().err.split())
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "light: going on in epoch 2, after 2 steps" in capsys.readouterr().out
    resumed, undisturbed = metrics_of(tmp_path / "run"), metrics_of(run_dir)
    for name in ("phases", "climb", "val", "test", "characters", "forgetting"):
        assert without_seconds(resumed[name]) == without_seconds(undisturbed[name])
    assert not (tmp_path / "run" / "checkpoints" / "resume").exists()


def test_what_recognition_refuses(tmp_path):
    file, folder = write_transcripts(tmp_path / "clips"), write_wav2vec2(tmp_path / "tiny")
    flags = ["--data", str(file), "--backbone", str(folder)]
    with pytest.raises(GraftError, match="--longest-seconds is 0.0, expected more than 0"):
        parse_config([*flags, "--longest-seconds", "0"], SpeechConfig)
