"""A rerun with another head against the first run: `python -m tests.benchmarks.second_run`.

The images of `two_phase` at the backbone's native 224 px, head only; the second run differs in label smoothing. Each
run is a process of its own with the same cache; imports and loading weights are outside, everything from the first file
read to the test metrics inside.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tests.acceptance.tools import PYTHON, ROOT, own_cache
from tests.benchmarks.picture import save_result

NATIVE_SIDE = 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs, with seeds 0, 1, ...")
    parser.add_argument("--json", help="file to which the result is added")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "LABEL_SMOOTHING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        from tests.benchmarks.two_phase import graft_side

        print(json.dumps(graft_side(int(options.one[0]), "", "head", float(options.one[1]), side=NATIVE_SIDE)))
        return 0
    print("seed   first run   second run   test accuracies")
    ratios, seconds = [], {"first": [], "second": []}
    for seed in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            environment, rows = own_cache(pathlib.Path(folder)), []
            for label_smoothing in ("0.0", "0.1"):
                command = [PYTHON, "-m", "tests.benchmarks.second_run", "--one", str(seed), label_smoothing]
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
        ratios.append(rows[0]["total"] / rows[1]["total"])
        for which, row in zip(seconds, rows, strict=True):
            seconds[which].append(row["total"])
        accuracies = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        print(f"{seed:4}   {rows[0]['total']:7.2f} s   {rows[1]['total']:8.2f} s   {accuracies}", flush=True)
    if options.json:
        save_result(options.json, "second_run", {which: float(np.median(all)) for which, all in seconds.items()})
    print(f"median: the second run is {np.median(ratios):.1f} times sooner")
    return 0


if __name__ == "__main__":
    sys.exit(main())
