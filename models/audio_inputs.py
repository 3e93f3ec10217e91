"""WAV bytes -> encoder input: the only such code. tf.data runs it in training, the SavedModel in serving.

All of it is core TensorFlow ops that TF Serving 2.19 links, and nothing in the bytes makes any of it raise: what
`audio_error` refuses is read as no samples, so `tf.map_fn` over a batch answers every row.
"""

from __future__ import annotations

import tensorflow as tf

from models.backbone import AudioPreprocess
from models.resample import AT_ONCE, in_pieces, resample
from models.wav_format import FLOAT, PCM, parse_wav, part, wav_error, wav_faults

__all__ = ["audio_error", "decode_wav", "encoder_inputs", "read_sound", "resample", "window"]

LOUDEST = 65_536.0  # float samples are held to it: some programs write 16-bit numbers as float; 1e30 is noise
TINY_VARIANCE = 1e-7  # as in transformers' Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm


def audio_error(data):
    """Why a file (scalar string) cannot be an input, "" where it can; scalar string. Judged by its headers."""
    data = tf.convert_to_tensor(data)
    return wav_error(data, parse_wav(data))


def decode_wav(data):
    """One WAV file (scalar string) -> (samples [n, channels] float32, -1 to 1; sample rate in Hz, scalar int32).

    PCM of 8, 16, 24 or 32 bits and float of 32 or 64 bits, also as WAVE_FORMAT_EXTENSIBLE, any number of channels.
    Float samples may exceed 1; NaN and infinity become 0. What `audio_error` refuses gives samples [0, 1].
    """
    data = tf.convert_to_tensor(data)
    wav = _readable(data)
    return _decode(data, wav, tf.constant(0, tf.int64), wav["frames"]), tf.cast(wav["rate_hz"], tf.int32)


def _readable(data) -> dict:
    """`parse_wav`, and as `row` which of the readers to use; no frames where the file is refused."""
    wav = parse_wav(data)
    good = ~tf.reduce_any(wav_faults(data, wav))
    size = tf.cast(wav["sample_bytes"], tf.int32)
    row = tf.where(wav["codec"] == PCM, size - 1, tf.where(wav["codec"] == FLOAT, tf.where(size == 4, 4, 5), 6))
    wav["row"] = tf.where(good, row, 6)
    wav["channels"], wav["frames"] = tf.where(good, wav["channels"], 1), tf.where(good, wav["frames"], 0)
    return wav


def _decode(data, wav: dict, first, count):
    """Samples [count, channels] from frame `first` on; fewer where the file ends before."""
    count = tf.maximum(tf.minimum(count, wav["frames"] - first), 0)
    values = part(data, wav["start"] + first * wav["frame_bytes"], count * wav["frame_bytes"])
    samples = tf.switch_case(wav["row"], [lambda read=read: read(values) for read in (*READERS, _nothing)])
    return tf.reshape(samples, tf.stack([count, wav["channels"]]))


def _read_integers(values, dtype, zero: int = 0):
    """Values of the dtype's full range -> -1 to 1."""
    numbers = tf.cast(tf.io.decode_raw(values, dtype), tf.float32)
    scale = 2.0 / (int(dtype.max) - int(dtype.min) + 1)
    return (numbers - zero) * scale if zero else numbers * scale


def _read_24_bits(values):
    three = tf.reshape(tf.io.decode_raw(values, tf.uint8), [-1, 3])
    four = tf.pad(three, [[0, 0], [1, 0]])  # the low byte of 32 bits
    return tf.cast(tf.bitcast(four, tf.int32), tf.float32) * 2.0**-31


def _read_floats(values, dtype):
    numbers = tf.cast(tf.io.decode_raw(values, dtype), tf.float32)
    return tf.clip_by_value(tf.where(tf.math.is_finite(numbers), numbers, 0.0), -LOUDEST, LOUDEST)


def _nothing(values):
    return tf.zeros([0])


READERS = (
    lambda values: _read_integers(values, tf.uint8, 128),
    lambda values: _read_integers(values, tf.int16),
    _read_24_bits,
    lambda values: _read_integers(values, tf.int32),
    lambda values: _read_floats(values, tf.float32),
    lambda values: _read_floats(values, tf.float64),
)


def read_sound(data, preprocess: AudioPreprocess):
    """One WAV file (scalar string) -> the mean of its channels [n] float32 at `preprocess.sample_rate_hz`.

    No samples, [0], where `audio_error` refuses it.
    """
    data = tf.convert_to_tensor(data)
    wav = _readable(data)
    share = tf.fill(tf.stack([wav["channels"], 1]), 1 / tf.cast(wav["channels"], tf.float32))

    def mixed(first):
        # The mean over the last axis takes TensorFlow ten times as long.
        return tf.reshape(tf.matmul(_decode(data, wav, first, tf.constant(AT_ONCE, tf.int64)), share), [-1])

    mono = in_pieces(mixed, wav["frames"], AT_ONCE)
    # A refused file may say 0 Hz.
    target_hz = tf.constant(preprocess.sample_rate_hz, tf.int64)
    return resample(mono, tf.where(wav["frames"] > 0, wav["rate_hz"], target_hz), target_hz)


def window(waveform, samples, start=0):
    """Samples [any] float32 -> (`samples` of them from `start` on [samples], mask [samples] int32).

    Zeros where the waveform ends before; the mask is 1 for its own samples and 0 there.
    """
    cut = waveform[start : start + samples]
    lacking = samples - tf.size(cut)
    mask = tf.pad(tf.ones_like(cut, tf.int32), [[0, lacking]])
    shape = [samples if isinstance(samples, int) else None]
    return tf.ensure_shape(tf.pad(cut, [[0, lacking]]), shape), tf.ensure_shape(mask, shape)


def encoder_inputs(waveform, mask, preprocess: AudioPreprocess) -> list:
    """Waveforms and masks [n, samples] -> what the encoder takes, [waveform float32, attention_mask int32].

    Padding is zeros. With `normalise` the samples where the mask is 1 have mean 0 and variance 1, row by row, as
    transformers' Wav2Vec2FeatureExtractor makes them.
    """
    waveform, mask = tf.cast(waveform, tf.float32), tf.cast(mask, tf.int32)
    real = tf.cast(mask, tf.float32)
    if preprocess.normalise:
        count = tf.maximum(tf.reduce_sum(real, 1, keepdims=True), 1.0)
        waveform -= tf.reduce_sum(waveform * real, 1, keepdims=True) / count
        variance = tf.reduce_sum(waveform**2 * real, 1, keepdims=True) / count
        waveform /= tf.sqrt(variance + TINY_VARIANCE)
    return [waveform * real, mask]
