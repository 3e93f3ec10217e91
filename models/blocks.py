"""Ordered blocks of any functional image encoder: by its layers' names, or else by the shape of its graph."""

from __future__ import annotations

import re

import keras

from models import GraftError
from models.backbone import Block

LEAST_BLOCKS = 3  # a stem and two units: with fewer there is nothing to choose between head and full

# How each architecture names its units, matched against "LayerClass layer_name": the pattern's first
# group is the block's name. Layers that match nothing belong to the block before them, so the stem comes
# first and the top stays on top. MobileNet numbers its top convolution as if it were one more unit, and
# only the class of the layer tells them apart.
BLOCK_PATTERNS = {
    "EfficientNetBackbone": r" (block\d+[a-z]+)_",
    "MobileNetBackbone": r"^(?:DepthwiseConvBlock|InvertedResidualBlock) (block_\d+_\d+)$",
    "ResNetBackbone": r" (stack\d+_block\d+)_",
    "ViTBackbone": r" (transformer_block_\d+)$",
}


def find_blocks(encoder: keras.Model, pattern: str | None = None) -> list[Block]:
    """Blocks by name where the pattern fits the graph, otherwise by the graph alone.

    A pattern fits where every block holds a kernel and is a run of whole segments of the graph, so that
    one tensor and no more passes from each block to the next.

    Raises:
        GraftError: fewer than 3 blocks either way.
    """
    segments = graph_segments(encoder)
    if pattern:
        blocks = blocks_by_name(encoder, pattern)
        ends = {id(segment[-1]) for segment in segments}
        order = [layer for block in blocks for layer in block.layers]
        if (
            len(blocks) >= LEAST_BLOCKS
            and order == [layer for segment in segments for layer in segment]
            and all(id(block.layers[-1]) in ends and any(map(has_kernel, block.layers)) for block in blocks)
        ):
            return blocks
    return blocks_by_graph(encoder)


def blocks_by_name(encoder: keras.Model, pattern: str) -> list[Block]:
    """Cut a functional encoder into ordered blocks by its layers' classes and names; block 0 is the stem."""
    blocks = {"stem": []}
    current = "stem"
    for layer in encoder.layers:
        match = re.search(pattern, f"{type(layer).__name__} {layer.name}")
        if match:
            current = match.group(1)
        blocks.setdefault(current, []).append(layer)
    return [Block(name, tuple(layers)) for name, layers in blocks.items()]


def blocks_by_graph(encoder: keras.Model) -> list[Block]:
    """Cut a functional encoder wherever a single tensor passes; block 0 is the stem.

    A residual or dense unit, inside which two tensors pass, becomes one block; a plain chain gives one
    block per convolution. What holds no kernel (norm, activation, pooling) joins the block before it.
    A block is named after its first layer with a kernel.

    Raises:
        GraftError: fewer than 3 blocks, because the units are hidden inside a layer or joined with each other.
    """
    runs = []
    for segment in graph_segments(encoder):
        if runs and (not any(map(has_kernel, runs[0])) or not any(map(has_kernel, segment))):
            runs[-1] += segment
        else:
            runs.append(list(segment))
    if len(runs) < LEAST_BLOCKS:
        fullest = max(encoder.layers, key=lambda layer: len(layer.weights))
        raise GraftError(
            f"{type(encoder).__name__} {encoder.name} cannot be cut into {LEAST_BLOCKS} blocks or more, only into "
            f"{len(runs)}: its units are hidden inside one layer ({type(fullest).__name__} {fullest.name}, "
            f"{len(fullest.weights)} of {len(encoder.weights)} weights), or are all joined with each other. Use a "
            f"backbone whose units are layers of one functional graph: ResNet, EfficientNet, MobileNet, DenseNet, "
            f"VGG or ViT."
        )
    blocks = [Block("stem", tuple(runs[0]))]
    for layers in runs[1:]:
        name = next(layer.name for layer in layers if has_kernel(layer))
        blocks.append(Block("stem_unit" if name == "stem" else name, tuple(layers)))
    return blocks


def graph_segments(encoder: keras.Model) -> list[list[keras.layers.Layer]]:
    """The layers in the encoder's order, cut wherever exactly one tensor is still needed further on.

    A layer with weights that is called several times keeps all its calls in one segment. Nodes by depth
    are a private table of Keras (3.15.1, pinned): there is no public way to see which tensor an operation
    takes. tests/test_blocks.py holds it in place.
    """
    by_depth = encoder._nodes_by_depth
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    last_use = {}  # of a tensor, or of a layer with weights: the index of the last node that needs it
    for index, node in enumerate(nodes):
        for tensor in node.arguments.keras_tensors:
            last_use[id(tensor)] = index
        if getattr(node.operation, "weights", None):
            last_use[id(node.operation)] = index
    last_use.update((id(tensor), len(nodes)) for tensor in encoder.outputs)
    places = {id(layer): place for place, layer in enumerate(encoder.layers)}
    segments, current, alive = [], set(), set()
    for index, node in enumerate(nodes):
        if id(node.operation) in places:
            current.add(places.pop(id(node.operation)))
        alive |= {id(tensor) for tensor in node.outputs} | {id(node.operation)}
        alive = {thing for thing in alive if last_use.get(thing, -1) > index}
        if current and (len(alive) == 1 or index == len(nodes) - 1):
            segments.append([encoder.layers[place] for place in sorted(current)])
            current = set()
    return segments


def has_kernel(layer: keras.layers.Layer) -> bool:
    """Whether a layer holds a weight of rank 2 or more: a convolution or a product, not a norm."""
    return any(len(weight.shape) >= 2 for weight in layer.weights)
