"""Clients that ask a server all the time, in a process of their own: `python -m tests.benchmarks.load_client`.

Each client has a connection of its own and asks again as soon as it has its answer. The requests are made before the
first is sent. It prints "asking", goes on until its standard input ends, and prints what it saw as a line of JSON:
"answers" (lists: when asked and when answered in seconds since 1970, the best label, the version where the API tells
it, the client's number), "failed" (messages) and "cpu" (seconds of CPU per second).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import grpc
import uvloop

from serving.runtime import import_protos
from tests.acceptance.tools import PYTHON, ROOT

CONNECT_SECONDS = 30


class Wrong(Exception):
    """An answer that is not one: the message says what came instead."""


@contextlib.contextmanager
def asking(model: str, files, rest: tuple[int, int] = (0, 0), grpc: tuple[int, int] = (0, 0)):
    """Clients that ask meanwhile; yields a dict that holds what they saw, afterwards.

    rest, grpc: (port, clients) for each interface.
    """
    command = [PYTHON, "-m", "tests.benchmarks.load_client", "--model", model]
    command += ["--rest", *map(str, rest), "--grpc", *map(str, grpc), *map(str, files)]
    client = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout.readline() == "asking\n", "the clients did not start"
        seen = {}
        yield seen
        said, _ = client.communicate(timeout=120)
        seen.update(json.loads(said))
    finally:
        client.kill()
        client.wait()


async def ask_rest(port: int, model: str, contents: list[bytes]):
    """An open connection as a function: number of a file -> (best label, None)."""
    bodies = [json.dumps({"instances": [{"b64": base64.b64encode(one).decode()}]}).encode() for one in contents]
    head = f"POST /v1/models/{model}:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    requests = [(head % len(body)).encode() + body for body in bodies]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(number: int):
        writer.write(requests[number])
        lines = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", lines, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]))
        if not lines.startswith(b"HTTP/1.1 200 "):
            raise Wrong(f"{lines.splitlines()[0].decode()}: {body.decode()[:200]}")
        (row,) = json.loads(body)["predictions"]
        if row["error"]:
            raise Wrong(row["error"])
        return row["labels"][0], None

    return ask


async def ask_grpc(port: int, model: str, contents: list[bytes]):
    """As `ask_rest`, over gRPC: number of a file -> (best label, version)."""
    predict_pb2, services = import_protos(
        "tensorflow_serving.apis.predict_pb2", "tensorflow_serving.apis.prediction_service_pb2_grpc"
    )
    requests = []
    for content in contents:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        tensor = request.inputs["image_bytes"]
        tensor.dtype = 7  # DT_STRING
        tensor.tensor_shape.dim.add(size=1)
        tensor.string_val.append(content)
        requests.append(request)
    # Else all clients of a process would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
    stub = services.PredictionServiceStub(channel)

    async def ask(number: int):
        answer = await stub.Predict(requests[number], timeout=CONNECT_SECONDS)
        (error,) = answer.outputs["error"].string_val
        if error:
            raise Wrong(error.decode())
        return answer.outputs["labels"].string_val[0].decode(), answer.model_spec.version.value

    return ask


async def load(options) -> dict:
    """Ask until standard input ends."""
    contents = [pathlib.Path(file).read_bytes() for file in options.files]
    makers = [(ask_rest, *options.rest), (ask_grpc, *options.grpc)]
    clients = [await make(port, options.model, contents) for make, port, count in makers for _ in range(count)]
    answers, failed, ended = [], [], asyncio.Event()

    async def go_on(client: int, ask) -> None:
        for turn in itertools.count(client):
            if ended.is_set():
                return
            sent = time.time()
            try:
                label, version = await ask(turn % len(contents))
            except (Wrong, OSError, EOFError, grpc.RpcError) as error:
                failed.append(f"{type(error).__name__}: {error}")
                return  # its connection may be of no use any more
            answers.append((sent, time.time(), label, version, client))

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    print("asking", flush=True)
    started, before = time.perf_counter(), sum(os.times()[:2])
    await asyncio.gather(*itertools.starmap(go_on, enumerate(clients)))
    cpu = (sum(os.times()[:2]) - before) / (time.perf_counter() - started)
    return {"answers": answers, "failed": list(collections.Counter(failed).items()), "cpu": cpu}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rest", type=int, nargs=2, metavar=("PORT", "CLIENTS"), required=True)
    parser.add_argument("--grpc", type=int, nargs=2, metavar=("PORT", "CLIENTS"), required=True)
    parser.add_argument("files", nargs="+")
    print(json.dumps(uvloop.run(load(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
