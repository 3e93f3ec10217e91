"""Folders in transformers and timm layout -> Backbone, for ResNet and ViT, on KerasHub's architectures.

KerasHub has converters for transformers' ViT and timm's ResNet, but not for the other two, and its ViT
converter leaves out the config's `layer_norm_eps` (1e-12 there, 1e-6 in KerasHub). So all four are read
here the same way: transformers' names are changed into timm's, the shape of the network is taken from
the weights, and a weight that the architecture has no place for is an error, since ignoring it would
compute something else.
"""

from __future__ import annotations

import pathlib
import re

import keras
import keras_hub
import numpy as np

from models import GraftError, checkpoints, layouts
from models.backbone import Backbone
from models.blocks import BLOCK_PATTERNS, blocks_by_name
from models.huggingface_preprocess import timm_preprocess, transformers_preprocess
from models.huggingface_weights import Weights, read_weights
from models.kerashub import flat_vit

# Patterns of transformers' names and what they become; they are tried in this order on the whole name.
# `layers.N` and `q_proj` are transformers 5's names in memory, which a plain torch.save writes; its
# save_pretrained still writes `encoder.layer.N` and `query`.
RENAMES = {
    "resnet": (
        (r"embedder\.embedder\.convolution\.(.+)", r"conv1.\1"),
        (r"embedder\.embedder\.normalization\.(.+)", r"bn1.\1"),
        (
            r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(.+)",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}.{m[4]}",
        ),
        (
            r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(.+)",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}.{m[4]}",
        ),
        (
            r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.(.+)",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.{m[4]}",
        ),
        (r"classifier\.1\.(.+)", r"fc.\1"),
    ),
    "vit": (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (
            r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.(.+)",
            r"blocks.\1.attn.\2.\3",
        ),
        (r"(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
        (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
        (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
        (r"(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"layernorm\.(.+)", r"norm.\1"),
        (r"classifier\.(.+)", r"head.\1"),
    ),
}
# Weights that no feature and no logit depends on: counters, the pooler that classifiers do not use, the mask token.
UNUSED = r".*num_batches_tracked|pooler\.dense\..+|embeddings\.mask_token"
# timm's number of heads is no part of the weights (timm/models/vision_transformer.py).
VIT_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
# Arguments of timm's models that the weights or this file account for; any other may change what is computed.
TIMM_ARGUMENTS = {
    "resnet": {"layers", "channels", "num_classes"},
    "vit": {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"},
}
# transformers' settings that must have these values, because KerasHub's architecture has no other.
REQUIRED = {
    "resnet": {
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "num_channels": 3,
    },
    "vit": {"hidden_act": "gelu", "num_channels": 3},
}
HEADS = {"resnet": "fc", "vit": "head"}


def load_huggingface_folder(folder: pathlib.Path) -> Backbone:
    """Load a ResNet or ViT from a folder in transformers or timm layout; `pytorch_model.bin` is converted once.

    The encoder computes in float32, whatever type the weights have. A ViT's features are its class token,
    a ResNet's the average of its last feature map, as the checkpoint's own classifier takes them.

    Raises:
        GraftError: not such a folder, a file missing or damaged, or an architecture that differs from
            KerasHub's; says in what.
    """
    folder = pathlib.Path(folder)
    family, config, files = layouts.check_huggingface_folder(folder)
    is_timm = layouts.folder_layout(folder) == "timm"
    _check_settings(folder, family, config, is_timm)
    state = Weights(folder, _timm_names(read_weights(files), family, is_timm), "timm's")
    head = state.take_head(HEADS[family])
    try:
        encoder = {"resnet": _resnet, "vit": _vit}[family](state, config, is_timm)
    except (ValueError, TypeError, KeyError) as error:  # KerasHub's own checks, settings of the wrong type
        raise GraftError(f"{folder} does not fit KerasHub's {family}: {error}") from error
    state.check_all_used()
    preprocess = timm_preprocess if is_timm else transformers_preprocess
    return Backbone(
        name=folder.resolve().name,
        encoder=encoder,
        preprocess=preprocess(folder, config, family, encoder.input_shape[1:3]),
        blocks=blocks_by_name(encoder, BLOCK_PATTERNS[{"resnet": "ResNetBackbone", "vit": "ViTBackbone"}[family]]),
        feature_size=int(encoder.output_shape[-1]),
        pooling={"resnet": "average", "vit": "token"}[family],
        source_head=head,
        source={
            "folder": folder.resolve().name,
            "architecture": config["architecture"] if is_timm else f"transformers {family}",
            "file": ", ".join(file.name for file in files),
            "sha256": ", ".join(checkpoints.file_sha256(file) for file in files),
            "licence": layouts.licence(folder, config),
        },
    )


def _check_settings(folder: pathlib.Path, family: str, config: dict, is_timm: bool) -> None:
    """Raise GraftError for settings under which the same weights would compute something else."""
    if is_timm:
        found = {name: "set" for name in config.get("model_args") or {} if name not in TIMM_ARGUMENTS[family]}
        pooling = config.get("global_pool") or None
        if pooling not in (None, {"resnet": "avg", "vit": "token"}[family]):
            found["global_pool"] = pooling
    else:
        found = {name: config[name] for name, value in REQUIRED[family].items() if config.get(name, value) != value}
    if found:
        raise GraftError(
            f"{folder / 'config.json'} has {', '.join(f'{name} = {value}' for name, value in found.items())}, with "
            f"which a {family} computes something that KerasHub's does not. Use a checkpoint without that."
        )


def _timm_names(state: dict[str, np.ndarray], family: str, is_timm: bool) -> dict[str, np.ndarray]:
    """The arrays under timm's names; those of no pattern keep theirs, and are reported later as not known."""
    renamed = {}
    for name, array in state.items():
        short = name if is_timm else name.removeprefix(f"{family}.")
        if re.fullmatch(UNUSED, short):
            continue
        for pattern, new in () if is_timm else RENAMES[family]:
            match = re.fullmatch(pattern, short)
            if match:
                name = match.expand(new) if isinstance(new, str) else new(match)
                break
        renamed[name] = array
    return renamed


def _resnet(state: Weights, config: dict, is_timm: bool) -> keras.Model:
    """KerasHub's ResNet (v1) with the weights' own depths and widths; any image size."""
    stages = state.count(r"layer(\d+)\.")
    if not stages:
        raise GraftError(f"{state.folder}: the weights lack layer1 (in timm's naming); they are not a ResNet's")
    units = [state.count(rf"layer{stage + 1}\.(\d+)\.") for stage in range(stages)]
    bottleneck = "layer1.0.conv3.weight" in state.state
    encoder = keras_hub.models.ResNetBackbone(
        input_conv_filters=[state.shape("conv1.weight")[0]],
        input_conv_kernel_sizes=[state.shape("conv1.weight")[2]],
        stackwise_num_filters=[state.shape(f"layer{stage + 1}.0.conv1.weight")[0] for stage in range(stages)],
        stackwise_num_blocks=units,
        stackwise_num_strides=[1] + [2] * (stages - 1),
        block_type="bottleneck_block" if bottleneck else "basic_block",
    )
    state.assign_convolution(encoder.get_layer("conv1_conv"), "conv1")
    state.assign_norm(encoder.get_layer("conv1_bn"), "bn1")
    for layer in encoder.layers:
        match = re.fullmatch(r"stack(\d+)_block(\d+)_(\d)_(conv|bn)", layer.name)
        if not match:
            continue
        unit, part = f"layer{int(match[1]) + 1}.{match[2]}", match[3]
        if match[4] == "conv":
            state.assign_convolution(layer, f"{unit}.downsample.0" if part == "0" else f"{unit}.conv{part}")
        else:
            state.assign_norm(layer, f"{unit}.downsample.1" if part == "0" else f"{unit}.bn{part}")
    return encoder


def _vit(state: Weights, config: dict, is_timm: bool) -> keras.Model:
    """KerasHub's ViT, flat, with the weights' own widths and depth, for the image size of its position embedding."""
    hidden, _, patch_height, patch_width = state.shape("patch_embed.proj.weight")
    height, width = _vit_image_size(state, config, is_timm, (patch_height, patch_width))
    if is_timm:
        size = config["architecture"].split("_")[1]
        heads = (config.get("model_args") or {}).get("num_heads", VIT_HEADS[size])
        settings = {"num_heads": heads, "layer_norm_epsilon": 1e-6}
    else:
        settings = {
            "num_heads": config.get("num_attention_heads", 12),
            "layer_norm_epsilon": config.get("layer_norm_eps", 1e-12),
            "dropout_rate": config.get("hidden_dropout_prob", 0.0),
            "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
        }
    if hidden % settings["num_heads"]:
        raise GraftError(f"{state.folder}: a width of {hidden} does not divide into {settings['num_heads']} heads")
    nested = keras_hub.models.ViTBackbone(
        image_shape=(height, width, 3),
        patch_size=(patch_height, patch_width),
        num_layers=state.count(r"blocks\.(\d+)\."),
        hidden_dim=hidden,
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight")[0],
        **settings,
    )
    embedding = nested.get_layer("vit_patching_and_embedding")
    state.assign_convolution(embedding.patch_embedding, "patch_embed.proj")
    embedding.class_token.assign(state.take("cls_token", embedding.class_token.shape))
    positions = embedding.position_embedding.embeddings
    positions.assign(state.take("pos_embed", positions.shape))
    units = nested.get_layer("vit_encoder")
    for index, unit in enumerate(units.encoder_layers):
        name = f"blocks.{index}"
        state.assign_norm(unit.layer_norm_1, f"{name}.norm1")
        state.assign_norm(unit.layer_norm_2, f"{name}.norm2")
        _assign_attention(state, unit.mha, f"{name}.attn")
        state.assign_dense(unit.mlp.dense_1, f"{name}.mlp.fc1")
        state.assign_dense(unit.mlp.dense_2, f"{name}.mlp.fc2")
    state.assign_norm(units.layer_norm, "norm")
    return flat_vit(nested)


def _vit_image_size(state: Weights, config: dict, is_timm: bool, patch: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels for which the position embedding [1, 1 + patches, hidden] was made."""
    if is_timm:
        size = (config.get("model_args") or {}).get("img_size") or layouts.timm_settings(config).get("input_size")
        size = size[-2:] if isinstance(size, list) else size
    else:
        size = config.get("image_size", 224)
    tokens = state.shape("pos_embed")[1] - 1
    side = round(tokens**0.5)
    height, width = size if isinstance(size, list) else [size or side * patch[0]] * 2
    if (height // patch[0]) * (width // patch[1]) != tokens:
        raise GraftError(
            f"{state.folder}: pos_embed holds {tokens} patches beside the class token, but {height} x {width} pixels "
            f"in patches of {patch[0]} x {patch[1]} make {(height // patch[0]) * (width // patch[1])}. "
            f"Set the size in config.json to the one that the weights were made for."
        )
    return height, width


def _assign_attention(state: Weights, layer: keras.layers.MultiHeadAttention, name: str) -> None:
    """Query, key and value, three Dense layers in transformers and one (`qkv`) in timm; then the output."""
    width, heads, size = layer.query_dense.kernel.shape
    for kind in ("weight", "bias"):
        if f"{name}.qkv.{kind}" in state.state:
            shape = (3, width, width) if kind == "weight" else (3, width)
            for part, array in zip("qkv", state.take(f"{name}.qkv.{kind}", shape), strict=True):
                state.state[f"{name}.{part}.{kind}"] = array
    for part, dense in (("q", layer.query_dense), ("k", layer.key_dense), ("v", layer.value_dense)):
        dense.kernel.assign(state.take(f"{name}.{part}.weight", (width, width)).T.reshape(width, heads, size))
        dense.bias.assign(state.take(f"{name}.{part}.bias", (heads, size)))
    dense = layer.output_dense
    dense.kernel.assign(state.take(f"{name}.proj.weight", (width, width)).T.reshape(heads, size, width))
    dense.bias.assign(state.take(f"{name}.proj.bias", (width,)))
