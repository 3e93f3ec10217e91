"""Sounds as data: the spoken words, finding, decoding, windows, crops and noise, log-mel."""

import csv
import hashlib
import pathlib
import shutil
import struct

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from models import GraftError
from models.backbone import AudioPreprocess
from models.offline_sounds import MANNERS, VOICES, WORDS, sound_data_file, speak, wav_bytes
from models.sound_windows import MOST_WINDOWS, cut_windows, read_windows, window_count
from pipelines.__main__ import main
from pipelines.log_mel import in_segments, log_mel, mean_and_deviation, shown_sound
from pipelines.sound_augmentation import add_noise, mask_bands, mask_spans, sound_loader
from pipelines.sounds import find_sounds, load_sounds, sound_parts
from pipelines.tfds import as_int16
from tests.tiny_sounds import tone, write_tones

PREPROCESS = AudioPreprocess(window_seconds=0.5)


# ---------------------------------------------------------------- spoken words


def test_speech_depends_on_its_arguments_alone():
    """In whatever order, however often: eSpeak NG itself gives other samples the second time."""
    asked = [("seven", "en-US+m1", 160, 60), ("yes", "en-GB-scotland+adam", 145, 55), ("go", "en+whisper", 170, 40)]
    first = [speak(*words)[0] for words in asked]
    again = [speak(*words)[0] for words in reversed(asked)][::-1]
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)
    assert all(0.1 < len(samples) / 22_050 < 1.5 and np.abs(samples).max() > 1000 for samples in first)
    assert speak("seven", "en-US+f2")[0].shape != first[0].shape
    with pytest.raises(GraftError, match="no voice 'en-XX\\+f2'"):
        speak("seven", "en-XX+f2")


def test_test_voices_are_heard_nowhere_else():
    accents, variants = (
        {split: {voice.partition("+")[at] for voice in voices} for split, voices in VOICES.items()} for at in (0, 2)
    )
    for split in ("train", "val"):
        assert not accents["test"] & accents[split] and not variants["test"] & variants[split]
        assert not set(VOICES["train"]) & set(VOICES["val"])
    assert [len(WORDS) * len(VOICES[s]) * len(MANNERS[s]) for s in ("train", "val", "test")] == [960, 160, 360]


def test_the_spoken_words_are_what_they_were():
    """The clips of eSpeak NG 1.52, byte for byte: figures of runs can be compared."""
    file = sound_data_file("spoken_words")
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 1480 and {row["label"] for row in rows} == set(WORDS)
    assert {row["group"] for row in rows if row["split"] == "test"} == set(VOICES["test"])
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row["path"]):
        digest.update((file.parent / row["path"]).read_bytes())
    assert digest.hexdigest()[:16] == "45bf1776940d611d"
    with pytest.raises(GraftError, match="no data set of sounds by this name; there are spoken_words"):
        sound_data_file("spoken_numbers")


# ---------------------------------------------------------------- finding and reading


def test_files_of_every_kind_are_decoded_once(tmp_path):
    folder = write_tones(tmp_path / "tones", per_class=4)
    samples = np.stack([tone(700, 0.4, 44_100), tone(800, 0.4, 44_100)], axis=1)
    for name, options in {
        "a.flac": {"subtype": "PCM_24"},
        "b.ogg": {},
        "c.mp3": {},
        "d.wav": {"subtype": "MS_ADPCM"},
        "e.wav": {"subtype": "FLOAT"},
    }.items():
        soundfile.write(folder / "middle" / name, samples, 44_100, **options)
    (folder / "middle" / "text.wav").write_text("no sound at all")
    (folder / "middle" / "notes.txt").write_text("not a clip")
    splits = load_sounds(find_sounds(str(folder)))
    assert splits.skipped[0]["path"].endswith("text.wav") and "not a WAV file" in splits.skipped[0]["reason"]
    rows = [row for table in splits for row in table.to_pylist()]
    assert len(rows) == 17
    made = {row["source"][-6:]: row for row in rows if row["source"] != row["path"]}
    assert set(made) == {"a.flac", "/b.ogg", "/c.mp3", "/d.wav"}
    for row in made.values():
        sound, rate_hz = soundfile.read(row["path"], always_2d=True)
        assert rate_hz == 44_100 and sound.shape[1] == 2 and row["frames"] == len(sound) >= 0.4 * 44_100
        assert row["id"] == hashlib.sha256(pathlib.Path(row["path"]).read_bytes()).hexdigest()[:16]
    assert any("4 clips are no WAV files" in warning for warning in splits.warnings)
    again = load_sounds(find_sounds(str(folder)))  # from what is known of the files
    assert again.fingerprint == splits.fingerprint and again.train.equals(splits.train)


def test_manifests_groups_and_copies(tmp_path):
    folder = write_tones(tmp_path / "tones", per_class=8)
    shutil.copy(folder / "low" / "00.wav", folder / "low" / "copy.wav")
    rows = [(str(path), path.parent.name, f"speaker{int(path.stem, 36) % 6}") for path in folder.rglob("*.wav")]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "speaker"), *rows])
    splits = load_sounds(find_sounds(str(tmp_path / "rows.csv"), group_column="speaker"))
    speakers = [set(table["group"].to_pylist()) for table in splits]
    assert not speakers[0] & speakers[1] and not speakers[0] & speakers[2] and len(set.union(*speakers)) == 6
    assert any("1 clips are exact copies" in warning for warning in splits.warnings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no clips in this folder. Expected one folder per class"),
        (lambda folder: (folder / "a").mkdir(), "no clips in this folder"),
        (lambda folder: [(folder / "a").mkdir(), (folder / "a" / "1.wav").write_bytes(b"x")], "only one class, 'a'"),
    ],
)
def test_mistakes_answer_at_once(tmp_path, capsys, make, message):
    make(tmp_path)
    assert main(["audio", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_tfds_gives_becomes_16_bits():
    np.testing.assert_array_equal(as_int16([100, -100, 32_768]), [100, -100, 32_767])
    np.testing.assert_array_equal(as_int16(np.array([1 << 30, -(1 << 31)])), [1 << 14, -32_768])
    np.testing.assert_array_equal(as_int16(np.array([0.5, -2.0], np.float32)), [16_384, -32_767])


def test_a_tfds_set_of_sounds(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"audio": tfds.features.Audio(sample_rate=8_000), "label": tfds.features.ClassLabel(names=["low", "high"])}
    )
    examples = [
        (index, {"audio": tone(200 + 500 * (index % 2), 0.2, 8_000, index).astype(np.int64), "label": index % 2})
        for index in range(12)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_tones", version="1.0.0", features=features, split_datasets={"train": examples}, data_dir=tmp_path
    )
    found = find_sounds("tfds:tiny_tones", data_dir=str(tmp_path))
    assert len(found) == 12 and {example.labels for example in found} == {("low",), ("high",)}
    sound, rate_hz = soundfile.read(found[0].path, dtype="int16")
    assert rate_hz == 8_000 and len(sound) == 1_600


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 150, 151, 1_000, 5_000])
def test_windows_cover_a_sound_from_end_to_end(samples):
    sound = np.arange(1, samples + 1, dtype=np.float32)[None]
    windows, masks = (part.numpy()[0] for part in cut_windows(tf.constant(sound), 100))
    assert len(windows) == window_count(samples, 100) <= MOST_WINDOWS and windows.shape[1] == 100
    real = windows[masks == 1]
    assert real.min() == 1 and real.max() == samples and not windows[masks == 0].any()
    if samples <= 100:
        assert len(windows) == 1 and masks.sum() == samples
    elif len(windows) < MOST_WINDOWS:
        assert set(real) == set(sound[0]) and np.diff(windows[:, 0]).max() <= 50
    np.testing.assert_array_equal(windows[:, 1:] - windows[:, :-1] == 1, masks[:, 1:] == 1)


def test_parts_hold_clips_of_as_many_windows_as_reading_gives(tmp_path):
    folder = write_tones(tmp_path / "tones", longest=3.0, rates_hz=(8_000, 16_000, 22_050, 44_100))
    table = load_sounds(find_sounds(str(folder))).train
    parts = sound_parts(table, PREPROCESS)
    assert len(parts) > 3 and sorted(np.concatenate([rows for rows, _ in parts])) == list(range(table.num_rows))
    for _, arrays in parts:
        for path in arrays[0].paths:
            windows, masks = read_windows(tf.io.read_file(path), PREPROCESS)
            assert windows.shape == masks.shape == arrays[0].shape[1:]


# ---------------------------------------------------------------- augmentation


def test_noise_is_as_loud_as_asked_for():
    sound = tf.constant(tone(500, 0.4).astype(np.float32) / 32768)
    wave, mask = tf.pad(sound, [[0, 1600]]), tf.pad(tf.ones_like(sound, tf.int32), [[0, 1600]])
    ratios = []
    for seed in range(40):
        noise = (add_noise(wave, mask, tf.constant([0, seed]), 10.0) - wave).numpy()
        assert not noise[-1600:].any()
        if noise.any():
            ratios.append(10 * np.log10(np.mean(wave[:-1600] ** 2) / np.mean(noise[:-1600] ** 2)))
    assert 10 < len(ratios) < 30 and 9.5 < min(ratios) < 15 and 25 < max(ratios) < 30.5


def test_changes_are_functions_of_the_seed(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(wav_bytes(tone(500, 2.0), 16_000))
    for augmentation in ("none", "noise", "spec-augment"):
        load = sound_loader(PREPROCESS, augmentation)
        one, same, other = (load(str(path), tf.constant([1, seed]))[0].numpy() for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert one.shape == (1, 8_000) and not np.array_equal(one, other)
    short = tmp_path / "short.wav"
    short.write_bytes(wav_bytes(tone(500, 0.2), 16_000))
    plain = sound_loader(PREPROCESS)(str(short), tf.constant([0, 0]))
    np.testing.assert_array_equal(plain[0], read_windows(tf.io.read_file(str(short)), PREPROCESS)[0])
    load = sound_loader(PREPROCESS, "noise")
    lengths = {int(load(str(short), tf.constant([0, seed]))[1].numpy().sum()) for seed in range(9)}
    assert len(lengths) > 3 and 3_200 * 0.9 <= min(lengths) <= max(lengths) <= 3_200 + 1_600


def test_masks_leave_out_bands_and_spans():
    random = np.random.default_rng(0).normal(size=8_000).astype(np.float32)
    seed = tf.constant([3, 1])
    before, after = (np.abs(np.fft.rfft(wave)) for wave in (random, mask_bands(tf.constant(random), 16_000, seed)))
    gone = after < 1e-3 * before.mean()
    assert 0.005 < gone.mean() < 0.6
    np.testing.assert_allclose(after[~gone], before[~gone], rtol=1e-2, atol=0.5)
    spans = mask_spans(tf.constant(random), tf.ones(8_000, tf.int32), seed).numpy()
    assert 0 < (spans == 0).mean() <= 0.2
    np.testing.assert_array_equal(spans[spans != 0], random[spans != 0])


# ---------------------------------------------------------------- log-mel


def test_log_mel_tells_pitch_and_time():
    low, high = (log_mel(wav_bytes(tone(pitch, 0.5), 16_000)).mean(axis=0).argmax() for pitch in (300, 3_000))
    assert low < high
    halves = np.concatenate([tone(300, 0.5), tone(3_000, 0.5)])
    spectrum, turned = (log_mel(wav_bytes(sound, 16_000)) for sound in (halves, halves[::-1]))
    assert mean_and_deviation(spectrum).shape == (160,) and in_segments(spectrum).shape == (640,)
    # Mean and deviation do not hear the order, segments do.
    assert np.abs(mean_and_deviation(spectrum) - mean_and_deviation(turned)).max() < 1
    assert np.abs(in_segments(spectrum) - in_segments(turned)).max() > 3
    for samples in (tone(300, 0.5)[:1], np.zeros(8_000, np.int16)):
        assert np.isfinite(in_segments(log_mel(wav_bytes(samples, 16_000)))).all()


def test_the_report_gets_ten_seconds_and_a_picture(tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, tone(500, 12.0, 8_000), 8_000)
    shown = shown_sound(str(path))
    assert shown["cut"] and 11.9 < shown["seconds"] < 12.1
    assert len(shown["sound"]) == 44 + 2 * 160_000 and shown["picture"].startswith(b"\x89PNG")
    assert struct.unpack("<I", shown["sound"][24:28]) == (16_000,)
