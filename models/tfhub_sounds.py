"""What stands around a TF-Hub module of sound, so that it takes what audio encoders take: a waveform and its mask.

Such modules know no mask (https://www.tensorflow.org/hub/common_signatures has none for audio; those there are take
mono samples at 16 kHz, -1 to 1): padding is silence to them, and of their frames those over sound are averaged.
"""

from __future__ import annotations

import keras
from keras import ops

from models.backbone import AudioPreprocess
from models.text_layers import PoolTokens

SAMPLE_RATE_HZ = 16_000
WINDOW_SECONDS = 2.0  # of modules that take any length


@keras.saving.register_keras_serializable("graft")
class FitSamples(keras.layers.Layer):
    """Waveform and mask [batch, samples] -> the same with silence where the mask is 0, cut or padded to `samples`.

    Without `samples` the length stays.
    """

    def __init__(self, samples: int | None = None, **options):
        super().__init__(**{"autocast": False, **options})
        self.samples = samples

    def call(self, waveform, attention_mask):
        mask = ops.cast(attention_mask, "int32")
        waveform = ops.cast(waveform, "float32") * ops.cast(mask, "float32")
        if self.samples is None:
            return waveform, mask
        padding = [[0, 0], [0, self.samples]]
        return tuple(ops.pad(part, padding)[:, : self.samples] for part in (waveform, mask))

    def compute_output_spec(self, waveform, attention_mask):
        shape = (waveform.shape[0], self.samples or waveform.shape[1])
        return keras.KerasTensor(shape, "float32"), keras.KerasTensor(shape, "int32")

    def get_config(self):
        return {**super().get_config(), "samples": self.samples}


@keras.saving.register_keras_serializable("graft")
class FramesOfSound(keras.layers.Layer):
    """Frames [batch, frames, d] and mask [batch, samples] -> mask [batch, frames] int32: the share that is sound.

    A module does not say how long its frames are; that they are spread evenly over the samples is near enough.
    """

    def __init__(self, **options):
        super().__init__(**{"autocast": False, **options})

    def call(self, frames, attention_mask):
        count = ops.shape(frames)[1]
        share = ops.mean(ops.cast(attention_mask, "float32"), axis=1, keepdims=True)
        places = ops.cast(ops.arange(count, dtype="int32"), "float32")
        return ops.cast(places < share * ops.cast(count, "float32"), "int32")

    def compute_output_spec(self, frames, attention_mask):
        return keras.KerasTensor(frames.shape[:2], "int32")


def sound_graph(run, samples: int | None):
    """([waveform, attention_mask], vectors [batch, d] or whatever else) of `run`: waveform [batch, samples] -> states.

    samples: what the module was traced with; None: any number.
    """
    waveform = keras.Input((None,), dtype="float32", name="waveform")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    fitted, mask = FitSamples(samples, name="fit_samples")(waveform, attention_mask)
    states = run(fitted)
    if len(states.shape) == 3:
        states = PoolTokens("mean", name="pooling")(states, FramesOfSound(name="frames_of_sound")(states, mask))
    return [waveform, attention_mask], states


def sound_preprocess(samples: int | None) -> AudioPreprocess:
    """For a module that takes `samples` samples; None: any number."""
    seconds = samples / SAMPLE_RATE_HZ if samples else None
    return AudioPreprocess(SAMPLE_RATE_HZ, seconds or WINDOW_SECONDS, longest_seconds=seconds)
