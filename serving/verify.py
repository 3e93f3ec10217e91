"""Proof that a version folder is fit for TF Serving and answers as training does.

`verify` runs this module in a process of its own, without TensorFlow's Python side, and each step in a fresh one: what
passes there needs nothing of the process that made it. Six steps (serving/steps.py), each fails with the item's name:

1. layout: one metagraph tagged `serve`, variables, tensors, batch dimension, dtypes, no XLA, no Python;
2. ops: every op is linked into the stock server of the target version;
3. answers: inputs reach the network as in training (`serving/contract.py`), TensorFlow's C++ loader runs it, XLA off,
   and the answers equal the expected ones;
4. rows: 0, 1, 2, 3 and every allowed number of rows of every signature equal single ones, be they of different
   sizes; a bad item spares its neighbours;
5. padding: a row that the server pads to its neighbour's size answers the same, or the server does not pad;
6. warm-up: the version's own warm-up requests are answered, as the server does before it serves a version.

For people: `python -m serving.verify FOLDER` prints a line per step. With `--libraries` all steps are repeated with the
TensorFlow libraries of the target's release, fetched from its wheel: everything else works without a network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from models import GraftError
from serving.answer_checks import ANSWERS, by_output, texts_of
from serving.batch_checks import made_rows
from serving.libraries import RELEASES, packages_with
from serving.runtime import SessionError
from serving.session import Session
from serving.static_checks import CheckFailed
from serving.steps import STEPS, in_fresh_process

# Absolute, of a probability. Sums in another order move one by some 1e-5 at most, networks with random weights the
# most; another resize, channel order, vocabulary or set of weights moves some of 200 by a hundredth and more.
TOLERANCE = 1e-4
EXPECTED = "expected "  # before the names of outputs, in a file of samples


class VerificationError(GraftError):
    """A version folder that must not be served; the message names the step and the item."""

    exit_code = 4


def verify(
    folder,
    samples,
    expected,
    target="2.20",
    tolerance=TOLERANCE,
    packages=None,
    contract: dict | None = None,
) -> dict:
    """Verify the version folder `folder` in a fresh process; raises VerificationError.

    samples: raw inputs of `serving_default`, a list of bytes; of a model with several inputs a list of tuples of
    bytes, in the order of the inputs' names. expected: the training side's answers to them, probabilities
    [n, classes] float32, zeros for an item that cannot be read; of a model that answers otherwise {output: values [n]},
    of which texts must be equal. On a GPU they are computed with TF32 off. The server runs on the CPU meanwhile, so
    that it leaves the GPU to its parent.
    packages: a folder whose `tensorflow` to use instead of the installed one (`serving.libraries.packages_with`).
    contract: what training made of the probe of `serving.contract`, which the version must make of it too.

    Returns {"files", "largest_difference", "largest_row_difference", "signatures", "ops", "target",
    "missing_in_2.19", "batch_sizes", "padding", "warmup_requests", "tensorflow", "load_seconds", "seconds"}.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="graft-verify-") as scratch:
        file = Path(scratch) / "samples.npz"
        width = len(samples[0]) if len(samples) and isinstance(samples[0], tuple) else 0
        parts = list(itertools.chain.from_iterable(samples)) if width else samples
        np.savez(
            file,
            data=np.frombuffer(b"".join(parts), np.uint8),
            lengths=np.array([len(part) for part in parts], np.int64),
            width=width,  # of a tuple; 0: samples are no tuples
            contract=json.dumps(contract),
            **{EXPECTED + name: values for name, values in by_output(expected).items()},
        )
        command = [sys.executable, "-m", "serving.verify", str(Path(folder).absolute()), "--json"]
        command += ["--samples", str(file), "--target", target, "--tolerance", repr(float(tolerance))]
        paths = [str(packages)] if packages else []
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            errors="replace",
        )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last_words = "\n".join(done.stderr.splitlines()[-15:])
        raise VerificationError(
            f"{folder}: the verifying process ended with code {done.returncode} and no answer:\n{last_words}"
        ) from None
    if "error" in answer:
        kind = VerificationError if done.returncode == VerificationError.exit_code else GraftError
        raise kind(answer["error"])
    return {**answer, "seconds": round(time.monotonic() - started, 3)}


def run_steps(
    folder, samples, expected, target, tolerance, say, run=lambda step, task: step(task), contract: dict | None = None
) -> dict:
    """All steps. Arguments and result as in `verify`; `say(line)` ends each step.

    run: called with a step and its task; `serving.steps.in_fresh_process`, or as it is to stay in this process.
    """
    task = {"folder": folder, "samples": samples, "expected": expected, "target": target, "tolerance": tolerance}
    task["contract"] = contract
    facts = {"files": len(samples), "target": target}
    for number, (name, step) in enumerate(STEPS.items(), 1):
        try:
            said, found = run(step, {**task, **facts})
        except (CheckFailed, SessionError) as error:
            position = f"step {number} of {len(STEPS)}, {name}"
            raise VerificationError(f"{folder}: verification failed at {position}: {error}") from error
        say(f"{name}: {said}")
        facts |= found
    del facts["good"]  # samples
    return facts


def verify_with_libraries(folder, samples, expected, target, tolerance) -> dict:
    """Verify once more, in a process that runs the TensorFlow libraries of the target's release; result as `verify`.

    Without samples the answers of the installed TensorFlow to made-up ones are expected. Raises GraftError where the
    libraries cannot be had.
    """
    if not samples:
        samples, expected = made_samples(folder)
    with packages_with(target, folder) as packages:
        try:
            result = verify(folder, samples, expected, target, tolerance, packages)
        except VerificationError as error:
            raise VerificationError(f"with the libraries of TensorFlow {RELEASES[target][0]}: {error}") from error
    if result["tensorflow"] != RELEASES[target][0]:
        raise GraftError(
            f"--libraries: the process ran TensorFlow {result['tensorflow']}, expected {RELEASES[target][0]}. Remove "
            f"the folder libraries from Graft's cache and try again"
        )
    return result


def made_samples(folder) -> tuple[list, dict]:
    """Made-up samples and the installed TensorFlow's answers to them; none where it takes other than strings."""
    with Session(folder) as session:
        signature = session.signatures["serving_default"]
        inputs = signature["inputs"]
        compared = [name for name in ANSWERS if name in signature["outputs"]]
        if not compared or any(dtype != "string" for dtype, _ in inputs.values()):
            return [], {}
        rows = {name: made_rows(name, *inputs[name], []) for name in sorted(inputs)}
        answers = session.run("serving_default", rows)
    samples = list(zip(*rows.values(), strict=True)) if len(rows) > 1 else list(*rows.values())
    return samples, {name: texts_of(answers[name]) for name in compared}


def read_samples(file):
    """Samples and expected answers, as `verify` writes them."""
    with np.load(file) as content:
        data, ends = content["data"].tobytes(), [0, *np.cumsum(content["lengths"]).tolist()]
        width = int(content["width"])
        expected = {name.removeprefix(EXPECTED): content[name] for name in content if name.startswith(EXPECTED)}
    parts = [data[start:end] for start, end in itertools.pairwise(ends)]
    return list(zip(*[iter(parts)] * width, strict=True)) if width else parts, expected


def read_contract(file) -> dict | None:
    """What training made of the probe, as `verify` writes it; None where nobody noted it."""
    with np.load(file) as content:
        return json.loads(str(content["contract"])) if "contract" in content else None


def main(arguments=None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.verify", description="Check that TF Serving can serve a version folder."
    )
    parser.add_argument("folder", help="one version, such as serving/NAME/1")
    parser.add_argument("--samples", metavar="FILE", help=".npz of raw inputs and expected answers")
    parser.add_argument("--target", default="2.20", help="TF Serving release (default: %(default)s)")
    parser.add_argument(
        "--libraries",
        action="store_true",
        help="repeat all steps with the TensorFlow libraries of that release; fetches its wheel once, about 260 MB",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference of a probability or confidence (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    options = parser.parse_args(arguments)
    samples, expected = read_samples(options.samples) if options.samples else ([], {})
    say = (lambda line: None) if options.json else print
    checked = (options.folder, samples, expected, options.target, options.tolerance)
    try:
        contract = read_contract(options.samples) if options.samples else None
        result = run_steps(*checked, say, in_fresh_process, contract)
        if options.libraries:
            again = result["libraries"] = verify_with_libraries(*checked)
            compared = f"{again['files']} samples, largest difference {again['largest_difference']:.1g}"
            say(f"libraries: TensorFlow {again['tensorflow']} passes all steps; {compared}")
    except GraftError as error:
        print(json.dumps({"error": str(error)}) if options.json else error)
        return error.exit_code
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
