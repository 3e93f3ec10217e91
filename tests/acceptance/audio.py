"""Full-size checks of sounds, about 40 minutes on two cores; writes audio.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import csv
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from models.offline_sounds import VOICES, sound_data_file, speak, wav_bytes
from tests.acceptance import tools
from tests.acceptance.tools import PYTHON, ROOT, graft

DRAWS = 5
NOISE_DB = 10.0
SEED = 0


def trained(folder, name, *words, **environment) -> dict:
    done, _ = graft("audio", *words, "--out", folder / name, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / name / "metrics.json").read_text())


def accuracies(metrics) -> tuple[float, float, float]:
    """Test accuracy of the run, of log-mel mean and deviation, and of log-mel in 8 segments."""
    return metrics["test"]["accuracy"], *(row["accuracy"] for row in metrics["baselines"])


def words(folder):
    """With no arguments; and with two blocks thawed, which validation alone would not have asked for."""
    (folder / "cache").mkdir()
    environment = tools.own_cache(folder / "cache")  # in which nothing is found
    default = trained(folder, "default", **environment)
    accuracy, simple, segments = accuracies(default)
    minutes = default["seconds"]["training"] / 60
    both = trained(folder, "both", "--depth", "2", **environment)
    tuned = both["phases"][-1]["test"]["accuracy"] if both["phases"][-1]["kept"] else both["test"]["accuracy"]
    head = both["phases"][0]["test"]["accuracy"]
    return [
        ("3. spoken_words, whisper_tiny_en: accuracy on unseen voices", f"{accuracy:.3f}", ">= 0.95", accuracy >= 0.95),
        (
            "3. above logistic regression on log-mel mean and deviation",
            f"{accuracy - simple:+.3f} ({simple:.3f})",
            ">= 0.15",
            accuracy - simple >= 0.15,
        ),
        (
            "3. above logistic regression on log-mel in 8 segments",
            f"{accuracy - segments:+.3f} ({segments:.3f})",
            ">= 0.04",
            accuracy - segments >= 0.04,
        ),
        ("3. minutes of training", f"{minutes:.1f}", "< 8", minutes < 8),
        ("3. --depth 2: accuracy, and of its head", f"{tuned:.3f}, {head:.3f}", "not 0.01 worse", tuned >= head - 0.01),
        (
            "3. minutes of training with --depth 2 (load average then, on two cores)",
            f"{both['seconds']['training'] / 60:.1f} ({os.getloadavg()[1]:.0f})",
            "printed",
            True,
        ),
    ]


def one_voice(folder):
    """80 clips of one voice, five draws; the validation and the test voices stay. The head phase, as `--depth head`."""
    splits, inputs = described("spoken_words")
    voices = splits.train["group"].to_numpy()
    found = []
    for voice in np.random.default_rng(SEED).permutation(VOICES["train"])[:DRAWS]:
        found.append([head_accuracy(splits, inputs[name], voices == voice) for name in ("features", "segments")])
    ours, segments = np.mean(found, axis=0)
    listed = ", ".join(f"{row[0]:.3f}" for row in found)
    return [
        ("3. one training voice, 80 clips, mean of 5 draws", f"{ours:.3f} ({listed})", ">= 0.85", ours >= 0.85),
        (
            "3. above log-mel in 8 segments",
            f"{ours - segments:+.3f} ({segments:.3f})",
            ">= 0.12",
            ours - segments >= 0.12,
        ),
    ]


def described(data: str):
    """A set of sounds, and what its clips are described by: {name: [train, val, test]}, [n, d] each."""
    import tensorflow as tf

    from pipelines.audio import build_model
    from pipelines.feeds import Feeds
    from pipelines.log_mel import statistics_of
    from pipelines.options import AudioConfig
    from pipelines.sounds import find_sounds, load_sounds, sound_parts

    config, splits = AudioConfig(), load_sounds(find_sounds(data))
    model = build_model(config, splits.class_names)
    read_inputs = functools.partial(sound_parts, preprocess=model.backbone.preprocess)
    feeds = Feeds(model, splits, splits.train, None, config, tf.distribute.get_strategy(), read_inputs)
    features = feeds.head(0).features
    statistics = [statistics_of(table) for table in splits]
    inputs = {name: [of_split[name] for of_split in statistics] for name in statistics[0]}
    return splits, {"features": [features(table)[:] for table in splits], **inputs}


def head_accuracy(splits, inputs, chosen=slice(None)) -> float:
    """Test accuracy of a head on some of the training clips, its penalty chosen on validation."""
    from pipelines.data import targets_of
    from pipelines.head_solver import solve_head

    train, val, test = inputs
    targets = [targets_of(table, len(splits.class_names)) for table in splits]
    weights = np.ones(len(train), np.float32)[chosen]
    heads, _, best, _ = solve_head(train[chosen], targets[0][chosen], weights, val, targets[1])
    kernel, bias = heads[best]
    return float(((test @ kernel + bias).argmax(axis=1) == targets[2].argmax(axis=1)).mean())


def write_manifest(path, folder, rows) -> pathlib.Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split", "group"])
        writer.writeheader()
        writer.writerows({**row, "path": folder / row["path"]} for row in rows)
    return path


def noise(folder):
    """White noise at 10 dB over every clip of all splits."""
    import wave

    file, random = sound_data_file("spoken_words"), np.random.default_rng(SEED)
    rows = list(csv.DictReader(file.open()))
    for row in rows:
        with wave.open(str(file.parent / row["path"])) as reader:
            samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2").astype(float)
        deviation = np.sqrt(np.mean(samples**2) * 10 ** (-NOISE_DB / 10))
        noisy = np.clip(samples + random.normal(0, deviation, len(samples)), -32768, 32767).astype(np.int16)
        target = folder / "noisy" / row["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(wav_bytes(noisy, 22_050))
    manifest = write_manifest(folder / "noisy.csv", folder / "noisy", rows)
    splits, inputs = described(str(manifest))
    accuracy, simple, segments = (head_accuracy(splits, inputs[name]) for name in ("features", "mean", "segments"))
    return [
        ("3. at 10 dB of white noise: accuracy on unseen voices", f"{accuracy:.3f}", ">= 0.75", accuracy >= 0.75),
        ("3. log-mel mean and deviation, 8 segments there", f"{simple:.3f}, {segments:.3f}", "printed", True),
    ]


def served(folder):
    """The exported model: every step of verification, and a clip alone and beside a longer one."""
    from serving.session import Session

    trained(folder, "served", "--depth", "head")
    version = folder / "served" / "serving" / "served" / "1"
    done = subprocess.run([PYTHON, "-m", "serving.verify", version], cwd=ROOT, capture_output=True, text=True)
    sounds = [wav_bytes(*speak(text)) for text in ("seven", "This sentence takes much longer than two seconds to say.")]
    with Session(version) as session:
        together = session.run("serving_default", {"audio_bytes": sounds})["probabilities"]
        alone = [session.run("serving_default", {"audio_bytes": [data]})["probabilities"][0] for data in sounds]
        bad = bad_inputs(session)
    difference = float(np.abs(together - np.stack(alone)).max())
    said = done.stdout.strip().splitlines()
    return [
        ("6. python -m serving.verify", said[-1] if said else done.stderr, "exit 0", done.returncode == 0),
        ("6. a clip alone and in a batch with a longer one", f"{difference:.1e}", "<= 1e-4", difference <= 1e-4),
        *bad,
    ]


def bad_inputs(session):
    """What a served model says to files that are no clips of words."""
    word = wav_bytes(*speak("seven"))
    hour = np.tile(np.random.default_rng(0).normal(0, 1000, 16_000).astype(np.int16), 3600)
    cases = {
        "an empty file": (b"", True),
        "zero samples": (wav_bytes(np.zeros(0, np.int16), 16_000), True),
        "a text file named .wav": (b"These are words, but nobody says them.\n", True),
        "a truncated file": (word[: len(word) // 2], True),
        "a 1 ms clip": (wav_bytes(np.full(16, 1000, np.int16), 16_000), False),
        "a one hour clip": (wav_bytes(hour, 16_000), False),
        "silence": (wav_bytes(np.zeros(16_000, np.int16), 16_000), False),
    }
    rows = []
    for name, (data, refused) in cases.items():
        started = time.perf_counter()
        answer = session.run("serving_default", {"audio_bytes": [data, word]})
        seconds = time.perf_counter() - started
        error, label, score = answer["error"][0].decode(), answer["labels"][0][0].decode(), answer["scores"][0][0]
        fine = bool(error) == refused and np.isfinite(answer["probabilities"]).all() and not answer["error"][1]
        fine = fine and answer["labels"][1][0] == b"seven"
        said = error or f"{label} {score:.2f}"
        rows.append((f"7. {name}, beside a good one ({seconds:.1f} s)", said, "an error" if refused else "any", fine))
    return rows


def two_phase(folder):
    done = subprocess.run([PYTHON, "-m", "tests.benchmarks.audio_two_phase"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout, flush=True)
    times = float(re.search(r"([\d.]+) times over both", done.stdout)[1])
    ours, plain = (float(value) for value in re.search(r"Graft ([\d.]+), plain ([\d.]+)", done.stdout).groups())
    return [
        (
            "8. two phases on spoken_words against a plain Keras loop, median of three",
            f"{times} times",
            "the ratio",
            True,
        ),
        ("8. test accuracy, mean of three seeds: Graft, plain", f"{ours}, {plain}", "the same", ours >= plain - 0.01),
    ]


def mistakes(folder):
    place = folder / "mistakes"
    for name in ("none", "one/a", "texts/a", "texts/b"):
        (place / name).mkdir(parents=True)
    for number in range(3):
        (place / "one" / "a" / f"{number}.wav").write_bytes(wav_bytes(np.zeros(800, np.int16), 16_000))
        for name in "ab":
            (place / "texts" / name / f"{number}.wav").write_text("no sound")
    cases = {
        "no such folder": ("--data", place / "nowhere"),
        "a folder without clips": ("--data", place / "none"),
        "one class": ("--data", place / "one"),
        "an image model": ("--data", "spoken_words", "--backbone", "efficientnet_lite0"),
        "a window of no length": ("--window-seconds", "0"),
    }
    return tools.mistakes("7", place, cases, command="audio")


CHECKS = (words, one_voice, noise, served, mistakes, two_phase)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "Sounds"))
