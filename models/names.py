"""What can be said of a backbone by its name alone: no TensorFlow, so that a mistake answers at once."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import tempfile

from models import GraftError, applications, hubs, layouts, offline
from models.audio_families import FAMILIES as AUDIO
from models.audio_families import audio_family_of, audio_types
from models.text_families import FAMILIES, family_of, text_types
from models.text_settings import check_settings
from models.wav2vec2_settings import encoder_settings

RANDOM = "random:"  # before a name: its architecture with random weights, to compare pretraining with


def check_backbone_name(name: str, kind: str | None = "image") -> None:
    """See that a backbone is on this machine; bring it into its hub's local cache where it is not.

    Known are offline names, `hf://`, `kaggle://`, KerasHub's built-in names, `applications:`, `tfhub:`,
    and folders; each also after `random:`. The modules of `tfhub:` and the weights of `applications:` are brought
    when they are loaded; here only their host is tried.

    Args:
        kind: "image", "text" or "audio", what the model must be for; None: any.

    Raises:
        GraftError: nothing by that name, no network to get it, or a model of another kind; says what was looked
            for and where.
    """
    name = name.removeprefix(RANDOM)
    if name in hubs.offline_names(kind):
        return
    if name in hubs.offline_names():
        raise other_kind(f"Backbone {name!r}", kind, offline.WEIGHTS[name]["kind"])
    if name.startswith("applications:"):
        if kind in ("text", "audio"):
            raise other_kind(f"Backbone {name!r}", kind, "image")
        model, file = applications.find_application(name)
        if file is None and not hubs.reachable(applications.HOST):
            files = " or ".join(applications.own_files(model))
            raise hubs.no_network(name, applications.HOST, f"{applications.weights_folder()} for {files}")
    elif name.startswith("tfhub:"):
        check_tfhub(name)
    elif name.startswith(("hf://", "kaggle://")):
        check_folder(hubs.fetch_hub(name), kind)
    elif pathlib.Path(name).is_dir():
        check_folder(pathlib.Path(name), kind)
    elif name in hubs.builtin_presets():
        check_family(name, kind)
        check_folder(hubs.fetch_hub(name), kind)
    else:
        raise unknown(name, kind)


def other_kind(what: str, kind: str, other: str) -> GraftError:
    """The error for a model that is for the kind of data `other`, not for `kind`."""
    article = {"image": "an", "text": "a", "audio": "an"}
    return GraftError(
        f"{what} is not {article[kind]} {kind} model but {article[other]} {other} model. Give {article[kind]} {kind} "
        f"model, for example {hubs.offline_names(kind)[0]}, or use it with `graft {other}`."
    )


def check_folder(folder: pathlib.Path, kind: str | None = "image") -> None:
    """Raise GraftError for a folder of no known layout, or whose config.json names no model of that kind."""
    if not (folder / "config.json").is_file():
        if (folder / "saved_model.pb").is_file():
            raise GraftError(f"Backbone folder {folder} is a SavedModel. To use it as a TF-Hub module: tfhub:{folder}.")
        raise GraftError(
            f"Backbone folder {folder} holds no config.json, so it is not a KerasHub preset and no Hugging Face or "
            f"timm model. Save a preset with `backbone.save_to_preset(folder)`, or give an offline name "
            f"({', '.join(hubs.offline_names(kind))})."
        )
    config, layout = layouts.read_config(folder), layouts.folder_layout(folder)
    families = {"text": family_of(config), "audio": audio_family_of(config, layout)}
    found = next((name for name, family in families.items() if family), None)
    if found and kind not in (None, found):
        if layout == "huggingface":
            what = f"a transformers model of the type {families[found]!r}"
        else:
            what = f"a {config.get('class_name', 'CTranslate2 Whisper')}"
        raise other_kind(f"Folder {folder} holds {what}, which", kind, found)
    if found:
        if layout == "huggingface":
            layouts.transformers_files(folder)
        if layout == "huggingface" and found == "text":
            check_settings(folder, families["text"], config)
        if families["audio"] in ("wav2vec2", "hubert"):
            encoder_settings(folder, config)
    elif kind in ("text", "audio"):
        raise _no_such_model(folder, config, kind)
    elif layout in ("huggingface", "timm"):
        layouts.check_huggingface_folder(folder)
    # By these KerasHub's image backbones are told from all others; only EfficientNet says input_shape.
    elif not {"image_shape", "input_shape"} & set(config.get("config") or {}):
        raise GraftError(
            f"Preset {folder} holds a {config.get('class_name', '?')}, which is not an image model: its config.json "
            f"has no image_shape. Give a preset of an image backbone, for example ResNet, EfficientNet or ViT."
        )


def _no_such_model(folder: pathlib.Path, config: dict, kind: str) -> GraftError:
    what = config.get("class_name") or config.get("model_type") or config.get("architecture")
    table, types = {"text": (FAMILIES, text_types()), "audio": (AUDIO, audio_types())}[kind]
    classes = [name for family in table.values() for name in family["classes"]]
    return GraftError(
        f"Folder {folder} holds a {what}, which is no {kind} model that Graft knows. It knows transformers' types "
        f"{', '.join(types)} and KerasHub's {', '.join(classes)}."
    )


def check_family(preset: str, kind: str | None = "image") -> None:
    """Raise GraftError for a built-in preset of KerasHub that is not of a family of that kind that Graft can cut."""
    family = hubs.builtin_presets()[preset][0]
    families = {"image": hubs.IMAGE_FAMILIES, "text": hubs.TEXT_FAMILIES, "audio": hubs.AUDIO_FAMILIES}
    known = families.get(kind) or hubs.IMAGE_FAMILIES + hubs.TEXT_FAMILIES + hubs.AUDIO_FAMILIES
    if family not in known:
        other = next((name for name, names in families.items() if family in names), None)
        if kind and other:
            raise other_kind(f"Backbone {preset!r}, a KerasHub preset of the family {family},", kind, other)
        raise GraftError(
            f"Backbone {preset!r} is a KerasHub preset of the family {family}, which is no "
            f"{kind or 'image, text or audio'} model or hides its units inside one layer. Families that work: "
            f"{', '.join(known)}."
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


def unknown(name: str, kind: str | None = "image") -> GraftError:
    """The error for a word that is no name of anything; with the names that look like it."""
    path = pathlib.Path(name)
    if path.is_file():
        return GraftError(
            f"Backbone {name!r} is a file. Give the folder that holds it together with its config.json, or for "
            f"weights of keras.applications: applications:ResNet50V2:{name}."
        )
    offline_names = hubs.offline_names(kind)
    presets = {"image": hubs.image_presets(), "text": hubs.text_presets(), "audio": hubs.audio_presets()}
    presets = presets.get(kind) or [name for names in presets.values() for name in names]
    models = [] if kind in ("text", "audio") else [f"applications:{model}" for model in applications.APPLICATIONS]
    choices = [*offline_names, *presets, *models]
    similar = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(similar)}?" if similar else ""
    return GraftError(
        f"Backbone {name!r} is not known: it is neither a folder on this machine, nor one of the offline backbones "
        f"({', '.join(offline_names)}), nor one of the {len(presets)} {kind or 'image, text and audio'} presets that "
        f"the installed KerasHub knows.{meant} Give one of those names, hf://USER/MODEL, "
        f"kaggle://USER/MODEL/keras/VARIATION, {'applications:NAME, ' if models else ''}tfhub:URL, or a folder that "
        f"holds a KerasHub preset, or a Hugging Face{' or timm' if models else ''} model."
    )


def known_blocks(name: str) -> int | None:
    """The number of blocks of an offline backbone; None where only loading it can tell."""
    return offline.WEIGHTS.get(name.removeprefix(RANDOM), {}).get("blocks")


def check_depth(count: int, backbone_name: str, blocks: int) -> None:
    """Raise GraftError unless `count` blocks can be thawed: 1 to `blocks`."""
    if not 1 <= count <= blocks:
        raise GraftError(
            f"Depth {count} is not possible: {backbone_name} has {blocks} blocks. "
            f"Give head, a number from 1 to {blocks}, or full."
        )
