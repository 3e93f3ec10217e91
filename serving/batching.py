"""Requests that come at about the same time, answered together: the batching of TF Serving, with its parameter file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from models import GraftError
from serving.models_table import RequestError

DEFAULTS = {"max_batch_size": 1000, "batch_timeout_micros": 0, "max_enqueued_batches": 10}  # of the server
MOST_PADDED_DIMENSIONS = 6  # as in the server
WAITED_TOO_LONG = "Run() timeout exceeded while waiting in batching queue"
QUEUE_FULL = "The batch scheduling queue to which this task was submitted is full"


@dataclass
class Batch:
    """Requests of one signature whose rows have the same shapes, or the same ranks where they are to be padded."""

    key: tuple
    started: float = field(default_factory=time.monotonic)
    rows: int = 0
    tasks: list = field(default_factory=list)  # (inputs, rows, time.monotonic() when it must be done, Future)


def read_parameters(parameters) -> dict:
    """A BatchingParameters proto -> what `start_batching` takes; raises GraftError for what is not possible."""
    values = {
        name: getattr(parameters, name).value if parameters.HasField(name) else default
        for name, default in {**DEFAULTS, "num_batch_threads": os.cpu_count() or 1}.items()
    }
    sizes = list(parameters.allowed_batch_sizes)
    if sizes and (sizes != sorted(set(sizes)) or sizes[-1] != values["max_batch_size"]):
        raise GraftError(
            f"allowed_batch_sizes {sizes}: expected increasing ones, the last one max_batch_size "
            f"({values['max_batch_size']})"
        )
    return {**values, "allowed_batch_sizes": sizes, "pad": parameters.pad_variable_length_inputs}


def start_batching(session, parameters: dict) -> tuple[Callable, Callable]:
    """(run, stop): `run` is `session.run`, joined with other threads' calls; `stop()` ends it.

    `run` raises RequestError: UNAVAILABLE where the queue is full, RESOURCE_EXHAUSTED where a request's time is over
    before its turn comes, INVALID_ARGUMENT for too large a request, FAILED_PRECONDITION for a model whose outputs do
    not have a row per row; and what `session.run` raises.
    """
    most_rows, sizes = parameters["max_batch_size"], parameters["allowed_batch_sizes"]
    timeout = parameters["batch_timeout_micros"] / 1e6
    changed = threading.Condition()
    queue: list[Batch] = []  # oldest first
    ended = threading.Event()

    def run(signature: str, inputs: dict, timeout_seconds: float | None = None) -> dict:
        arrays = {name: value if isinstance(value, np.ndarray) else np.asarray(value) for name, value in inputs.items()}
        rows = count_rows(arrays)
        if rows > most_rows:
            message = f"Task size {rows} is larger than maximum input batch size {most_rows}"
            raise RequestError("INVALID_ARGUMENT", message)
        if rows == 0:
            return session.run(signature, arrays, timeout_seconds)  # there is nothing to share
        deadline = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds
        key = batch_key(signature, arrays, parameters["pad"])
        answer = Future()
        with changed:
            batch = next((one for one in queue if one.key == key and one.rows + rows <= most_rows), None)
            if batch is None:
                if len(queue) >= parameters["max_enqueued_batches"]:
                    raise RequestError("UNAVAILABLE", QUEUE_FULL)
                batch = Batch(key)
                queue.append(batch)
            batch.rows += rows
            batch.tasks.append((arrays, rows, deadline, answer))
            changed.notify()
        return answer.result()

    def next_batch() -> Batch | None:
        """Wait for a batch that is full or old enough; None at the end."""
        with changed:
            while not ended.is_set():
                now = time.monotonic()
                ready = next((one for one in queue if one.rows >= most_rows or now - one.started >= timeout), None)
                if ready is not None:
                    queue.remove(ready)
                    return ready
                changed.wait(queue[0].started + timeout - now if queue else None)
        return None

    def work() -> None:
        while (batch := next_batch()) is not None:
            try:
                answers = run_batch(session, batch, sizes)
            except Exception as error:  # of whatever kind: who waits must learn of it
                for *_, answer in batch.tasks:
                    answer.set_exception(error)
            else:
                for (*_, answer), outputs in zip(batch.tasks, answers, strict=True):
                    answer.set_result(outputs)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(parameters["num_batch_threads"])]
    for thread in threads:
        thread.start()

    def stop() -> None:
        with changed:
            ended.set()
            changed.notify_all()
        for thread in threads:
            thread.join()

    return run, stop


def count_rows(arrays: dict[str, np.ndarray]) -> int:
    """The first dimension, which all inputs must share."""
    if any(array.ndim == 0 for array in arrays.values()):
        raise RequestError("INVALID_ARGUMENT", "Batching session Run() input tensors must have at least one dimension")
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1:
        message = "Batching session Run() input tensors must have equal 0th-dimension size"
        raise RequestError("INVALID_ARGUMENT", message)
    return counts.pop()


def batch_key(signature: str, arrays: dict[str, np.ndarray], pad: bool) -> tuple:
    """Requests with the same key may share a batch."""
    described = ((name, array.dtype, array.ndim if pad else array.shape[1:]) for name, array in arrays.items())
    return (signature, *sorted(described, key=lambda one: one[0]))


def pad_rows(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays of one rank, padded behind with each one's own first element until all rows have one shape."""
    if len({array.shape[1:] for array in arrays}) == 1:
        return arrays
    if arrays[0].ndim > MOST_PADDED_DIMENSIONS:
        raise RequestError("INVALID_ARGUMENT", "Only tensors with rank from 1 to 6 can be padded.")
    if any(array.size == 0 for array in arrays):
        raise RequestError("INVALID_ARGUMENT", "Got empty tensor in batch of non-empty tensors.")
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    padded = []
    for array in arrays:
        whole = np.full((len(array), *largest), array.flat[0], array.dtype)
        whole[tuple(slice(size) for size in array.shape)] = array
        padded.append(whole)
    return padded


def run_batch(session, batch: Batch, sizes: list[int]) -> list[dict]:
    """The outputs of each task. The batch is padded to an allowed size with the first row of its last task."""
    now, deadline = time.monotonic(), max(task[2] for task in batch.tasks)
    if deadline <= now:
        raise RequestError("RESOURCE_EXHAUSTED", WAITED_TOO_LONG)
    rows = next((size for size in sizes if size >= batch.rows), batch.rows)
    inputs = {}
    for name in batch.tasks[0][0]:
        arrays = pad_rows([task[0][name] for task in batch.tasks])
        inputs[name] = np.concatenate(arrays + [arrays[-1][:1]] * (rows - batch.rows))
    outputs = session.run(batch.key[0], inputs, None if deadline == float("inf") else deadline - now)
    for name, values in outputs.items():
        if values.ndim == 0 or len(values) != rows:
            raise RequestError(
                "FAILED_PRECONDITION",
                f"Batched output tensor {name} has shape {list(values.shape)}, expected {rows} rows",
            )
    answers, start = [], 0
    for _, count, *_ in batch.tasks:
        answers.append({name: values[start : start + count] for name, values in outputs.items()})
        start += count
    return answers
