"""Layers of Whisper's encoder that KerasHub lacks: its spectrogram, and which frames are sound and which padding.

Sound has `HOP` samples a mel frame and `FRAME` samples a frame of the encoder (a convolution with stride 2). All of it
is in float32, whatever the others compute in.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops
from keras_hub.layers import WhisperAudioConverter

SAMPLE_RATE_HZ, FFT, HOP, FRAME = 16_000, 400, 160, 320  # Radford et al. 2022 (arXiv 2212.04356), 2.2
# Whisper always saw a clip followed by silence up to 30 s. A clip that stands alone, with no silence after it, gives
# other states (a word of 0.67 s: cosine 0.86 to those of 30 s; with silence up to 2 s: 0.93), so it gets that much.
SHORTEST = 2 * SAMPLE_RATE_HZ
LONGEST = 30 * SAMPLE_RATE_HZ  # what lies behind is not heard, as in Whisper's own feature extractor
FLOOR, RANGE = 1e-10, 8.0  # the least power, and how many decades below the loudest are kept


def frame_count(samples, longest: int = LONGEST):
    """Frames of the encoder for so many samples, an int or an int32 tensor: of at least 2 s and at most `longest`."""
    if isinstance(samples, int):
        return min(-(-max(samples, SHORTEST) // FRAME), longest // FRAME)
    return ops.minimum((ops.maximum(samples, SHORTEST) + FRAME - 1) // FRAME, longest // FRAME)


@keras.saving.register_keras_serializable("graft")
class FrameMasks(keras.layers.Layer):
    """Mask [batch, samples] int32, 1 for a clip's own samples, which come first -> two masks [batch, frames] int32.

    The first is 1 where the encoder attends: the clip, and silence up to 2 s; the second where the clip itself is.
    Neither depends on how much padding the clip has.
    """

    def __init__(self, longest: int = LONGEST, **options):
        super().__init__(**{"autocast": False, **options})
        self.longest = longest

    def call(self, attention_mask):
        samples = ops.sum(ops.cast(attention_mask, "int32"), axis=1, keepdims=True)
        places = ops.arange(frame_count(ops.shape(attention_mask)[1], self.longest), dtype="int32")
        attended = ops.cast(places < frame_count(samples, self.longest), "int32")
        return attended, ops.cast(places * FRAME < samples, "int32")

    def compute_output_spec(self, attention_mask):
        frames = attention_mask.shape[1] and frame_count(attention_mask.shape[1], self.longest)
        return tuple(keras.KerasTensor((attention_mask.shape[0], frames), "int32") for _ in range(2))

    def get_config(self):
        return {**super().get_config(), "longest": self.longest}


@keras.saving.register_keras_serializable("graft")
class LogMel(keras.layers.Layer):
    """Waveform [batch, samples] and mask of it -> Whisper's log-mel spectrogram [batch, 2 * frames, mels] float32.

    As WhisperFeatureExtractor of transformers computes it: 25 ms under a Hann window every 10 ms, mirrored before
    the first sample and silent after the last; powers in Slaney's mel bands; log10, held to 8 decades below the
    loudest of the clip; (x + 4) / 4. Frames that `FrameMasks` says are not attended are 0, and no clip's own frames
    depend on them.
    """

    def __init__(self, mels: int = 80, longest: int = LONGEST, **options):
        super().__init__(**{"autocast": False, **options})
        self.mels, self.longest = mels, longest
        self.filters = WhisperAudioConverter(num_mels=mels).mel_filters  # [FFT / 2 + 1, mels]
        self.window = (0.5 - 0.5 * np.cos(2 * math.pi * np.arange(FFT) / FFT)).astype("float32")

    def call(self, waveform, attention_mask):
        mask = ops.cast(attention_mask, "int32")
        samples = ops.sum(mask, axis=1)
        frames = 2 * frame_count(ops.shape(waveform)[1], self.longest)
        waveform = ops.cast(waveform, "float32") * ops.cast(mask, "float32")

        waveform = ops.pad(waveform, [[0, 0], [0, SHORTEST + FFT]])[:, : frames * HOP + FFT // 2 - HOP]
        mirrored = ops.flip(waveform[:, 1 : FFT // 2 + 1], axis=1)
        pieces = ops.extract_sequences(ops.concatenate([mirrored, waveform], axis=1), FFT, HOP)
        real, imaginary = ops.rfft(pieces * self.window)  # [batch, frames, FFT / 2 + 1]
        powers = ops.matmul(real * real + imaginary * imaginary, self.filters)  # [batch, frames, mels]
        decades = ops.log10(ops.maximum(powers, FLOOR))

        attended = ops.arange(frames, dtype="int32") < 2 * frame_count(samples, self.longest)[:, None]
        decades = ops.where(attended[..., None], decades, math.log10(FLOOR))
        loudest = ops.max(decades, axis=(1, 2), keepdims=True)
        scaled = (ops.maximum(decades, loudest - RANGE) + 4.0) / 4.0
        return ops.where(attended[..., None], scaled, 0.0)

    def compute_output_spec(self, waveform, attention_mask):
        frames = waveform.shape[1] and 2 * frame_count(waveform.shape[1], self.longest)
        return keras.KerasTensor((waveform.shape[0], frames, self.mels), "float32")

    def get_config(self):
        return {**super().get_config(), "mels": self.mels, "longest": self.longest}


@keras.saving.register_keras_serializable("graft")
class Sinusoids(keras.initializers.Initializer):
    """Whisper's position embeddings [frames, d]: sines, then cosines, of wave lengths from 2 pi to 20,000 pi frames."""

    def __call__(self, shape, dtype=None, **_):
        frames, size = shape
        rates = np.exp(-math.log(10_000) / (size // 2 - 1) * np.arange(size // 2))
        angles = np.arange(frames)[:, None] * rates
        return ops.convert_to_tensor(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype or "float32")


@keras.saving.register_keras_serializable("graft")
class AddPositions(keras.layers.Layer):
    """Adds position embeddings to states [batch, frames, d]; they never train, as in Whisper."""

    def __init__(self, frames: int = LONGEST // FRAME, **options):
        super().__init__(**options)
        self.frames = frames
        self.position_embeddings_initializer = Sinusoids()

    def build(self, shape):
        self.position_embeddings = self.add_weight(
            name="position_embeddings",
            shape=(self.frames, shape[-1]),
            initializer=self.position_embeddings_initializer,
            trainable=False,
        )

    def call(self, states):
        return states + self.position_embeddings[: ops.shape(states)[1]]

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "frames": self.frames}
