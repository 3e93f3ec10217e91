"""Mixed precision: the encoder computes in 16 bits, its weights and all that follows stay float32.

The policy of every layer is set after loading, so that it works with any loader. Functions read it while they are
traced: one that was traced before goes on as it was.
"""

from __future__ import annotations

import contextlib

import keras
import tensorflow as tf

from models.classifier import Classifier

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def set_precision(model: Classifier, precision: str) -> None:
    """Set what the encoder's layers compute in, nested ones too.

    Layers with `autocast=False`, such as a TF-Hub module, whose graph is fixed, keep their own.

    Args:
        precision: "float32", "bfloat16" or "float16".
    """
    policy = keras.DTypePolicy(POLICIES[precision])
    for layer in model.encoder._flatten_layers():
        # Two kinds of Keras's own layers say autocast=False although they follow their policy.
        if layer.autocast or isinstance(layer, (keras.layers.LayerNormalization, keras.layers.Embedding)):
            layer.dtype_policy = policy


@contextlib.contextmanager
def computing_in(model: Classifier, precision: str):
    """Within, the encoder computes in a precision, as `set_precision` says; afterwards in float32."""
    set_precision(model, precision)
    try:
        yield
    finally:
        set_precision(model, "float32")


class LossScale:
    """Keeps float16 gradients from vanishing: the loss is scaled up, the gradients down; build it in scope.

    Steps with gradients that are not finite are left out, and halve the scale; GROWTH_STEPS good ones in a row
    double it (Micikevicius et al. 2018, arXiv 1710.03740; the numbers are Keras's). Keras's LossScaleOptimizer does
    not fit here: of several replicas it asks only the first whether its gradients are finite.
    """

    GROWTH_STEPS = 2000

    def __init__(self, initial: float = 2.0**15):
        self.scale = tf.Variable(initial, trainable=False, dtype=tf.float32, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int32, name="good_steps")

    def update(self, finite) -> None:
        """Book a step. finite: bool scalar, of all replicas; call it in cross-replica context."""
        good_steps = tf.where(finite, self.good_steps + 1, 0)
        grows = good_steps >= self.GROWTH_STEPS
        factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
        self.scale.assign(tf.maximum(self.scale * factor, 1.0))
        self.good_steps.assign(tf.where(grows, 0, good_steps))


def all_finite(gradients):
    """Whether every entry of a list of gradients is a number: bool scalar."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
