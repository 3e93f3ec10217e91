"""Inference of what is frozen: a graph whose weights are constants, so that BatchNorm folds into convolutions."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2


def frozen_function(function, shapes):
    """Compile a function of float32 tensors [b, *shape] -> a tensor or a list, with all variables as constants.

    The result holds the weights as they are now: make a new one after they changed. TensorFlow's optimizer folds
    constants, which it cannot do with variables; tests/test_frozen.py compares with the model itself.

    Returns:
        A function of the same tensors -> a list of tensors.
    """
    specification = [tf.TensorSpec([None, *shape], tf.float32) for shape in shapes]
    run = tf.function(
        lambda *inputs: tf.nest.flatten(function(*inputs)), input_signature=specification, autograph=False
    )
    return convert_variables_to_constants_v2(run.get_concrete_function())
