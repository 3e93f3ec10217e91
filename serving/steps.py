"""The six steps of `serving/verify.py`: functions of a task that return what to say and the facts they found.

A task is {"folder", "samples", "expected", "target", "tolerance", "contract"} and the facts of the steps before.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path

from models import GraftError
from serving.answer_checks import check_answers, check_contract, read_class_names, read_thresholds, read_unsure_below
from serving.batch_checks import check_padding, check_rows, check_warmup, read_batching
from serving.libraries import loaded_release
from serving.session import Session
from serving.static_checks import CheckFailed, check_layout, check_ops, read_metagraph


def layout(task: dict) -> tuple[str, dict]:
    """Files, signatures, dtypes; no XLA, no Python."""
    _, signatures = check_layout(task["folder"])
    signatures = sorted(signatures)
    return f"signatures {', '.join(signatures)}; any number of rows, no XLA, no Python", {"signatures": signatures}


def ops(task: dict) -> tuple[str, dict]:
    """Every op against the list of the target."""
    graph, _ = read_metagraph(Path(task["folder"]))
    found, missing_in_219 = check_ops(graph, task["target"])
    older = f"; TF Serving 2.19 lacks {', '.join(missing_in_219)}" if missing_in_219 else ""
    said = f"{len(found)}, all in TF Serving {task['target']}{older}"
    return said, {"ops": len(found), "missing_in_2.19": missing_in_219}


def answers(task: dict) -> tuple[str, dict]:
    """What the C++ loader's session answers to the samples, against what is expected; the contract of inputs first."""
    check_contract(task["folder"], task.get("contract"))
    samples, tolerance, started = task["samples"], task["tolerance"], time.monotonic()
    with Session(task["folder"]) as session:
        load_seconds = time.monotonic() - started
        difference, good = check_answers(session, samples, task["expected"], tolerance, **known_of(task["folder"]))
    compared = f"{len(samples)} samples, largest difference {difference:.1g}, allowed {tolerance:.1g}"
    return f"loaded in {load_seconds:.2f} s; {compared if samples else 'no samples given'}", {
        "good": good,
        "largest_difference": difference,
        "load_seconds": round(load_seconds, 3),
        "tensorflow": loaded_release(),
    }


def rows(task: dict) -> tuple[str, dict]:
    """Batches of every size against single rows."""
    sizes = sorted({1, 2, 3, *read_batching(task["folder"])["sizes"]})
    known = known_of(task["folder"])
    with Session(task["folder"]) as session:
        largest = max(check_rows(session, name, task["good"], **known, sizes=sizes) for name in task["signatures"])
    said = f"batches of {', '.join(map(str, [0, *sizes]))} equal single items, largest difference {largest:.1g}"
    return said, {"largest_row_difference": largest, "batch_sizes": sizes}


def padding(task: dict) -> tuple[str, dict]:
    """Rows that the server pads to the size of their neighbours."""
    known = known_of(task["folder"]) | {"pads": read_batching(task["folder"])["pads"]}
    with Session(task["folder"]) as session:
        lines = [check_padding(session, name, **known) for name in task["signatures"]]
    lines = [line for line in lines if line]
    return "; ".join(lines) or "no signature takes rows of several sizes", {"padding": lines}


def warmup(task: dict) -> tuple[str, dict]:
    """The version's own warm-up requests."""
    count = check_warmup(task["folder"], read_batching(task["folder"])["largest"])
    return f"{count} requests answered" if count else "this version has no requests", {"warmup_requests": count}


STEPS = {"layout": layout, "ops": ops, "answers": answers, "rows": rows, "padding": padding, "warm-up": warmup}


def known_of(folder) -> dict:
    """What the version folder says of its own answers."""
    return {
        "class_names": read_class_names(folder),
        "thresholds": read_thresholds(folder),
        "unsure_below": read_unsure_below(folder),
    }


def in_fresh_process(step: Callable, task: dict) -> tuple[str, dict]:
    """What `step(task)` returns or raises, in a process forked from this one, which must not have loaded TensorFlow.

    Nothing that one step leaves in the runtime, such as a table that a request has filled, reaches the next; one that
    takes the process down, as it would the server, is told from one that fails. Raises CheckFailed for it.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(step, task, sender))
    process.start()
    sender.close()  # the child's copy remains: when it ends, so does the pipe
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode > 0:  # a bug of ours: its traceback has been printed
            raise RuntimeError(f"the step {step.__name__} ended with code {process.exitcode}") from None
        name = signal.Signals(-process.exitcode).name
        raise CheckFailed(f"{name} ended the process, as it would end the server") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def send_result(step: Callable, task: dict, sender) -> None:
    """Send what a step returns, or the error that says what is wrong with the version."""
    try:
        result = step(task)
    except (CheckFailed, GraftError) as error:
        result = error
    sender.send(result)
