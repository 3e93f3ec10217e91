"""The contract of preprocessing: what a fixed probe becomes on its way to the encoder, in training and when served.

A probe is a made-up file or text, the same everywhere. What it becomes says what no setting can hide: the range and
order of the channels, casing, and how many tokens are kept. Training notes it through its own input pipeline, export
through the functions that it traces into the served graph, and `serving/verify.py` compares the two. Each kind of data
brings its own probe; here a contract is a dict of numbers, words and lists of them.
"""

from __future__ import annotations

import functools
import io
import math
import wave

import numpy as np

RELATIVE = 1e-4  # of the largest number of a list: resizing sums in another order elsewhere
WORDS = {  # what the entries of a contract are called
    "image_size": "size of the picture",
    "range": "values of black and white",
    "channel_means": "means of the red, green and blue part of the probe, channel by channel",
    "tokens": "tokens of the probe",
    "longest": "most tokens of a text",
    "cased": "upper and lower case are told apart",
    "ids": "first token ids of the probe",
    "samples": "samples of the probe, a fifth of a second",
    "pitch_hz": "pitch of the probe at the encoder's sample rate",
    "level": "loudness of the probe (root of the mean square)",
}
TEXT_PROBE = "Graft GRAFTS graft, unHURRIED and naïve: 42 words?"
TONE_HZ, TONE_SECONDS, TONE_RATE_HZ = 500, 0.2, 48_000  # of the sound
LONG_PROBE = " ".join([TEXT_PROBE] * 100)  # longer than any limit


@functools.cache
def image_probe() -> bytes:
    """A PNG of 96 x 96 pixels: three bars, of strong red, green and blue, on a dark and a light half."""
    import tensorflow as tf

    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[48:] = 255
    for channel in range(3):
        bar = slice(12 + 24 * channel, 36 + 24 * channel)
        pixels[12:84, bar] = 0
        pixels[12:84, bar, channel] = 200 + 20 * channel
    return tf.io.encode_png(pixels).numpy()


def image_contract(image) -> dict:
    """What the probe has become, [height, width, 3] float as the encoder takes it.

    range: of black and of white, where no edge is near that resizing could overshoot. channel_means: of the middle of
    the red, the green and the blue bar, the value of each of the three channels.
    """
    image = np.asarray(image, np.float64)
    height, width = image.shape[:2]
    rows = slice(height * 3 // 8, height * 5 // 8)
    middles = [width * (24 + 24 * bar) // 96 for bar in range(3)]
    return {
        "image_size": [height, width],
        "range": [float(image[0, 0].min()), float(image[-1, -1].max())],
        "channel_means": [image[rows, middle].mean(axis=0).tolist() for middle in middles],
    }


def sound_probe() -> bytes:
    """A WAV file, 16 bits, two channels at 48 kHz: a tone on the left, the same at half its loudness on the right."""
    times = np.arange(int(TONE_SECONDS * TONE_RATE_HZ)) / TONE_RATE_HZ
    tone = np.sin(2 * np.pi * TONE_HZ * times)[:, None] * [0.5, 0.25]
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(2)
        opened.setsampwidth(2)
        opened.setframerate(TONE_RATE_HZ)
        opened.writeframes((tone * 32767).astype("<i2").tobytes())
    return file.getvalue()


def sound_contract(waveform, mask, sample_rate_hz: int) -> dict:
    """What the probe has become: a window [samples] float and its mask, as the encoder takes them."""
    real = np.asarray(waveform, np.float64)[np.asarray(mask) > 0]
    turns = np.count_nonzero(np.diff(np.signbit(real))) / 2
    return {
        "samples": len(real),
        "pitch_hz": round(turns / len(real) * sample_rate_hz),
        "level": [float(np.sqrt(np.mean(real**2)))],
    }


def text_contract(token_ids, long_token_ids, upper_ids, lower_ids) -> dict:
    """What the probe has become, and whether case counts; each a list of token ids without padding."""
    return {
        "ids": [int(number) for number in token_ids[:16]],
        "tokens": len(token_ids),
        "longest": len(long_token_ids),
        "cased": [int(number) for number in upper_ids] != [int(number) for number in lower_ids],
    }


def differences(trained: dict, served: dict) -> list[str]:
    """What differs, one sentence each: entry, what training saw, what serving sees; and what is likely wrong."""
    found = []
    for name in sorted(trained.keys() | served.keys()):
        if name not in trained or name not in served or not same(trained[name], served[name]):
            words = WORDS.get(name, name.replace("_", " "))
            found.append(f"{words}: {shown(trained.get(name))} in training, {shown(served.get(name))} when served")
    if found and swapped(trained, served):
        found.insert(0, "red and blue are swapped")
    return found


def same(one, other) -> bool:
    """Whether two entries are equal, numbers of a list up to RELATIVE of the largest."""
    if isinstance(one, (bool, str)) or isinstance(other, (bool, str)) or one is None or other is None:
        return one == other
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape:
        return False
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    return bool(np.abs(one - other).max(initial=0.0) <= RELATIVE * scale)


def swapped(trained: dict, served: dict) -> bool:
    """Whether pictures have their channels the other way round."""
    means = trained.get("channel_means"), served.get("channel_means")
    if None in means or same(*means):
        return False
    order = [np.argsort(np.asarray(value), axis=1)[:, -1].tolist() for value in means]  # the strongest of each bar
    return order[0] == [2 - channel for channel in order[1]]


def shown(value) -> str:
    """An entry as people read it."""
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "nothing"}[value]
    return str(value)
