"""What a running SavedModel answers when requests share a batch: rows, sizes, padding and the warm-up requests.

The last three steps of `serving/verify.py`. The server joins the rows of requests, repeats a row until the batch has
an allowed size, and on demand pads shorter rows (tensorflow_serving/batching/batching_session.cc).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from models import GraftError
from serving.answer_checks import ROWS, input_columns, run_checked
from serving.config import BATCH_SIZES, BATCHING_FILE, read_config
from serving.static_checks import CheckFailed
from serving.warmup import WARMUP_FILE, read_requests, replay_warmup

ROW_TOLERANCE = 1e-4  # per largest value of the output or 1: kernels sum in another order for other sizes
FREE_TO_TURN = {"labels", "chosen", "unsure"}  # on a last bit; `run_checked` compares them with the scores
BAD_ITEM = b"\xff\x00 no supported input starts like this"
MADE_SIZE = 48  # for unknown dimensions other than the batch, in made-up inputs
SHORTER_SIZE = 40  # for the same in a row that is padded to MADE_SIZE
PNG_SIDES = (64, 40, 96)  # pixels of made-up images: rows of one batch differ in size
WAV_SAMPLES = (8_000, 20_000, 80_000)  # of made-up sounds, likewise
TEXT_REPEATS = (1, 8, 60)  # of a phrase of a made-up text, for the same reason


def read_batching(folder) -> dict:
    """How the server joins requests to a version: {"sizes", "largest", "pads"}.

    "sizes": batches to try, those allowed by its batching_params.pbtxt, else those of warm-up requests and the largest;
    "largest": rows that one request may have, None without a limit; "pads": whether rows of different sizes are padded.
    Raises CheckFailed for a file with which the server refuses to load the model.
    """
    file = Path(folder) / BATCHING_FILE
    if not file.is_file():
        return {"sizes": list(BATCH_SIZES), "largest": None, "pads": False}
    try:
        parameters = read_config(file, "BatchingParameters")
    except GraftError as error:
        raise CheckFailed(str(error)) from error
    sizes, splits = list(parameters.allowed_batch_sizes), parameters.enable_large_batch_splitting.value
    limit = "max_execution_batch_size" if splits else "max_batch_size"
    most = getattr(parameters, limit).value if parameters.HasField(limit) else None
    if sizes and (sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != most):
        raise CheckFailed(
            f"{file}: allowed_batch_sizes {sizes}, {limit} {most}: expected increasing sizes from 1 on, the last one "
            f"equal to {limit}, or the server refuses to load the model"
        )
    if not sizes:
        sizes = [*(size for size in BATCH_SIZES if most is None or size < most), *([most] if most else [])]
    return {
        "sizes": sizes,
        "largest": None if splits else most,
        "pads": parameters.pad_variable_length_inputs,
    }


def check_rows(
    session, signature, samples, class_names, thresholds=None, unsure_below=None, sizes=BATCH_SIZES
) -> float:
    """Run a signature with 0 to ROWS and with `sizes` rows, compare with single rows, return the largest difference.

    Larger batches repeat the ROWS items. Where it takes strings, a bad item in the middle must leave its neighbours'
    rows as they are.
    """
    inputs = session.signatures[signature]["inputs"]
    texts = [name for name in inputs if inputs[name][0] == "string"]
    known = input_columns(texts, samples) if texts and samples else {}
    rows = {name: made_rows(name, *inputs[name], known.get(name, [])) for name in inputs}

    def run(*order):
        chosen = {name: rows[name][list(order)] for name in rows}
        return run_checked(session, signature, chosen, class_names, thresholds, unsure_below)

    singles = [run(row) for row in range(ROWS)]
    largest = 0.0
    for count in sorted({*range(ROWS + 1), *sizes}):
        what, order = f"signature {signature}, {count} rows", [row % ROWS for row in range(count)]
        largest = max(largest, compare_rows(what, run(*order), singles, dict(enumerate(order))))
    for name in texts:
        rows[name][1] = BAD_ITEM
    if texts:
        answer = run(0, 1, 2)
        what = f"signature {signature}, a bad item between two good ones"
        largest = max(largest, compare_rows(what, answer, singles, {0: 0, 2: 2}))
        # A text may be anything; bytes of a file have a format, and these have none.
        if "error" in answer and texts[0].endswith("_bytes") and not answer["error"][1]:
            raise CheckFailed(f"{what}: the output error is empty for it, expected the reason")
    return largest


def compare_rows(what: str, outputs: dict, singles: list[dict], items: dict[int, int]) -> float:
    """Largest difference between rows of a batch and the same items answered singly; `items` {row: index of single}."""
    largest = 0.0
    for name in outputs.keys() - FREE_TO_TURN:
        for row, item in items.items():
            difference = row_difference(outputs[name][row], singles[item][name][0])
            largest = max(largest, difference)
            if not difference <= ROW_TOLERANCE:
                raise CheckFailed(
                    f"{what}: output {name}: row {row} differs from the same item alone (difference "
                    f"{difference:.2g}, allowed {ROW_TOLERANCE:.0g}). Rows must not depend on each other"
                )
    return largest


def row_difference(one, other) -> float:
    """Of floats the largest difference per largest absolute value or 1; of anything else infinity unless equal."""
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype.kind != "f" or one.shape != other.shape:
        return 0.0 if np.array_equal(one, other) else np.inf
    return float(np.max(np.abs(one - other), initial=0.0) / max(1.0, np.max(np.abs(other), initial=0.0)))


def check_padding(session, signature, class_names, thresholds=None, unsure_below=None, pads: bool = False) -> str:
    """How a signature answers a row that the server padded to the size of its neighbour; "" where rows have one size.

    Padding repeats the input's first element in every free dimension but the batch (AddPadding of
    tensorflow_serving/batching/batching_util.cc). Without `pads` the server does not, and refuses such a batch.
    Raises CheckFailed where it pads and the answer is another one.
    """
    inputs = session.signatures[signature]["inputs"]
    if not any(None in shape[1:] for _, shape in inputs.values()):
        return ""
    short = {name: made_rows(name, *inputs[name], [], SHORTER_SIZE)[:1] for name in inputs}
    long = {name: made_rows(name, *inputs[name], [])[1:2] for name in inputs}
    joined = {name: np.concatenate([padded_row(short[name], long[name].shape), long[name]]) for name in inputs}
    alone = run_checked(session, signature, short, class_names, thresholds, unsure_below)
    together = run_checked(session, signature, joined, class_names, thresholds, unsure_below)
    for name in sorted(alone.keys() - FREE_TO_TURN):
        difference = row_difference(together[name][0], alone[name][0])
        if difference <= ROW_TOLERANCE:
            continue
        found = f"output {name}: a row padded from {SHORTER_SIZE} to {MADE_SIZE} answers otherwise"
        if pads:
            raise CheckFailed(
                f"signature {signature}, {found} (difference {difference:.2g}, allowed {ROW_TOLERANCE:.0g}). Remove "
                f"pad_variable_length_inputs from {BATCHING_FILE}, or have the model ignore what repeats at the end"
            )
        return f"{signature} must not be padded ({found}): batching joins only requests of one size"
    return f"{signature} may be padded"


def padded_row(row: np.ndarray, shape) -> np.ndarray:
    """A row in an array of `shape`, filled up with its first element."""
    whole = np.full(shape, row.flat[0], row.dtype)
    whole[tuple(slice(size) for size in row.shape)] = row
    return whole


def check_warmup(folder, largest: int | None) -> int:
    """Answer the warm-up requests of a version folder as the server does; returns how many, 0 without such a file.

    `largest`: rows that one request may have. Raises CheckFailed and SessionError as `replay_warmup` does.
    """
    if not (Path(folder) / WARMUP_FILE).is_file():
        return 0
    for index, (signature, inputs) in enumerate(read_requests(Path(folder) / WARMUP_FILE)):
        rows = max((len(values) for values in inputs.values() if values.ndim), default=0)
        if largest is not None and rows > largest:
            raise CheckFailed(
                f"warm-up request {index}, signature {signature}: {rows} rows, but {BATCHING_FILE} allows {largest}"
            )
    return replay_warmup(folder)


def made_rows(name: str, dtype: str, shape: tuple, samples: list[bytes], size: int = MADE_SIZE) -> np.ndarray:
    """ROWS rows for an input: the samples where it takes strings and there are any, else made up.

    `size`: of every unknown dimension but the batch.
    """
    shape = [ROWS, *(size if inner is None else inner for inner in shape[1:])]
    if dtype == "string":
        make = {"image_bytes": made_png, "audio_bytes": made_wav}.get(name, made_text)
        items = samples or [make(row) for row in range(ROWS)]
        column = np.array([items[row % len(items)] for row in range(ROWS)], object)
        return np.broadcast_to(column.reshape([ROWS] + [1] * (len(shape) - 1)), shape).copy()
    largest = 256 if dtype.startswith("float") else 2
    return np.random.default_rng(0).uniform(0, largest, shape).astype(dtype)


def made_text(row: int) -> bytes:
    """Words, more of them in every row."""
    return b" ".join([b"made up %d" % row] * TEXT_REPEATS[row])


def made_wav(row: int) -> bytes:
    """A WAV file of faint noise, mono, 16 bits, 16 kHz, longer in every row; the last one fills several windows."""
    samples = np.random.default_rng(row).integers(-3000, 3000, WAV_SAMPLES[row]).astype("<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    chunks = b"WAVEfmt " + form + struct.pack("<4sI", b"data", len(samples)) + samples
    return struct.pack("<4sI", b"RIFF", len(chunks)) + chunks


def made_png(row: int) -> bytes:
    """A PNG of random RGB pixels, of another size in every row (PNG specification, third edition, section 5)."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    side = PNG_SIDES[row]
    pixels = np.random.default_rng(row).integers(0, 256, [side, side * 3], np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
