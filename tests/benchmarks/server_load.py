"""The embedded server under load against the bare C++ session: `python -m tests.benchmarks.server_load`.

EfficientNet-Lite0 with ten classes, 224-pixel JPEG files of about 25 kB, one per request. The clients run in a process
of their own on the same cores (tests/benchmarks/load_client.py); the CPU time that they take is printed. Batching is
that of serving/deploy, with as many threads as CPUs. The bare session is `serving.session.Session` in a process of its
own, called in a loop by as many threads, with batches of the sizes that the server has just made of its requests. Both
alternate for some rounds; medians count.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
from PIL import Image

from serving.config import read_config, write_config
from tests.acceptance.tools import PYTHON, ROOT
from tests.benchmarks.load_client import asking
from tests.embedded_server import ask, free_ports

NAME, FILES, SIDE = "photos", 64, 224
GRAIN, QUALITY = 4, 90  # of the noise: files as large as photographs of this size
THREADS = 64  # of each interface, as in serving/deploy/kubernetes
CPUS = os.cpu_count() or 1
COUNTING_SERVER = """
import sys, time
from serving import batching, server
run_batch, log = batching.run_batch, open(sys.argv[1], "w", 1)

def counted(session, batch, *others):
    print(time.time(), batch.rows, file=log)
    return run_batch(session, batch, *others)

batching.run_batch = counted
sys.exit(server.main(sys.argv[2:]))
"""  # the server, with a line per batch in a file
PARAMETERS_FILE = ROOT / "serving" / "deploy" / "config" / "batching_params.pbtxt"


def export(folder: str) -> None:
    """Write the model; in a process of its own, for TensorFlow takes seconds and memory."""
    from models.backbone import load_backbone
    from models.classifier import Classifier
    from serving.export import export_image_classifier

    backbone = load_backbone("efficientnet_lite0")
    names = [f"class {number}" for number in range(10)]
    export_image_classifier(Classifier(backbone, len(names)), backbone.preprocess, names, folder)


def write_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = [folder / f"{seed}.jpg" for seed in range(FILES)]
    for seed, file in enumerate(files):
        coarse = np.random.default_rng(seed).integers(0, 256, [SIDE // GRAIN, SIDE // GRAIN, 3], np.uint8)
        image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(file, "jpeg", quality=QUALITY)
    return files


def measure_session(folder, files, batches: list[int], threads: int, seconds: float) -> dict:
    """The bare session under threads that run batches of these sizes in turn: figures as of `measure_server`."""
    from serving.session import Session

    contents = itertools.cycle([pathlib.Path(file).read_bytes() for file in files])
    sizes, done, lock, ended = itertools.cycle(batches), [], threading.Lock(), threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            with lock:
                batch = [next(contents) for _ in range(next(sizes))]
            session.run("serving_default", {"image_bytes": batch})
            done.append((time.time(), len(batch)))

    with Session(folder) as session:
        for size in (*sorted(set(batches)), *sorted(set(batches))):  # kernels for a size are made when it first comes
            session.run("serving_default", {"image_bytes": [next(contents) for _ in range(size)]})
        workers = [threading.Thread(target=go_on) for _ in range(threads)]
        for worker in workers:
            worker.start()
        begin, end, cpus = count_cpus(psutil.Process(), seconds)
        ended.set()
        for worker in workers:
            worker.join()
        resident = psutil.Process().memory_info().rss / 1e6
    rate = sum(count for at, count in done if begin <= at < end) / (end - begin)
    return {"rate": rate, "cpu": 1e3 * cpus / rate, "resident": resident}


def count_cpus(process, seconds: float) -> tuple[float, float, float]:
    """Wait for a warm-up and a measurement, each so long; returns its begin and end and the CPUs in use then."""
    time.sleep(seconds)
    begin, before = time.time(), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    end, after = time.time(), sum(process.cpu_times()[:2])
    return begin, end, (after - before) / (end - begin)


def in_own_process(folder, files, batches, threads, seconds) -> dict:
    """`measure_session`, so that its memory is its own."""
    code = "import json, sys; from tests.benchmarks.server_load import measure_session; "
    code += "print(json.dumps(measure_session(*json.load(sys.stdin))))"
    task = json.dumps([str(folder), list(map(str, files)), batches, threads, seconds])
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, input=task, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@contextlib.contextmanager
def serving(folder, file: pathlib.Path, words=(), log=None):
    """A server; yields its ports, its process and the seconds from its start to its first answer."""
    rest, grpc = free_ports(2)
    command = [PYTHON, "-m", "serving.server"] if log is None else [PYTHON, "-c", COUNTING_SERVER, str(log)]
    command += [str(folder), "--rest_api_port", str(rest), "--port", str(grpc), *words]
    command += [f"--rest_api_num_threads={THREADS}", f"--grpc_max_threads={THREADS}"]
    body = json.dumps({"instances": [{"b64": base64.b64encode(file.read_bytes()).decode()}]})
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                status, answer = ask(rest, "POST", f"/v1/models/{NAME}:predict", body)
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        assert status == 200, answer
        yield {"rest": rest, "grpc": grpc}, psutil.Process(process.pid), seconds
    finally:
        process.terminate()
        process.wait(30)


def measure_server(ports: dict, process, api: str, clients: int, files, seconds: float) -> dict:
    """Under so many clients: requests per second, milliseconds that they wait, milliseconds of CPU per request."""
    with asking(NAME, files, **{api: (ports[api], clients)}) as seen:
        begin, end, cpus = count_cpus(process, seconds)
    assert not seen["failed"], seen["failed"]
    times = [1e3 * (answered - sent) for sent, answered, *_ in seen["answers"] if begin <= answered < end]
    rate, (p50, p99) = len(times) / (end - begin), np.percentile(times, [50, 99])
    row = {"rate": rate, "p50": p50, "p99": p99, "cpu": 1e3 * cpus / rate, "clients": seen["cpu"]}
    return {**row, "begin": begin, "end": end}


def batches_of(log, row: dict) -> list[int]:
    """The sizes of the batches that the server made during a measurement."""
    lines = [line.split() for line in pathlib.Path(log).read_text().splitlines()]
    return [int(rows) for at, rows in lines if row["begin"] <= float(at) < row["end"]]


def measure(options, folder: pathlib.Path, files) -> None:
    parameters = read_config(PARAMETERS_FILE, "BatchingParameters")
    parameters.num_batch_threads.value = CPUS
    write_config(folder / "batching_params.pbtxt", parameters)
    batching = ["--enable_batching=true", "--batching_parameters_file", str(folder / "batching_params.pbtxt")]
    log, model = folder / "batches", folder / NAME
    rows, bare, most = {}, {}, max(options.clients)
    with serving(model, files[0]) as off, serving(model, files[0], batching, log) as on:
        servers = {"off": off, "on": on}
        print(f"server start to first answer: {off[2]:.1f} s; {resident(off):.0f} MB resident then", flush=True)
        for _ in range(options.rounds):
            for which, api, clients in itertools.product(servers, options.api, options.clients):
                ports, process, _ = servers[which]
                row = measure_server(ports, process, api, clients, files, options.seconds)
                batches = batches_of(log, row) if which == "on" else [1]
                row["batch"] = float(np.mean(batches))
                rows.setdefault((which, api, clients), []).append(row)
                if clients == most:
                    threads = CPUS if which == "on" else clients
                    session = in_own_process(model / "1", files, batches, threads, options.seconds)
                    bare.setdefault((which, api), []).append(session)
        print_rows(rows)
        for (which, api), measured in bare.items():
            ratios = [row["rate"] / one["rate"] for row, one in zip(rows[which, api, most], measured, strict=True)]
            rate, cpu, megabytes = (middle(measured, name) for name in ("rate", "cpu", "resident"))
            print(
                f"batching {which}, {most} clients over {api}: {np.median(ratios):.0%} of the bare session with the "
                f"same batches ({rate:.1f} images/s, {cpu:.1f} ms of CPU each, {megabytes:.0f} MB resident)"
            )
        print(f"resident at the end: batching off {resident(off):.0f} MB, on {resident(on):.0f} MB")


def resident(server) -> float:
    return server[1].memory_info().rss / 1e6


def middle(rows: list[dict], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def print_rows(rows: dict) -> None:
    """A line per kind of load: the medians of its rounds."""
    print("batching   API    clients   requests/s   p50 ms   p99 ms   mean batch   CPU ms each   CPUs of the clients")
    for (which, api, clients), measured in rows.items():
        names = ("rate", "p50", "p99", "batch", "cpu", "clients")
        rate, p50, p99, batch, cpu, share = (middle(measured, name) for name in names)
        print(
            f"{which:8}   {api:4}   {clients:7}   {rate:10.1f}   {p50:6.0f}   {p99:6.0f}   {batch:10.1f}   "
            f"{cpu:11.1f}   {share:19.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement, and of its warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--api", nargs="+", choices=["rest", "grpc"], default=["rest", "grpc"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = write_files(folder)
        code = f"from tests.benchmarks.server_load import export; export({str(folder / NAME / '1')!r})"
        subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True, capture_output=True)
        measure(options, folder, files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
