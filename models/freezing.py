"""Trainable flags per layer: set them, show them, and prove that they were obeyed."""

from __future__ import annotations

import hashlib
import re

import keras
import numpy as np

from models import GraftError
from models.classifier import Classifier
from models.names import check_depth


def freeze(model: Classifier) -> None:
    """Freeze the whole backbone; the head stays trainable."""
    _set_blocks(model, trainable_count=0)


def unfreeze_top(model: Classifier, count: int, train_batch_norm: bool = False) -> None:
    """Thaw the top `count` blocks and freeze those below; asked for, a frozen front thaws too.

    BatchNorm layers stay frozen wholly (statistics, gamma and beta) unless `train_batch_norm`:
    on a small dataset their batch statistics are noise that destroys what the backbone knows.

    Raises:
        GraftError: fewer than 1 or more blocks than the backbone has.
    """
    check_depth(count, model.backbone.name, len(model.blocks))
    _set_blocks(model, trainable_count=count, train_batch_norm=train_batch_norm)


def unfreeze_all(model: Classifier, train_batch_norm: bool = False) -> None:
    """Thaw every block above the backbone's frozen front; BatchNorm layers stay frozen unless `train_batch_norm`."""
    _set_blocks(model, trainable_count=thawable_blocks(model), train_batch_norm=train_batch_norm)


def thawable_blocks(model: Classifier) -> int:
    """How many blocks --depth full thaws: all but the front that the backbone's makers never fine-tuned."""
    return len(model.blocks) - model.backbone.frozen_front


def unfreeze_matching(model: Classifier, patterns: list[str], train_batch_norm: bool = False) -> None:
    """Thaw the backbone's layers whose name matches one of the regular expressions; freeze all others.

    Raises:
        GraftError: a pattern that matches no layer with weights; lists the names there are.
    """
    layers = [layer for block in model.blocks for layer in block.layers if layer.weights]
    for pattern in patterns:
        if not any(re.search(pattern, layer.name) for layer in layers):
            raise GraftError(
                f"The pattern {pattern!r} matches no layer of {model.backbone.name}. "
                f"Its layers: {', '.join(layer.name for layer in layers)}."
            )
    _set_blocks(model, trainable_count=0)
    for layer in layers:
        if any(re.search(pattern, layer.name) for pattern in patterns):
            _set_layer(layer, True, train_batch_norm)


def _set_blocks(model: Classifier, trainable_count: int, train_batch_norm: bool = False) -> None:
    frozen_count = len(model.blocks) - trainable_count
    for index, block in enumerate(model.blocks):
        for layer in block.layers:
            _set_layer(layer, index >= frozen_count, train_batch_norm)


def _set_layer(layer: keras.layers.Layer, trainable: bool, train_batch_norm: bool) -> None:
    # Assigning the value that `trainable` already has is a no-op in Keras 3 and would leave
    # sublayers as they were: hence the opposite value first.
    layer.trainable = not trainable
    layer.trainable = trainable
    if trainable and not train_batch_norm:
        for sublayer in layer._flatten_layers():
            if is_batch_norm(sublayer):
                sublayer.trainable = False


def is_batch_norm(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a BatchNorm, or holds the variables of one inside a TF-Hub module."""
    return isinstance(layer, keras.layers.BatchNormalization) or getattr(layer, "holds_batch_norm", False)


def trainable_table(model: Classifier, base_rate: float = 0.0, rates: dict[str, float] | None = None) -> list[dict]:
    """One row per block, bottom to top, the head last.

    Row: name, layers (with weights), parameters, trainable_parameters, learning_rate (base rate times
    the block's multiplier, 0 where nothing trains), batch_norm ("none", "frozen" or "trains").

    Args:
        base_rate: the head's learning rate.
        rates: multiplier per block name, as `models.optimizer.block_multipliers` gives it.
    """
    rates = rates or {}
    rows = []
    for name, layers in [(block.name, block.layers) for block in model.blocks] + [("head", (model.head,))]:
        sublayers = [sub for layer in layers for sub in layer._flatten_layers()]
        norms = [layer for layer in sublayers if is_batch_norm(layer)]
        trainable = [w for layer in layers for w in layer.trainable_weights]
        rows.append(
            {
                "name": name,
                "layers": sum(bool(layer.weights) for layer in layers),
                "parameters": sum(_size(w) for layer in layers for w in layer.weights),
                "trainable_parameters": sum(map(_size, trainable)),
                "learning_rate": base_rate * rates.get(name, 1.0) if trainable else 0.0,
                "batch_norm": "none"
                if not norms
                else ("trains" if any(norm.trainable for norm in norms) else "frozen"),
            }
        )
    return rows


def moving_weights(model: Classifier) -> list[keras.Variable]:
    """The weights that training may change: the trainable ones, then the statistics of thawed BatchNorm layers."""
    thawed = [
        sublayer
        for block in model.blocks
        for layer in block.layers
        for sublayer in layer._flatten_layers()
        if is_batch_norm(sublayer) and sublayer.trainable
    ]
    return model.trainable_weights + [weight for norm in thawed for weight in norm.non_trainable_weights]


def checksums(model: Classifier) -> dict[str, str]:
    """SHA-256 of every weight's bytes, keyed by "block/weight path" (paths alone repeat in some families)."""
    result = {}
    for block_name, weights in [(b.name, b.weights) for b in model.blocks] + [("head", model.head.weights)]:
        for index, weight in enumerate(weights):
            value = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
            result[f"{block_name}/{index}:{weight.path}"] = hashlib.sha256(value.tobytes()).hexdigest()
    return result


def check_moved(model: Classifier, before: dict[str, str]) -> dict[str, int]:
    """Prove, after a phase, that frozen weights are what they were and the others moved.

    Args:
        before: `checksums(model)` from the phase's start; the trainable flags must still be the phase's.

    Returns:
        Counts: frozen, trainable (all that may move), and `still`: those of them that did not.

    Raises:
        RuntimeError: a frozen weight changed (our bug, never the user's).
    """
    after = checksums(model)
    trainable = {id(weight) for weight in moving_weights(model)}
    keys = iter(before)
    frozen_changed, still, counts = [], 0, {"frozen": 0, "trainable": 0}
    for weights in [b.weights for b in model.blocks] + [model.head.weights]:
        for weight in weights:
            key = next(keys)
            changed = before[key] != after[key]
            counts["trainable" if id(weight) in trainable else "frozen"] += 1
            if id(weight) in trainable:
                still += not changed
            elif changed:
                frozen_changed.append(key)
    if frozen_changed:
        raise RuntimeError(f"Frozen weights changed during training: {frozen_changed[:5]}")
    return {**counts, "still": still}


def _size(weight: keras.Variable) -> int:
    return int(np.prod(weight.shape))
