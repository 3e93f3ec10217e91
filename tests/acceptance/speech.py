"""Speech recognition on eSpeak's voices, about 15 minutes on two free cores; writes speech.md beside this file.

A tiny encoder learns 400 digit strings from random weights; then the same encoder learns new words, and so does one
with random weights, in as many steps. DIGIT_EPOCHS and WORD_EPOCHS in the environment make it smaller.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import sys

import numpy as np

from models.offline_sounds import VOICES, WORDS, speak, wav_bytes
from tests.acceptance import tools
from tests.acceptance.tools import graft
from tests.tiny_speech import write_wav2vec2

SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 256, "hidden_dropout": 0.05}
SIZES |= {"attention_dropout": 0.05, "activation_dropout": 0.05}
COUNTS = {"digits": {"train": 400, "val": 60, "test": 100}, "words": {"train": 120, "val": 40, "test": 100}}
EPOCHS = {"digits": int(os.environ.get("DIGIT_EPOCHS", 60)), "words": int(os.environ.get("WORD_EPOCHS", 30))}
LEARNING = "--depth 5 --head-epochs 1 --head-learning-rate 0.01 --fine-tune-learning-rate 0.01 --batch-size 16"
LEARNING += " --patience 99 --clip-norm 1"


def spoken(folder: pathlib.Path, name: str, vocabulary: tuple[str, ...], seed: int) -> pathlib.Path:
    """A manifest of strings of 2 or 3 words in the training voices of `spoken_words`, the same every time."""
    random, rows = np.random.default_rng(seed), []
    (folder / name).mkdir(parents=True)
    for split, count in COUNTS[name].items():
        for index in range(count):
            text = " ".join(random.choice(vocabulary, int(random.integers(2, 4))))
            sound = speak(text, str(random.choice(VOICES["train"])), int(random.integers(150, 200)), 50)
            path = f"{split}-{index:03}.wav"
            (folder / name / path).write_bytes(wav_bytes(*sound))
            rows.append((path, text, split))
    with (folder / name / "transcripts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "split"), *rows])
    return folder / name / "transcripts.csv"


def trained(folder: pathlib.Path, name: str, data: pathlib.Path, backbone: pathlib.Path, epochs: int, *more) -> dict:
    words = f"--data {data} --backbone {backbone} --out {folder / name} --fine-tune-epochs {epochs} {LEARNING}"
    done, seconds = graft("speech", *words.split(), *more, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads((folder / name / "metrics.json").read_text()), "seconds": seconds, "run": folder / name}


def checkpoint(run: pathlib.Path, backbone: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The encoder of a run as a folder in transformers' layout."""
    from models.wav2vec2_weights import write_wav2vec2_folder
    from pipelines.config import read_config
    from pipelines.options import SpeechConfig
    from pipelines.runs import find_checkpoint
    from pipelines.speech import build_model

    characters = json.loads((run / "metrics.json").read_text())["characters"]
    model = build_model(read_config(run / "config.yaml", SpeechConfig), "".join(characters))
    model.load_weights(find_checkpoint(run))
    settings = [json.loads((backbone / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")]
    write_wav2vec2_folder(model.encoder, folder, *settings)
    return folder


def rate(metrics: dict) -> str:
    low, high = metrics["test"]["character_interval"]
    return f"{metrics['test']['character_error_rate']:.3f} ({low:.3f} to {high:.3f})"


def digits(folder: pathlib.Path) -> list[tuple]:
    tiny = write_wav2vec2(folder / "tiny", **SIZES)
    run = trained(folder, "digit_run", spoken(folder, "digits", WORDS[:10], 0), tiny, EPOCHS["digits"])
    seconds = sum(phase["seconds"] for phase in run["phases"])
    what = f"4. 400 digit strings, a tiny encoder from random weights, {EPOCHS['digits']} epochs"
    return [
        (f"{what}: training", f"{seconds:.0f} s", "at most 600 s", seconds <= 600),
        ("4. its character error rate on 100 others", rate(run), "printed", True),
        served("digits", run),
    ]


def new_words(folder: pathlib.Path) -> list[tuple]:
    """Needs what `digits` has left in the folder."""
    data, tiny = spoken(folder, "words", WORDS[10:], 1), folder / "tiny"
    encoder = checkpoint(folder / "digit_run", tiny, folder / "digit_encoder")
    pretrained, random = (
        trained(folder, f"{name}_run", data, start, EPOCHS["words"])
        for name, start in (("pretrained", encoder), ("random", tiny))
    )
    epochs = [[phase["epochs"] for phase in run["phases"]] for run in (pretrained, random)]
    better = pretrained["test"]["character_error_rate"] < random["test"]["character_error_rate"]
    return [
        (
            f"4. 120 strings of ten new words, epochs {epochs[0]} and {epochs[1]}: character error rate from the "
            f"digits' encoder, and from random weights",
            f"{rate(pretrained)}, {rate(random)}",
            "the first is lower, in equal steps",
            better and epochs[0] == epochs[1],
        ),
        served("words, from the digits' encoder", pretrained),
        served("words, from random weights", random),
    ]


def served(name: str, run: dict) -> tuple:
    count = run["serving"]["files"]
    return (f"4. exported transcripts that equal training's ({name})", f"{count} files", "100", count == 100)


CHECKS = (digits, new_words)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "Speech recognition"))
