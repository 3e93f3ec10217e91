"""KerasHub preset folders -> Backbone. `keras-nlp` is a shim over keras_hub: declared there, imported here."""

from __future__ import annotations

import pathlib
import re

import h5py
import keras
import keras_hub
import numpy as np

from models import GraftError
from models.backbone import Backbone, ImagePreprocess
from models.blocks import BLOCK_PATTERNS, find_blocks
from models.checkpoints import file_sha256
from models.hubs import weight_files
from models.layouts import licence, read_config, read_json


def load_preset_folder(folder: pathlib.Path) -> Backbone:
    """Load a KerasHub preset (config.json, weights, image_converter.json) from a folder.

    Any image architecture of KerasHub will do whose graph can be cut into blocks: by the names of its
    units where BLOCK_PATTERNS knows them, otherwise by the graph's shape.

    Raises:
        GraftError: damaged folder, no single feature map as output, or units that are hidden inside one layer.
    """
    folder = folder.absolute()  # KerasHub takes a relative path for a built-in name where it is called like one
    config = read_config(folder)
    class_name = config.get("class_name", "?")
    encoder = load_preset(folder, config)
    files = weight_files(folder)
    run_depthwise_without_xla(encoder)
    pooling = _pooling_of(folder, encoder)
    if class_name == "ViTBackbone":
        encoder = flat_vit(encoder)
    return Backbone(
        name=folder.name,
        encoder=encoder,
        preprocess=image_preprocess(folder, encoder),
        blocks=find_blocks(encoder, BLOCK_PATTERNS.get(class_name)),
        feature_size=int(encoder.output_shape[-1]),
        pooling=pooling,
        source_head=read_source_head(folder, pooling, int(encoder.output_shape[-1])),
        source={
            "folder": folder.name,
            "architecture": class_name,
            "file": ", ".join(file.name for file in files),
            "sha256": ", ".join(file_sha256(file) for file in files),
            "licence": licence(folder, config),
        },
    )


def load_preset(folder: pathlib.Path, config: dict) -> keras.Model:
    """KerasHub's own backbone of a preset, of whatever kind; `config` is its config.json.

    Raises:
        GraftError: damaged, or written by a newer KerasHub.
    """
    try:
        return keras_hub.models.Backbone.from_preset(str(folder))
    except Exception as error:  # KerasHub raises many kinds, h5py and JSON errors among them
        raise GraftError(
            f"Preset {folder} ({config.get('class_name', '?')}) could not be loaded: {error}. It must be a folder "
            f"written by `backbone.save_to_preset(folder)` with a KerasHub not newer than {keras_hub.__version__}."
        ) from error


def _pooling_of(folder: pathlib.Path, encoder: keras.Model) -> str:
    """The pooling that fits the encoder's output: maps by average, tokens by the class token where it has one."""
    shape = encoder.output_shape
    rank = len(shape) if isinstance(shape, tuple) and all(not isinstance(side, tuple) for side in shape) else 0
    if rank not in (3, 4):
        raise GraftError(
            f"Preset {folder} ({type(encoder).__name__}) gives {shape}, expected one feature map [batch, height, "
            f"width, d] or tokens [batch, tokens, d]. Graft classifies by pooled features, so use another backbone."
        )
    if rank == 4:
        return "average"
    return "token" if getattr(encoder, "use_class_token", False) else "tokens"


def read_source_head(folder: pathlib.Path, pooling: str, feature_size: int) -> tuple | None:
    """The preset's own classifier, (kernel [feature_size, n], bias [n]), from task.json and task.weights.h5.

    None where there is none, or it is more than one Dense layer on features pooled as Graft pools them.
    """
    if not (folder / "task.json").is_file() or not (folder / "task.weights.h5").is_file():
        return None
    config = read_json(folder / "task.json").get("config", {})
    if config.get("pooling") != {"average": "avg", "token": "token"}.get(pooling) or config.get("intermediate_dim"):
        return None
    try:
        with h5py.File(folder / "task.weights.h5") as file:
            dense = [name for name in file["layers"] if re.fullmatch(r"dense(_\d+)?", name)]
            if len(dense) != 1:
                return None
            variables = file["layers"][dense[0]]["vars"]
            head = tuple(np.array(variables[name]) for name in sorted(variables))
    except (OSError, KeyError) as error:
        raise GraftError(f"{folder / 'task.weights.h5'} could not be read: {error}. Copy or fetch it again.") from error
    fits = len(head) == 2 and head[0].ndim == 2 and len(head[0]) == feature_size and head[1].shape == head[0].shape[1:]
    return head if fits else None


def run_depthwise_without_xla(encoder: keras.Model) -> None:
    """Let convolutions with a group per channel run as depthwise ones, which they are.

    Keras compiles grouped convolutions with XLA, which stock TF Serving does not have (MobileNet's are such).
    """
    for layer in encoder._flatten_layers():
        if isinstance(layer, keras.layers.Conv2D) and layer.groups > 1 and layer.kernel.shape[2] == 1:

            def depthwise(inputs, kernel, layer=layer):
                height, width, _, filters = kernel.shape
                kernel = keras.ops.reshape(kernel, (height, width, layer.groups, filters // layer.groups))
                return keras.ops.depthwise_conv(inputs, kernel, layer.strides, layer.padding, None, layer.dilation_rate)

            layer.convolution_op = depthwise


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
