"""Layers of Wav2Vec2 and HuBERT that Keras lacks; shapes are [batch, frames, d], masks [batch, frames] int32, 1 = real.

Norms over time, positions and attention may be told which frames are real; then no clip's frames depend on its
padding. No op here needs XLA or static shapes, and none is refused by it.
"""

from __future__ import annotations

import keras
from keras import ops

from models.text_layers import gelu_tanh
from models.wav2vec2_settings import frame_count

ACTIVATIONS = {"gelu": "gelu", "gelu_new": gelu_tanh, "relu": "relu"}  # config.json's words -> what Keras takes
NORM_EPSILON = 1e-5  # of the norms between convolutions: PyTorch's default, which no config says


@keras.saving.register_keras_serializable("graft")
class Samples(keras.layers.Layer):
    """Waveform [batch, n] and attention mask -> [batch, n, 1], zeros in the padding, `shortest` samples or more."""

    def __init__(self, shortest: int, **options):
        super().__init__(**options)
        self.shortest = shortest

    def call(self, waveform, attention_mask):
        waveform = ops.where(ops.cast(attention_mask, "bool"), waveform, ops.zeros_like(waveform))
        longer = ops.pad(waveform, [[0, 0], [0, self.shortest]])
        return longer[:, : at_least(ops.shape(waveform)[1], self.shortest), None]

    def compute_output_shape(self, waveform_shape, attention_mask_shape=None):
        length = waveform_shape[1]
        return (waveform_shape[0], length and max(length, self.shortest), 1)

    def get_config(self):
        return {**super().get_config(), "shortest": self.shortest}


@keras.saving.register_keras_serializable("graft")
class FrameMask(keras.layers.Layer):
    """Attention mask of samples [batch, n] -> mask of the frames that convolutions make of them.

    A frame is real where all samples that it is computed from are, as in transformers; a clip too short for any
    has one.
    """

    def __init__(self, kernels, strides, shortest: int, **options):
        super().__init__(**{"autocast": False, **options})
        self.kernels, self.strides, self.shortest = list(kernels), list(strides), shortest

    def call(self, attention_mask):
        samples = ops.sum(ops.cast(attention_mask, "int32"), axis=1)
        real = ops.where(samples > 0, ops.maximum(self.frames(samples), 1), 0)
        places = ops.arange(self.frames(at_least(ops.shape(attention_mask)[1], self.shortest)), dtype="int32")
        return ops.cast(places < real[:, None], "int32")

    def frames(self, samples):
        return frame_count(samples, self.kernels, self.strides)

    def compute_output_spec(self, attention_mask):
        batch, length = attention_mask.shape
        return keras.KerasTensor((batch, length and self.frames(max(length, self.shortest))), "int32")

    def get_config(self):
        more = {"kernels": self.kernels, "strides": self.strides, "shortest": self.shortest}
        return {**super().get_config(), **more}


def at_least(length, shortest: int):
    """The larger of the two; `length` may be a tensor where a shape is open."""
    return max(length, shortest) if isinstance(length, int) else ops.maximum(length, shortest)


@keras.saving.register_keras_serializable("graft")
class RealFrames(keras.layers.Layer):
    """States [batch, frames, d] with zeros where the frame mask says padding, which tells a head where a clip ends."""

    def call(self, states, frame_mask):
        return states * ops.cast(frame_mask, states.dtype)[..., None]

    def compute_output_shape(self, states_shape, frame_mask_shape=None):
        return states_shape


@keras.saving.register_keras_serializable("graft")
class TimeNorm(keras.layers.Layer):
    """Group norm with a group per channel: each channel of a clip gets mean 0 and variance 1 over time.

    Over the real frames where a mask is given, over all frames, as PyTorch's GroupNorm, where none is.
    """

    def __init__(self, epsilon: float = NORM_EPSILON, **options):
        super().__init__(**options)
        self.epsilon = epsilon
        self.gamma_initializer, self.beta_initializer = keras.initializers.Ones(), keras.initializers.Zeros()

    def build(self, states_shape, frame_mask_shape=None):
        self.gamma = self.add_weight(name="gamma", shape=(states_shape[-1],), initializer=self.gamma_initializer)
        self.beta = self.add_weight(name="beta", shape=(states_shape[-1],), initializer=self.beta_initializer)

    def call(self, states, frame_mask=None):
        states = ops.cast(states, "float32")
        real = ops.ones_like(states[..., :1]) if frame_mask is None else ops.cast(frame_mask, "float32")[..., None]
        count = ops.maximum(ops.sum(real, axis=1, keepdims=True), 1.0)
        states -= ops.sum(states * real, axis=1, keepdims=True) / count
        variance = ops.sum(states * states * real, axis=1, keepdims=True) / count
        scaled = states * ops.rsqrt(variance + self.epsilon)
        gamma, beta = (ops.cast(weight, "float32") for weight in (self.gamma, self.beta))
        return ops.cast(scaled * gamma + beta, self.compute_dtype)

    def compute_output_shape(self, states_shape, frame_mask_shape=None):
        return states_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("graft")
class SpecAugment(keras.layers.Layer):
    """In training, some spans of frames become one learned vector, and some spans of channels become 0.

    Park et al. 2019, arXiv 1904.08779, as Wav2Vec2Model._mask_hidden_states of transformers does it: of n frames
    `time_share` x n / `time_length` spans, which may overlap.
    """

    def __init__(
        self, time_share=0.05, time_length=10, time_least=2, channel_share=0.0, channel_length=10, channel_least=0,
        seed: int = 0, **options,
    ):  # fmt: skip
        super().__init__(**options)
        self.time = {"share": time_share, "length": time_length, "least": time_least}
        self.channel = {"share": channel_share, "length": channel_length, "least": channel_least}
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.masked_spec_embed_initializer = keras.initializers.RandomUniform(0, 1, seed=0)

    def build(self, states_shape, frame_mask_shape=None):
        initializer = self.masked_spec_embed_initializer
        self.masked_spec_embed = self.add_weight(
            name="masked_spec_embed", shape=(states_shape[-1],), initializer=initializer
        )

    def call(self, states, frame_mask=None, training=False):
        if not training:
            return states
        shape = ops.shape(states)
        if self.time["share"] > 0:
            lengths = ops.broadcast_to(shape[1], (shape[0],))
            if frame_mask is not None:
                lengths = ops.sum(ops.cast(frame_mask, "int32"), axis=1)
            spans = self.spans(shape[0], shape[1], lengths, **self.time)
            states = ops.where(spans[..., None], ops.cast(self.masked_spec_embed, states.dtype), states)
        if self.channel["share"] > 0:
            lengths = ops.broadcast_to(shape[2], (shape[0],))
            spans = self.spans(shape[0], shape[2], lengths, **self.channel)
            states = ops.where(spans[:, None, :], ops.zeros_like(states), states)
        return states

    def spans(self, batch, size, lengths, share: float, length: int, least: int):
        """Spans of `length` places that start at random among the first `lengths` [batch]: [batch, size] bool."""
        lengths = ops.cast(lengths, "int32")
        rounding = keras.random.uniform((), seed=self.seed_generator)
        count = ops.cast(ops.floor(share * ops.cast(lengths, "float32") / length + rounding), "int32")
        count = ops.maximum(count, least)
        starts = ops.maximum(lengths - length + 1, 0)  # places where a span can start
        count = ops.minimum(ops.minimum(count, size // length), starts)
        draws = keras.random.uniform((batch, size), seed=self.seed_generator)
        draws = ops.where(ops.arange(size, dtype="int32") < starts[:, None], draws, 2.0)
        order = ops.argsort(ops.argsort(draws, axis=1), axis=1)
        begun = ops.cumsum(ops.cast(ops.cast(order, "int32") < count[:, None], "int32"), axis=1)
        ended = ops.pad(begun, [[0, 0], [length, 0]])[:, :size]
        return begun > ended

    def compute_output_shape(self, states_shape, frame_mask_shape=None):
        return states_shape

    def get_config(self):
        kinds = {"time": self.time, "channel": self.channel}
        flat = {f"{kind}_{key}": value for kind, values in kinds.items() for key, value in values.items()}
        return {**super().get_config(), **flat, "seed": self.seed}


@keras.saving.register_keras_serializable("graft")
class PositionalConvolution(keras.layers.Layer):
    """States + activation(convolution of the states over time, in groups of channels), which tells positions.

    The weight normalisation of the checkpoint is folded into the kernel [size, d / groups, d]. A convolution per
    group: of grouped ones TensorFlow has no gradient on CPUs, and Keras would ask for XLA, which servers need not have.
    """

    def __init__(self, size: int = 128, groups: int = 16, activation="gelu", **options):
        super().__init__(**options)
        self.size, self.groups = size, groups
        self.activation = keras.activations.get(activation)
        self.kernel_initializer, self.bias_initializer = keras.initializers.HeNormal(seed=0), keras.initializers.Zeros()

    def build(self, states_shape, frame_mask_shape=None):
        kernel_shape = (self.size, states_shape[-1] // self.groups, states_shape[-1])
        self.kernel = self.add_weight(name="kernel", shape=kernel_shape, initializer=self.kernel_initializer)
        self.bias = self.add_weight(name="bias", shape=(states_shape[-1],), initializer=self.bias_initializer)

    def call(self, states, frame_mask=None):
        if frame_mask is not None:
            states = states * ops.cast(frame_mask, states.dtype)[..., None]
        # Of an even size PyTorch's symmetric padding makes one frame too many, and its last is dropped.
        padded = ops.pad(states, [[0, 0], [self.size // 2, (self.size - 1) // 2], [0, 0]])
        parts = zip(ops.split(padded, self.groups, axis=-1), ops.split(self.kernel, self.groups, axis=-1))
        outputs = [ops.conv(part, kernel, padding="valid", data_format="channels_last") for part, kernel in parts]
        return states + self.activation(ops.concatenate(outputs, axis=-1) + self.bias)

    def compute_output_shape(self, states_shape, frame_mask_shape=None):
        return states_shape

    def get_config(self):
        more = {"size": self.size, "groups": self.groups, "activation": keras.activations.serialize(self.activation)}
        return {**super().get_config(), **more}


@keras.saving.register_keras_serializable("graft")
class SpeechUnit(keras.layers.Layer):
    """One transformer unit: self-attention and feed-forward, each with a residual and a norm, [batch, frames, d].

    Args:
        norm_first: norms stand before attention and feed-forward (large, XLS-R, MMS), else after them (base).
        layerdrop: in training, the share of batches that pass the unit by (Fan et al. 2019, arXiv 1909.11556).
        adapter_size: width of MMS's feed-forward part behind the unit (Pratap et al. 2023, arXiv 2305.13516); None
            without one.
    """

    def __init__(
        self, heads: int, wide: int, activation="gelu", epsilon: float = 1e-5, norm_first: bool = False,
        dropout: float = 0.0, attention_dropout: float = 0.0, activation_dropout: float = 0.0, layerdrop: float = 0.0,
        adapter_size: int | None = None, **options,
    ):  # fmt: skip
        super().__init__(**options)
        self.heads, self.wide, self.epsilon, self.norm_first = heads, wide, epsilon, norm_first
        self.rates = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.rates |= {"activation_dropout": activation_dropout, "layerdrop": layerdrop}
        self.adapter_size, self.activation = adapter_size, keras.activations.get(activation)
        self.seed_generator = keras.random.SeedGenerator(0)

    def build(self, states_shape, frame_mask_shape=None):
        size = states_shape[-1]
        policy, states = {"dtype": self.dtype_policy}, (None, None, size)
        layers, rates = keras.layers, self.rates
        self.attention = layers.MultiHeadAttention(
            self.heads, size // self.heads, dropout=rates["attention_dropout"], name="attention", **policy
        )
        self.attention_norm = layers.LayerNormalization(epsilon=self.epsilon, name="attention_norm", **policy)
        self.wide_dense = layers.Dense(self.wide, activation=self.activation, name="wide", **policy)
        self.narrow_dense = layers.Dense(size, name="narrow", **policy)
        self.norm = layers.LayerNormalization(epsilon=self.epsilon, name="norm", **policy)
        self.attention.build(states, states)
        self.dropouts = [layers.Dropout(rates["dropout"], **policy) for _ in range(2)]
        self.wide_dropout = layers.Dropout(rates["activation_dropout"], **policy)
        for layer, width in ((self.attention_norm, size), (self.wide_dense, size), (self.norm, size)):
            layer.build((None, None, width))
        self.narrow_dense.build((None, None, self.wide))
        if self.adapter_size:
            self.adapter_norm = layers.LayerNormalization(epsilon=NORM_EPSILON, name="adapter_norm", **policy)
            self.adapter_wide = layers.Dense(self.adapter_size, activation="relu", name="adapter_wide", **policy)
            self.adapter_narrow = layers.Dense(size, name="adapter_narrow", **policy)
            self.adapter_norm.build(states)
            self.adapter_wide.build(states)
            self.adapter_narrow.build((None, None, self.adapter_size))

    def call(self, states, frame_mask=None, training=False):
        before = states
        if self.norm_first:
            states = states + self.attend(self.attention_norm(states), frame_mask, training)
            states = states + self.feed_forward(self.norm(states), training)
        else:
            states = self.attention_norm(states + self.attend(states, frame_mask, training))
            states = self.norm(states + self.feed_forward(states, training))
        if self.adapter_size:
            states = states + self.adapter_narrow(self.adapter_wide(self.adapter_norm(states)))
        if training and self.rates["layerdrop"] > 0:
            dropped = keras.random.uniform((), seed=self.seed_generator) < self.rates["layerdrop"]
            states = ops.where(dropped, before, states)
        return states

    def attend(self, states, frame_mask, training):
        attended = None if frame_mask is None else ops.cast(frame_mask, "bool")[:, None, :]
        states = self.attention(states, states, attention_mask=attended, training=training)
        return self.dropouts[0](states, training=training)

    def feed_forward(self, states, training):
        states = self.wide_dropout(self.wide_dense(states), training=training)
        return self.dropouts[1](self.narrow_dense(states), training=training)

    def compute_output_shape(self, states_shape, frame_mask_shape=None):
        return states_shape

    def get_config(self):
        more = {"heads": self.heads, "wide": self.wide, "epsilon": self.epsilon, "norm_first": self.norm_first}
        more |= {"activation": keras.activations.serialize(self.activation), "adapter_size": self.adapter_size}
        return {**super().get_config(), **more, **self.rates}
