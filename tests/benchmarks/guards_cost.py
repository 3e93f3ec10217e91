"""What the guards that are always on cost: the same run with and without them.

    python -m tests.benchmarks.guards_cost

With: probes of transfer on at most 500 examples, CKA and neighbours on 128 after each epoch, near copies, temperature,
the gap to training, the contract of preprocessing. Without: all of these taken out, which no flag does. Each run is a
process of its own with an empty cache, sides in alternating order; importing TensorFlow is outside. CPU seconds are
printed beside wall-clock ones: they tell the same on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from tests.acceptance.tools import PYTHON, ROOT, own_cache
from tests.benchmarks.picture import save_result

SIDES = ("with", "without")


def take_guards_out() -> None:
    """Put something that does nothing in the place of each guard."""
    from pipelines import contract, results, run_training, training, transfer

    class NoGuard:
        def __init__(self, *arguments):
            pass

        def begin(self, feed):
            return None

    training.ForgettingGuard = NoGuard
    nothing = {"verdict": None, "sentence": "Not asked."}
    transfer.judge_transfer = run_training.probe_verdict = lambda *arguments, **more: nothing
    run_training.examiner = lambda *arguments: ({}, lambda features: None)
    results.judge_gap = lambda *arguments: {}
    contract.trained_image_contract = contract.trained_text_contract = lambda *arguments: None


def one(side: str, seed: int, words: list[str]) -> dict:
    """One run; the seconds from the first file read to the last one written."""
    from pipelines import image, text
    from pipelines.config import parse_config
    from pipelines.console import start_tensorflow
    from pipelines.options import TextConfig

    kind, *words = words
    words += ["--seed", str(seed), *(["--no-calibrate"] if side == "without" else [])]
    config = parse_config(words) if kind == "image" else parse_config(words, TextConfig, "graft text")
    start_tensorflow(seed)
    import pipelines.transfer  # noqa: F401  imports are outside

    if side == "without":
        take_guards_out()
    started, used = time.perf_counter(), cpu_seconds()
    folder = (image if kind == "image" else text).run(config)
    seconds = json.loads((folder / "metrics.json").read_text())["seconds"]
    return {"wall": time.perf_counter() - started, "cpu": cpu_seconds() - used, "stages": seconds}


def cpu_seconds() -> float:
    """Of this process and of those that it waited for, such as verification."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def compare(runs: int, words: list[str]) -> dict[str, list[dict]]:
    """{"with": rows, "without": rows}; prints a line for each run."""
    rows = {side: [] for side in SIDES}
    print(f"graft {' '.join(words)}\nguards    seed      wall       CPU")
    for seed in range(runs):
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            with tempfile.TemporaryDirectory(prefix="graft-guards-") as folder:
                (pathlib.Path(folder) / "cache").mkdir()
                environment = own_cache(pathlib.Path(folder) / "cache")
                command = [PYTHON, "-m", "tests.benchmarks.guards_cost", "--one", side, str(seed), *words]
                command += ["--out", str(pathlib.Path(folder) / "run")]
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr + done.stdout)
            rows[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side:8} {seed:5}   {rows[side][-1]['wall']:7.1f} s {rows[side][-1]['cpu']:7.1f} s", flush=True)
    return rows


def extra(rows: dict[str, list[dict]], figure: str) -> float:
    """What the guards add, a share of the run without them: medians."""
    with_them, without = (np.median([row[figure] for row in rows[side]]) for side in SIDES)
    return float(with_them / without - 1)


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]), sys.argv[4:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs, with seeds 0, 1, ...")
    parser.add_argument("--json", help="file to which the result is added")
    parser.add_argument("words", nargs="*", help="the run (default: image --data textures --image-size 160 --depth 2)")
    options, rest = parser.parse_known_args()
    default = ["image", "--data", "textures", "--image-size", "160", "--depth", "2"]
    rows = compare(options.runs, [*options.words, *rest] or default)
    if options.json:
        result = {side: float(np.median([row["wall"] for row in rows[side]])) for side in SIDES}
        save_result(options.json, "guards_cost", result)
    print(f"guards add {extra(rows, 'wall'):.0%} of the time and {extra(rows, 'cpu'):.0%} of the CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
