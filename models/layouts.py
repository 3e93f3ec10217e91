"""What a folder of weights holds, told from its files' names and its config.json alone.

No TensorFlow, so that a wrong folder answers at once. Four layouts are known: KerasHub's presets, transformers'
folders (config.json with `model_type`), timm's (config.json with `architecture`) and CTranslate2's (model.bin).
"""

from __future__ import annotations

import json
import pathlib
import re

from models import GraftError

TRANSFORMERS_TYPES = ("resnet", "vit")
# timm's names that Graft knows in full; `resnet50d`, `vit_base_patch16_clip_224` and the like compute otherwise.
TIMM_ARCHITECTURES = (
    ("resnet", r"resnet(18|26|34|50|101|152|200)", "resnet18, 26, 34, 50, 101, 152, 200"),
    (
        "vit",
        r"(vit|deit)_(tiny|small|base|large|huge)_patch\d+_\d+(_in21k)?",
        "vit_SIZE_patchN_PIXELS and deit_SIZE_patchN_PIXELS with SIZE tiny, small, base, large or huge",
    ),
)
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in this order: safetensors need no conversion
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Keys of the config.json of BERTs older than `model_type`, dmis-lab/biobert-v1.1 among them.
OLD_BERT_KEYS = {"hidden_act", "hidden_size", "num_attention_heads", "num_hidden_layers", "type_vocab_size"}


def folder_layout(folder: pathlib.Path) -> str:
    """The layout of a local folder: "kerashub", "huggingface" (transformers), "timm" or "ctranslate2".

    Raises:
        GraftError: no config.json, one that is not a JSON object, or one of no known layout.
    """
    config = read_config(folder)
    if "registered_name" in config or ("class_name" in config and "config" in config):
        return "kerashub"
    if "model_type" in config or set(config) >= OLD_BERT_KEYS:
        return "huggingface"
    if "architecture" in config:
        return "timm"
    if (folder / "model.bin").is_file():
        return "ctranslate2"
    raise GraftError(
        f"{folder / 'config.json'} is of no layout that Graft knows: it has none of the keys registered_name or "
        f"class_name (a KerasHub preset), model_type (transformers), architecture (timm). Its keys: "
        f"{', '.join(list(config)[:8]) or 'none'}."
    )


def is_huggingface_folder(folder: pathlib.Path) -> bool:
    """Whether `load_huggingface_folder` is the one to load this folder; raises as `folder_layout` does."""
    return folder_layout(folder) in ("huggingface", "timm")


def check_huggingface_folder(folder: pathlib.Path) -> tuple[str, dict, list[pathlib.Path]]:
    """What a folder in transformers or timm layout holds, checked as far as names and config.json tell.

    Returns:
        The family ("resnet" or "vit"), the config, and the files with the weights.

    Raises:
        GraftError: an architecture that Graft does not know, or a weights file that is missing.
    """
    config = read_config(folder)
    if folder_layout(folder) == "huggingface":
        family = config.get("model_type", "bert")
        if family not in TRANSFORMERS_TYPES:
            raise GraftError(
                f"{folder} holds a transformers model of the type {family!r}; as image backbones Graft knows "
                f"{', '.join(TRANSFORMERS_TYPES)}. Use a folder of one of these, or a KerasHub preset."
            )
    else:
        name = str(config["architecture"])
        family = next((family for family, pattern, _ in TIMM_ARCHITECTURES if re.fullmatch(pattern, name)), None)
        if family is None:
            raise GraftError(
                f"{folder} holds a timm model of the architecture {name!r}; Graft knows "
                f"{'; '.join(known for *_, known in TIMM_ARCHITECTURES)}. Use a folder of one of these, or a "
                f"KerasHub preset."
            )
    return family, config, transformers_files(folder)


def transformers_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights: one, or the shards that an index names; safetensors before .bin.

    Raises:
        GraftError: none of them is there, an index is not one, or a shard is missing.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise GraftError(
        f"{folder} holds a config.json but no weights: expected {SINGLE_FILES[0]}, {SINGLE_FILES[1]}, or "
        f"shards with {INDEX_FILES[0]} or {INDEX_FILES[1]}. Copy the weights file beside config.json."
    )


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    # A name with a folder in it would read a file from elsewhere.
    if not names or any(pathlib.PurePath(str(name)).name != name for name in names):
        raise GraftError(f"{index} names no shards: expected a weight_map of weight names and names of files beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise GraftError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names ({len(names)} files in all)."
        )
    return [index.parent / name for name in names]


def read_config(folder: pathlib.Path) -> dict:
    """The folder's config.json. Raises GraftError where there is none, or it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise GraftError(
            f"{folder} holds no config.json; expected the folder of a KerasHub preset, or of a transformers or "
            f"timm model. A folder of images is for --data."
        )
    return read_json(path)


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from a file. Raises GraftError where it cannot be read or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraftError(f"{path} could not be read as JSON: {error}. Copy or download it again.") from None
    if not isinstance(content, dict):
        raise GraftError(f"{path} holds a JSON {type(content).__name__}; expected an object. Download it again.")
    return content


def timm_settings(config: dict) -> dict:
    """The pretrained_cfg of timm's config.json; before timm 0.9 its keys lay in config.json itself."""
    settings = config.get("pretrained_cfg")
    return settings if isinstance(settings, dict) else config


def licence(folder: pathlib.Path, config: dict) -> str:
    """The licence in the front matter of README.md (`license: mit`), else the one in timm's config, else "unknown"."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    # By hand: a YAML reader is not needed for one line, and raises on what some cards hold.
    line = re.search(r"^license:[ \t]*([^#\n]+)", front[1], re.MULTILINE) if front else None
    said = line[1].strip().strip("'\"") if line else timm_settings(config).get("license")
    return str(said or "unknown")
