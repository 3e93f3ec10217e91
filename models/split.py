"""Cut a backbone at a block: a frozen prefix that need be computed once, and a suffix that trains on its output."""

from __future__ import annotations

import keras

from models.backbone import Backbone


def split(backbone: Backbone, block: int) -> tuple[keras.Model, keras.Model]:
    """Cut before block number `block`: (prefix, suffix), both on the backbone's own layers.

    The prefix maps the encoder's input to the list of tensors that cross the cut: one in a plain network,
    more where a residual, a mask or a position bias passes by it. The suffix maps that list to the encoder's
    output. `suffix(prefix(x))` computes what `encoder(x)` does, operation by operation, and training the
    suffix changes the backbone itself.

    Args:
        block: 1 to the number of blocks less one, counted from the bottom.

    Raises:
        ValueError: no such block, or nothing can be cut there because all of it happens in one layer.
    """
    if not 1 <= block < len(backbone.blocks):
        raise ValueError(f"{backbone.name} can be cut before block 1 to {len(backbone.blocks) - 1}, not {block}.")
    encoder = backbone.encoder
    above = {id(layer) for part in backbone.blocks[block:] for layer in part.layers}

    # A node is one call of an operation. It is above the cut if its layer is, or if it needs a result from above.
    # Operations that are no layers (an addition written as x + y) are in no block: the second rule places them.
    # Nodes by depth, inputs deepest, are a private table of Keras (3.15.1, pinned); tests/test_split.py holds it.
    by_depth = encoder._nodes_by_depth
    from_above, crossing = set(), {}
    for node in (node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]):
        needed = node.arguments.keras_tensors
        if id(node.operation) in above or any(id(tensor) in from_above for tensor in needed):
            crossing.update({id(tensor): tensor for tensor in needed if id(tensor) not in from_above})
            from_above.update(id(tensor) for tensor in node.outputs)
    if not from_above:
        raise ValueError(f"{backbone.name} cannot be cut: all of it happens in one layer.")
    # An output that nothing above the cut computes passes through.
    crossing.update({id(t): t for t in encoder.outputs if id(t) not in from_above})
    tensors = list(crossing.values())
    prefix = keras.Model(encoder.inputs, tensors, name=f"{backbone.name}_below_{backbone.blocks[block].name}")
    # Keras makes new nodes for a model that starts at inner tensors; the layers stay the same objects.
    suffix = keras.Model(tensors, encoder.output, name=f"{backbone.name}_from_{backbone.blocks[block].name}")
    return prefix, suffix


def between(lower: keras.Model, upper: keras.Model) -> keras.Model:
    """What lies between two prefixes of one backbone: from the tensors that leave `lower` to those that leave `upper`.

    Raises:
        ValueError: `lower` ends above `upper`.
    """
    # Keras (3.15.1) loses an input of a model that starts at inner tensors where it is an output too: a copy is none.
    passing = {id(tensor) for tensor in lower.outputs}
    outputs = [keras.layers.Identity()(tensor) if id(tensor) in passing else tensor for tensor in upper.outputs]
    return keras.Model(lower.outputs, outputs)
