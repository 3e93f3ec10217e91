"""What a running SavedModel answers: the third step of `serving/verify.py`, and what holds for every answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from serving.contract import differences
from serving.static_checks import CheckFailed

LABELS_FILE = "assets.extra/labels.txt"
DETAILS_FILE = "assets.extra/graft.json"
ROWS = 3  # different items that the later steps put into batches
BATCH = 16  # samples per call where answers are compared
ANSWERS = ("probabilities", "transcript", "confidence")  # outputs that are compared: all others follow from these


def check_answers(
    session, samples, expected, tolerance, class_names, thresholds=None, unsure_below=None
) -> tuple[float, list[bytes]]:
    """Compare serving_default's answers with the expected ones; return the largest difference.

    `expected` is as `by_output` takes it. `thresholds` [classes] float32 are those of a multi-label model: what it
    chooses must fit its probabilities, so that it is what training chooses, but for a probability within `tolerance` of
    its threshold. Likewise `unsure_below`, the best score from which an answer is sure.
    Also returns up to ROWS samples that have no error, for the next steps.
    """
    if not samples:
        return 0.0, []
    inputs = session.signatures["serving_default"]["inputs"]
    width = len(samples[0]) if isinstance(samples[0], tuple) else 1
    if [dtype for dtype, _ in inputs.values()] != ["string"] * width:
        wanted = "a single one, of strings" if width == 1 else f"{width} of strings"
        raise CheckFailed(f"signature serving_default: inputs {inputs}, expected {wanted}")
    expected = by_output(expected)
    # Where two characters are as likely, a last bit decides, which depends on the neighbours' lengths.
    size = 1 if "transcript" in expected else BATCH
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    answers = [
        run_checked(session, "serving_default", input_columns(inputs, batch), class_names, thresholds, unsure_below)
        for batch in batches
    ]
    if not expected.keys() <= answers[0].keys():
        raise CheckFailed(f"signature serving_default: outputs {sorted(answers[0])}, expected {', '.join(expected)}")
    errors = [b""] * len(samples)
    if "error" in answers[0]:
        errors = [error for answer in answers for error in answer["error"]]
    largest = 0.0
    for name, values in expected.items():
        served = np.concatenate([answer[name] for answer in answers])
        largest = max(largest, compare_output(name, served, values, errors, tolerance))
    good = [sample for sample, error in zip(samples, errors, strict=True) if not error]
    return largest, good[:ROWS]


def by_output(expected) -> dict[str, np.ndarray]:
    """Expected answers as {output: values [n, ...]}, float32 or str; an array is of probabilities [n, classes]."""
    if not isinstance(expected, dict):
        expected = {"probabilities": np.asarray(expected, np.float32)}
    return {name: np.asarray(values) for name, values in expected.items()}


def compare_output(name: str, served, expected, errors, tolerance) -> float:
    """The largest difference of an output [n, ...] from what is expected; texts must be equal. errors: the served ones.

    Raises CheckFailed for one above the tolerance.
    """
    if served.shape != expected.shape:
        raise CheckFailed(f"{name} {list(served.shape)}, expected {list(expected.shape)}")
    is_text, served = served.dtype == object, texts_of(served)
    difference = np.where(served == expected, 0.0, np.inf) if is_text else np.abs(served - expected)
    place = np.unravel_index(np.argmax(difference), difference.shape)  # a NaN counts as largest
    largest = float(difference[place])
    if largest <= tolerance:
        return largest
    found, wanted = (repr(str(values[place])) if is_text else f"{values[place]:.6f}" for values in (served, expected))
    limits = "" if is_text else f" (difference {largest:.2g}, allowed {tolerance:.1g})"
    reason = f"; served error: {errors[place[0]].decode()}" if errors[place[0]] else ""
    what = f"probability of class {place[1]}" if name == "probabilities" else name
    raise CheckFailed(
        f"item {place[0]} of {len(served)}: the served {what} is {found}, expected {wanted}{limits}{reason}"
    )


def texts_of(values: np.ndarray) -> np.ndarray:
    """An output of bytes as one of str; anything else as it is."""
    if values.dtype != object:
        return values
    return np.array([value.decode() for value in values.flat], str).reshape(values.shape)


def input_columns(inputs, samples) -> dict[str, list[bytes]]:
    """Samples -> {input name: values}. A sample of several inputs is a tuple, in the order of the inputs' names."""
    if not isinstance(samples[0], tuple):
        samples = [(sample,) for sample in samples]
    return dict(zip(sorted(inputs), map(list, zip(*samples, strict=True)), strict=True))


def run_checked(session, signature, inputs, class_names, thresholds, unsure_below=None) -> dict:
    """Run, and check what holds for every answer: rows, text, finite numbers, labels and choices that fit scores."""
    outputs = session.run(signature, inputs)
    count = len(next(iter(inputs.values())))
    for name, values in outputs.items():
        what = f"signature {signature}, output {name}"
        if values.shape[:1] != (count,):
            raise CheckFailed(f"{what}: shape {list(values.shape)} for {count} rows, expected {count} first")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CheckFailed(f"{what}: holds NaN or infinity, expected finite numbers")
        if values.dtype == object and not name.endswith("_bytes"):
            for value in values.flat:
                check_text(what, value)
    if {"labels", "scores", "probabilities"} <= set(outputs) and class_names:
        check_labels(signature, outputs, class_names)
    if "probabilities" in outputs and (thresholds is not None or "chosen" in outputs):
        check_chosen(signature, outputs, thresholds)
    if "scores" in outputs and (unsure_below is not None or "unsure" in outputs):
        check_unsure(signature, outputs, unsure_below)
    if {"transcript", "confidence", "error"} <= set(outputs):
        check_transcripts(signature, outputs)
    return outputs


def check_text(what: str, value: bytes) -> None:
    """REST sends strings as JSON text, and as base64 only where the output's name says so."""
    try:
        value.decode()
    except UnicodeDecodeError:
        raise CheckFailed(f"{what}: {value!r:.40} is not text. Name such an output NAME_bytes") from None


def check_labels(signature, outputs, class_names) -> None:
    """Labels and scores are the best classes, best first; nothing at all for an item with an error."""
    columns = {name.encode(): column for column, name in enumerate(class_names)}
    probabilities = outputs["probabilities"]
    if probabilities.shape[1] != len(class_names):
        raise CheckFailed(
            f"signature {signature}: probabilities of {probabilities.shape[1]} classes, "
            f"but {LABELS_FILE} names {len(class_names)}"
        )
    errors = outputs.get("error", [b""] * len(probabilities))
    for row, labels in enumerate(outputs["labels"]):
        scores = outputs["scores"][row]
        best = np.sort(probabilities[row])[::-1][: len(scores)]
        if errors[row]:
            fits = not any(labels) and not scores.any() and not probabilities[row].any()
        else:
            fits = np.array_equal(scores, best) and all(
                label in columns and probabilities[row, columns[label]] == score
                for label, score in zip(labels, scores, strict=True)
            )
        if not fits:
            raise CheckFailed(
                f"signature {signature}, row {row}: labels {list(labels)}, scores {scores.tolist()} and "
                f"error {errors[row]!r} do not fit its probabilities {probabilities[row].tolist()}"
            )


def check_chosen(signature, outputs, thresholds) -> None:
    """A class is chosen where its probability reaches its threshold; nothing is for an item with an error."""
    if thresholds is None or "chosen" not in outputs:
        raise CheckFailed(
            f"signature {signature}: {'' if 'chosen' in outputs else 'no '}output chosen, but "
            f"{'no ' if thresholds is None else ''}thresholds in {DETAILS_FILE}. Expected both, or neither"
        )
    probabilities, chosen = outputs["probabilities"], outputs["chosen"]
    if len(thresholds) != probabilities.shape[1]:
        raise CheckFailed(
            f"signature {signature}: probabilities of {probabilities.shape[1]} classes, "
            f"but {DETAILS_FILE} has {len(thresholds)} thresholds"
        )
    good = np.array([not error for error in outputs.get("error", [b""] * len(probabilities))], bool)
    expected = good[:, None] & (probabilities >= thresholds)
    if not np.array_equal(chosen, expected):
        row = int(np.argmax((chosen != expected).any(axis=1)))
        raise CheckFailed(
            f"signature {signature}, row {row}: chosen {chosen[row].tolist()} does not fit its probabilities "
            f"{probabilities[row].tolist()} and the thresholds {thresholds.tolist()} of {DETAILS_FILE}"
        )


def check_unsure(signature, outputs, unsure_below) -> None:
    """An answer is unsure where its best score is below the threshold, an item with an error always."""
    if unsure_below is None or "unsure" not in outputs:
        raise CheckFailed(
            f"signature {signature}: {'' if 'unsure' in outputs else 'no '}output unsure, but "
            f"{'no ' if unsure_below is None else ''}unsure_below in {DETAILS_FILE}. Expected both, or neither"
        )
    expected = outputs["scores"][:, 0] < unsure_below
    if not np.array_equal(outputs["unsure"], expected):
        row = int(np.argmax(outputs["unsure"] != expected))
        raise CheckFailed(
            f"signature {signature}, row {row}: unsure {bool(outputs['unsure'][row])} does not fit its best score "
            f"{outputs['scores'][row, 0]:.6f} and unsure_below {unsure_below:.6f} of {DETAILS_FILE}"
        )


def check_transcripts(signature, outputs) -> None:
    """A confidence is a share of one; an item with an error has none, and no transcript."""
    for row, (text, sure, error) in enumerate(zip(*(outputs[name] for name in ("transcript", "confidence", "error")))):
        if (text or sure) if error else not 0 <= sure <= 1 + 1e-6:
            raise CheckFailed(
                f"signature {signature}, row {row}: transcript {text!r}, confidence {sure} and error {error!r} do not "
                f"fit each other"
            )


def read_class_names(folder) -> list[str]:
    """The lines of labels.txt; none where the model has no such file."""
    file = Path(folder) / LABELS_FILE
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def read_thresholds(folder) -> np.ndarray | None:
    """The thresholds [classes] float32 of a multi-label model; None for any other.

    Raises CheckFailed for a graft.json that cannot be read.
    """
    return read_floats(folder, "thresholds")


def read_unsure_below(folder) -> np.float32 | None:
    """The best score from which an answer is sure; None for a model that does not say. Raises as `read_thresholds`."""
    value = read_floats(folder, "unsure_below")
    return None if value is None else np.float32(value)


def check_contract(folder, trained: dict | None) -> None:
    """Inputs reach the encoder as they did in training; trained: as `serving.contract` has it, None: not known.

    A version that says nothing of its own, from before there were contracts, passes.
    """
    file = Path(folder) / DETAILS_FILE
    served = json.loads(file.read_text("utf-8")).get("input_contract") if trained and file.is_file() else None
    found = differences(trained, served) if served else []
    if found:
        raise CheckFailed(
            f"inputs reach the network otherwise than in training: {'; '.join(found)}. Export with the preprocessing "
            f"that training had"
        )


def read_floats(folder, name: str) -> np.ndarray | None:
    """An entry of graft.json as float32; None where it has none."""
    file = Path(folder) / DETAILS_FILE
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text("utf-8")).get(name)
        return None if value is None else np.array(value, np.float32)
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckFailed(f"{file}: cannot be read ({error}). Export the model again") from error
