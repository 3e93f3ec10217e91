"""What the full lists have in common: the command line as users run it, and the table that is committed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from models import offline

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def graft(*words, timeout=1800, **environment):
    """Run `graft WORDS` in a process of its own; returns the finished process and its seconds."""
    started = time.perf_counter()
    command = [PYTHON, "-m", "pipelines", *map(str, words)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=variables)
    return done, time.perf_counter() - started


def own_cache(folder: pathlib.Path) -> dict[str, str]:
    """The environment of runs whose cache holds the fetched weights and data, and nothing else."""
    for name in ("wheels", "unpacked", "data"):
        (folder / name).symlink_to(offline.cache_folder() / name)
    return {**os.environ, "GRAFT_CACHE": str(folder)}


def tests(what: str, *words):
    """A row for tests of the suite, run with pytest words; slow ones too."""
    command = [PYTHON, "-m", "pytest", "-q", "-m", "not acceptance", "--durations=0", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (what, done.stdout.strip().splitlines()[-1], "passed", done.returncode == 0)


def mistakes(number: str, place: pathlib.Path, cases: dict, command: str = "image", **environment):
    """Rows for commands that must end with exit 2 and one message, within 5 s, and write nothing below `place`."""
    rows = []
    before = sorted(place.rglob("*"))
    for name, words in cases.items():
        extra = () if "--out" in words else ("--out", place / "run")
        done, seconds = graft(command, *words, *extra, **environment)
        message = done.stderr.strip().replace(str(place), "...").replace(str(pathlib.Path.home()), "~")
        clean = done.returncode == 2 and "Traceback" not in message and sorted(place.rglob("*")) == before
        rows.append(
            (
                f"{number}. {name}: {message.splitlines()[0][:160] if message else 'no message'}",
                f"exit {done.returncode}, {seconds:.1f} s",
                "exit 2, < 5 s, nothing written",
                clean and seconds < 5,
            )
        )
    return rows


def run_checks(checks, file: str, title: str) -> int:
    """Run all checks, or those named on the command line; all of them write the table beside `file`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    wanted = sys.argv[1:]
    lines = ["| what | measured | wanted | |", "|---|---|---|---|"]
    fine = True
    with tempfile.TemporaryDirectory(prefix="graft-acceptance-") as name:
        for check in checks:
            if wanted and check.__name__ not in wanted:
                continue
            print(f"== {check.__name__}", flush=True)
            for what, measured, expected, holds in check(pathlib.Path(name)):
                fine &= bool(holds)
                cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in (what, measured, expected)]
                lines.append(f"| {' | '.join(cells)} | {'yes' if holds else '**no**'} |")
                print(lines[-1], flush=True)
    if not wanted:
        path = pathlib.Path(file).with_suffix(".md")
        text = f"# {title}: the full list, on commit {commit.stdout.strip()}\n\n"
        text += f"`make acceptance OF={path.stem}`, two CPU cores.\n\n"
        path.write_text(text + "\n".join(lines) + "\n")
    return 0 if fine else 1
