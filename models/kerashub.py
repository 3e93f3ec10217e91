"""KerasHub preset folders -> Backbone. `keras-nlp` is a shim over keras_hub: declared there, imported here."""

from __future__ import annotations

import json
import pathlib
import re

import keras
import keras_hub

from models import GraftError
from models.backbone import Backbone, Block, ImagePreprocess


def load_preset_folder(folder: pathlib.Path) -> Backbone:
    """Load a KerasHub preset (config.json, weights, image_converter.json) from a folder.

    Raises:
        GraftError: damaged or foreign folder, or an architecture whose blocks Graft does not know.
    """
    class_name = _read_json(folder / "config.json").get("class_name", "?")
    if class_name not in BLOCK_PATTERNS:
        raise GraftError(
            f"Preset {folder} holds a {class_name}; Graft knows the blocks of {', '.join(BLOCK_PATTERNS)}. "
            f"Use a preset of one of these."
        )
    try:
        encoder = keras_hub.models.Backbone.from_preset(str(folder))
    except Exception as error:  # KerasHub raises many kinds, h5py and JSON errors among them
        raise GraftError(
            f"Preset {folder} ({class_name}) could not be loaded: {error}. It must be a folder written by "
            f"`backbone.save_to_preset(folder)` with a KerasHub not newer than {keras_hub.__version__}."
        ) from error
    pooling = "average"
    if class_name == "ViTBackbone":
        pooling = "token" if encoder.use_class_token else "tokens"
        encoder = flat_vit(encoder)
    return Backbone(
        name=folder.name,
        encoder=encoder,
        preprocess=image_preprocess(folder, encoder),
        blocks=blocks_by_name(encoder, BLOCK_PATTERNS[class_name]),
        feature_size=int(encoder.output_shape[-1]),
        pooling=pooling,
        source={"preset": folder.name, "architecture": class_name},
    )


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


def flat_vit(vit: keras.Model) -> keras.Model:
    """KerasHub's ViT as a flat graph of the very same layers, each transformer unit a layer of its own.

    The original hides its units inside one layer (ViTEncoder), so that nothing could be frozen or cut
    between them. Order of the calls: ViTEncoder.call in keras_hub/src/models/vit/vit_layers.py.
    """
    units = vit.get_layer("vit_encoder")
    features = units.dropout(vit.get_layer("vit_patching_and_embedding")(vit.input))
    for unit in units.encoder_layers:
        features = unit(features)
    return keras.Model(vit.input, units.layer_norm(features), name=vit.name)


def image_preprocess(folder: pathlib.Path, encoder: keras.Model) -> ImagePreprocess:
    """Read the preset's image_converter.json: `pixel * scale + offset` there is `(pixel - mean) / deviation` here.

    Without that file: the encoder's own input size (224 where it has none) and pixels as they are,
    which is what KerasHub's backbones do with no converter.

    Raises:
        GraftError: the preset pads, or its converter's size is not the one that the encoder was built for.
    """
    path = folder / "image_converter.json"
    config = {}
    if path.is_file():
        try:  # through KerasHub, which still reads the older names that some presets use (mean, variance, height)
            config = keras_hub.layers.ImageConverter.from_preset(str(folder)).get_config()
        except Exception as error:  # of many kinds, as above
            raise GraftError(f"{path} could not be loaded: {error}. The preset folder is damaged.") from error
    size = config.get("image_size") or [side or 224 for side in encoder.input_shape[1:3]]
    fixed = encoder.input_shape[1:3]
    if any(built and built != asked for built, asked in zip(fixed, size)):
        raise GraftError(
            f"Preset {folder}: {path.name} resizes images to {size[0]} x {size[1]} pixels, but the encoder was built "
            f"for {fixed[0]} x {fixed[1]} and takes no other size. Set image_size to {list(fixed)} in {path.name}."
        )
    scale = _per_channel(config.get("scale"), 1.0)
    offset = _per_channel(config.get("offset"), 0.0)
    if config.get("pad_to_aspect_ratio"):
        raise GraftError(
            f"Preset {folder} pads images to the target's shape (pad_to_aspect_ratio); Graft crops or "
            f"stretches. Set pad_to_aspect_ratio to false in {path.name} if that suits your images."
        )
    return ImagePreprocess(
        image_size=(int(size[0]), int(size[1])),
        aspect="crop" if config.get("crop_to_aspect_ratio", True) else "stretch",
        interpolation=config.get("interpolation", "bilinear"),
        antialias=bool(config.get("antialias", False)),
        mean=tuple(-o / s for o, s in zip(offset, scale)),
        deviation=tuple(1.0 / s for s in scale),
    )


def _per_channel(value, default: float) -> tuple[float, float, float]:
    if value is None:
        value = default
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),) * 3


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GraftError(f"{path} could not be read as JSON: {error}. The preset folder is damaged.") from error
