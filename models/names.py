"""What can be said of a backbone by its name alone: no TensorFlow, so that a mistake answers at once."""

from __future__ import annotations

import pathlib

from models import GraftError, offline


def check_backbone_name(name: str) -> None:
    """Raise GraftError where `name` is neither an offline image backbone nor a KerasHub preset folder."""
    offline_names = [known for known, entry in offline.WEIGHTS.items() if entry["kind"] == "image"]
    if name in offline_names:
        return
    folder = pathlib.Path(name)
    if not folder.is_dir():
        raise GraftError(
            f"Backbone {name!r} is not known: it is neither a folder on this machine nor one of the offline "
            f"backbones ({', '.join(offline_names)}). Give one of those names, or a folder that holds a "
            f"KerasHub preset (config.json, model.weights.h5)."
        )
    if not (folder / "config.json").is_file():
        raise GraftError(
            f"Backbone folder {folder} holds no config.json, so it is not a KerasHub preset. "
            f"Save one with `backbone.save_to_preset(folder)`, or give an offline name "
            f"({', '.join(offline_names)})."
        )


def known_blocks(name: str) -> int | None:
    """The number of blocks of an offline backbone; None where only loading it can tell."""
    return offline.WEIGHTS.get(name, {}).get("blocks")


def check_depth(count: int, backbone_name: str, blocks: int) -> None:
    """Raise GraftError unless `count` blocks can be thawed: 1 to `blocks`."""
    if not 1 <= count <= blocks:
        raise GraftError(
            f"Depth {count} is not possible: {backbone_name} has {blocks} blocks. "
            f"Give head, a number from 1 to {blocks}, or full."
        )
