"""The settings of Wav2Vec2's and HuBERT's folders, checked. No TensorFlow, so that a wrong folder answers at once.

Names and defaults are those of transformers' Wav2Vec2Config and HubertConfig.
"""

from __future__ import annotations

import pathlib

from models import GraftError
from models.layouts import read_json

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",  # "group": of the first convolution, over time; "layer": of each, over channels
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,  # the kernel of the positional convolution, in frames
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,  # True: norms stand before attention and feed-forward
    "apply_spec_augment": True,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    "adapter_attn_dim": None,  # MMS: a small feed-forward part after each unit, per language
}
CHOICES = {
    "hidden_act": ("gelu", "gelu_new", "relu"),
    "feat_extract_activation": ("gelu", "gelu_new", "relu"),
    "feat_extract_norm": ("group", "layer"),
    # What Graft's architecture has not.
    "conv_pos_batch_norm": (False, None),
    "add_adapter": (False, None),
}
WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings")
WHOLE += ("num_conv_pos_embedding_groups", "mask_time_length", "mask_feature_length")


def encoder_settings(folder: pathlib.Path, config: dict) -> dict:
    """The settings of a folder's config.json that decide what is computed, with transformers' defaults.

    Raises:
        GraftError: values of the wrong type, that contradict each other, or that Graft's architecture has not.
    """
    settings = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    file = folder / "config.json"
    for name, choices in CHOICES.items():
        if config.get(name, choices[0]) not in choices:
            raise GraftError(
                f"{file}: {name} is {config[name]!r}, with which a {config.get('model_type')} computes something that "
                f"Graft's does not; expected {' or '.join(map(repr, choices))}. Use a checkpoint without that."
            )
    for name in WHOLE:
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise GraftError(f"{file}: {name} is {settings[name]!r}; expected a whole number, 1 or more.")
    for name, default in DEFAULTS.items():
        if isinstance(default, float) and not isinstance(settings[name], (int, float)):
            raise GraftError(f"{file}: {name} is {settings[name]!r}; expected a number.")
    convolutions = [settings[name] for name in ("conv_dim", "conv_stride", "conv_kernel")]
    lists = all(isinstance(values, list) and values for values in convolutions)
    whole = lists and all(isinstance(value, int) and value > 0 for values in convolutions for value in values)
    if not whole or len(set(map(len, convolutions))) > 1:
        raise GraftError(
            f"{file}: conv_dim, conv_stride and conv_kernel are {', '.join(map(repr, convolutions))}; expected lists "
            f"of equal length, a whole number per convolution."
        )
    for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
        if settings["hidden_size"] % settings[name]:
            raise GraftError(f"{file}: {name} {settings[name]} does not divide hidden_size {settings['hidden_size']}.")
    return settings


def extractor_settings(folder: pathlib.Path) -> dict:
    """What preprocessor_config.json asks for: sampling_rate, do_normalize, return_attention_mask.

    Where there is no such file, transformers' defaults.

    Raises:
        GraftError: an extractor of another kind.
    """
    found = {"sampling_rate": 16_000, "do_normalize": True, "return_attention_mask": False}
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return found
    config = read_json(file)
    for name, value in {"feature_size": 1, "padding_value": 0.0, "padding_side": "right"}.items():
        if config.get(name, value) != value:
            raise GraftError(f"{file}: {name} is {config[name]!r}; a waveform encoder of Graft takes {value!r}.")
    found |= {name: config[name] for name in found if config.get(name) is not None}
    if not isinstance(found["sampling_rate"], int) or found["sampling_rate"] < 1:
        raise GraftError(f"{file}: sampling_rate is {found['sampling_rate']!r}; expected a whole number of hertz.")
    return found


def frame_count(samples, kernels, strides):
    """Frames that convolutions without padding make of so many samples: integers, or tensors of integers."""
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def receptive_field(kernels, strides) -> int:
    """Samples that one frame is computed from: the shortest waveform that gives a frame."""
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field
