"""How transformers' and timm's own code prepares images, as an ImagePreprocess.

Both resize first and cut out the centre afterwards; Graft cuts first and resizes only what is kept. The
boxes are the same up to rounding: theirs to whole pixels of the result, ours to whole pixels of the
picture. Where they coincide the pixels differ by 0.3 levels of 255 in the mean, which is PIL's rounding to
whole levels; where they lie half a pixel of the result apart, by up to 9 in detailed photographs
(224 pixels, scikit-image's photographs, upright and turned). tests/test_huggingface.py compares both.
Both antialias, as PIL does. What would need padding, or a crop after stretching, is an error.
"""

from __future__ import annotations

import pathlib

from models import GraftError, layouts
from models.backbone import ImagePreprocess

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5)
# Where a checkpoint says nothing: what timm (models/resnet.py and vision_transformer.py, `_cfg`) and the
# families' first checkpoints (microsoft/resnet-50, google/vit-base-patch16-224) use.
TIMM_DEFAULTS = {
    "resnet": {
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_DEVIATION,
    },
    "vit": {"crop_pct": 0.9, "interpolation": "bicubic", "mean": HALVES, "std": HALVES},
}
TRANSFORMERS_DEFAULTS = {
    "resnet": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_pct": 0.875,
        "resample": 3,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_DEVIATION,
    },
    "vit": {"image_processor_type": "ViTImageProcessor", "resample": 2, "image_mean": HALVES, "image_std": HALVES},
}
PROCESSOR_FILE = "preprocessor_config.json"
PIL_RESAMPLING = {0: "nearest", 1: "lanczos3", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
TIMM_RESAMPLING = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos3",
    "random": "bilinear",  # for training; timm evaluates with bilinear then
}
# transformers' ConvNextImageProcessor crops only below this size, and stretches from it on.
STRETCHED_FROM = 384


def timm_preprocess(folder: pathlib.Path, config: dict, family: str, built: tuple) -> ImagePreprocess:
    """From `pretrained_cfg` in timm's config.json; TIMM_DEFAULTS for what it does not say.

    Args:
        built: height and width that the encoder takes; None where it takes any.

    Raises:
        GraftError: a setting that Graft cannot reproduce.
    """
    path = folder / "config.json"
    given = {key: value for key, value in layouts.timm_settings(config).items() if value is not None}
    settings = {"crop_mode": "center", **TIMM_DEFAULTS[family], **given}
    size = _size(path, "input_size", settings.get("input_size", [3, *_built_size(built)]), 3)[1:]
    mode, share = settings["crop_mode"], _number(path, "crop_pct", settings["crop_pct"])
    if mode == "border" or (mode == "squash" and share != 1.0) or mode not in ("center", "squash"):
        raise GraftError(
            f"{path} has crop_mode {mode!r} with crop_pct {share}; Graft can crop (center) or stretch whole pictures "
            f"(squash with crop_pct 1.0), not pad. Change it to one of these if that suits your images."
        )
    if settings["interpolation"] not in TIMM_RESAMPLING:
        raise _unknown(path, "interpolation", settings["interpolation"], TIMM_RESAMPLING)
    return ImagePreprocess(
        image_size=_checked_size(path, size, built),
        aspect="crop" if mode == "center" else "stretch",
        crop_share=size[0] / int(size[0] / share),  # timm rounds the size before the crop down
        interpolation=TIMM_RESAMPLING[settings["interpolation"]],
        antialias=True,
        mean=tuple(255 * value for value in _triple(path, "mean", settings["mean"])),
        deviation=tuple(255 * value for value in _triple(path, "std", settings["std"])),
    )


def transformers_preprocess(folder: pathlib.Path, config: dict, family: str, built: tuple) -> ImagePreprocess:
    """From transformers' preprocessor_config.json; TRANSFORMERS_DEFAULTS where there is none, or it lacks a key.

    Args:
        built: height and width that the encoder takes; None where it takes any.

    Raises:
        GraftError: a setting that Graft cannot reproduce.
    """
    path = folder / PROCESSOR_FILE
    given = layouts.read_json(path) if path.is_file() else {}
    given = {key: value for key, value in given.items() if value is not None}
    size = {"height": _built_size(built)[0], "width": _built_size(built)[1]}
    settings = {"size": size, **TRANSFORMERS_DEFAULTS[family], **given}
    # Until transformers 4.26 the key was another; the default must not stand in its way.
    settings["image_processor_type"] = (
        given.get("image_processor_type") or given.get("feature_extractor_type") or settings["image_processor_type"]
    )
    if not settings.get("do_resize", True):
        raise GraftError(f"{path} has do_resize false; Graft gives all images one size. Set do_resize and size there.")
    if settings.get("do_pad"):
        raise GraftError(
            f"{path} has do_pad true; Graft crops or stretches. Set it to false if that suits your images."
        )
    size, aspect, share = _processor_size(path, settings)
    if settings["resample"] not in PIL_RESAMPLING:
        raise _unknown(path, "resample", settings["resample"], PIL_RESAMPLING)
    factor = _number(path, "rescale_factor", settings.get("rescale_factor", 1 / 255))
    levels = 1 / factor if settings.get("do_rescale", True) else 1.0  # pixel levels per unit of mean and deviation
    normalize = settings.get("do_normalize", True)
    mean = _triple(path, "image_mean", settings["image_mean"]) if normalize else (0.0,) * 3
    deviation = _triple(path, "image_std", settings["image_std"]) if normalize else (1.0,) * 3
    return ImagePreprocess(
        image_size=_checked_size(path, size, built),
        aspect=aspect,
        crop_share=share,
        interpolation=PIL_RESAMPLING[settings["resample"]],
        antialias=True,
        mean=tuple(levels * value for value in mean),
        deviation=tuple(levels * value for value in deviation),
    )


def _processor_size(path: pathlib.Path, settings: dict) -> tuple[list[int], str, float]:
    """Size, aspect and crop share that `size`, `crop_size`, `crop_pct` and `do_center_crop` come to.

    A whole number as `size` is a square for ViT's processor and the shortest edge for all others. With a
    shortest edge and no crop the picture keeps its shape there; Graft keeps its central square.
    """
    name, size = settings["image_processor_type"], settings["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size} if name.startswith("ViT") else {"shortest_edge": size}
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if crop is not None:
        crop = [crop, crop] if isinstance(crop, int) else crop
        crop = [crop.get("height"), crop.get("width")] if isinstance(crop, dict) else crop
        crop = _size(path, "crop_size", crop, 2)
    if isinstance(size, dict) and "shortest_edge" in size:
        edge = _size(path, "size", [size["shortest_edge"]], 1)[0]
        if name.startswith("ConvNext"):
            if edge >= STRETCHED_FROM:
                return [edge, edge], "stretch", 1.0
            share = edge / int(edge / _number(path, "crop_pct", settings.get("crop_pct", 224 / 256)))
            return [edge, edge], "crop", share
        if crop is None:
            return [edge, edge], "crop", 1.0
        if max(crop) <= edge:
            return crop, "crop", min(crop) / edge
    elif isinstance(size, dict) and "height" in size and "width" in size:
        target = _size(path, "size", [size["height"], size["width"]], 2)
        if crop is None or crop == target:
            return target, "stretch", 1.0
    raise GraftError(
        f"{path} has size {size} and crop_size {crop}, which Graft cannot reproduce: expected height and width "
        f"(stretched, not cropped) or a shortest_edge, with a crop_size not larger than it."
    )


def _built_size(built: tuple) -> list[int]:
    return [side or 224 for side in built]


def _checked_size(path: pathlib.Path, size: list[int], built: tuple) -> tuple[int, int]:
    if any(side and side != asked for side, asked in zip(built, size, strict=True)):
        raise GraftError(
            f"{path} makes images of {size[0]} x {size[1]} pixels, but the encoder was built for "
            f"{built[0]} x {built[1]} and takes no other size. Set the size in {path.name} to that."
        )
    return size[0], size[1]


def _size(path: pathlib.Path, key: str, value, length: int) -> list[int]:
    if not isinstance(value, list) or len(value) != length or any(type(n) is not int or n < 1 for n in value):
        raise GraftError(f"{path} has {value} as {key}; expected {length} whole numbers above 0.")
    return value


def _number(path: pathlib.Path, key: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise GraftError(f"{path} has {value!r} as {key}; expected a number above 0.")
    return float(value)


def _triple(path: pathlib.Path, key: str, value) -> tuple[float, ...]:
    """Three numbers, one per channel; one number stands for all three."""
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise GraftError(f"{path} has {value!r} as {key}; expected three numbers, for red, green and blue.")
    return tuple(float(number) for number in values)


def _unknown(path: pathlib.Path, key: str, value, known) -> GraftError:
    return GraftError(f"{path} has {value!r} as {key}; Graft knows {', '.join(map(str, known))}.")
