"""The audio pipeline end to end, with a small random Whisper: run folder, windows, export, answers, after training."""

import csv
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from models import GraftError
from models.offline_sounds import sound_data_file, wav_bytes
from pipelines import audio, runs
from pipelines.__main__ import main
from pipelines.batch import read_details
from pipelines.config import parse_config
from pipelines.options import AudioConfig
from pipelines.sounds import sound_predictor
from serving.session import Session
from serving.warmup import WARMUP_FILE, read_requests, replay_warmup, write_warmup
from tests.embedded_server import running
from tests.test_page import answers, browser, drop, opened, rows_of  # noqa: F401 (a fixture)
from tests.tiny_sounds import PITCHES_HZ, tone, write_tones, write_whisper

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def run(data, backbone, out, *more):
    words = ["--data", data, "--backbone", backbone, "--out", out, "--fine-tune-epochs", 2, "--batch-size", 8]
    words += ["--window-seconds", 0.5, "--depth", 1, "--views", 2, *more]
    return audio.run(parse_config([str(word) for word in words], AudioConfig, "graft audio"))


def metrics_of(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("presets") / "tiny_whisper")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("sounds") / "tones", rates_hz=(16_000, 22_050))


@pytest.fixture(scope="module")
def run_dir(data, whisper, tmp_path_factory):
    return run(data, whisper, tmp_path_factory.mktemp("runs") / "tones")


@pytest.fixture(scope="module")
def session(run_dir):
    with Session(run_dir / "serving" / "tones" / "1") as session:
        yield session


def trained(run_dir):
    model = audio.build_model(audio.read_config(run_dir / "config.yaml", AudioConfig), sorted(PITCHES_HZ))
    model.load_weights(runs.find_checkpoint(run_dir))
    return model


def test_the_run_folder_holds_everything(run_dir):
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    assert {"config.yaml", "metrics.json", "model_card.md", "report.html", "splits.csv", "tensorboard"} <= names
    assert "serving/tones/1/saved_model.pb" in names and not [name for name in names if "tmp" in name]
    metrics = metrics_of(run_dir)
    assert metrics["kind"] == "audio" and sum(metrics["examples"][name] for name in ("train", "val", "test")) == 30
    assert [phase["name"] for phase in metrics["phases"]] == ["head", "fine_tune"]
    assert [row["name"][:15] for row in metrics["baselines"]] == ["Log-mel mean an", "Log-mel in 8 ti"]
    assert metrics["transfer"]["probes"].keys() == {"pretrained", "random_weights", "raw"}
    assert any("longer than the window of 0.5 s" in warning for warning in metrics["warnings"])


def test_served_answers_are_those_of_training_for_any_length(run_dir, session):
    """Features averaged over windows are logits averaged over windows: the head is linear."""
    from models.sound_windows import read_windows

    model = trained(run_dir)
    sounds = [wav_bytes(tone(500, seconds, rate), rate) for seconds, rate in ((0.2, 16_000), (0.7, 8_000), (5, 44_100))]
    temperature = json.loads((run_dir / "metrics.json").read_text())["calibration"]["temperature"]
    logits = []
    for data in sounds:
        windows, masks = read_windows(data, model.backbone.preprocess)
        logits.append(model([windows, masks], training=False).numpy().mean(axis=0))
    answers = session.run("serving_default", {"audio_bytes": sounds})
    np.testing.assert_allclose(answers["probabilities"], tf.nn.softmax(np.array(logits) / temperature), atol=1e-5)
    for index, data in enumerate(sounds):  # a clip alone, and in a batch with a longer one
        alone = session.run("serving_default", {"audio_bytes": [data]})["probabilities"][0]
        np.testing.assert_allclose(alone, answers["probabilities"][index], atol=1e-5)
    table = runs.read_split(run_dir, "test")
    predict = sound_predictor(model, model.backbone.preprocess, 4)
    files = [pathlib.Path(path).read_bytes() for path in table["path"].to_pylist()]
    served = session.run("serving_default", {"audio_bytes": files})["probabilities"]
    np.testing.assert_allclose(served, tf.nn.softmax(predict(table) / temperature), atol=1e-5)


def test_a_bad_item_does_not_fail_its_neighbours(session):
    good = wav_bytes(tone(500, 0.3), 16_000)
    bad = [b"", b"RIFF", b"just a text that is called .wav", good[:30], wav_bytes(np.zeros(0, np.int16), 16_000)]
    quiet = [wav_bytes(np.zeros(8000, np.int16), 16_000), wav_bytes(tone(500, 0.001), 16_000)]
    answers = session.run("serving_default", {"audio_bytes": [good, *bad, *quiet]})
    errors = [error.decode() for error in answers["error"]]
    assert [bool(error) for error in errors] == [False, True, True, True, True, True, False, False], errors
    np.testing.assert_allclose(answers["probabilities"].sum(axis=1), [1, 0, 0, 0, 0, 0, 1, 1], atol=1e-5)
    features = session.run("features", {"audio_bytes": [good, *bad, *quiet]})
    assert np.isfinite(features["features"]).all() and not features["features"][1:6].any()
    alone = session.run("serving_default", {"audio_bytes": [good]})
    np.testing.assert_allclose(answers["probabilities"][0], alone["probabilities"][0], atol=1e-5)
    assert session.run("serving_default", {"audio_bytes": np.zeros(0, object)})["labels"].shape == (0, 3)


def test_waveforms_get_the_answers_of_their_files(session):
    for seconds in (0.3, 1.9):
        sounds = [tone(pitch, seconds) for pitch in (300, 900)]
        files = session.run("serving_default", {"audio_bytes": [wav_bytes(sound, 16_000) for sound in sounds]})
        waveforms = np.stack(sounds).astype(np.float32) / 32768
        answers = session.run("waveform", {"waveform": waveforms})
        np.testing.assert_allclose(answers["probabilities"], files["probabilities"], atol=1e-5)
    odd = session.run("waveform", {"waveform": np.array([[np.nan, np.inf, 0.1]], np.float32)})
    assert np.isfinite(odd["probabilities"]).all() and not odd["error"][0]
    empty = session.run("waveform", {"waveform": np.zeros((2, 0), np.float32)})
    assert all(b"no samples" in error for error in empty["error"]) and not empty["scores"].any()


def test_the_report_plays_mistakes(run_dir, tmp_path):
    """Labels turned round, so that there are mistakes whatever the model has learned."""
    rows = list(csv.DictReader((run_dir / "splits.csv").open()))
    other = dict(zip(sorted(PITCHES_HZ), ["low", "middle", "high"]))
    with (tmp_path / "wrong.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((row["path"], other[row["class"]]) for row in rows)])
    assert main(["evaluate", str(run_dir), "--data", str(tmp_path / "wrong.csv"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "media-src data:" in page and page.count("<audio controls") >= 5
    assert page.count("data:image/png") >= page.count("<audio controls")
    assert "clips" in page and "picture.jpg" not in page


def test_predict_takes_what_training_takes(run_dir, data, tmp_path, capsys):
    for name in ("a.flac", "b.ogg", "c.mp3"):
        soundfile.write(tmp_path / name, tone(700, 0.5) / 32768, 16_000)
    soundfile.write(tmp_path / "d.wav", tone(700, 0.5), 16_000, subtype="IMA_ADPCM")
    (tmp_path / "e.wav").write_bytes(b"text")
    assert main(["predict", str(run_dir), str(tmp_path), "--out", str(tmp_path / "out.csv")]) == 0
    rows = {row["path"][-6:]: row for row in csv.DictReader((tmp_path / "out.csv").open())}
    assert len(rows) == 5 and "not a WAV file" in rows.pop("/e.wav")["error"]
    assert all(row["label"] in PITCHES_HZ and not row["error"] for row in rows.values()), rows
    assert main(["predict", str(run_dir)]) == 2
    assert "give clip files, a folder" in capsys.readouterr().err


def test_warm_up_requests_are_made_up_sounds(run_dir, tmp_path):
    folder = shutil.copytree(run_dir / "serving" / "tones" / "1", tmp_path / "1")
    count = write_warmup(folder, read_details(folder), batch_sizes=(1, 4))
    requests = read_requests(folder / WARMUP_FILE)
    assert replay_warmup(folder) == count == 4
    waveforms = {name: inputs.get("waveform") for name, inputs in requests}["waveform"]
    assert waveforms.shape == (1, 8_000) and np.abs(waveforms).max() <= 0.1


@pytest.mark.slow
def test_export_makes_the_next_version_with_the_same_answers(run_dir, session, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "tones")
    assert main(["export", str(copy)]) == 0
    asked = {"audio_bytes": [wav_bytes(tone(900, 1.2), 16_000)]}
    with Session(copy / "serving" / "tones" / "2") as again:
        answers = again.run("serving_default", asked)["probabilities"]
    np.testing.assert_allclose(answers, session.run("serving_default", asked)["probabilities"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wav2vec2_base", "hubert_large"])
def test_a_head_on_wav2vec2_and_on_hubert(data, family, tmp_path):
    """Both layouts, random weights: verified when exported; a clip answers alone as in a batch with a longer one."""
    out = run(data, FIXTURES / "wav2vec2" / family, tmp_path / "run", "--depth", "head")
    sounds = [wav_bytes(tone(500, seconds, rate), rate) for seconds, rate in ((0.2, 16_000), (0.7, 8_000), (3, 44_100))]
    with Session(out / "serving" / "run" / "1") as session:
        together = session.run("serving_default", {"audio_bytes": sounds})["probabilities"]
        for index, sound in enumerate(sounds):
            alone = session.run("serving_default", {"audio_bytes": [sound]})["probabilities"][0]
            np.testing.assert_allclose(alone, together[index], atol=1e-4)


@pytest.mark.slow
def test_the_cache_changes_nothing(data, whisper, tmp_path):
    """Windows, crops and noise: the same figures with and without it, in both phases."""
    words = ("--head-solver", "sgd", "--no-export")
    kept = metrics_of(run(data, whisper, tmp_path / "kept", *words))
    none = metrics_of(run(data, whisper, tmp_path / "none", *words, "--cache", "none"))
    for one, other in zip(kept["phases"], none["phases"], strict=True):
        for row, again in zip(one["history"], other["history"], strict=True):
            np.testing.assert_allclose(row["val_loss"], again["val_loss"], rtol=2e-4)
            np.testing.assert_allclose(row["loss"], again["loss"], rtol=2e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--window-seconds", 4), "made for at most 3 s"),
        (("--depth", 9), "Depth 9 is not possible"),
        (("--backbone", "minilm_l6"), "audio"),
        (("--data", "no-such-folder"), "there is no such folder"),
        (("--window-seconds", 0), "--window-seconds is 0.0, expected from 0.05 to 60"),
    ],
)
def test_mistakes_are_one_message(data, whisper, tmp_path, words, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        run(data, whisper, tmp_path / "never", *words)
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_long_clips_several_labels_and_every_augmentation(whisper, tmp_path):
    folder = write_tones(tmp_path / "tones", longest=6.0)
    rows = [
        (str(path), path.parent.name + ("|even" if int(path.stem) % 2 == 0 else "")) for path in folder.rglob("*.wav")
    ]
    with (tmp_path / "several.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    out = run(tmp_path / "several.csv", whisper, tmp_path / "several", "--augmentation", "spec-augment")
    with Session(out / "serving" / "several" / "1") as session:
        answer = session.run("serving_default", {"audio_bytes": [wav_bytes(tone(500, 0.5), 16_000)]})
    assert answer["chosen"].shape == (1, 4)
    plain = run(folder, whisper, tmp_path / "plain", "--augmentation", "none", "--depth", "full", "--no-export")
    assert metrics_of(plain)["phases"][1]["name"] == "fine_tune"


@pytest.mark.slow
def test_spoken_words_with_whisper(tmp_path):
    """The real thing, head only, with the first three of its training voices: unseen voices, better than log-mel.

    All voices: `make acceptance OF=audio`.
    """
    manifest = sound_data_file("spoken_words")
    rows = list(csv.DictReader(manifest.open()))
    voices = {split: sorted({row["group"] for row in rows if row["split"] == split}) for split in ("train", "val")}
    kept = {*voices["train"][::4], *voices["val"][:2], "en-US-nyc+paul", "en-GB-scotland+belinda"}
    with (tmp_path / "words.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "path": manifest.parent / row["path"]} for row in rows if row["group"] in kept)
    words = ["--data", tmp_path / "words.csv", "--depth", "head", "--out", tmp_path / "run"]
    metrics = metrics_of(audio.run(parse_config([str(word) for word in words], AudioConfig, "graft audio")))
    assert metrics["examples"] == {"train": 240, "val": 80, "test": 120, "skipped": 0}
    simple, segments = (row["accuracy"] for row in metrics["baselines"])
    assert metrics["test"]["accuracy"] >= 0.9
    assert metrics["test"]["accuracy"] >= max(simple + 0.15, segments + 0.05)


@pytest.mark.slow
def test_what_more_clips_would_bring(whisper, tmp_path):
    data = write_tones(tmp_path / "tones", rates_hz=(16_000,))
    words = ["--data", data, "--backbone", whisper, "--draws", 2, "--out", tmp_path / "curve"]
    assert main(["curve", *map(str, words)]) == 0
    found = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert found["kind"] == "audio" and found["points"][-1]["examples"] > found["points"][0]["examples"]


@pytest.mark.slow
def test_the_page_plays_and_asks(run_dir, browser, tmp_path):  # noqa: F811
    """FLAC too: the browser decodes it, and sends WAV."""
    sound = tone(700, 0.5)
    soundfile.write(tmp_path / "tone.flac", sound, 16_000)
    with (
        running("--model_base_path", run_dir / "serving" / "tones", "--model_name", "photos", name="photos") as (
            rest,
            *_,
        ),
        opened(browser, rest) as page,
    ):
        assert page.locator(".drop u").inner_text() == "Choose a sound"
        drop(page, "tone.wav", wav_bytes(sound, 16_000))
        answers(page)
        drop(page, "tone.flac", (tmp_path / "tone.flac").read_bytes())
        newest, oldest = answers(page, 2)
        assert rows_of(newest)[0][0] == rows_of(oldest)[0][0] and len(rows_of(newest)) == 3
        assert page.locator("article audio").count() == 2
