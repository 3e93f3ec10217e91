"""Two sides of a benchmark in alternating order, each run in a process of its own with an empty cache."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tests.acceptance.tools import PYTHON, ROOT, own_cache


def run_sides(module: str, runs: int, *words) -> dict[str, list[dict]]:
    """Run `python -m module --side graft|plain --seed N` and print what each run took.

    A run prints one line of JSON: phase_1 and total in seconds, accuracy. Returns {"graft": rows, "plain": rows}.
    """
    results = {"graft": [], "plain": []}
    print("side    seed   phase 1   both phases   test accuracy")
    for seed in range(runs):
        for side in ("graft", "plain") if seed % 2 == 0 else ("plain", "graft"):
            with tempfile.TemporaryDirectory() as cache:
                command = [PYTHON, "-m", module, "--side", side, "--seed", str(seed), *words]
                environment = own_cache(pathlib.Path(cache))
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            results[side].append(row)
            figures = f"{row['phase_1']:7.1f} s   {row['total']:9.1f} s   {row['accuracy']:.3f}"
            print(f"{side:7} {seed:4}   {figures}", flush=True)
    return results


def summary(results: dict[str, list[dict]]) -> tuple[dict, dict]:
    """Print and return ({side: {figure: median seconds}}, {side: mean accuracy}) of `run_sides`."""
    seconds = {
        side: {name: float(np.median([row[name] for row in rows])) for name in ("phase_1", "total")}
        for side, rows in results.items()
    }
    accuracies = {side: float(np.mean([row["accuracy"] for row in rows])) for side, rows in results.items()}
    times = {name: seconds["plain"][name] / seconds["graft"][name] for name in ("phase_1", "total")}
    print(f"medians: {times['phase_1']:.1f} times sooner in phase 1, {times['total']:.1f} times over both phases")
    print(f"mean test accuracy: Graft {accuracies['graft']:.3f}, plain {accuracies['plain']:.3f}")
    return seconds, accuracies
