"""Layers of text encoders that KerasHub lacks: the pooling, and positions that every unit computes for itself.

None has weights of its own. Two read weights of layers that other blocks hold; they do not track those,
since a weight belongs to exactly one block. All say in float32 what they say, whatever the others compute in.
"""

from __future__ import annotations

import keras
from keras import ops

POOLINGS = ("mean", "cls", "last")
MASKED = -3e4  # added to the attention scores of padding: its exponential is 0, and float16 can hold it


@keras.saving.register_keras_serializable("graft")
def gelu_tanh(inputs):
    """GELU by its approximation with tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return keras.activations.gelu(inputs, approximate=True)


@keras.saving.register_keras_serializable("graft")
class PoolTokens(keras.layers.Layer):
    """Hidden states [batch, tokens, d] and padding mask [batch, tokens] int32 -> one vector per example [batch, d].

    "mean" over real tokens, "cls": the first token, "last": the last real token. An example without any real
    token gives zeros under "mean".
    """

    def __init__(self, pooling: str, **options):
        super().__init__(**{"autocast": False, **options})
        if pooling not in POOLINGS:
            raise ValueError(f"Pooling {pooling!r} is none of {', '.join(POOLINGS)}.")
        self.pooling = pooling

    def call(self, states, padding_mask):
        states = ops.cast(states, "float32")
        if self.pooling == "cls":
            return states[:, 0]
        real = ops.cast(padding_mask, "float32")
        if self.pooling == "mean":
            return ops.sum(states * real[..., None], axis=1) / ops.maximum(ops.sum(real, axis=1, keepdims=True), 1.0)
        places = ops.arange(ops.shape(padding_mask)[1], dtype="int32")
        last = ops.max(ops.cast(padding_mask, "int32") * places, axis=1, keepdims=True)
        chosen = ops.cast(ops.equal(places, last), "float32")  # 1 at one place: the sum is that state, exactly
        return ops.sum(states * chosen[..., None], axis=1)

    def get_config(self):
        return {**super().get_config(), "pooling": self.pooling}


class _Borrowing(keras.layers.Layer):
    """A layer that uses another one, `self.lender()`, without tracking its weights."""

    def __init__(self, lender: keras.layers.Layer | None = None, **options):
        super().__init__(**{"autocast": False, **options})
        self.lender = lambda: lender  # Keras tracks what an attribute is, not what a function returns

    def get_config(self):
        return super().get_config()  # without the lender: the graph around it tells which one that is


@keras.saving.register_keras_serializable("graft")
class PositionBias(_Borrowing):
    """T5's position bias with the padding mask folded in, [batch, heads, tokens, tokens], from the first unit's table.

    As KerasHub's T5MultiHeadAttention.call computes it, but for the number that masks.
    """

    def call(self, states, padding_mask):
        length = ops.shape(states)[1]
        bias = ops.cast(self.lender().compute_bias(length, length), "float32")
        return bias + (1.0 - ops.cast(padding_mask[:, None, None, :], "float32")) * MASKED


@keras.saving.register_keras_serializable("graft")
class RelativePositions(_Borrowing):
    """DeBERTa's relative positions [batch, 2 x bucket, d] from another block's weights."""

    def call(self, states):
        return self.lender()(states)


@keras.saving.register_keras_serializable("graft")
class HoldPositions(keras.layers.Layer):
    """Passes hidden states through; its block holds the weights of DeBERTa's relative positions."""

    def __init__(self, positions: keras.layers.Layer | None = None, **options):
        super().__init__(**options)
        self.positions = positions

    def call(self, states):
        return states

    def get_config(self):
        return super().get_config()
