"""Full-size checks of texts, about 40 minutes on two cores; writes text.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import csv
import json
import pathlib
import re
import subprocess
import sys

from tests.acceptance import tools
from tests.acceptance.tools import PYTHON, ROOT, graft


def said_by(module: str, *words) -> str:
    done = subprocess.run([PYTHON, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout, flush=True)
    return done.stdout


def trained(folder, name, *words) -> dict:
    done, _ = graft("text", "--depth", 2, *words, "--out", folder / name)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / name / "metrics.json").read_text())


def mean(runs) -> float:
    return sum(run["test"]["accuracy"] for run in runs) / len(runs)


def topics(folder):
    heads = [trained(folder, f"head{seed}", "--depth", "head", "--seed", seed) for seed in range(3)]
    both = [trained(folder, f"both{seed}", "--seed", seed) for seed in range(3)]
    whole = ("--group-column", "conversation")
    grouped = [trained(folder, f"grouped-{depth}", *whole, "--depth", depth) for depth in ("head", "2")]
    baseline = [run["baselines"][0]["accuracy"] for run in (heads[0], grouped[0])]
    return [
        (
            "1. topics, minilm_l6, --depth head: test accuracy, mean of three seeds",
            f"{mean(heads):.3f}",
            ">= 0.75",
            mean(heads) >= 0.75,
        ),
        (
            "1. with the top two blocks, mean of three seeds",
            f"{mean(both):.3f} ({', '.join(format(run['test']['accuracy'], '.3f') for run in both)})",
            "> head only",
            mean(both) > mean(heads),
        ),
        (
            "1. TF-IDF with logistic regression on the same splits, printed by the report",
            f"{baseline[0]:.3f}",
            "0.10 below both phases",
            mean(both) >= baseline[0] + 0.10,
        ),
        (
            "1. no conversation in two splits: head only, both phases, TF-IDF",
            f"{grouped[0]['test']['accuracy']:.3f}, {grouped[1]['test']['accuracy']:.3f}, {baseline[1]:.3f}",
            "printed",
            True,
        ),
    ]


def backbones(folder):
    return [
        tools.tests("2. features equal PyTorch's; every cut exact (line 7)", "tests/test_text_backbones.py"),
        tools.tests("3., 4. served graphs: 500 strings, fresh process, linked ops", "tests/test_export_text.py"),
        tools.tests("3. tokens equal transformers'", "tests/test_tokenizers.py"),
        tools.tests("3., 8. both phases, export and verify of every family; a string module", "tests/test_text.py"),
        tools.tests("9. every form of data, and mistakes", "tests/test_texts.py", "tests/test_baselines.py"),
    ]


def memory(folder):
    lines = said_by("tests.acceptance.text_memory").strip().splitlines()
    start, middle, end = (float(value) for value in re.findall(r"([\d.]+) MB", "\n".join(lines))[:3])
    return [
        (
            "5. 100,000 requests of unseen words to a served BPE graph: resident MB at start, middle, end",
            f"{start}, {middle}, {end}",
            "flat",
            end - middle < 2 and end - start < 20,
        )
    ]


def throughput(folder):
    said = said_by("tests.benchmarks.text_throughput")
    default, tuned = (float(value) for value in re.findall(r"([\d.]+) times as many", said))
    return [
        ("6. examples per second against KerasHub by default", f"{default} times", ">= 8", default >= 8),
        ("6. against KerasHub with 128 tokens", f"{tuned} times", ">= 2", tuned >= 2),
    ]


def two_phase(folder):
    said = said_by("tests.benchmarks.text_two_phase")
    times = float(re.search(r"([\d.]+) times over both", said)[1])
    ours, plain = (float(value) for value in re.search(r"Graft ([\d.]+), plain ([\d.]+)", said).groups())
    return [
        (
            "7. two phases on topics against a plain Keras loop, median of three",
            f"{times} times",
            ">= 2.5",
            times >= 2.5,
        ),
        ("7. test accuracy, mean of three seeds: Graft, plain", f"{ours}, {plain}", "the same", ours >= plain - 0.01),
    ]


def mistakes(folder):
    place = folder / "mistakes"
    place.mkdir()
    with open(place / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("body", "label"), *((f"text {n}", "ab"[n % 2]) for n in range(20))])
    (place / "empty.csv").write_text("")
    with open(place / "numbers.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((n, "ab"[n % 2]) for n in range(20))])
    cases = {
        "a missing column": ("--data", place / "rows.csv"),
        "an empty file": ("--data", place / "empty.csv"),
        "a text column of numbers": ("--data", place / "numbers.csv"),
        "an image model": ("--data", "topics", "--backbone", "efficientnet_lite0"),
    }
    return tools.mistakes("9", place, cases, command="text")


CHECKS = (throughput, two_phase, topics, memory, mistakes, backbones)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "Texts"))
