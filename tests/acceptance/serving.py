"""Full-size checks of serving, about an hour on two cores; writes serving.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from tests.acceptance import tools
from tests.acceptance.tools import PYTHON, ROOT

BATCHES = (1, 8)  # of export_speed
MOST_TIMES_AS_LONG = 1.3  # as the best other engine
KERNEL_SHARE = 0.85


def said_by(module: str, *words) -> str:
    """What a module printed; it may end with 1, where what it measured is not what is wanted."""
    done = subprocess.run([PYTHON, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    print(done.stdout, flush=True)
    return done.stdout


def whole(row):
    """A row of tests in which none was skipped."""
    what, measured, wanted, holds = row
    return what, measured, f"{wanted}, none skipped", holds and "skipped" not in measured


def interfaces(folder):
    files = ("tests/test_server_rest.py", "tests/test_server_grpc.py", "tests/test_tensors.py", "tests/test_client.py")
    names = ("tests/test_server_rest.py", "tests/test_server_grpc.py", "-k", "of_the_loader")
    return [
        tools.tests("1. REST and gRPC as the contract says, over real sockets; the clients", *files),
        whole(tools.tests("2. an image and a text model: the served answers are the C++ loader's", *names)),
    ]


def hot_swap(folder):
    said = said_by("tests.acceptance.hot_swap")
    load = re.search(r"(\d+) clients, (\d+) s: (\d+) answers over REST, (\d+) over gRPC", said)
    failed = int(re.search(r"failed requests: (\d+)", said)[1])
    wrong = int(re.search(r"not live: (\d+)", said)[1])
    growth = float(re.search(r"grows by (-?[\d.]+)%", said)[1])
    return [
        (
            "3. 10 versions published and 3 rolled back under load: failed requests",
            f"{failed} of {load[0]}",
            "0",
            not failed,
        ),
        ("3. answers from a version that was not live", wrong, "0", not wrong),
        ("3. resident memory, growth per swap over the last five", f"{growth}%", "< 1%", growth < 1),
    ]


def publishers(folder):
    killed = tools.tests(
        "4. 30 publishers killed at random moments: no partial version, the next one publishes",
        *("-m", "acceptance", "tests/test_publish.py"),
    )
    return [whole(killed), full_disk()]


def full_disk():
    """The test mounts a small tmpfs: as a user other than root, in a name space of its own."""
    command = [PYTHON, "-m", "pytest", "-q", "-m", "not acceptance", "tests/test_publish.py", "-k", "full_disk"]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--mount", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    what = "4. a full disk (tmpfs of 1 MB): a clear error, nothing visible"
    return whole((what, done.stdout.strip().splitlines()[-1], "passed", done.returncode == 0))


def load(folder):
    said = said_by("tests.benchmarks.server_load", "--seconds", "4")
    start = float(re.search(r"first answer: ([\d.]+) s", said)[1])
    rows = [("5. server start to first answer, EfficientNet-Lite0", f"{start} s", "< 5 s", start < 5)]
    for which, api, percent, rest in re.findall(r"batching (on|off), 32 clients over (\w+): (\d+)% (.*)", said):
        what = f"5. 32 clients over {api}, batching {which}: throughput of the bare C++ session"
        wanted, holds = (">= 85%", int(percent) >= 85) if which == "on" else ("printed", True)
        rows.append((what, f"{percent}% {rest}", wanted, holds))
    resident = re.search(r"resident at the end: (.*)", said)[1]
    return [*rows, ("5. resident memory of the server at the end", resident, "printed", True)]


def speed(folder):
    """Other engines are needed, see tests/benchmarks/export_speed.py.

    Where one of them is faster by more than is wanted, the profile must show that TensorFlow's time is that of oneDNN's
    own fused kernels: then nothing is left that another graph could save.
    """
    said = said_by("tests.benchmarks.export_speed", "--profile", "--batches", *map(str, BATCHES))
    rows = []
    for batch, text in zip(BATCHES, re.findall(r"variables take (.*)", said), strict=True):
        times = dict(re.findall(rf"^ *{batch}   (\S.*?) {{2,}}([\d.]+)", said, re.MULTILINE))
        what, listed = f"5. export_speed, batch {batch}", "; ".join(f"{side} {ms}" for side, ms in times.items())
        rows.append((f"{what}: ms per image", listed, "printed", True))
        profiles = re.findall(rf"^  batch {batch}: (.*)", said, re.MULTILINE)  # with oneDNN, then without
        fused = sum(float(ms) for ms in re.findall(r"_MklNativeFused\w+ ([\d.]+) ms", profiles[0]))
        share = fused / (batch * float(times["TensorFlow, constants"]))
        other = re.search(r"constants ([\d.]+) times as long as", text)
        fine = other and (float(other[1]) <= MOST_TIMES_AS_LONG or share >= KERNEL_SHARE)
        rows.append(
            (
                f"{what}: variables take",
                f"{text}; {share:.0%} of the time of constants is in oneDNN's fused convolutions",
                f"constants <= {MOST_TIMES_AS_LONG} times the best engine, or {KERNEL_SHARE:.0%} in these kernels",
                fine,
            )
        )
        for switch, kernels in zip(("on", "off"), profiles, strict=True):
            rows.append((f"{what}: ms of a batch in TensorFlow's kernels, oneDNN {switch}", kernels, "printed", True))
    return rows


def fuzz(folder):
    done = subprocess.run(
        [PYTHON, "-m", "tests.acceptance.fuzz", "--count", "50000"], cwd=ROOT, capture_output=True, text=True
    )
    what = "6. 50,000 malformed REST bodies and gRPC messages"
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    return [(what, said, "every answer a proper error", done.returncode == 0)]


def verification(folder):
    files = ("tests/test_verify.py", "tests/test_verify_batches.py", "tests/test_verify_libraries.py")
    return [tools.tests("7. what must fail verification fails with its own message", *files)]


def page(folder):
    return [whole(tools.tests("8. the page in a real browser, with screenshots", "tests/test_page.py"))]


CHECKS = (load, speed, hot_swap, publishers, fuzz, interfaces, verification, page)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "Serving"))
