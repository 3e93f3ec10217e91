"""Ask a served model from Python: TensorFlow Serving or Graft's own server, over REST or gRPC, without TensorFlow.

    with Client("http://localhost:8501/v1/models/photos") as client:
        answers = client.run("serving_default", {"image_bytes": [pathlib.Path("cat.jpg").read_bytes()]})

A Client answers as `serving.session.Session` does, so what asks an exported folder can ask a server.
"""

from __future__ import annotations

import random
import re
import time
import urllib.parse

import numpy as np

from models import GraftError
from serving.config import MAX_BATCH_SIZE
from serving.runtime import input_array
from serving.session import SessionError
from serving.transports import Grpc, Rest, ServerError, TryAgain

MOST_ROWS = MAX_BATCH_SIZE  # of a request: the server refuses more where it joins requests to batches
MOST_BYTES = 16 << 20  # of a request's inputs, where it has more than one row
TIMEOUT_S = 30.0  # for one request; the server's own default limit over REST
TRIES = 5  # of a request to a server that is busy or away
FIRST_WAIT_S = 0.25  # before the second try, and twice as long before each next one

_WHICH = r"(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?(?::predict)?/?"
_PATHS = {"http": re.compile(rf"(?P<prefix>.*)/v1/models/{_WHICH}"), "grpc": re.compile(rf"(?P<prefix>)/{_WHICH}")}
_PATHS["https"] = _PATHS["http"]


class Client:
    """A served model: `run` answers a signature, as `Session.run` does. Close it, or use it in a `with` statement.

    `signatures` is as in `serving.session.Session`; `name` and `version` are those of the model that was met.
    A Client belongs to one thread: it keeps one connection.
    """

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, pinned: bool = False):
        """Meet the model: fetch its version and signatures.

        Args:
            url: http://HOST:8501/v1/models/NAME or grpc://HOST:8500/NAME, with /versions/3 or /labels/stable after
                it where a certain one is meant; https:// as well.
            pinned: ask the version that was met, even when a newer one goes live meanwhile.

        Raises:
            ServerError: the server cannot be reached, or knows no such model.
            GraftError: the URL is none of these.
        """
        self.url, self._which = url, parse_url(url)
        self.name = urllib.parse.unquote(self._which["name"])
        self._transport = (Grpc if self._which["scheme"] == "grpc" else Rest)(self._which, timeout_s)
        try:
            self.version, self.signatures = self._retried(self._transport.metadata)
        except BaseException:
            self.close()
            raise
        if pinned:
            self._which.update(version=str(self.version), label=None)

    def run(self, signature: str, inputs: dict) -> dict[str, np.ndarray]:
        """Answer one signature: {input name: array, or list of bytes} -> {output name: array}.

        Dimension 0 of inputs and outputs counts rows; many rows travel in several requests. Strings are bytes.

        Raises:
            ServerError: the server refused a request, or gave no answer in time.
            SessionError: unknown names and wrong dtypes, found before anything is sent.
        """
        if signature not in self.signatures:
            raise SessionError(f"{self.url}: no signature {signature!r}. Expected one of: {', '.join(self.signatures)}")
        expected, outputs = (self.signatures[signature][side] for side in ("inputs", "outputs"))
        what = f"{self.url}: signature {signature}"
        if set(inputs) != set(expected):
            raise SessionError(f"{what}: got the inputs {sorted(inputs)}, expected {sorted(expected)}")
        arrays = {name: input_array(inputs[name], *expected[name], f"{what}: input {name}") for name in inputs}
        if len({len(array) for array in arrays.values()}) > 1:
            raise SessionError(f"{what}: inputs of {[len(array) for array in arrays.values()]} rows, expected equal")
        answers = [
            self._retried(self._transport.predict, signature, {n: a[rows] for n, a in arrays.items()}, outputs)
            for rows in requests_of(list(arrays.values()))
        ]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}

    def _retried(self, call, *arguments):
        """The result of a call, tried again with growing waits while the server is busy or away."""
        for attempt in range(TRIES):
            try:
                return call(*arguments)
            except TryAgain as error:
                if attempt == TRIES - 1:
                    raise ServerError(
                        f"{self.url}: no answer in {TRIES} tries: {error}. Does the server run, and is this its port?"
                    ) from error
                # Random, or all clients of a busy server would come back at the same moment.
                time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))
            except ServerError as error:
                raise ServerError(f"{self.url}: {error}") from error.__cause__

    def close(self) -> None:
        self._transport.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def is_url(text: str) -> bool:
    """Whether a text is meant as the address of a served model."""
    return text.split("://")[0] in _PATHS and "://" in text


def parse_url(url: str) -> dict:
    """The parts of a model's address: scheme, host, port, prefix, name, version and label (None where not named)."""
    refused = GraftError(
        f"{url}: not the address of a served model. Expected http://HOST:8501/v1/models/NAME or "
        f"grpc://HOST:8500/NAME, where wanted with /versions/3 or /labels/stable after it."
    )
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port that is no number
        raise refused from error
    match = parts.scheme in _PATHS and parts.hostname and _PATHS[parts.scheme].fullmatch(parts.path)
    if not match or parts.query or parts.fragment:
        raise refused
    return {"scheme": parts.scheme, "host": parts.hostname, "port": port, **match.groupdict()}


def requests_of(arrays: list[np.ndarray]) -> list[slice]:
    """Which rows go into which request: at most MOST_ROWS, and few enough for MOST_BYTES."""
    sizes = np.zeros(len(arrays[0]), np.int64)  # bytes of each row
    for array in arrays:
        for row, values in enumerate(array):
            sizes[row] += len(values) if isinstance(values, bytes) else values.nbytes
    slices, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        if row - start == MOST_ROWS or (row > start and total + size > MOST_BYTES):
            slices.append(slice(start, row))
            start, total = row, 0
        total += size
    return [*slices, slice(start, len(sizes))]
