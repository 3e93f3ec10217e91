"""Inference of what is frozen: a graph whose weights are constants, so that BatchNorm folds into convolutions."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

LARGEST = 1_000_000_000  # bytes of weights; a graph, which is a protobuf, can hold 2 GB


def frozen_function(function, inputs):
    """Compile a function of tensors [b, *shape] -> a tensor or a list, with all variables as constants.

    Args:
        inputs: a pair per tensor: its shape without the batch, its dtype.

    The result holds the weights as they are now: make a new one after they changed. TensorFlow's optimizer folds
    constants, which it cannot do with variables; tests/test_frozen.py compares with the model itself.

    Returns:
        A function of the same tensors -> a list of tensors.
    """
    signature = [tf.TensorSpec([None, *shape], dtype) for shape, dtype in inputs]
    run = tf.function(lambda *inputs: tf.nest.flatten(function(*inputs)), input_signature=signature, autograph=False)
    weights = run.get_concrete_function().variables
    size = sum(weight.shape.num_elements() * weight.dtype.size for weight in weights)
    resources = sum(tensor.dtype == tf.resource for tensor in run.get_concrete_function().captured_inputs)
    if size > LARGEST or resources > len(weights):  # tables (of words) cannot become constants
        return run
    constant = convert_variables_to_constants_v2(run.get_concrete_function())
    # Called directly, it would spell out every input as text for an error that it then drops: 10 ms for a batch.
    return tf.function(lambda *inputs: constant(*inputs), input_signature=signature, autograph=False)
