"""Swapping versions under load: `python -m tests.acceptance.hot_swap`.

An embedded server answers 50 clients, half over REST and half over gRPC, in a process of their own, while 10 versions
are published and 3 are rolled back as `graft publish` and `graft rollback` do it. The best label of every answer names
the model that gave it: it must be one that was live between question and answer. A version is live from its rename
until the server says that a newer one answers. Prints resident memory after each swap.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import psutil

from tests.acceptance.tools import PYTHON, ROOT
from tests.benchmarks.load_client import asking
from tests.embedded_server import ask, running

NAME, MODELS, FILES = "photos", 11, 16
ROLLED_BACK_AFTER = (4, 7, 10)  # publications
CLASSES = [f"model {number}" for number in range(MODELS)]
LAST = 5  # swaps over which memory must not grow


def export(folder: str) -> None:
    """Write the models 0, 1, ...: the best label of each is its own name; and images. In a process of its own."""
    import numpy as np

    from serving.export import export_image_classifier
    from tests.test_export import encoded_image, tiny_classifier

    model = tiny_classifier(MODELS)
    for number in range(MODELS):
        model.head.bias.assign(100.0 * np.eye(MODELS)[number])
        export_image_classifier(model, model.backbone.preprocess, CLASSES, pathlib.Path(folder) / str(number))
    for seed in range(FILES):
        (pathlib.Path(folder) / f"{seed}.jpg").write_bytes(encoded_image(seed, "jpeg", (375, 500, 3)))


def state_of(port: int, number: int) -> str:
    """The state of a version, as the server tells it; "" while it does not know it."""
    status, body = ask(port, "GET", f"/v1/models/{NAME}/versions/{number}")
    return json.loads(body)["model_version_status"][0]["state"] if status == 200 else ""


def wait_for_state(port: int, number: int, state: str) -> float:
    """Wait until a version has this state; returns when it was seen to have it, in seconds since 1970."""
    for _ in range(6000):
        if state_of(port, number) == state:
            return time.time()
        time.sleep(0.01)
    raise AssertionError(f"version {number} is {state_of(port, number)!r} after a minute, expected {state}")


def swap_versions(models: pathlib.Path, repository: pathlib.Path, port: int, process, seconds: float) -> list[dict]:
    """Publish and roll back, spread over so many seconds; a row per version that was live."""
    from serving.publish import publish, rollback

    rows = [{"number": 1, "model": 0, "what": "published", "from": 0.0, "until": float("inf")}]
    rows[0]["resident"] = process.memory_info().rss / 1e6
    plan = [
        step for number in range(1, MODELS) for step in (number, *(["back"] if number in ROLLED_BACK_AFTER else []))
    ]
    started = time.monotonic()
    for turn, step in enumerate(plan):
        time.sleep(max(0.0, started + turn * seconds / len(plan) - time.monotonic()))
        if step == "back":
            folder, origin = rollback(repository, NAME)
            # A copy of a published version: the one before the one that was live.
            row = {"model": next(row["model"] for row in rows if row["number"] == origin), "what": "rolled back"}
        else:
            folder, _ = publish(models / str(step), repository, NAME, {}, {})
            row = {"model": step, "what": "published"}
        number = int(folder.name)
        # The rename is the last change to the folder itself.
        row.update({"number": number, "from": folder.stat().st_ctime, "until": float("inf")})
        rows[-1]["until"] = wait_for_state(port, number, "AVAILABLE")
        wait_for_state(port, rows[-1]["number"], "END")
        rows.append({**row, "resident": process.memory_info().rss / 1e6})
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    return rows


def wrong_answers(answers: list, rows: list[dict]) -> list[str]:
    """Answers of a model that was not live between question and answer, or under a number that is not its own."""
    found = []
    models, last = {row["number"]: row["model"] for row in rows}, {}
    for sent, answered, label, number, client in answers:
        model = CLASSES.index(label)
        live = [row for row in rows if row["model"] == model and answered >= row["from"] and sent <= row["until"]]
        if not live:
            found.append(f"model {model}, which was not live at {sent:.2f}")
        if number is not None and models[number] != model:
            found.append(f"model {model} as version {number}, which is model {models[number]}")
        if number is not None and number < last.get(client, 0):
            found.append(f"version {number} after version {last[client]}")
        last[client] = number or 0
    return found


def growth(rows: list[dict]) -> float:
    """Of resident memory per swap, over the last ones."""
    return (rows[-1]["resident"] / rows[-1 - LAST]["resident"]) ** (1 / LAST) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="at least; until all swaps are done")
    parser.add_argument("--clients", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        models, repository = pathlib.Path(name) / "models", pathlib.Path(name) / "repository"
        code = f"from tests.acceptance.hot_swap import export; export({str(models)!r})"
        subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, capture_output=True)
        from serving.publish import publish

        publish(models / "0", repository, NAME, {}, {})
        with running(repository / NAME, name=NAME) as (rest, grpc, process):
            halves = {"rest": (rest, options.clients - options.clients // 2), "grpc": (grpc, options.clients // 2)}
            started = time.monotonic()
            with asking(NAME, sorted(models.glob("*.jpg")), **halves) as seen:
                rows = swap_versions(models, repository, rest, psutil.Process(process.pid), options.seconds)
            seconds = time.monotonic() - started
    answers, failed = seen["answers"], sum(count for _, count in seen["failed"])
    wrong = wrong_answers(answers, rows)
    print("version   model                   resident MB")
    for row in rows:
        print(f"{row['number']:7}   {row['model']:5}   {row['what']:11}   {row['resident']:14.1f}")
    by_api = [sum((row[3] is None) == rest for row in answers) for rest in (True, False)]
    print(f"{options.clients} clients, {seconds:.0f} s: {by_api[0]} answers over REST, {by_api[1]} over gRPC")
    print(f"failed requests: {failed} {seen['failed'][:3]}")
    print(f"answers from a version that was not live: {len(wrong)} {wrong[:3]}")
    print(f"resident memory grows by {growth(rows):.2%} per swap over the last {LAST}")
    return int(bool(failed or wrong or growth(rows) >= 0.01))


if __name__ == "__main__":
    sys.exit(main())
