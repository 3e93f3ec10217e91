"""Warm-up requests beside a SavedModel: the server answers them before a new version takes requests.

`assets.extra/tf_serving_warmup_requests` is a TFRecord file of PredictionLog protos
(tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc). One that fails stops the load. The requests are
made up, noise and random words, so that nothing of the training set is published.
"""

from __future__ import annotations

import io
import math
import os
import wave
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from serving.answer_checks import input_columns
from serving.config import BATCH_SIZES
from serving.runtime import import_protos
from serving.session import Session
from serving.static_checks import CheckFailed
from serving.tensors import read_tensor, write_tensor

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
MOST_RECORDS = 1000  # kNumMaxWarmupRecords of the server
FRAME_BYTES = 16  # around a TFRecord: its length and two checksums (tensorflow/core/lib/io/record_writer.h)
IMAGE_SIZE = (375, 500)  # rows, columns: ImageNet's photographs are about so large
GRAIN = 8  # pixels per random colour: noise of single pixels would make far larger files than photographs are
WORDS = 60  # of a text where the model tells no length of its own
RATE_HZ, WINDOW_SECONDS = 16_000, 2.0  # of a sound where the model tells neither
PIECES_PER_WORD = 4  # tokens that a made-up word falls into, about


def write_warmup(folder, details: dict, samples=(), batch_sizes=BATCH_SIZES) -> int:
    """Write the warm-up requests of the version folder `folder`; returns how many.

    One request per batch size for `serving_default`, and one of the fewest rows for every other signature: each has
    kernels of its own to prepare, and the sizes share them.

    Args:
        details: what the export says of itself (assets.extra/graft.json); {} where it says nothing.
        samples: real inputs of `serving_default` to use instead of made-up ones, bytes or tuples of bytes. They can be
            read by whoever can read the model.
    """
    requests = []
    with Session(folder) as session:
        for name, signature in sorted(session.signatures.items()):
            sizes = batch_sizes if name == "serving_default" else batch_sizes[:1]
            rows = rows_for(signature["inputs"], details, samples, max(sizes))
            for size in sizes:
                requests.append((name, {key: values[:size] for key, values in rows.items()}))
    file = Path(folder) / WARMUP_FILE
    file.parent.mkdir(exist_ok=True)
    write_requests(file, requests)
    return len(requests)


def replay_warmup(folder) -> int:
    """Answer every warm-up request of a version folder, as the server does; returns how many there are.

    Raises CheckFailed for a file that the server could not read, for a request with an error in its answer;
    SessionError for one that the model refuses.
    """
    requests = read_requests(Path(folder) / WARMUP_FILE)
    with Session(folder) as session:
        replay_requests(session, requests)
    return len(requests)


def replay_requests(session: Session, requests: list[tuple[str, dict]]) -> None:
    """Answer warm-up requests, each a signature and its inputs; raises as `replay_warmup` does."""
    for index, (signature, inputs) in enumerate(requests):
        what = f"warm-up request {index} of {len(requests)}"
        if signature not in session.signatures:
            raise CheckFailed(f"{what}: the model has no signature {signature!r}")
        wanted = {key: dtype for key, (dtype, _) in session.signatures[signature]["inputs"].items()}
        found = {key: "string" if values.dtype == object else values.dtype.name for key, values in inputs.items()}
        if found != wanted:
            raise CheckFailed(f"{what}: inputs {found}, but signature {signature} takes {wanted}")
        for error in session.run(signature, inputs).get("error", ()):
            if error:
                raise CheckFailed(f"{what}: the model answers with the error: {error.decode(errors='replace')}")


def rows_for(inputs: dict, details: dict, samples, count: int) -> dict:
    """`count` rows for the inputs of a signature: of `samples` where all its inputs are strings, else made up."""
    if samples and all(dtype == "string" for dtype, _ in inputs.values()):
        columns = input_columns(inputs, [samples[row % len(samples)] for row in range(count)])
        return {name: np.array(values, object) for name, values in columns.items()}
    return {name: made_up(name, *inputs[name], details, count) for name in inputs}


def made_up(name: str, dtype: str, shape, details: dict, count: int) -> np.ndarray:
    """`count` rows of noise for one input: JPEG files, WAV files, texts, or numbers of the dtype and shape."""
    if dtype == "string":
        make = {"image_bytes": noise_jpeg, "audio_bytes": noise_wav}.get(name, noise_text)
        return np.array([make(seed, details) for seed in range(count)], object)
    if name == "waveform":
        return np.stack([noise_samples(seed, details) for seed in range(count)]).astype(dtype)
    height, width = details.get("image_size", IMAGE_SIZE)
    free = dict(enumerate([count, height, width]))
    sizes = [free.get(axis, 1) if size is None else size for axis, size in enumerate(shape)]
    largest = 255 if dtype.startswith("float") else 2
    return np.random.default_rng(0).uniform(0, largest, sizes).astype(dtype)


def noise_jpeg(seed: int, details: dict) -> bytes:
    """A JPEG file of coloured noise, of about the size of a photograph and its file."""
    from PIL import Image

    rows, columns = IMAGE_SIZE
    coarse = np.random.default_rng(seed).integers(0, 256, [rows // GRAIN, columns // GRAIN, 3], np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC).save(file, "jpeg", quality=80)
    return file.getvalue()


def noise_samples(seed: int, details: dict) -> np.ndarray:
    """Faint noise as long as the window that the model hears, [samples] float32, at its own sample rate."""
    heard = {"sample_rate_hz": RATE_HZ, "window_seconds": WINDOW_SECONDS, **details.get("preprocess", {})}
    seconds = min(heard["window_seconds"], details.get("longest_seconds", math.inf))
    count = max(1, round(heard["sample_rate_hz"] * seconds))
    return np.random.default_rng(seed).uniform(-0.1, 0.1, count).astype(np.float32)


def noise_wav(seed: int, details: dict) -> bytes:
    """A WAV file of faint noise, 16 bits, mono, as long as the window that the model hears."""
    samples = noise_samples(seed, details)
    rate_hz = details.get("preprocess", {}).get("sample_rate_hz", RATE_HZ)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate_hz, len(samples), "NONE", ""))
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def noise_text(seed: int, details: dict) -> bytes:
    """Random words of 2 to 9 letters, which about fill the window that the model reads."""
    random = np.random.default_rng(seed)
    tokens = details.get("preprocess", {}).get("sequence_length")
    count = max(1, tokens // PIECES_PER_WORD) if tokens else WORDS
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return " ".join("".join(random.choice(letters, random.integers(2, 10))) for _ in range(count)).encode()


def write_requests(file, requests) -> None:
    """Write [(signature, {input name: array})] as the server reads them; strings are object arrays of bytes."""
    from tensorboard.summary.writer.record_writer import RecordWriter  # TFRecord without TensorFlow

    (log_module,) = import_protos("tensorflow_serving.apis.prediction_log_pb2")
    with open(file, "wb") as stream:
        writer = RecordWriter(stream)
        for signature, inputs in requests:
            log = log_module.PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = signature
            for name, values in inputs.items():
                write_tensor(np.asarray(values), request.inputs[name], packed=True)
            writer.write(log.SerializeToString())


def read_requests(file) -> list[tuple[str, dict[str, np.ndarray]]]:
    """What `write_requests` wrote; raises CheckFailed where the server would refuse to load the model."""
    (log_module,) = import_protos("tensorflow_serving.apis.prediction_log_pb2")
    requests = []
    for record in read_records(file):
        what = f"{file}: record {len(requests)}"
        try:
            log = log_module.PredictionLog.FromString(record)
        except DecodeError as error:
            raise CheckFailed(f"{what} cannot be read ({error})") from error
        if log.WhichOneof("log_type") != "predict_log":
            raise CheckFailed(f"{what} is no predict request")
        request = log.predict_log.request
        inputs = {name: read_tensor(tensor) for name, tensor in request.inputs.items()}
        for name, array in inputs.items():
            if array is None:
                raise CheckFailed(f"{what}: the tensor of the input {name} makes no sense")
        requests.append((request.model_spec.signature_name or "serving_default", inputs))
    if len(requests) > MOST_RECORDS:
        raise CheckFailed(f"{file}: {len(requests)} records, the server takes {MOST_RECORDS}")
    return requests


def read_records(file) -> list[bytes]:
    """The records of a TFRecord file; raises CheckFailed where it is missing or damaged."""
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    records = []
    try:
        left = os.path.getsize(file)
        reader = PyRecordReader_New(str(file))
        while left > 0:
            reader.GetNext()
            records.append(reader.record())
            left -= FRAME_BYTES + len(records[-1])
    except (OSError, errors.OpError) as error:
        raise CheckFailed(f"{file}: record {len(records)} cannot be read ({error})") from error
    return records
