"""Full-size checks of the cache, about 50 minutes on two cores; writes cache.md and benchmarks.json beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from tests.acceptance import tools
from tests.acceptance.tools import PYTHON, ROOT, graft, own_cache

RESULTS = pathlib.Path(__file__).with_name("benchmarks.json")  # what tests/benchmarks/picture.py draws


def benchmark(name: str, *words) -> str:
    command = [PYTHON, "-m", f"tests.benchmarks.{name}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout, flush=True)
    return done.stdout


def two_phase(folder):
    said = benchmark("two_phase", "--json", str(RESULTS))
    phase_1, both = (float(value) for value in re.search(r"medians: ([\d.]+) .* ([\d.]+) times over", said).groups())
    ours, plain = (float(value) for value in re.search(r"Graft ([\d.]+), plain ([\d.]+)", said).groups())
    return [
        ("1. two_phase: times sooner than plain Keras in phase 1, median of three", phase_1, ">= 8", phase_1 >= 8),
        ("1. over both phases", both, ">= 4", both >= 4),
        (
            "1. test accuracy, mean of three seeds: Graft, plain",
            f"{ours}, {plain}",
            "within 0.01",
            ours >= plain - 0.01,
        ),
    ]


def random_vit(folder):
    said = benchmark("two_phase", "--backbone", "vit", "--runs", "1", "--images", "1000")
    both = float(re.search(r"([\d.]+) times over", said)[1])
    return [
        ("1. a random ViT of MiniLM's size, depth 2, 1,000 tiles: times sooner over both", both, ">= 2.5", both >= 2.5)
    ]


def second_run(folder):
    times = float(re.search(r"is ([\d.]+) times", benchmark("second_run", "--json", str(RESULTS)))[1])
    return [("2. second_run: times sooner than the first, head-only change", times, ">= 20", times >= 20)]


def input_pipeline(folder):
    share = int(re.search(r"reaches (\d+)%", benchmark("input_pipeline", "--json", str(RESULTS)))[1])
    return [("3. input_pipeline: share of a bare decode and resize", f"{share}%", ">= 90%", share >= 90)]


def growth(folder):
    said = benchmark("growth", "--runs", "1", "--json", str(RESULTS))
    bent = [float(value) for value in re.findall(r"([\d.]+)% from", said)]
    more = re.search(r"memory on disk grows by .*\(([+-]\d+)%\)", said)
    equal = benchmark("growth", "--three-times").strip().splitlines()[-1]
    return [
        ("4. growth: time's largest deviation from a line, cache in memory and on disk", f"{bent} %", "<= 15%",
         max(bent) <= 15),
        ("4. growth: from 4 to 8 times the data, once the cache spills", more[0], "<= 10%", int(more[1]) <= 10),
        ("4. features three times the memory budget against all in memory", equal, "equal to 4 decimals",
         "NOT" not in equal),
    ]  # fmt: skip


def scratch(folder):
    said = benchmark("scratch", "--epochs", "15", "--json", str(RESULTS)).strip().splitlines()
    return [("scratch: time to the accuracy that training from scratch reaches at best", said[-1], "printed", True)]


def figures(folder, name, environment, *words):
    """test figures and losses of both phases of a run on a small part of `textures`."""
    common = ("--image-size", 96, "--head-solver", "sgd", "--depth", 2)
    common += () if "--data" in words else ("--data", tiles(folder), "--fine-tune-epochs", 3)
    done, seconds = graft("image", *common, *words, "--out", folder / name, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((folder / name / "metrics.json").read_text())
    return metrics["test"], seconds


def tiles(folder):
    from tests.acceptance.images import small_textures

    place = folder / "small"
    return place if place.is_dir() else small_textures(place, per_class=20)


def same_figures(folder):
    cache = folder / "cache_a"
    cache.mkdir()
    environment = {"GRAFT_CACHE": own_cache(cache)["GRAFT_CACHE"]}
    plain, _ = figures(folder, "plain", environment, "--augmentation", "none", "--cache", "none")
    cached, _ = figures(folder, "cached", environment, "--augmentation", "none")
    spilled, _ = figures(folder, "spilled", environment, "--augmentation", "none", "--cache-memory", 1e-6)
    shown = [f"{run['accuracy']:.4f} {run['loss']:.6f}" for run in (plain, cached, spilled)]
    close = all(
        abs(run[name] - plain[name]) < 5e-5 for run in (cached, spilled) for name in ("accuracy", "loss", "macro_f1")
    )
    views, accuracies = [], []
    for seed in range(3):
        for number in (8, 4):
            # On all of `textures`, 676 test images: on the small part one image is a point.
            words = ("--data", "textures", "--fine-tune-epochs", 8, "--seed", seed, "--views", number)
            run, _ = figures(folder, f"views{number}-{seed}", environment, *words)
            (accuracies if number == 8 else views).append(run["accuracy"])
    means = [sum(values) / len(values) for values in (accuracies, views)]
    return [
        (
            "5. test accuracy and loss: --cache none, in memory, read from disk",
            ", ".join(shown),
            "equal to 4 decimals",
            close,
        ),
        (
            "5. eight epochs of augmentation, mean of three seeds: a view per epoch, --views 4",
            f"{means[0]:.4f}, {means[1]:.4f}",
            "within 0.01",
            means[1] >= means[0] - 0.01,
        ),
    ]


def kills(folder):
    """kill -9 at ten random moments; the next run must find only whole entries and give the figures of a clean one."""
    cache = folder / "cache_b"
    cache.mkdir()
    environment = own_cache(cache)
    words = ["--data", tiles(folder), "--image-size", 96, "--head-solver", "sgd", "--fine-tune-epochs", 3, "--depth", 2]
    clean, seconds = figures(folder, "clean", {"GRAFT_CACHE": environment["GRAFT_CACHE"]}, "--cache", "none")
    chance, left, whole = random.Random(0), 0, 0
    for number in range(10):
        command = [PYTHON, "-m", "pipelines", "image", *map(str, words), "--out", str(folder / f"killed{number}")]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(6, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        entries = list((cache / "features").glob("*"))
        left += sum(entry.name.startswith(".tmp-") for entry in entries)
        whole = sum(not entry.name.startswith(".tmp-") for entry in entries)
    after, _ = figures(folder, "after", {"GRAFT_CACHE": environment["GRAFT_CACHE"]})
    abandoned = sum(entry.name.startswith(".tmp-") for entry in (cache / "features").glob("*"))
    same = all(abs(after[name] - clean[name]) < 5e-5 for name in ("accuracy", "loss"))
    return [
        (
            "6. ten runs killed: half-written folders left by kills, whole entries, half-written after the next run",
            f"{left}, {whole}, {abandoned}",
            "printed, printed, 0",
            abandoned == 0,
        ),
        (
            "6. test accuracy and loss of the next run, and of one without a cache",
            f"{after['accuracy']:.4f} {after['loss']:.6f}, {clean['accuracy']:.4f} {clean['loss']:.6f}",
            "equal to 4 decimals",
            same,
        ),
    ]


def cuts(folder):
    return [tools.tests("7. suffix of prefix is the whole, at every block, gradients included", "tests/test_split.py")]


def first_features(folder):
    """Seconds from the command to the first progress of the frozen part, on the demo set, nothing cached."""
    cache = folder / "cache_c"
    cache.mkdir()
    done, seconds = graft(
        "image",
        "--data",
        "textures",
        "--depth",
        "head",
        "--out",
        folder / "demo",
        GRAFT_CACHE=own_cache(cache)["GRAFT_CACHE"],
    )
    assert done.returncode == 0, done.stderr
    computed = float(re.search(r"features: computed in (\d+) s", done.stdout)[1])
    laps = json.loads((folder / "demo" / "metrics.json").read_text())["seconds"]
    after = sum(laps[name] for name in ("training", "evaluation", "export and verification"))
    before = seconds - after
    return [
        (
            "8. demo at 224 px: seconds until features are computed; all features; head-only run as a whole",
            f"{before:.1f}, {computed:.0f}, {seconds:.0f}",
            "< 15 until the first batch",
            before < 15,
        )
    ]


CHECKS = (
    two_phase,
    random_vit,
    second_run,
    input_pipeline,
    first_features,
    growth,
    same_figures,
    kills,
    cuts,
    scratch,
)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "The cache"))
