"""Speech recognition: transcripts, CTC, error rates, and a run from a manifest to a served model."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from models.backbone import load_backbone
from models.offline_sounds import wav_bytes
from models.recogniser import CERTAIN, Recogniser, ctc_losses, frame_counts, greedy, transcripts
from pipelines import speech
from pipelines.config import parse_config
from pipelines.options import SpeechConfig
from pipelines.speech_training import speech_objective, written
from pipelines.transcript_scores import align, distance, error_rates, worst_transcripts
from pipelines.transcripts import count_characters, find_transcripts, load_transcripts, normalised
from serving.session import Session
from tests.tiny_speech import write_transcripts, write_wav2vec2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


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
    assert sum(table.num_rows for table in splits) == 24 and all(table.num_rows for table in splits)
    for table in splits:
        for text, places in zip(table["text"].to_pylist(), table["characters"].to_pylist()):
            assert "".join(" abc"[place] for place in places if place >= 0) == text
    again, _ = load_transcripts(find_transcripts(str(file)), "letters", 0.5)
    assert "longer than --longest-seconds 0.5" in " ".join(again.warnings)
    with pytest.raises(GraftError, match="0 of 24 clips can be used"):
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


@pytest.mark.slow
def test_a_run_from_manifest_to_served_transcripts(tmp_path):
    file, folder = write_transcripts(tmp_path / "clips"), write_wav2vec2(tmp_path / "tiny")
    flags = f"--data {file} --backbone {folder} --out {tmp_path / 'run'} --batch-size 8 --head-epochs 2 --depth 1"
    flags += " --fine-tune-epochs 2 --fine-tune-learning-rate 0.01 --head-learning-rate 0.01"
    run_dir = speech.run(parse_config(flags.split(), SpeechConfig))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["serving"]["equal"] == metrics["examples"]["test"]
    assert [phase["name"] for phase in metrics["phases"]] == ["head", "fine_tune"]
    trains = [row["trainable_parameters"] > 0 for row in metrics["phases"][1]["blocks"]]
    assert trains == [False, False, False, True, True]
    assert "Worst mistakes" in (run_dir / "report.html").read_text()
    details = json.loads((run_dir / metrics["serving"]["folder"] / "assets.extra" / "graft.json").read_text())
    assert details["normalise"] == "letters" and details["characters"] == " abc"
    with Session(run_dir / metrics["serving"]["folder"]) as session:
        long = wav_bytes(np.zeros(31 * 8_000, np.int16), 8_000)
        short = wav_bytes(np.ones(1, np.int16), 44_100)
        asked = [b"no sound", b"", long, wav_bytes(np.zeros(0, np.int16), 16_000), short]
        answer = session.run("serving_default", {"audio_bytes": asked})
        assert [bool(error) for error in answer["error"]] == [True] * 4 + [False]
        assert b"longer than 30 s" in answer["error"][2]
        assert np.isfinite(answer["confidence"]).all() and not answer["confidence"][:4].any()
        assert session.run("serving_default", {"audio_bytes": []})["transcript"].shape == (0,)


def test_what_recognition_refuses(tmp_path):
    file, folder = write_transcripts(tmp_path / "clips"), write_wav2vec2(tmp_path / "tiny")
    flags = ["--data", str(file), "--backbone", str(folder)]
    with pytest.raises(GraftError, match="--depth auto: recognition has two phases"):
        speech.check_request(parse_config([*flags, "--depth", "auto"], SpeechConfig))
    with pytest.raises(GraftError, match="--longest-seconds is 0.0, expected more than 0"):
        parse_config([*flags, "--longest-seconds", "0"], SpeechConfig)
