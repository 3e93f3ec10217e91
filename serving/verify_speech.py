"""Proof that an exported recogniser is fit for TF Serving and writes what training's side writes.

The steps of `serving.verify`, but that answers are transcripts: layout, ops, answers, rows, padding. In a process of
its own, through TensorFlow's C++ loader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from serving.batch_checks import check_padding, check_rows
from serving.runtime import SessionError
from serving.session import Session
from serving.static_checks import CheckFailed, check_layout, check_ops
from serving.verify import VerificationError

CONFIDENCE_TOLERANCE = 1e-3


def verify_speech(folder, samples: list[bytes], expected: list[str], confidences, target: str = "2.20") -> dict:
    """Verify the version folder `folder` in a fresh process; raises VerificationError.

    Args:
        samples: WAV files; expected, confidences: what training's side answers to each.

    Returns {"files", "equal", "largest_difference" (of confidences), "largest_row_difference", "signatures", "ops",
    "missing_in_2.19", "padding"}.
    """
    with tempfile.TemporaryDirectory(prefix="graft-verify-") as scratch:
        for index, data in enumerate(samples):
            (Path(scratch) / f"{index}.wav").write_bytes(data)
        asked = {"expected": list(expected), "confidences": [float(value) for value in confidences], "target": target}
        (Path(scratch) / "asked.json").write_text(json.dumps(asked), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "serving.verify_speech", str(Path(folder).absolute()), scratch],
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
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
        raise VerificationError(f"{folder}: verification failed: {answer['error']}")
    return answer


def run_steps(folder, samples: list[bytes], expected: list[str], confidences, target: str) -> dict:
    """All steps, in this process; raises CheckFailed and SessionError."""
    graph, signatures = check_layout(folder)
    ops, missing = check_ops(graph, target)
    largest = 0.0
    with Session(folder) as session:
        for index, data in enumerate(samples):
            outputs = session.run("serving_default", {"audio_bytes": [data]})
            text, error = outputs["transcript"][0].decode(), outputs["error"][0].decode()
            if error or text != expected[index]:
                raise CheckFailed(f"sample {index}: answers {text!r} {error}, training's side {expected[index]!r}")
            largest = max(largest, abs(float(outputs["confidence"][0]) - confidences[index]))
        if not largest <= CONFIDENCE_TOLERANCE:
            raise CheckFailed(f"confidences differ by {largest:.2g}, allowed {CONFIDENCE_TOLERANCE:g}")
        row_difference = max(check_rows(session, name, samples[:3], []) for name in sorted(signatures))
        padding = [check_padding(session, name, []) for name in sorted(signatures)]
    return {
        "files": len(samples),
        "equal": len(samples),
        "largest_difference": largest,
        "largest_row_difference": row_difference,
        "signatures": sorted(signatures),
        "ops": len(ops),
        "missing_in_2.19": missing,
        "padding": [line for line in padding if line],
    }


def main(folder: str, scratch: str) -> int:
    asked = json.loads((Path(scratch) / "asked.json").read_text("utf-8"))
    samples = [(Path(scratch) / f"{index}.wav").read_bytes() for index in range(len(asked["expected"]))]
    try:
        answer = run_steps(folder, samples, asked["expected"], asked["confidences"], asked["target"])
    except (CheckFailed, SessionError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
