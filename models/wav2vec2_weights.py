"""The weights of Wav2Vec2 and HuBERT: transformers' names and shapes <-> our layers, read and written."""

from __future__ import annotations

import json
import pathlib
import re

import keras
import numpy as np
import safetensors.numpy

from models.huggingface_weights import Weights, read_weights
from models.wav2vec2_layers import PositionalConvolution, SpeechUnit

PREFIXES = ("wav2vec2.", "hubert.")
# Weights that no state of the encoder depends on: quantisers and heads.
UNUSED = r"quantizer\..+|project_(?:hid|q)\..+|lm_head\..+|projector\..+|classifier\..+|layer_weights|tdnn\..+"
UNUSED += r"|feature_extractor\.\d+\..+|objective\..+"
# Of the positional convolution's kernel: PyTorch's old names of its length and direction, and its new ones.
KERNEL = "encoder.pos_conv_embed.conv"
NORMALISED = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


def read_encoder(folder: pathlib.Path, files: list[pathlib.Path]) -> Weights:
    """The encoder's arrays under names that start inside it; the positional convolution's kernel is folded."""
    state = read_weights(files)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    state = {name: array for name, array in state.items() if not re.fullmatch(UNUSED, name)}
    for length, direction in NORMALISED:
        length, direction = f"{KERNEL}.{length}", f"{KERNEL}.{direction}"
        if length in state and direction in state:
            state[f"{KERNEL}.weight"] = folded(state.pop(length), state.pop(direction))
    return Weights(folder, state)


def folded(length: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """A weight-normalised kernel (Salimans and Kingma 2016, arXiv 1602.07868): a length per position, [1, 1, size]."""
    length, direction = np.asarray(length, np.float32), np.asarray(direction, np.float32)
    return length * direction / np.sqrt(np.sum(direction.astype(np.float64) ** 2, (0, 1))).astype(np.float32)


def named_layers(encoder: keras.Model):
    """Yield (layer with weights, transformers' name for it, the kind: dense, convolution, norm) for all of an encoder.

    The positional convolution and the vector of SpecAugment are kinds of their own.
    """
    for layer in encoder.layers:
        convolution = re.fullmatch(r"conv(\d+)(_norm)?", layer.name)
        if convolution:
            start = f"feature_extractor.conv_layers.{convolution[1]}"
            yield (layer, f"{start}.layer_norm", "norm") if convolution[2] else (layer, f"{start}.conv", "convolution")
        elif isinstance(layer, SpeechUnit):
            yield from _unit_layers(layer, f"encoder.layers.{layer.name.removeprefix('layer')}")
        elif layer.name in NAMES:
            yield layer, *NAMES[layer.name]


NAMES = {
    "projection_norm": ("feature_projection.layer_norm", "norm"),
    "projection": ("feature_projection.projection", "dense"),
    "spec_augment": ("masked_spec_embed", "vector"),
    "positions": (KERNEL, "positions"),
    "encoder_norm": ("encoder.layer_norm", "norm"),
}


def _unit_layers(unit: SpeechUnit, start: str):
    for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
        yield getattr(unit.attention, f"{part}_dense"), f"{start}.attention.{name}_proj", "dense"
    yield unit.attention_norm, f"{start}.layer_norm", "norm"
    yield unit.wide_dense, f"{start}.feed_forward.intermediate_dense", "dense"
    yield unit.narrow_dense, f"{start}.feed_forward.output_dense", "dense"
    yield unit.norm, f"{start}.final_layer_norm", "norm"
    if unit.adapter_size:
        yield unit.adapter_norm, f"{start}.adapter_layer.norm", "norm"
        yield unit.adapter_wide, f"{start}.adapter_layer.linear_1", "dense"
        yield unit.adapter_narrow, f"{start}.adapter_layer.linear_2", "dense"


def assign_weights(state: Weights, encoder: keras.Model) -> None:
    """Give an encoder the arrays of `read_encoder`.

    Raises:
        GraftError: an array missing, of another shape, or of no layer.
    """
    for layer, name, kind in named_layers(encoder):
        if kind == "dense":
            state.assign_dense(layer, name)
        elif kind == "norm":
            state.assign_norm(layer, name)
        elif kind == "vector":
            state.assign(layer.masked_spec_embed, name)
        else:
            if kind == "positions":
                layer.use_bias = True  # what assign_convolution asks of a layer of Keras
            state.assign_convolution(layer, name)
    state.check_all_used()


def write_wav2vec2_folder(encoder: keras.Model, folder: pathlib.Path, config: dict, preprocess: dict) -> None:
    """Write an encoder as a folder in transformers' layout, which PyTorch's transformers reads too.

    Args:
        config: what config.json says, model_type among it; preprocess: what preprocessor_config.json says.
    """
    state = {}
    for layer, name, kind in named_layers(encoder):
        if kind == "vector":
            state[name] = layer.masked_spec_embed.numpy()
        elif kind == "norm":
            state[f"{name}.weight"], state[f"{name}.bias"] = layer.gamma.numpy(), layer.beta.numpy()
        else:
            kernel = layer.kernel.numpy()
            if kind == "dense":  # heads of attention are axes of their own
                rows = kernel.shape[0] if layer.name in ("query", "key", "value") else int(np.prod(kernel.shape[:-1]))
                state[f"{name}.weight"] = kernel.reshape(rows, -1).T
            else:
                state[f"{name}.weight"] = kernel.transpose(2, 1, 0)
            if isinstance(layer, PositionalConvolution):
                kernel = state.pop(f"{name}.weight")
                state[f"{name}.{NORMALISED[0][0]}"] = np.sqrt(np.sum(kernel**2, (0, 1), keepdims=True))
                state[f"{name}.{NORMALISED[0][1]}"] = kernel
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias.numpy().reshape(-1)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess, indent=2))
