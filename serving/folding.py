"""A trained network as one function whose weights are constants, with what follows a convolution merged into it.

Of constants TensorFlow's optimizer makes better use than of variables when a graph is loaded: it computes what depends
on weights alone once, and fuses a convolution with its bias and its activation. It does not merge BatchNorm's factor
into depthwise kernels, and its own rewriting of sums keeps additions apart from the convolutions before them. So that
is done here: a convolution and the scaling and shifting of its channels become a convolution and a BiasAdd, which
every kernel library knows how to fuse.

Networks of matrices, such as text encoders, gain nothing: MiniLM answered as fast with either, and with constants took
five times the memory and three times as long to load.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

# Bytes of weights. A graph is a protobuf, which holds 2 GB at most, and the server keeps several copies of it.
FOLDED_BYTES = 300_000_000
MATRICES = "most of them are in no convolution and would gain nothing as constants"
KERNEL_RANK = 4  # of what convolutions of images multiply with
FOLDED_TOLERANCE = 1e-5  # per largest value of the output or 1
CONVOLUTIONS = {"Conv2D": (3,), "DepthwiseConv2dNative": (2, 3)}  # -> the kernel's axes that its output channels are
# What BatchNorm's factor and shift are made of; everything else counts as depending on the input.
CONSTANT_OPS = {"Const", "Cast", "Reshape", "ExpandDims", "Mul", "RealDiv", "AddV2", "Add", "Sub", "Neg"}
CONSTANT_OPS |= {"Sqrt", "Rsqrt", "Squeeze"}
SHIFTS = ("AddV2", "Add", "BiasAdd")


def fold_weights(network: Callable, inputs: list[tf.TensorSpec], examples: list, limit: int) -> tuple[Callable, dict]:
    """Return the function to export in place of `network`, and what was done.

    Args:
        network: tensors as `inputs` say -> a list of tensors, float32, whose weights are variables.
        examples: tensors for `inputs`: both functions must give the same for them, within FOLDED_TOLERANCE.
        limit: bytes of weights above which they stay variables; FOLDED_BYTES is a good choice, 0 folds nothing.

    Returns:
        (a function of the same tensors -> a list of tensors,
        {"kept_as": "constants" or "variables", "bytes": of weights, and "largest_difference" or "why"}).
        Every graph that calls the folded function shares its constants: the SavedModel holds them once.
    """
    function = tf.function(network, input_signature=inputs, autograph=False)
    concrete = function.get_concrete_function()
    weights, size = concrete.variables, byte_count(concrete.variables)
    if size > limit:
        return network, as_variables(weights, f"{size / 1e6:.1f} MB of them, the limit is {limit / 1e6:.0f} MB")
    if byte_count([weight for weight in weights if weight.shape.rank == KERNEL_RANK]) < size / 2:
        return network, as_variables(weights, MATRICES)
    if sum(tensor.dtype == tf.resource for tensor in concrete.captured_inputs) > len(weights):
        return network, as_variables(weights, "the network holds tables, which cannot be constants")
    try:
        constant = convert_variables_to_constants_v2(concrete, lower_control_flow=False)
        folded = merged_function(constant)
        with tf.device("/CPU:0"):  # a GPU may round to 10 bits of the mantissa (TF32)
            found = folded(*examples)
    except Exception as error:  # of many kinds: a graph from elsewhere may hold anything, and variables serve as well
        return network, as_variables(weights, f"{type(error).__name__}: {error}")
    with tf.device("/CPU:0"):
        difference = largest_difference(found, concrete(*examples))
    if not difference <= FOLDED_TOLERANCE:
        return network, as_variables(weights, f"constants change the answers by {difference:.2g}")
    return folded, {"kept_as": "constants", "bytes": size, "largest_difference": difference}


def as_variables(weights: list, why: str) -> dict:
    """What `fold_weights` says of weights that stay tf.Variables."""
    return {"kept_as": "variables", "bytes": byte_count(weights), "why": why}


def byte_count(weights: list) -> int:
    return sum(weight.shape.num_elements() * weight.dtype.size for weight in weights)


def largest_difference(found, expected) -> float:
    """Between two lists of tensors, each per its largest absolute value or 1; NaN where there is one."""
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        difference = np.max(np.abs(one - other), initial=0.0) / max(1.0, np.max(np.abs(other), initial=0.0))
        largest = float(np.maximum(largest, difference))  # keeps a NaN
    return largest


def merged_function(constant) -> Callable:
    """A concrete function without variables -> one with merged convolutions, of the same tensors."""
    inputs = [tensor.name for tensor in constant.inputs]
    outputs = [tensor.name for tensor in constant.outputs]
    graph = merge_into_convolutions(constant.graph.as_graph_def(), [name.partition(":")[0] for name in outputs])
    return imported(graph).prune(inputs, outputs)


def imported(graph):
    return tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph, name=""), [])


def merge_into_convolutions(graph, outputs: list[str]):
    """Merge the scaling and shifting of channels that follows a convolution into its kernel and one BiasAdd.

    Exact but for rounding: the products are computed in float64. Convolutions whose kernels are no float32 constants,
    or whose result is used elsewhere too, stay as they are.

    Args:
        graph: GraphDef without variables; changed.
        outputs: names of the nodes that must keep their values.

    Returns:
        The GraphDef of what the outputs need.
    """
    graph = needed(skip_identities(without_gradients(graph)), outputs)
    nodes = {node.name: node for node in graph.node}
    users = find_users(graph, outputs)
    chains = {}
    for node in graph.node:
        mergeable = node.op in CONVOLUTIONS and node.attr["T"].type == tf.float32.as_datatype_enum
        if mergeable and node.attr["data_format"].s in (b"", b"NHWC") and is_constant(node.input[1], nodes):
            chains[node.name] = affine_steps(node, users, nodes)
    names = {nodes[name].input[1] for name in chains}
    names |= {name for steps in chains.values() for _, constants in steps for name in constants}
    values = evaluate(graph, sorted(names))
    for name, steps in chains.items():
        merge(graph, nodes[name], steps, values)
    return needed(graph, outputs)


def without_gradients(graph):
    """Forget the gradients that layers define themselves (swish): they capture tensors, which cannot be saved.

    What they are attached to only passes its inputs on. Changes the graph and returns it.
    """
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        node.attr.pop("_gradient_op_type", None)
    for function in graph.library.function:
        function.attr.pop("_gradient_op_type", None)
    return graph


def skip_identities(graph):
    """Let every node read from what an Identity reads; changes the graph and returns it.

    Control inputs go: they put reads of variables in order, of which there are none left, and keep them all alive.
    """
    nodes = {node.name: node for node in graph.node}
    for node in graph.node:
        sources = [name for name in node.input if not name.startswith("^")]
        for index, name in enumerate(sources):
            while nodes[name.partition(":")[0]].op == "Identity":
                name = nodes[name.partition(":")[0]].input[0]
            sources[index] = name
        node.input[:] = sources
    return graph


def needed(graph, outputs):
    """The nodes that `outputs` depend on, and all functions, as a new GraphDef; placeholders stay."""
    nodes = {node.name: node for node in graph.node}
    kept, waiting = set(), [*outputs, *(node.name for node in graph.node if node.op == "Placeholder")]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += [source.partition(":")[0] for source in nodes[name].input]
    chosen = tf.compat.v1.GraphDef(versions=graph.versions, library=graph.library)
    chosen.node.extend(node for node in graph.node if node.name in kept)
    return chosen


def find_users(graph, outputs) -> dict:
    """{tensor: the nodes that read it}; None stands for whoever reads an output."""
    users = {name: [None] for name in outputs}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def is_constant(name: str, nodes: dict) -> bool:
    """Whether a tensor depends on constants alone."""
    node = nodes[name.partition(":")[0]]
    return node.op in CONSTANT_OPS and all(is_constant(source, nodes) for source in node.input)


def affine_steps(convolution, users: dict, nodes: dict) -> list[tuple]:
    """[(node, its constant inputs)]: what scales and shifts the channels of a convolution, in order, nothing else."""
    steps, name = [], convolution.name
    while True:
        following = users.get(name, [])
        if len(following) != 1 or following[0] is None:
            return steps
        node = following[0]
        if node.op in ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"):
            fits = not node.attr["is_training"].b and node.input[0] == name
            fits = fits and not any(f"{node.name}:{output}" in users for output in range(1, 6))
        elif node.op == "Sub":
            fits = node.input[0] == name
        else:
            fits = node.op in ("Mul", *SHIFTS)
        constants = [source for source in node.input if source != name]
        if not fits or not all(is_constant(source, nodes) for source in constants):
            return steps
        steps.append((node, constants))
        name = node.name


def evaluate(graph, names: list[str]) -> dict[str, np.ndarray]:
    """{tensor: its value} of tensors that depend on constants alone."""
    if not names:
        return {}
    with tf.device("/CPU:0"):
        tensors = imported(graph).prune([], [name if ":" in name else f"{name}:0" for name in names])()
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def merge(graph, convolution, steps, values: dict) -> None:
    """Put the steps after one convolution into its kernel and the last of them, which becomes a BiasAdd."""
    kernel = values[convolution.input[1]]
    axes = CONVOLUTIONS[convolution.op]
    channels = [kernel.shape[axis] for axis in axes]
    scale, shift, last = np.ones(np.prod(channels)), np.zeros(np.prod(channels)), None
    for node, constants in steps:
        parts = [values[name].astype(np.float64) for name in constants]
        if not all(part.size == 1 or part.shape[-1:] == (part.size,) == scale.shape for part in map(squeezed, parts)):
            break  # no single value for each channel
        factor, offset = factor_and_offset(node, [part.reshape(-1) for part in parts])
        scale, shift, last = scale * factor, shift * factor + offset, node
    if last is None or (last.op == "BiasAdd" and len(steps) == 1):
        return
    convolution.input[1] = add_constant(graph, f"{convolution.name}/merged_kernel", kernel * scale.reshape(channels))
    bias = add_constant(graph, f"{convolution.name}/merged_bias", shift)
    last.op = "BiasAdd"
    last.input[:] = [convolution.name, bias]
    last.attr.clear()
    last.attr["T"].type = tf.float32.as_datatype_enum


def squeezed(value: np.ndarray) -> np.ndarray:
    """Without leading axes of size 1, which broadcasting would add."""
    while value.ndim > 1 and value.shape[0] == 1:
        value = value[0]
    return value


def factor_and_offset(node, parts: list[np.ndarray]) -> tuple:
    """What a step does to the channels: x -> x * factor + offset."""
    if node.op == "Mul":
        return parts[0], 0.0
    if node.op in SHIFTS:
        return 1.0, parts[0]
    if node.op == "Sub":
        return 1.0, -parts[0]
    gamma, beta, mean, variance = parts
    factor = gamma / np.sqrt(variance + node.attr["epsilon"].f)
    return factor, beta - mean * factor


def add_constant(graph, name: str, value: np.ndarray) -> str:
    """Add a float32 constant to a graph; returns its name."""
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = tf.float32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.astype(np.float32)))
    return name
