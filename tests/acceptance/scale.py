"""Survival and scale at full size: kills at random moments, stops, workers that die, and what a run ends with then.

    python -m tests.acceptance.scale [CHECK ...]

A run is tiny here (a small random backbone, 72 pictures), so that many fit; what is compared is all of metrics.json but
`seconds` and `created`.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from tests import tiny_presets
from tests.acceptance import tools
from tests.conftest import write_png_folder

KILLS_PER_PART = 4
FLAGS = ("--depth", 1, "--head-solver", "sgd", "--head-epochs", 6, "--fine-tune-epochs", 8, "--patience", 50)
FLAGS += ("--batch-size", 4, "--checkpoint-seconds", 0.2, "--head-learning-rate", 0.003)


def prepared(folder: pathlib.Path) -> pathlib.Path:
    """A folder with pictures and a tiny preset; made once for all checks."""
    if not (folder / "pictures").exists():
        write_png_folder(folder / "pictures", per_class=24)
        tiny_presets.efficientnet(folder / "preset")
    return folder


def words(folder: pathlib.Path, out: pathlib.Path, *more) -> list[str]:
    common = ("--data", folder / "pictures", "--backbone", folder / "preset", "--out", out, *FLAGS, *more)
    return ["image", *map(str, common)]


def start(command: list[str], cache: pathlib.Path, **environment) -> subprocess.Popen:
    """`graft COMMAND` in a process of its own, its output unbuffered in OUT-lines."""
    variables = {**os.environ, "GRAFT_CACHE": str(cache), "PYTHONUNBUFFERED": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([tools.PYTHON, "-m", "pipelines", *command], cwd=tools.ROOT, env=variables, **pipes)


def figures(run_dir: pathlib.Path) -> dict:
    """metrics.json but for what two equal runs differ in."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in ("seconds", "created")}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads((run_dir / "metrics.json").read_text()))


def undisturbed(folder: pathlib.Path) -> tuple[dict, float]:
    """The figures of a run that nothing happens to, and the seconds from its first word to its end."""
    out = folder / "undisturbed"
    process = start(words(folder, out), folder / "cache-undisturbed")
    process.stdout.readline()
    started = time.perf_counter()
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    return figures(out), time.perf_counter() - started


def place_of(run_dir: pathlib.Path) -> str:
    """What a killed run had reached, by what lies in its folder."""
    if not run_dir.exists():
        return "reading data"
    names = sorted(path.name for path in (run_dir / "checkpoints" / "resume").glob("*.npz"))
    if (run_dir / "metrics.json").exists():
        return "complete"
    if not names:
        return "caching or the first steps"
    if names[-1] == "2-fine_tune.ended.npz":
        return "evaluation and export"
    return f"{names[-1].removesuffix('.npz')}"


def killed(part: int, folder: pathlib.Path):
    """kill -9 at random moments of a run, then `graft resume`: the same metrics.json every time."""
    folder = prepared(folder)
    expected, seconds = undisturbed(folder)
    loss, choose = expected["phases"][-1]["val_loss"], random.Random(part)
    for number in range(KILLS_PER_PART):
        out, moment = folder / f"killed{number}", choose.uniform(0.5, seconds)
        cache = folder / f"cache{number}"
        process = start(words(folder, out), cache)
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = place_of(out)
        again = ["resume", str(out)] if (out / "config.yaml").exists() else words(folder, out)
        process = start(again, cache)
        _, errors = process.communicate()
        found = figures(out) if process.returncode == 0 else None
        ended = f"validation loss {found['phases'][-1]['val_loss']:.9f}" if found else errors.strip().splitlines()[-1]
        equal = "all figures equal" if found == expected else "**other figures**"
        left = (out / "checkpoints" / "resume").exists()
        yield (
            f"killed {moment:.1f} s after its first word ({reached}), then `graft {again[0]}`",
            f"exit {process.returncode}, {ended}, {equal}",
            f"validation loss {loss:.9f}, all figures equal",
            found == expected and not left,
        )


def killed_part(part: int):
    """A check of its own for some of the kills, so that none takes long."""
    check = functools.partial(killed, part)
    check.__name__ = f"killed_{part}"
    return check


CHECKS = [*map(killed_part, range(1, 6))]

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, __file__, "Scale and survival: the full list"))
