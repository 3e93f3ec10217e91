"""Resident memory of a served byte-pair graph under requests of unseen words: `python -m tests.acceptance.text_memory`.

KerasHub's tokenizer keeps every word that it has seen; the exported graph must not. A tiny RoBERTa is exported and
answers requests of a few random words each, none sent before; prints resident memory at start, middle and end.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import string
import subprocess
import sys
import tempfile
import time

import psutil

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "text" / "roberta"
WARM_UP = 2000  # requests before the first measurement: allocators fill their pools meanwhile


def export(folder: str) -> None:
    """Write the tiny classifier; in a process of its own, so that training's memory does not count."""
    from models.classifier import Classifier
    from models.text import load_text_folder
    from serving.export_text import export_text_classifier

    backbone = load_text_folder(FOLDER)
    export_text_classifier(Classifier(backbone, 3), backbone.preprocess, ["a", "b", "c"], folder)


def measure(folder, requests: int, words: int = 4) -> list[float]:
    """Send the requests through TensorFlow's C++ loader; resident megabytes at start, middle and end."""
    from serving.session import Session

    draw, process = random.Random(0), psutil.Process()

    def send(count: int) -> float:
        for _ in range(count):
            text = " ".join("".join(draw.choices(string.ascii_letters, k=draw.randint(5, 12))) for _ in range(words))
            session.run("serving_default", {"text": [text.encode()]})
        return process.memory_info().rss / 1e6

    with Session(folder) as session:
        return [send(WARM_UP), send(requests // 2), send(requests - requests // 2)]


def main(arguments=None) -> int:
    """The command; returns 1 where memory has grown by more than a megabyte per 10,000 requests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(pathlib.Path(scratch) / "1")
        code = f"from tests.acceptance.text_memory import export; export({folder!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        started = time.monotonic()
        memory = measure(folder, options.requests)
    seconds = time.monotonic() - started
    print(f"{options.requests} requests of 4 unseen words each, {options.requests / seconds:.0f} a second")
    for place, megabytes in zip(("start", "middle", "end"), memory, strict=True):
        print(f"{place:>6}: {megabytes:.1f} MB resident")
    return int(memory[2] - memory[0] > options.requests / 10_000)


if __name__ == "__main__":
    sys.exit(main())
