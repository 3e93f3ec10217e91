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
    """A row for tests of the suite, run with pytest words: quick, slow and those of the full list."""
    command = [PYTHON, "-m", "pytest", "-q", "-m", "", "--durations=0", *words]
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
    """Run all checks, or those named on the command line, and write what they measured into the table beside `file`.

    Each check has its part of the table, with the commit that it ran on; parts that it does not know stay.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    commit = commit_now()
    path = pathlib.Path(file).with_suffix(".md")
    parts = read_parts(path)
    names = [check.__name__ for check in checks]
    unknown = set(sys.argv[1:]) - set(names)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such check. There are: {', '.join(names)}")
    fine = True
    with tempfile.TemporaryDirectory(prefix="graft-acceptance-") as folder:
        for check in checks:
            if sys.argv[1:] and check.__name__ not in sys.argv[1:]:
                continue
            print(f"== {check.__name__}", flush=True)
            lines = [f"On commit {commit}:", "", "| what | measured | wanted | |", "|---|---|---|---|"]
            for what, measured, expected, holds in check(pathlib.Path(folder)):
                fine &= bool(holds)
                cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in (what, measured, expected)]
                lines.append(f"| {' | '.join(cells)} | {'yes' if holds else '**no**'} |")
                print(lines[-1], flush=True)
            parts[check.__name__] = "\n".join(lines)
            text = f"# {title}\n\n`make acceptance OF={path.stem}`, two CPU cores.\n"
            text += "".join(
                f"\n## {name}\n\n{parts[name]}\n" for name in [*names, *(parts.keys() - set(names))] if name in parts
            )
            path.write_text(text)
    return 0 if fine else 1


def commit_now() -> str:
    """The commit of the checkout, and "-dirty" where anything but these tables has changed since."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests/acceptance/*.md")
    return git("describe", "--always") + ("-dirty" if changed else "")


def read_parts(path: pathlib.Path) -> dict[str, str]:
    """The parts of a table that was written before, by the name of their check."""
    if not path.is_file():
        return {}
    found = (part.partition("\n") for part in path.read_text().split("\n## ")[1:])
    return {name: text.strip() for name, _, text in found}
