"""What can be said of a backbone by its name alone: no TensorFlow, so that a mistake answers at once."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import tempfile

from models import GraftError, applications, hubs, layouts, offline


def check_backbone_name(name: str) -> None:
    """See that a backbone is on this machine; bring it into its hub's local cache where it is not.

    Known are offline names, `hf://`, `kaggle://`, KerasHub's built-in names, `applications:`, `tfhub:`,
    and folders. The modules of `tfhub:` and the weights of `applications:` are brought when they are
    loaded; here only their host is tried.

    Raises:
        GraftError: nothing by that name, or no network to get it; says what was looked for and where.
    """
    if name in hubs.offline_names():
        return
    if name.startswith("applications:"):
        model, file = applications.find_application(name)
        if file is None and not hubs.reachable(applications.HOST):
            files = " or ".join(applications.own_files(model))
            raise hubs.no_network(name, applications.HOST, f"{applications.weights_folder()} for {files}")
    elif name.startswith("tfhub:"):
        check_tfhub(name)
    elif name.startswith(("hf://", "kaggle://")):
        check_folder(hubs.fetch_hub(name))
    elif pathlib.Path(name).is_dir():
        check_folder(pathlib.Path(name))
    elif name in hubs.builtin_presets():
        check_family(name)
        check_folder(hubs.fetch_hub(name))
    else:
        raise unknown(name)


def check_folder(folder: pathlib.Path) -> None:
    """Raise GraftError for a folder that is of no known layout, or whose config.json names no image model."""
    if not (folder / "config.json").is_file():
        if (folder / "saved_model.pb").is_file():
            raise GraftError(f"Backbone folder {folder} is a SavedModel. To use it as a TF-Hub module: tfhub:{folder}.")
        raise GraftError(
            f"Backbone folder {folder} holds no config.json, so it is not a KerasHub preset and no Hugging Face or "
            f"timm model. Save a preset with `backbone.save_to_preset(folder)`, or give an offline name "
            f"({', '.join(hubs.offline_names())})."
        )
    if layouts.is_huggingface_folder(folder):
        layouts.check_huggingface_folder(folder)
        return
    config = layouts.read_config(folder)
    settings = config.get("config")
    # By these KerasHub's image backbones are told from all others; only EfficientNet says input_shape.
    if not isinstance(settings, dict) or not {"image_shape", "input_shape"} & set(settings):
        raise GraftError(
            f"Preset {folder} holds a {config.get('class_name', '?')}, which is not an image model: its config.json "
            f"has no image_shape. Give a preset of an image backbone, for example ResNet, EfficientNet or ViT."
        )


def check_family(preset: str) -> None:
    """Raise GraftError for a built-in preset of KerasHub that is not of an image family that Graft can cut."""
    family = hubs.builtin_presets()[preset][0]
    if family not in hubs.IMAGE_FAMILIES:
        raise GraftError(
            f"Backbone {preset!r} is a KerasHub preset of the family {family}, which is no image model or hides its "
            f"units inside one layer. Image families that work: {', '.join(hubs.IMAGE_FAMILIES)}."
        )


def check_tfhub(name: str) -> None:
    """Raise GraftError unless `tfhub:FOLDER` holds a SavedModel, or `tfhub:URL` is cached or its host answers."""
    handle = name.removeprefix("tfhub:")
    if "://" not in handle:
        if not (pathlib.Path(handle).expanduser() / "saved_model.pb").is_file():
            raise GraftError(
                f"Backbone {name!r}: {handle or 'the folder'} holds no saved_model.pb, so it is no TF-Hub module. "
                f"Write tfhub:FOLDER with the folder of a TF2 SavedModel, or tfhub:https://..."
            )
        return
    if not handle.startswith("https://"):
        raise GraftError(f"Backbone {name!r}: expected tfhub:https://... or tfhub:FOLDER; modules run as code.")
    # tensorflow_hub's own rule: one folder per address, named after its SHA-1.
    cache = pathlib.Path(os.environ.get("TFHUB_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "tfhub_modules"))
    folder = cache.expanduser() / hashlib.sha1(handle.encode()).hexdigest()
    if not (folder / "saved_model.pb").is_file() and not hubs.reachable(handle):
        raise hubs.no_network(name, handle, folder)


def unknown(name: str) -> GraftError:
    """The error for a word that is no name of anything; with the names that look like it."""
    path = pathlib.Path(name)
    if path.is_file():
        return GraftError(
            f"Backbone {name!r} is a file. Give the folder that holds it together with its config.json, or for "
            f"weights of keras.applications: applications:ResNet50V2:{name}."
        )
    offline_names = hubs.offline_names()
    choices = [*offline_names, *hubs.image_presets(), *(f"applications:{model}" for model in applications.APPLICATIONS)]
    similar = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(similar)}?" if similar else ""
    return GraftError(
        f"Backbone {name!r} is not known: it is neither a folder on this machine, nor one of the offline backbones "
        f"({', '.join(offline_names)}), nor one of the {len(hubs.image_presets())} image presets that the installed "
        f"KerasHub knows.{meant} Give one of those names, hf://USER/MODEL, kaggle://USER/MODEL/keras/VARIATION, "
        f"applications:NAME, tfhub:URL, or a folder that holds a KerasHub preset, or a Hugging Face or timm model."
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
