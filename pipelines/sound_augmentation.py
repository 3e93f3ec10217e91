"""Random changes to sounds in training: another crop, a shift, louder or softer, noise, and masks (SpecAugment).

All are functions of a seed, as `pipelines.data.dataset` gives it, and of nothing else.
"""

from __future__ import annotations

import functools

import numpy as np

SHIFT_SECONDS = 0.1  # most that a clip that fits the window is moved, either way
GAIN_DB = 6.0  # most by which it is made louder or softer
NOISE_RANGE_DB = 20.0  # noise is as loud as asked for, or up to so much softer
NOISE_SHARE = 0.5  # of the examples that get noise
QUIET = 1e-10  # power below which a clip counts as silent: noise relative to it would be none
FREQUENCY_SHARE = 27 / 80  # widest band that is masked: F = 27 of 80 mel channels, as in SpecAugment's LD policy
TIME_SHARE = 0.1  # longest span that is masked, of the real samples
MASKS = 2  # of either kind
MEL_BREAK_HZ = 700.0  # of the mel scale, 2595 log10(1 + f / 700)


@functools.cache
def sound_loader(preprocess, augmentation: str = "none", noise_snr_db: float = 10.0):
    """A `load` function for `pipelines.data.dataset`: path of a WAV file -> waveform and mask [1, samples].

    One window of each clip: a random one where it is longer. With "noise" the clip is shifted, its gain changed, and
    half of the clips get white noise at a signal-to-noise ratio between `noise_snr_db` and 20 dB more, uniform in
    decibels, over the real samples. "spec-augment" masks two bands of frequencies and two spans of time besides (Park
    et al. 2019, "SpecAugment"), on the waveform, so that it suits every backbone.
    """
    import tensorflow as tf

    from models.audio_inputs import encoder_inputs, read_sound, window
    from models.sound_windows import window_samples

    samples, rate_hz = window_samples(preprocess), preprocess.sample_rate_hz

    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)], autograph=False)
    def load(path, seed):
        waveform = read_sound(tf.io.read_file(path), preprocess)
        wave, mask = window(*place(waveform, samples, rate_hz, seed, shifts=augmentation != "none"))
        if augmentation != "none":
            wave = add_noise(change_gain(wave, seed), mask, seed, noise_snr_db)
        if augmentation == "spec-augment":
            wave = mask_spans(mask_bands(wave, rate_hz, seed), mask, seed)
        return tuple(encoder_inputs(wave[None], mask[None], preprocess))

    return load


def drawn(seed, number: int, low, high, shape=()):
    """Uniform numbers; `number` tells the draws of one example apart."""
    import tensorflow as tf

    return tf.random.stateless_uniform(shape, tf.stack([seed[0], seed[1] * 16 + number]), low, high)


def place(waveform, samples: int, rate_hz: int, seed, shifts: bool):
    """(waveform [any], samples, start): which window to cut. Silence may come in front of a clip that fits it."""
    import tensorflow as tf

    room = tf.size(waveform) - samples
    start = tf.cast(drawn(seed, 0, 0.0, 1.0) * tf.cast(tf.maximum(room, 0) + 1, tf.float32), tf.int32)
    start = tf.minimum(start, tf.maximum(room, 0))
    if not shifts:
        return waveform, samples, start
    most = SHIFT_SECONDS * rate_hz
    shift = tf.cast(drawn(seed, 1, -most, most), tf.int32)
    shift = tf.where(room < 0, tf.minimum(shift, -room), 0)  # what there is room for: the end is not pushed out
    late = tf.pad(waveform, [[tf.maximum(shift, 0), 0]])
    # Where it begins sooner, what is cut off is at most a tenth of the clip.
    early = tf.minimum(tf.maximum(-shift, 0), tf.size(waveform) // 10)
    return late, samples, start + early


def change_gain(wave, seed):
    """Louder or softer by up to GAIN_DB."""
    return wave * 10.0 ** (drawn(seed, 2, -GAIN_DB, GAIN_DB) / 20)


def add_noise(wave, mask, seed, snr_db: float):
    """White noise over the real samples of some clips."""
    import tensorflow as tf

    real = tf.cast(mask, tf.float32)
    power = tf.reduce_sum(wave**2 * real) / tf.maximum(tf.reduce_sum(real), 1.0)
    ratio_db = drawn(seed, 3, snr_db, snr_db + NOISE_RANGE_DB)
    noise = tf.random.stateless_normal(tf.shape(wave), tf.stack([seed[0], seed[1] * 16 + 4]))
    deviation = tf.sqrt(power * 10.0 ** (-ratio_db / 10))
    wanted = (drawn(seed, 5, 0.0, 1.0) < NOISE_SHARE) & (power > QUIET)
    return wave + tf.where(wanted, noise * deviation * real, 0.0)


def mask_bands(wave, rate_hz: int, seed):
    """Without the frequencies of MASKS random bands, each up to FREQUENCY_SHARE of the mel scale wide."""
    import tensorflow as tf

    length = wave.shape[0]
    spectrum = tf.signal.rfft(wave)
    hertz = np.linspace(0, rate_hz / 2, length // 2 + 1, dtype=np.float32)
    mel = np.log1p(hertz / MEL_BREAK_HZ) / np.log1p(rate_hz / 2 / MEL_BREAK_HZ)  # 0 to 1
    for number in range(MASKS):
        width = drawn(seed, 6 + number, 0.0, FREQUENCY_SHARE)
        low = drawn(seed, 8 + number, 0.0, 1.0) * (1 - width)
        kept = tf.cast((mel < low) | (mel >= low + width), tf.float32)
        spectrum *= tf.cast(kept, tf.complex64)
    return tf.signal.irfft(spectrum, [length])


def mask_spans(wave, mask, seed):
    """Without MASKS random spans of time, each up to TIME_SHARE of the real samples long."""
    import tensorflow as tf

    real = tf.cast(tf.reduce_sum(mask), tf.float32)
    places = tf.range(tf.size(wave), dtype=tf.float32)
    for number in range(MASKS):
        length = drawn(seed, 10 + number, 0.0, TIME_SHARE) * real
        start = drawn(seed, 12 + number, 0.0, 1.0) * (real - length)
        wave *= tf.cast((places < start) | (places >= start + length), tf.float32)
    return wave
