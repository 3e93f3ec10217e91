"""Long sounds in windows of one length: the same few for training's evaluation and for the served model.

Core TensorFlow ops only. What is averaged over the windows of a sound are its pooled features: with a linear head that
is the average of the windows' logits.
"""

from __future__ import annotations

import tensorflow as tf

from models.audio_inputs import audio_error, encoder_inputs, read_sound
from models.backbone import AudioPreprocess

MOST_WINDOWS = 16  # of one sound, spread evenly over it: an hour costs no more than what they hold
OVERLAP = 2  # windows begin half a window apart, or a little less, until there are MOST_WINDOWS


def window_samples(preprocess: AudioPreprocess) -> int:
    """Samples of a window."""
    return round(preprocess.window_seconds * preprocess.sample_rate_hz)


def window_count(samples, window: int):
    """How many windows a sound of so many samples has, 1 to MOST_WINDOWS; integers, or integer tensors and arrays."""
    hop = max(window // OVERLAP, 1)
    wanted = 1 + -(-(samples - window) // hop)  # rounded up: the last window ends where the sound does
    if isinstance(samples, tf.Tensor):
        return tf.clip_by_value(wanted, 1, MOST_WINDOWS)
    return max(1, min(wanted, MOST_WINDOWS))


def cut_windows(waveforms, window: int):
    """Waveforms [n, samples] float32 of one length -> windows [n, k, window] and masks [n, k, window] int32.

    The first window starts with the sound and the last ends with it; a sound shorter than the window is padded with
    zeros, and the mask is 1 where there is sound.
    """
    samples = tf.shape(waveforms)[1]
    count = window_count(samples, window)
    room = tf.cast(tf.maximum(samples - window, 0), tf.int64)  # 64 bits: an hour times 16 is above 2^31 at 48 kHz
    starts = tf.cast(tf.range(count, dtype=tf.int64) * room // tf.cast(tf.maximum(count - 1, 1), tf.int64), tf.int32)
    places = starts[:, None] + tf.range(window)[None, :]  # [k, window]
    padded = tf.pad(waveforms, [[0, 0], [0, tf.maximum(window - samples, 0)]])
    windows = tf.gather(padded, places, axis=1)  # [n, k, window]
    masks = tf.broadcast_to(tf.cast(places < samples, tf.int32)[None], tf.shape(windows))
    windows.set_shape([waveforms.shape[0], None, window])
    masks.set_shape([waveforms.shape[0], None, window])
    return windows, masks


def read_windows(data, preprocess: AudioPreprocess):
    """The bytes of a WAV file (scalar string) -> [windows, masks], [k, samples] each, as the encoder takes them."""
    waveform = read_sound(data, preprocess)
    windows, masks = cut_windows(waveform[None], window_samples(preprocess))
    return encoder_inputs(windows[0], masks[0], preprocess)


def read_windows_of_many(audio_bytes, preprocess: AudioPreprocess):
    """Bytes of WAV files [n] string, n at least 1 -> windows of all, one after the other, and whose they are.

    Returns:
        [windows, masks], [w, samples] each, as the encoder takes them; the row of each window [w] int64, ascending,
        and every row occurs; errors [n] string, "" where all is well. What has an error has a window all the same.
    """

    def read_one(data):
        windows, masks = read_windows(data, preprocess)
        # An empty mask is no input for an encoder: what follows from it is thrown away.
        masks = tf.maximum(masks, tf.cast(tf.reduce_max(masks) == 0, tf.int32))
        return windows, masks, audio_error(data)

    window = window_samples(preprocess)
    specs = [tf.RaggedTensorSpec([None, window], dtype, ragged_rank=0) for dtype in (tf.float32, tf.int32)]
    windows, masks, errors = tf.map_fn(
        read_one, audio_bytes, fn_output_signature=(*specs, tf.TensorSpec([], tf.string))
    )
    rows = windows.value_rowids()
    inputs = [tf.ensure_shape(ragged.values, [None, window]) for ragged in (windows, masks)]
    return inputs, rows, errors


def average_rows(values, rows):
    """Values [w, ...] of windows and the row of each -> [n, ...], the mean over the windows of each row."""
    return tf.math.segment_mean(values, rows)
