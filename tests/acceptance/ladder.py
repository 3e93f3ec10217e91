"""What `--depth auto` exports against a full search, in which every rung is trained and the best one by test is known.

    python -m tests.acceptance.ladder --data textures topics digits --seeds 10

A full search is what someone without `auto` would do: `--depth head`, `--depth 2` and `--depth full`, one after the
other. Each side starts with an empty cache. Prints a line per run and a table. About 10 minutes per seed on two cores,
4 with --image-size 96.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

from tests.acceptance.tools import graft, own_cache

RUNGS = {"head": "head", "light": "2", "full": "full"}  # of auto, and as a depth of its own
WITHIN = 0.01  # of test accuracy


def trained(folder: pathlib.Path, data: str, depth: str, seed: int, image_size: int) -> dict:
    """What a run exports has this test accuracy, took these seconds, and came from that rung; its cache is `folder`."""
    words = [] if data == "topics" else ["--image-size", image_size]
    words += ["--data", data, "--depth", depth, "--seed", seed, "--out", folder / f"{data}-{depth}-{seed}"]
    done, seconds = graft("text" if data == "topics" else "image", *words, GRAFT_CACHE=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((words[-1] / "metrics.json").read_text())
    found = {
        "accuracy": figures["test"]["accuracy"],
        "seconds": seconds,
        "training_seconds": figures["seconds"]["training"],
        "rungs": [row["rung"] for row in figures.get("climb", {}).get("rungs", [])],
        "best": figures.get("climb", {}).get("best", depth),
    }
    print(f"{data}, seed {seed}, --depth {depth}: {found}", flush=True)
    return found


def compared(data: str, seed: int, image_size: int) -> dict:
    """One seed of both sides."""
    sides = {}
    for side, depths in (("auto", ["auto"]), ("search", list(RUNGS.values()))):
        with tempfile.TemporaryDirectory(prefix="graft-ladder-") as folder:
            own_cache(pathlib.Path(folder))
            sides[side] = [trained(pathlib.Path(folder), data, depth, seed, image_size) for depth in depths]
    (auto,), search = sides["auto"], sides["search"]
    best = max(run["accuracy"] for run in search)
    return {
        "auto": auto,
        "search": dict(zip(RUNGS, search)),
        "within": auto["accuracy"] >= best - WITHIN - 1e-9,
        "times": sum(run["seconds"] for run in search) / auto["seconds"],
        "training_times": sum(run["training_seconds"] for run in search) / auto["training_seconds"],
    }


def table(results: dict[str, list[dict]]) -> str:
    """A Markdown table: a line per data set, means over seeds."""
    lines = [
        "| data | seeds | auto | head, light, full alone | within 1 point of the best | kept by auto "
        "| search took, times auto (training alone) |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for data, rows in results.items():
        count = len(rows)
        auto = sum(row["auto"]["accuracy"] for row in rows) / count
        alone = ", ".join(f"{sum(row['search'][rung]['accuracy'] for row in rows) / count:.3f}" for rung in RUNGS)
        kept = [row["auto"]["best"] for row in rows]
        kept = ", ".join(f"{rung} {kept.count(rung)}" for rung in RUNGS if rung in kept)
        times, training = (sum(row[name] for row in rows) / count for name in ("times", "training_times"))
        lines.append(
            f"| {data} | {count} | {auto:.3f} | {alone} | {sum(row['within'] for row in rows)} | {kept} "
            f"| {times:.2f} ({training:.2f}) |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=["textures", "topics", "digits"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=0, help="0: the backbone's own")
    options = parser.parse_args()
    results = {
        data: [compared(data, seed, options.image_size) for seed in range(options.seeds)] for data in options.data
    }
    print(table(results))
    near = all(10 * sum(row["within"] for row in rows) >= 9 * len(rows) for rows in results.values())
    quicker = all(row["times"] > 1 for data, rows in results.items() if data != "digits" for row in rows)
    return 0 if near and quicker else 1


if __name__ == "__main__":
    raise SystemExit(main())
