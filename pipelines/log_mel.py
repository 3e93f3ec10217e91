"""Log-mel spectrograms: what simpler methods hear of a sound, and how the report shows one.

25 ms frames every 10 ms, 80 mel channels, as speech models have them; nothing here feeds a backbone.
"""

from __future__ import annotations

import functools
import io
import itertools
import pathlib
import wave

import numpy as np
import pyarrow as pa

from pipelines.console import progress_bar
from pipelines.evaluate import evaluate
from pipelines.evaluate_multi_label import choose_thresholds, evaluate_multi_label, sigmoid
from pipelines.sound_files import SOUND_SUFFIXES, wav_of

FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010
CHANNELS = 80
LOWEST_HZ = 20.0
FLOOR = 1e-10  # power: 100 dB below full scale
SEGMENTS = 8
SHOWN_SECONDS = 10.0  # of a sound that the report plays
PICTURE = (192, 96)  # width, height in pixels
PICTURE_RANGE_DB = 70.0  # below the loudest part all is black
RATE_HZ = 16_000


@functools.cache
def _mel_reader(rate_hz: int):
    import tensorflow as tf

    from models.audio_inputs import read_sound
    from models.backbone import AudioPreprocess

    preprocess, frame, hop = AudioPreprocess(rate_hz), round(FRAME_SECONDS * rate_hz), round(HOP_SECONDS * rate_hz)
    size = 2 ** int(np.ceil(np.log2(frame)))
    weights = tf.signal.linear_to_mel_weight_matrix(CHANNELS, size // 2 + 1, rate_hz, LOWEST_HZ, rate_hz / 2)

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def read(data):
        waveform = read_sound(data, preprocess)
        padded = tf.pad(waveform, [[0, tf.maximum(frame - tf.size(waveform), 0)]])
        power = tf.abs(tf.signal.stft(padded, frame, hop, size)) ** 2
        return waveform, tf.math.log(tf.maximum(power @ weights, FLOOR))

    return read


def log_mel(data: bytes, rate_hz: int = RATE_HZ) -> np.ndarray:
    """The bytes of a WAV file -> the logarithm of its mel spectrum [frames, 80] float32, one frame at least."""
    return _mel_reader(rate_hz)(data)[1].numpy()


def mean_and_deviation(spectrum: np.ndarray) -> np.ndarray:
    """[frames, channels] -> [2 x channels]: what is said, but not when."""
    return np.concatenate([spectrum.mean(axis=0), spectrum.std(axis=0)])


def in_segments(spectrum: np.ndarray, segments: int = SEGMENTS) -> np.ndarray:
    """[frames, channels] -> [segments x channels], the mean of each of so many equal parts of its time."""
    bounds = np.linspace(0, len(spectrum), segments + 1)
    parts = [spectrum[int(low) : max(int(np.ceil(high)), int(low) + 1)] for low, high in itertools.pairwise(bounds)]
    return np.concatenate([part.mean(axis=0) for part in parts])


def statistics_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Two descriptions of each clip of a table: "mean" [n, 160] and "segments" [n, 640], float32."""
    found = {"mean": [], "segments": []}
    with progress_bar() as bar:
        task = bar.add_task("log-mel spectrograms", total=table.num_rows, note="")
        for path in table["path"].to_pylist():
            spectrum = log_mel(pathlib.Path(path).read_bytes())
            bar.advance(task)
            found["mean"].append(mean_and_deviation(spectrum))
            found["segments"].append(in_segments(spectrum))
    return {name: np.array(rows, np.float32) for name, rows in found.items()}


NAMES = {
    "mean": "Log-mel mean and deviation with logistic regression",
    "segments": "Log-mel in 8 time segments with logistic regression",
}


def log_mel_baselines(splits, seed: int = 0) -> list[dict]:
    """Logistic regression on log-mel mean and deviation, and on log-mel in 8 segments of time, scored as the run is.

    Features have mean 0 and deviation 1; the L2 penalty is the one with the best validation loss.

    Args:
        splits: `pipelines.data.Splits` of sounds.

    Returns:
        For each: name; metric, value, interval (95%, [low, high]) and half_width of the headline on the test set;
        accuracy on the test set (None of several labels); l2, the penalty.
    """
    statistics = [statistics_of(table) for table in splits]
    return [_baseline(name, [of_split[name] for of_split in statistics], splits, seed) for name in NAMES]


def _baseline(name: str, inputs: list[np.ndarray], splits, seed: int) -> dict:
    from pipelines.data import targets_of
    from pipelines.head_solver import solve_head

    train, val, test = inputs
    targets = [targets_of(table, len(splits.class_names)) for table in splits]
    weights = splits.train["weight"].to_numpy()
    heads, path, best, _ = solve_head(train, targets[0], weights, val, targets[1], splits.multi_label)
    kernel, bias = heads[best]
    logits = test @ kernel + bias
    if splits.multi_label:
        thresholds = choose_thresholds(targets[1], sigmoid(val @ kernel + bias))
        chosen = sigmoid(logits) >= thresholds
        figures = evaluate_multi_label(targets[2], logits, chosen, thresholds, splits.class_names, seed)
    else:
        figures = evaluate(targets[2].argmax(axis=1), logits, splits.class_names, seed=seed)
    return {
        "name": NAMES[name],
        **{key: figures["headline"][key] for key in ("metric", "value", "interval", "half_width")},
        "accuracy": figures.get("accuracy"),
        "l2": path[best]["l2"],
    }


# ---------------------------------------------------------------- for the report


def is_sound(path: str) -> bool:
    """Whether a file is a sound: a WAV file by its first bytes, another kind by its name."""
    if pathlib.Path(path).suffix.lower() in SOUND_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start[:4] in (b"RIFF", b"RF64") and start[8:] == b"WAVE"


def shown_sound(path: str) -> dict:
    """A sound file for the report: its spectrogram as a PNG, its first seconds as a 16-bit WAV, how long it is."""
    data = pathlib.Path(path).read_bytes()
    data = data if data[:4] in (b"RIFF", b"RF64") else wav_of(data)
    waveform, spectrum = (part.numpy() for part in _mel_reader(RATE_HZ)(data))
    seconds = len(waveform) / RATE_HZ
    most = round(SHOWN_SECONDS * RATE_HZ)
    samples = np.rint(np.clip(waveform[:most], -1, 1) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE_HZ, len(samples), "NONE", ""))
        writer.writeframes(samples.tobytes())
    return {
        "picture": spectrogram_png(spectrum[: round(SHOWN_SECONDS / HOP_SECONDS)]),
        "sound": file.getvalue(),
        "seconds": seconds,
        "cut": seconds > SHOWN_SECONDS,
    }


def spectrogram_png(spectrum: np.ndarray) -> bytes:
    """A log-mel spectrum [frames, channels] as a picture: time to the right, pitch upwards, the loudest brightest."""
    from matplotlib import colormaps
    from PIL import Image

    decibels = spectrum.T[::-1] * (10 / np.log(10))
    shares = np.clip((decibels - decibels.max()) / PICTURE_RANGE_DB + 1, 0, 1)
    pixels = (colormaps["magma"](shares)[..., :3] * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(PICTURE, Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()
