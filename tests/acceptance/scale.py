"""Survival and scale at full size: kills at random moments, stops, workers that die, and what a run ends with then.

    python -m tests.acceptance.scale [CHECK ...]

A run is tiny here (a small random backbone, 72 pictures), so that many fit; what is compared is all of metrics.json but
`seconds` and `created`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import traceback

import numpy as np

from tests import loopback
from tests.acceptance import tools
from tests.conftest import write_png_folder

PR_SET_PDEATHSIG = 1  # of Linux
KILLS_PER_PART = 2
FLAGS = ("--depth", 1, "--head-solver", "sgd", "--head-epochs", 6, "--fine-tune-epochs", 8, "--patience", 50)
FLAGS += ("--batch-size", 4, "--checkpoint-seconds", 0.2, "--head-learning-rate", 0.003)


def prepared(folder: pathlib.Path) -> pathlib.Path:
    """A folder with pictures and a tiny preset; made once for all checks."""
    if not (folder / "pictures").exists():
        write_png_folder(folder / "pictures", per_class=24)
        code = "import pathlib, sys; from tests import tiny_presets; "
        code += "tiny_presets.efficientnet(pathlib.Path(sys.argv[1]))"
        subprocess.run([tools.PYTHON, "-c", code, str(folder / "preset")], check=True, capture_output=True)
    return folder


def words(folder: pathlib.Path, out: pathlib.Path, *more) -> list[str]:
    common = ("--data", folder / "pictures", "--backbone", folder / "preset", "--out", out, *FLAGS, *more)
    return ["image", *map(str, common)]


@functools.cache
def load_everything() -> None:
    """Import all that a run imports, once: each run is then a process forked from here, and the kills are many."""
    import serving.export  # noqa: F401


def start(command: list[str], out: pathlib.Path, cache: pathlib.Path, number: int = 0, **environment) -> int:
    """`graft COMMAND` in a forked process of its own, its output in OUT.NUMBER.log; returns the process id."""
    load_everything()
    from pipelines.__main__ import main

    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no run outlives the list
        try:
            with open(f"{out}.{number}.log", "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os.environ.update(environment, GRAFT_CACHE=str(cache))
                code = main(command)
                sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def figures(run_dir: pathlib.Path) -> dict:
    """metrics.json but for what two equal runs differ in."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in ("seconds", "created")}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads((run_dir / "metrics.json").read_text()))


def log_of(out: pathlib.Path, number: int = 0) -> str:
    return pathlib.Path(f"{out}.{number}.log").read_text()


@functools.cache
def undisturbed(folder: pathlib.Path) -> tuple[dict, float]:
    """The figures of a run that nothing happens to, and its seconds."""
    out, started = folder / "undisturbed", time.perf_counter()
    code = ended(start(words(folder, out), out, folder / "cache-undisturbed"))
    if code:
        sys.exit(log_of(out))
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
        name, moment = f"{part}-{number}", choose.uniform(0, seconds)
        out, cache = folder / f"killed{name}", folder / f"cache{name}"
        child = start(words(folder, out), out, cache)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ended(child)
        reached = place_of(out)
        again = ["resume", str(out)] if (out / "config.yaml").exists() else words(folder, out)
        code = ended(start(again, out, cache))
        found = figures(out) if code == 0 else None
        told = (
            f"validation loss {found['phases'][-1]['val_loss']:.9f}" if found else out.with_suffix(".log").read_text()
        )
        equal = "all figures equal" if found == expected else "**other figures**"
        left = (out / "checkpoints" / "resume").exists()
        yield (
            f"killed after {moment:.1f} of {seconds:.1f} s ({reached}), then `graft {again[0]}`",
            f"exit {code}, {told[-200:]}, {equal}",
            f"validation loss {loss:.9f}, all figures equal",
            found == expected and not left,
        )


def killed_part(part: int):
    """A check of its own for some of the kills, so that none takes long."""
    check = functools.partial(killed, part)
    check.__name__ = f"killed_{part}"
    return check


def stopped(folder: pathlib.Path):
    """SIGTERM at random moments: out within 10 s with 75, and `graft resume` ends the run as if it had not been."""
    folder = prepared(folder)
    expected, seconds = undisturbed(folder)
    choose = random.Random(75)
    for number in range(3):
        out, moment, cache = folder / f"stopped{number}", choose.uniform(0.2, 0.8) * seconds, folder / f"term{number}"
        child = start(words(folder, out), out, cache)
        time.sleep(moment)
        os.kill(child, signal.SIGTERM)
        asked = time.perf_counter()
        code, waited = ended(child), time.perf_counter() - asked
        reached = place_of(out)
        again = ["resume", str(out)] if (out / "config.yaml").exists() else words(folder, out)
        resumed = ended(start(again, out, cache))
        same = resumed == 0 and figures(out) == expected
        yield (
            f"SIGTERM after {moment:.1f} of {seconds:.1f} s ({reached}), then `graft {again[0]}`",
            f"exit {code} after {waited:.1f} s, then exit {resumed}, {'all' if same else 'not all'} figures equal",
            "exit 75 within 10 s, then exit 0, all figures equal",
            code == 75 and waited < 10 and same,
        )


def start_workers(folder: pathlib.Path, out: pathlib.Path, count: int, *more) -> list[int]:
    """A run with so many workers on loopback, each with a cache of its own."""
    return [
        start(
            words(folder, out, "--distribute", "multiworker", *more),
            out,
            folder / f"{out.name}-cache{number}",
            number,
            TF_CONFIG=environment["TF_CONFIG"],
        )
        for number, environment in enumerate(loopback.cluster_of(count))
    ]


def dead_worker(folder: pathlib.Path):
    """kill -9 of one of two workers mid-epoch: the other ends with 75, and after a restart the figures are the same."""
    folder = prepared(folder)
    codes = [ended(child) for child in start_workers(folder, folder / "both", 2)]
    yield "two workers, nothing happens", f"exit {codes}", "exit [0, 0]", codes == [0, 0]
    expected = figures(folder / "both")
    for victim in (1, 0):
        out = folder / f"without{victim}"
        children = start_workers(folder, out, 2)
        while "epoch  2/8" not in log_of(out):
            time.sleep(0.05)
        time.sleep(0.1)
        os.kill(children[victim], signal.SIGKILL)
        died = time.perf_counter()
        ended(children[victim])
        code, waited = ended(children[1 - victim]), time.perf_counter() - died
        reached = place_of(out)
        codes = [ended(child) for child in start_workers(folder, out, 2, "--resume")]
        same = codes == [0, 0] and figures(out) == expected
        yield (
            f"kill -9 of worker {victim}{' (the chief)' * (victim == 0)} ({reached}), then both again with --resume",
            f"the other: exit {code} after {waited:.0f} s; then {codes}, {'all' if same else 'not all'} figures equal",
            "exit 75 within 60 s; then exit [0, 0], all figures equal to those of two workers to which nothing happens",
            code == 75 and waited < 60 and same,
        )


def prepared_for_workers(folder: pathlib.Path) -> pathlib.Path:
    if not (folder / "texts.csv").exists():
        write_png_folder(folder / "pictures", per_class=15, side=32)
        colours = ("red", "green", "blue")
        rows = [f"the {colours[row % 3]} {'the ' * (row % 5)}{row},{colours[row % 3]}" for row in range(50)]
        (folder / "texts.csv").write_text("\n".join(["text,label", *rows]))
        # In a process of its own: the kills fork from this one, which must not have used TensorFlow.
        code = "import sys, tensorflow as tf; from tests.test_tfhub import ImageModule; "
        code += "tf.saved_model.save(ImageModule(), sys.argv[1])"
        subprocess.run([tools.PYTHON, "-c", code, str(folder / "module")], check=True, capture_output=True)
        code = "import pathlib, sys; from tests import tiny_text_presets; "
        code += "tiny_text_presets.write('bert', pathlib.Path(sys.argv[1]))"
        subprocess.run([tools.PYTHON, "-c", code, str(folder / "bert")], check=True, capture_output=True)
    return folder


def devices(folder: pathlib.Path):
    """Two and four logical devices, two and three workers: the losses of one device with the same global batch."""
    folder = prepared_for_workers(folder / "workers")
    command = ["-m", "tests.loopback"]
    for kind, count in (("logical devices", 2), ("logical devices", 4), ("workers", 2), ("workers", 3)):
        name = f"{kind.split()[-1]}{count}"
        for case in loopback.CASES:
            differences = compare(folder, folder / f"{name}-{case}", kind, count, case, command)
            yield (
                f"{count} {kind}, {case}: {differences['train']} training examples in batches of 12 (climb: 24)",
                f"losses differ by {differences['losses']:.1e} at most, decisions {differences['decisions']}",
                "losses by less than 1e-5, decisions equal",
                differences["losses"] < 1e-5 and differences["decisions"] == "equal",
            )


def compare(folder, out, kind: str, count: int, case: str, command: list[str]) -> dict:
    """One case on one device and on several; what differs."""
    one = alone(folder, case)
    if kind == "workers":
        processes = loopback.start_all(count, [*command, str(out), str(folder), case])
    else:
        environment = {**os.environ, "LOGICAL_DEVICES": str(count)}
        words = [tools.PYTHON, *command, str(out), str(folder), case]
        processes = [subprocess.Popen(words, env=environment)]
    codes = [process.wait() for process in processes]
    if any(codes):
        return {"train": one["train"], "losses": math.inf, "decisions": f"of processes that ended with {codes}"}
    found = json.loads(pathlib.Path(f"{out}.0.json").read_text())[case]
    gap = np.abs(np.subtract(found["losses"], one["losses"])).max()
    equal = "equal" if found["decisions"] == one["decisions"] else "**differ**"
    return {"train": one["train"], "losses": float(gap), "decisions": equal}


@functools.cache
def alone(folder: pathlib.Path, case: str) -> dict:
    """A case on one device, in a process of its own."""
    out = folder / f"alone-{case}"
    words = [tools.PYTHON, "-m", "tests.loopback", str(out), str(folder), case]
    subprocess.run(words, check=True, env={**os.environ, "LOGICAL_DEVICES": "1"})
    return json.loads(pathlib.Path(f"{out}.0.json").read_text())[case]


def broken(folder: pathlib.Path):
    """Damaged checkpoint and cache, full disk, a file that vanishes, a loss that is no number, steps in one graph."""
    files = ("tests/test_recovery.py", "tests/test_cache.py")
    yield tools.tests("damaged, full, gone, no number: tests of recovery and cache", *files)
    yield tools.tests("several steps in one graph are single steps", "tests/test_training.py", "-k", "one_graph")


def scaling(folder: pathlib.Path):
    """What a second worker brings here, beside what the machine can do at all; wants a quiet machine."""
    command = [tools.PYTHON, "-m", "tests.benchmarks.scaling"]
    done = subprocess.run(command, cwd=tools.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        what, _, figures = line.partition("  ")
        yield f"scaling: {what}", figures.strip(), "printed", True


CHECKS = [*map(killed_part, range(1, 11)), stopped, dead_worker, devices, broken, scaling]

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, __file__, "Scale and survival: the full list"))
