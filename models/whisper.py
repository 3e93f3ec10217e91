"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) -> Backbone: a flat graph on KerasHub's own layers.

The log-mel spectrogram is part of the graph, and so is the mean over a clip's own frames. Read from KerasHub's
presets, transformers' folders and CTranslate2's model.bin.
"""

from __future__ import annotations

import pathlib
import re
import types

import keras
import numpy as np
from keras_hub.src.models.whisper.whisper_encoder import WhisperEncoder  # KerasHub exports only the whole model

from models import GraftError, layouts
from models.audio_families import check_audio_pooling
from models.audio_layers import FFT, FRAME, HOP, SAMPLE_RATE_HZ, AddPositions, FrameMasks, LogMel
from models.backbone import AudioPreprocess, Backbone, Block
from models.checkpoints import file_sha256
from models.ctranslate2 import read_ctranslate2
from models.hubs import weight_files
from models.huggingface_weights import Weights, read_weights
from models.kerashub import load_preset
from models.text_layers import PoolTokens

# Weights that no state of the encoder depends on: the decoder, the heads of WhisperForAudioClassification.
UNUSED = r"(?:model\.)?decoder\..+|proj_out\..+|projector\..+|classifier\..+|layer_weights"
# Where the settings of a feature extractor must be those of Whisper: transformers' and KerasHub's words for them.
EXTRACTOR = {"sampling_rate": SAMPLE_RATE_HZ, "n_fft": FFT, "hop_length": HOP, "num_fft_bins": FFT, "stride": HOP}
# A unit's parts in transformers' naming -> in CTranslate2's; its first linear layer holds query, key and value.
CTRANSLATE2_PARTS = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "self_attn.out_proj": "self_attention/linear_1",
    "final_layer_norm": "ffn/layer_norm",
    "fc1": "ffn/linear_0",
    "fc2": "ffn/linear_1",
}


def load_whisper_folder(folder: pathlib.Path, pooling: str | None = None) -> Backbone:
    """Load Whisper's encoder from a folder: a KerasHub preset, transformers' layout, or CTranslate2's.

    The encoder takes waveform [batch, samples] float32 at 16 kHz and attention_mask [batch, samples] int32 (1: a
    sample of the clip, 0: padding behind it), any number of samples; of more than 30 s it hears the first 30. A
    clip of less than 2 s is followed by silence up to that; its states depend on no other padding and no other clip.

    Args:
        pooling: "mean" (None too), over the clip's own frames: [batch, d] float32. "frames": [batch, frames, d],
            a frame every 320 samples.

    Raises:
        GraftError: a file missing or damaged, another architecture, or a pooling that does not fit.
    """
    folder = pathlib.Path(folder).absolute()
    pooling = check_audio_pooling(folder.name, pooling)
    config, layout = layouts.read_config(folder), layouts.folder_layout(folder)
    if layout == "ctranslate2":
        return load_whisper_ct2(folder / "model.bin", pooling)
    _check_extractor(folder)
    if layout == "kerashub":
        original = load_preset(folder, config)
        parts = _preset_parts(original)
        architecture, files = config["class_name"], weight_files(folder)
    else:
        files = layouts.transformers_files(folder)
        _check_config(folder, config)
        state = Weights(folder, _encoder_names(read_weights(files)))
        parts = _build_parts(state, int(config["encoder_attention_heads"]), float(config.get("dropout", 0.0)))
        architecture = "transformers whisper"
    encoder, blocks = flat_encoder(parts, pooling)
    return _backbone(folder, encoder, blocks, files, architecture, layouts.licence(folder, config))


def load_whisper_ct2(file: pathlib.Path, pooling: str | None = None) -> Backbone:
    """Load Whisper's encoder from CTranslate2's model.bin with float weights; see `load_whisper_folder`.

    Raises:
        GraftError: no such file, another model, or quantised weights.
    """
    file = pathlib.Path(file).absolute()
    pooling = check_audio_pooling(file.parent.name, pooling)
    specification, arrays = read_ctranslate2(file)
    if specification != "WhisperSpec":
        raise GraftError(f"{file} holds a model of the kind {specification}; expected WhisperSpec, a Whisper.")
    state = Weights(file.parent, transformers_names(file, arrays), "transformers'")
    if "encoder/num_heads" not in arrays:
        raise GraftError(f"{file} does not say encoder/num_heads; expected a whole Whisper. Convert the model again.")
    parts = _build_parts(state, int(arrays["encoder/num_heads"]))
    encoder, blocks = flat_encoder(parts, pooling)
    return _backbone(file.parent, encoder, blocks, [file], "CTranslate2 WhisperSpec", "unknown")


def _backbone(folder, encoder, blocks, files, architecture, licence) -> Backbone:
    return Backbone(
        name=folder.resolve().name,
        encoder=encoder,
        preprocess=AudioPreprocess(sample_rate_hz=SAMPLE_RATE_HZ, longest_seconds=encoder.longest / SAMPLE_RATE_HZ),
        blocks=blocks,
        feature_size=int(encoder.output_shape[-1]),
        pooling="none",
        source={
            "folder": folder.name,
            "architecture": architecture,
            "file": ", ".join(file.name for file in files),
            "sha256": ", ".join(file_sha256(file) for file in files),
            "licence": licence,
        },
    )


# ---------------------------------------------------------------- the graph


def flat_encoder(parts: types.SimpleNamespace, pooling: str) -> tuple[keras.Model, list[Block]]:
    """The graph on given layers, and its blocks: convolutions, then one per transformer unit.

    Order of the calls: WhisperBackbone in keras_hub/src/models/whisper/whisper_backbone.py.
    """
    longest = parts.positions.frames * FRAME
    log_mel = LogMel(parts.mels, longest, name="log_mel")
    masks = FrameMasks(longest, name="frame_masks")
    first_gelu, second_gelu = (keras.layers.Activation(keras.activations.gelu, name=f"gelu_{n}") for n in (1, 2))
    padding = keras.layers.ZeroPadding1D(1, name="padding")  # symmetric; "same" with stride 2 pads at the end only

    waveform = keras.Input((None,), dtype="float32", name="waveform")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    attended, real = masks(attention_mask)
    states = first_gelu(parts.conv1(log_mel(waveform, attention_mask)))
    states = second_gelu(parts.conv2(padding(states)))
    states = parts.dropout(parts.positions(states))
    for unit in parts.units:
        states = unit(states, padding_mask=attended)
    states = parts.norm(states)
    top = [parts.norm]
    if pooling == "mean":
        top.append(PoolTokens("mean", name="pooling"))
        states = top[-1](states, real)
    encoder = keras.Model([waveform, attention_mask], states, name="whisper_encoder")
    encoder.longest = longest  # samples
    inputs = [layer for layer in encoder.layers if isinstance(layer, keras.layers.InputLayer)]
    bottom = [log_mel, masks, parts.conv1, first_gelu, padding, parts.conv2, second_gelu, parts.positions]
    blocks = [("convolutions", [*inputs, *bottom, parts.dropout])]
    blocks += [(f"layer{number}", [unit]) for number, unit in enumerate(parts.units)]
    blocks[-1][1].extend(top)
    return encoder, [Block(name, tuple(layers)) for name, layers in blocks]


def _layers(mels: int, size: int, frames: int, dropout: float) -> types.SimpleNamespace:
    """The layers but for the units, without weights; names as KerasHub's."""
    return types.SimpleNamespace(
        mels=mels,
        conv1=keras.layers.Conv1D(size, 3, padding="same", name="encoder_token_embedding_conv_layer_1"),
        conv2=keras.layers.Conv1D(size, 3, strides=2, name="encoder_token_embedding_conv_layer_2"),
        positions=AddPositions(frames, name="encoder_position_embedding"),
        dropout=keras.layers.Dropout(dropout, name="encoder_embeddings_dropout"),
        norm=keras.layers.LayerNormalization(epsilon=1e-5, name="encoder_layer_norm"),
        units=[],
    )


def _preset_parts(original: keras.Model) -> types.SimpleNamespace:
    """The very layers of a KerasHub backbone, but for the position embedding, which would train when thawed."""
    parts = types.SimpleNamespace(
        mels=original.num_mels,
        conv1=original.encoder_conv_layer_1,
        conv2=original.encoder_conv_layer_2,
        positions=AddPositions(original.max_encoder_sequence_length // 2, name="encoder_position_embedding"),
        dropout=original.encoder_embeddings_dropout,
        norm=original.encoder_layer_norm,
        units=original.encoder_transformer_layers,
    )
    parts.positions.build((None, None, original.hidden_dim))
    parts.positions.position_embeddings.assign(original.encoder_position_embedding.position_embeddings)
    return parts


def _build_parts(state: Weights, heads: int, dropout: float = 0.0) -> types.SimpleNamespace:
    """Layers with the weights of an encoder in transformers' naming, of the sizes that these have."""
    size, mels, _ = state.shape("conv1.weight")
    frames, _ = state.shape("embed_positions.weight")
    if size % heads:
        raise GraftError(f"{state.folder}: {heads} attention heads do not divide the hidden size {size}")
    parts = _layers(mels, size, frames, dropout)
    parts.conv1.build((None, None, mels))
    parts.conv2.build((None, None, size))
    parts.positions.build((None, None, size))
    parts.norm.build((None, None, size))
    state.assign_convolution(parts.conv1, "conv1")
    state.assign_convolution(parts.conv2, "conv2")
    state.assign(parts.positions.position_embeddings, "embed_positions.weight")
    for number in range(state.count(r"layers\.(\d+)\.")):
        prefix = f"layers.{number}"
        unit = WhisperEncoder(
            intermediate_dim=state.shape(f"{prefix}.fc1.weight")[0],
            num_heads=heads,
            dropout=dropout,
            activation=keras.activations.gelu,
            layer_norm_epsilon=1e-5,
            normalize_first=True,
            name=f"transformer_encoder_layer_{number}",
        )
        unit.build((None, None, size))
        attention = unit._self_attention_layer
        state.assign_dense(attention._query_dense, f"{prefix}.self_attn.q_proj")
        state.assign_dense(attention._key_dense, f"{prefix}.self_attn.k_proj")
        state.assign_dense(attention._value_dense, f"{prefix}.self_attn.v_proj")
        state.assign_dense(attention._output_dense, f"{prefix}.self_attn.out_proj")
        state.assign_norm(unit._self_attention_layer_norm, f"{prefix}.self_attn_layer_norm")
        state.assign_norm(unit._feedforward_layer_norm, f"{prefix}.final_layer_norm")
        state.assign_dense(unit._feedforward_intermediate_dense, f"{prefix}.fc1")
        state.assign_dense(unit._feedforward_output_dense, f"{prefix}.fc2")
        parts.units.append(unit)
    state.assign_norm(parts.norm, "layer_norm")
    state.check_all_used()
    return parts


# ---------------------------------------------------------------- files


def _encoder_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's arrays under names that start inside it; the decoder's and heads are left out."""
    kept = {name: array for name, array in state.items() if not re.fullmatch(UNUSED, name)}
    return {re.sub(r"^(?:model\.)?encoder\.", "", name): array for name, array in kept.items()}


def transformers_names(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's arrays of a CTranslate2 Whisper under transformers' names.

    Raises:
        GraftError: quantised weights, or a key projection with a bias, which Whisper has not.
    """
    if any(name.startswith("encoder/") and name.endswith("weight_scale") for name in arrays):
        raise GraftError(
            f"{file} holds quantised weights (int8 or int16); expected float. Convert the model again with "
            f"ct2-transformers-converter --quantization float16."
        )
    state = {}

    def copy(ours, theirs, words=("weight", "bias")):
        for word, their_word in zip(("weight", "bias"), words):
            if f"encoder/{theirs}/{their_word}" in arrays:
                state[f"{ours}.{word}"] = arrays[f"encoder/{theirs}/{their_word}"]

    norm = ("gamma", "beta")
    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("embed_positions", "position_encodings", ("encodings", ""))
    copy("layer_norm", "layer_norm", norm)
    layers = {match[1] for match in (re.match(r"encoder/layer_(\d+)/", name) for name in arrays) if match}
    for number in layers:
        for ours, theirs in CTRANSLATE2_PARTS.items():
            copy(f"layers.{number}.{ours}", f"layer_{number}/{theirs}", norm if "norm" in ours else ("weight", "bias"))
        joined = f"encoder/layer_{number}/self_attention/linear_0"
        if not {f"{joined}/weight", f"{joined}/bias"} <= set(arrays):
            raise GraftError(f"{file} lacks {joined}/weight or its bias; expected a whole Whisper. Convert it again.")
        for word in ("weight", "bias"):
            for part, array in zip("qkv", np.split(arrays[f"{joined}/{word}"], 3)):
                state[f"layers.{number}.self_attn.{part}_proj.{word}"] = array
        if state.pop(f"layers.{number}.self_attn.k_proj.bias").any():
            raise GraftError(f"{file}: the keys of layer {number} have a bias; those of Whisper have none.")
    return state


def _check_config(folder: pathlib.Path, config: dict) -> None:
    if config.get("activation_function", "gelu") != "gelu":
        raise GraftError(
            f"{folder / 'config.json'}: activation_function is {config['activation_function']!r}; KerasHub's Whisper "
            f"has gelu. Use another checkpoint."
        )
    if not isinstance(config.get("encoder_attention_heads"), int):
        raise GraftError(f"{folder / 'config.json'} says no encoder_attention_heads; expected a whole number.")


def _check_extractor(folder: pathlib.Path) -> None:
    """Raise GraftError where the folder asks for another spectrogram than Whisper's."""
    for name in ("preprocessor_config.json", "audio_converter.json"):
        if not (folder / name).is_file():
            continue
        settings = layouts.read_json(folder / name)
        settings = settings.get("config") or settings
        for key, value in EXTRACTOR.items():
            if settings.get(key, value) != value:
                raise GraftError(
                    f"{folder / name}: {key} is {settings[key]!r}; Whisper's spectrogram has {value}. Use another "
                    f"checkpoint."
                )
