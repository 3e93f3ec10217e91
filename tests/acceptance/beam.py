"""Full-size checks of batch jobs on Apache Beam, about 20 minutes on two cores; writes beam.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds). Beam has an environment
of its own: that of GRAFT_BEAM_PYTHON (a Python with the extra `beam`), else .venv-beam here, made on first use.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
from pyarrow import parquet

from models.offline import PHOTOGRAPHS
from models.offline_texts import text_data_file
from tests.acceptance import tools
from tests.acceptance.tools import ROOT, graft

IMAGES, TEXTS, BROKEN = 5_000, 20_000, 0.01
NOUNS = {"image": "images", "text": "texts"}


def beam_python() -> str:
    """The Python that has Apache Beam."""
    named = os.environ.get("GRAFT_BEAM_PYTHON")
    python = pathlib.Path(named) if named else ROOT / ".venv-beam" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        install = [
            "-m",
            "pip",
            "install",
            "-q",
            "-e",
            f"{ROOT}[beam,offline,test]",
            "-c",
            ROOT / "constraints-beam.txt",
        ]
        subprocess.run([python, *install], check=True)
    return str(python)


def trained(kind: str) -> pathlib.Path:
    """A run of the head alone on the offline set; kept between checks.

    Images with real weights; texts with the small random BERT of the tests, since 20,000 texts four times through a
    real one take an hour on two cores, and nothing here depends on what a model has learned.
    """
    run = pathlib.Path(os.environ.get("GRAFT_BEAM_MODELS", ROOT / "runs")) / f"beam-{kind}"
    if not run.is_dir():
        small = ["--backbone", ROOT / "tests" / "fixtures" / "text" / "bert", "--sequence-length", 64]
        done, _ = graft(kind, "--depth", "head", "--out", run, *(small if kind == "text" else ["--image-size", 96]))
        assert done.returncode == 0, done.stderr
    return run


# ---------------------------------------------------------------- inputs


def write_pictures(folder: pathlib.Path) -> tuple[pathlib.Path, set[str]]:
    """A manifest of 5,000 JPEG files, random crops of photographs, 1% of them broken in five ways; their paths."""
    import importlib.util

    draw = random.Random(0)
    source = pathlib.Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    photographs = [Image.open(source / file).convert("RGB") for file in PHOTOGRAPHS.values()]
    broken, every = set(), round(1 / BROKEN)
    (folder / "pictures").mkdir()
    for number in range(IMAGES):
        photograph, side = draw.choice(photographs), draw.randint(96, 200)
        left, top = (draw.randint(0, size - side) for size in photograph.size)
        file = io.BytesIO()
        photograph.crop((left, top, left + side, top + side)).save(file, "jpeg", quality=85)
        content, name = file.getvalue(), f"pictures/{number:04}.jpg"
        if number % every == every // 2:
            broken.add(name)
            way = number // every % 5
            if way == 4:
                continue  # in the manifest, but not there
            content = (b"", content[:100], b"no image at all", b"\0\0\0\x18ftypheic" + content)[way]
        (folder / name).write_bytes(content)
    manifest = folder / "pictures.csv"
    manifest.write_text("path\n" + "".join(f"pictures/{number:04}.jpg\n" for number in range(IMAGES)))
    return manifest, broken


def write_texts(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, str], set[str]]:
    """A JSONL manifest of 20,000 different texts, 1% of them empty, blank or missing; texts and broken ones by id."""
    draw = random.Random(0)
    with open(text_data_file("topics"), newline="", encoding="utf-8") as file:
        sentences = [row["text"] for row in csv.DictReader(file)]
    texts, broken, every = {}, set(), round(1 / BROKEN)
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as file:
        for number in range(TEXTS):
            text, name = f"{draw.choice(sentences)} {draw.choice(sentences)} {number}", f"texts.jsonl#{number + 1}"
            if number % every == every // 2:
                broken.add(name)
                text = ("", " \t ", None)[number // every % 3]
            else:
                texts[name] = text
            file.write(json.dumps({"text": text}) + "\n")
    return folder / "texts.jsonl", texts, broken


# ---------------------------------------------------------------- running, killing


def job_command(word: str, run, manifest, output, shard_size: int, *flags) -> list[str]:
    words = [beam_python(), "-m", "pipelines", word, run, "--input", manifest, "--output", output]
    return [*map(str, words), "--shard-size", str(shard_size), "--runner", "FnApiRunner", *flags]


def killed(command: list[str], output: pathlib.Path, more: int) -> int:
    """Start a job and kill -9 all its processes once so many more shards are done; returns how many are then."""
    before = len(list(output.glob("done/part-*")))
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere, start_new_session=True)
        while len(list(output.glob("done/part-*"))) < before + more:
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return len(list(output.glob("done/part-*")))


def completed(command: list[str]) -> tuple[str, float]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, time.perf_counter() - started


def read_job(output: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """All rows of answers/ and of failed/."""
    failed = []
    for path in sorted(output.glob("failed/part-*.csv")):
        with open(path, newline="") as file:
            failed += csv.DictReader(file)
    return parquet.read_table(output / "answers").to_pylist(), failed


def plain_predictions(run, words, out: pathlib.Path, column: str) -> dict[str, dict]:
    done, _ = graft("predict", run, *words, "--out", out, "--probabilities")
    assert done.returncode == 0, done.stderr
    with open(out, newline="", encoding="utf-8") as file:
        return {row[column]: row for row in csv.DictReader(file)}


def largest_difference(answers: list[dict], predictions: dict, key) -> tuple[float, int]:
    """Of probabilities, and how many labels differ; key: id -> that of the prediction."""
    worst, others = 0.0, 0
    for row in answers:
        same = predictions[key(row["id"])]
        wanted = np.array([float(value) for name, value in same.items() if name.startswith("p(")])
        worst = max(worst, float(np.abs(np.array(row["probabilities"]) - wanted).max()))
        others += same["label"] != row["label"]
    return worst, others


def restarted(word, run, manifest, output, shard_size, count):
    """Kill twice, once with worker processes; run to the end. Rows for the table, answers and failures."""
    command = job_command(word, run, manifest, output, shard_size)
    workers = ("--direct_num_workers", "2", "--direct_running_mode", "multi_processing")
    first = killed(command, output, 3)
    second = killed(job_command(word, run, manifest, output, shard_size, *workers), output, 3)
    stamps = {path.name: path.stat().st_mtime_ns for path in output.glob("done/part-*")}
    _, seconds = completed(command)
    kept = all((output / "done" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    answers, failed = read_job(output)
    ids = collections.Counter(row["id"] for row in answers) + collections.Counter(row["id"] for row in failed)
    shards = len(list(output.glob("done/part-*")))
    left = [path.name for path in output.rglob(".tmp-*")]
    rows = [
        (
            f"killed -9 at {first} and, with two worker processes, at {second} of {shards} shards, then run to the end "
            f"({seconds:.0f} s): inputs once each in answers or failed, shards kept, files left over",
            f"{sum(n == 1 for n in ids.values()):,} of {count:,} once, {sum(n > 1 for n in ids.values())} twice, "
            f"{'all kept' if kept else 'not kept'}, {len(left)} left over",
            "all once, none twice, all kept, none",
            len(ids) == count and set(ids.values()) == {1} and kept and not left,
        )
    ]
    return rows, answers, failed


def examples(failed: list[dict]) -> str:
    return "; ".join(dict.fromkeys(re.sub(r"starts with the bytes.*?;", "...;", row["reason"])[:60] for row in failed))


# ---------------------------------------------------------------- the list


def images(folder):
    run = trained("image")
    manifest, broken = write_pictures(folder)
    output = folder / "image-job"
    rows, answers, failed = restarted("predict", run, manifest, output, 256, IMAGES)
    predictions = plain_predictions(run, [manifest], folder / "predictions.csv", "path")
    worst, others = largest_difference(answers, predictions, lambda name: name)
    reasons = {row["id"]: row["reason"] for row in failed}
    same = all(predictions[name]["error"] == reason for name, reason in reasons.items())
    return [
        (
            f"5. {IMAGES:,} images, {len(broken)} broken: answered once; labels other than `graft predict`'s; largest "
            f"difference of a probability",
            f"{len(answers):,}, {others}, {worst:.1e}",
            f"{IMAGES - len(broken):,}, 0, 1e-6 (6 decimals in its CSV)",
            len(answers) == IMAGES - len(broken) and not others and worst <= 1e-6,
        ),
        (
            f"5. broken ones in the dead letter, with `graft predict`'s reasons: {examples(failed)}",
            f"{len(failed)}, {'the same' if same else 'others'}",
            f"{len(broken)}, the same",
            set(reasons) == broken and same and all(reasons.values()),
        ),
        *((f"5. images, {what}", *others) for what, *others in rows),
        served(run, folder, answers),
    ]


def served(run, folder, answers):
    """A row: 200 answers against those of a server, over REST."""
    from serving.client import Client
    from tests.embedded_server import running

    sample = answers[:: max(1, len(answers) // 200)][:200]
    worst, name = 0.0, next((run / "serving").iterdir()).name
    with running(run, name=name) as (port, _, _), Client(f"http://127.0.0.1:{port}/v1/models/{name}") as client:
        for start in range(0, len(sample), 32):
            batch = sample[start : start + 32]
            outputs = client.run("serving_default", {"image_bytes": [(folder / r["id"]).read_bytes() for r in batch]})
            wanted = np.array([row["probabilities"] for row in batch])
            worst = max(worst, float(np.abs(outputs["probabilities"] - wanted).max()))
    return (f"5. {len(sample)} of them asked of the embedded server over REST", f"{worst:.1e}", "1e-6", worst <= 1e-6)


def texts(folder):
    run = trained("text")
    manifest, texts, broken = write_texts(folder)
    output = folder / "text-job"
    rows, answers, failed = restarted("predict", run, manifest, output, 1024, TEXTS)
    with open(folder / "texts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text",), *((text,) for text in texts.values())])
    predictions = plain_predictions(run, [folder / "texts.csv"], folder / "texts-out.csv", "text")
    worst, others = largest_difference(answers, predictions, texts.get)
    return [
        (
            f"5. {TEXTS:,} texts, {len(broken)} broken: answered once; labels other than `graft predict`'s; largest "
            f"difference of a probability",
            f"{len(answers):,}, {others}, {worst:.1e}",
            f"{len(texts):,}, 0, 2e-6 (texts are in other batches there)",
            len(answers) == len(texts) and not others and worst <= 2e-6,
        ),
        (
            f"5. broken ones in the dead letter: {examples(failed)}",
            f"{len(failed)}",
            f"{len(broken)}",
            {row["id"] for row in failed} == broken and all(row["reason"] for row in failed),
        ),
        *((f"5. texts, {what}", *others) for what, *others in rows),
    ]


def overhead_of(kind: str, manifest: pathlib.Path):
    """A row per size: what the job costs per input on top of the bare session."""
    version = next((trained(kind) / "serving").glob("*/1"))
    said, _ = completed([beam_python(), "-m", "tests.benchmarks.batch_jobs", str(version), str(manifest)])
    found = re.findall(r"^ *(\d+) +(without Beam|on FnApiRunner) +(\d+) +(\d+)$", said, re.MULTILINE)
    first = {}
    rows = []
    for count, way, bare, added in found:
        first.setdefault(way, int(added))
        rows.append(
            (
                f"5. {NOUNS[kind]}, {int(count):,} of them, {way}: per input in the bare session; added by the job",
                f"{bare} us; {added} us",
                f"printed, bounded: at most {1.2 * first[way]:.0f} us (a quarter of the inputs, +20%)",
                int(added) <= 1.2 * first[way],
            )
        )
    return rows


def image_overhead(folder):
    return overhead_of("image", write_pictures(folder)[0])


def text_overhead(folder):
    return overhead_of("text", write_texts(folder)[0])


def tests(folder):
    command = [beam_python(), "-m", "pytest", "-q", "-m", "", "tests/test_beam.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [
        ("tests of the extra, in its environment", done.stdout.strip().splitlines()[-1], "passed", not done.returncode)
    ]


CHECKS = (images, texts, image_overhead, text_overhead, tests)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, pathlib.Path(__file__), "Batch jobs on Apache Beam"))
