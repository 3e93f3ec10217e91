"""Wav2Vec2 (Baevski et al. 2020, arXiv 2006.11477) and HuBERT (Hsu et al. 2021, arXiv 2106.07447): encoders of speech.

One architecture in two layouts: base (a norm over time behind the first convolution, norms behind attention and
feed-forward) and large, XLS-R and MMS (a norm behind each convolution, norms before). A flat graph of named layers,
loaded from folders in transformers' layout.

transformers hands the padding of a batch on to attention, and to the norm over time always, so that there a clip's
states depend on the clips beside it. Here no clip's frames know of padding: they are what transformers gives for the
clip alone. `padding="transformers"` has its way instead.
"""

from __future__ import annotations

import pathlib

import keras

from models import GraftError, layouts
from models.audio_families import check_audio_pooling
from models.backbone import AudioPreprocess, Backbone, Block
from models.checkpoints import file_sha256
from models.text_layers import PoolTokens
from models.wav2vec2_layers import (
    ACTIVATIONS,
    NORM_EPSILON,
    FrameMask,
    PositionalConvolution,
    RealFrames,
    Samples,
    SpecAugment,
    SpeechUnit,
    TimeNorm,
)
from models.wav2vec2_settings import encoder_settings, extractor_settings, frame_count, receptive_field
from models.wav2vec2_weights import assign_weights, read_encoder

__all__ = ["frame_count", "load_wav2vec2_folder", "wav2vec2_backbone", "wav2vec2_encoder"]

PADDINGS = ("apart", "transformers")


def load_wav2vec2_folder(folder: pathlib.Path, pooling: str | None = None, padding: str = "apart") -> Backbone:
    """Load a Wav2Vec2 or HuBERT encoder from a folder in transformers' layout; heads and quantisers are left out.

    The encoder takes waveform [batch, samples] float32 and attention_mask [batch, samples] int32 (1: a sample of the
    clip, 0: padding behind it), any number of samples.

    Args:
        pooling: "mean" (None too), over a clip's own frames: [batch, d] float32. "frames": [batch, frames, d], zeros
            behind a clip's own.
        padding: "apart": no frame depends on padding. "transformers": padding counts as it does there, in the norm
            over time and, where preprocessor_config.json says return_attention_mask: false, in attention too.

    Raises:
        GraftError: a file missing or damaged, settings or weights of another architecture, a pooling that does not fit.
    """
    folder = pathlib.Path(folder).absolute()
    config = layouts.read_config(folder)
    settings, extractor = encoder_settings(folder, config), extractor_settings(folder)
    files = layouts.transformers_files(folder)
    state = read_encoder(folder, files)
    settings["masked_spec_embed"] = "masked_spec_embed" in state.state
    attends_padding = padding == "transformers" and not extractor["return_attention_mask"]
    backbone = wav2vec2_backbone(
        settings, folder.resolve().name, pooling, padding, attends_padding, model_type=config["model_type"]
    )
    assign_weights(state, backbone.encoder)
    backbone.preprocess = AudioPreprocess(extractor["sampling_rate"], normalise=bool(extractor["do_normalize"]))
    backbone.source = {
        "folder": folder.name,
        "architecture": f"transformers {config['model_type']}",
        "file": ", ".join(file.name for file in files),
        "sha256": ", ".join(file_sha256(file) for file in files),
        "licence": layouts.licence(folder, config),
    }
    return backbone


def wav2vec2_backbone(
    settings: dict,
    name: str,
    pooling: str | None = None,
    padding: str = "apart",
    attends_padding: bool = False,
    model_type: str = "wav2vec2",
) -> Backbone:
    """A backbone with random weights. settings: as `encoder_settings` gives them; the other arguments as for loading.

    Its blocks are the convolutions, which stay frozen even under --depth full, as in the papers; then the embeddings
    (projection and positions), then one per transformer unit.
    """
    pooling = check_audio_pooling(name, pooling)
    if padding not in PADDINGS:
        raise GraftError(f"Padding {padding!r} of {name} is not known: choose {' or '.join(PADDINGS)}.")
    encoder, blocks = wav2vec2_encoder(settings, pooling, padding, attends_padding, f"{model_type}_encoder")
    return Backbone(
        name=name,
        encoder=encoder,
        preprocess=AudioPreprocess(normalise=True),
        blocks=blocks,
        feature_size=settings["hidden_size"],
        pooling="none",
        frozen_front=1,
    )


def wav2vec2_encoder(
    settings: dict,
    pooling: str = "mean",
    padding: str = "apart",
    attends_padding: bool = False,
    name="wav2vec2_encoder",
) -> tuple[keras.Model, list[Block]]:
    """The graph with random weights, and its blocks, bottom to top."""
    kernels, strides = settings["conv_kernel"], settings["conv_stride"]
    shortest = receptive_field(kernels, strides)
    bottom = []

    def add(block: list, layer, *inputs):
        block.append(layer)
        return layer(*inputs)

    waveform = keras.Input((None,), dtype="float32", name="waveform")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    real = add(bottom, FrameMask(kernels, strides, shortest, name="frame_mask"), attention_mask)  # [batch, frames]
    states = add(bottom, Samples(shortest, name="samples"), waveform, attention_mask)  # [batch, samples, 1]
    for number, (size, kernel, stride) in enumerate(zip(settings["conv_dim"], kernels, strides, strict=True)):
        layer = keras.layers.Conv1D(size, kernel, stride, use_bias=settings["conv_bias"], name=f"conv{number}")
        states = add(bottom, layer, states)  # [batch, fewer, size]
        if settings["feat_extract_norm"] == "layer":
            norm = keras.layers.LayerNormalization(epsilon=NORM_EPSILON, name=f"conv{number}_norm")
            states = add(bottom, norm, states)
        elif number == 0:
            mask = None
            if padding == "apart":
                layer = FrameMask(kernels[:1], strides[:1], shortest, name="conv0_mask")
                mask = add(bottom, layer, attention_mask)
            states = add(bottom, TimeNorm(name="conv0_norm"), states, mask)
        activation = ACTIVATIONS[settings["feat_extract_activation"]]
        states = add(bottom, keras.layers.Activation(activation, name=f"conv{number}_activation"), states)

    attended = None if attends_padding else real
    blocks = [("convolutions", bottom), ("embeddings", [])]
    states = _embeddings(settings, states, attended, blocks[1][1], add)
    for number in range(settings["num_hidden_layers"]):
        blocks.append((f"layer{number}", []))
        states = add(blocks[-1][1], _unit(settings, f"layer{number}"), states, attended)
    if settings["do_stable_layer_norm"]:
        states = add(blocks[-1][1], _norm(settings, "encoder_norm"), states)
    if pooling == "mean":
        states = add(blocks[-1][1], PoolTokens("mean", name="pooling"), states, real)
    elif padding == "apart":
        states = add(blocks[-1][1], RealFrames(name="frames"), states, real)
    encoder = keras.Model([waveform, attention_mask], states, name=name)
    encoder.kernels, encoder.strides = tuple(kernels), tuple(strides)  # for frame_count
    bottom += [layer for layer in encoder.layers if isinstance(layer, keras.layers.InputLayer)]
    return encoder, [Block(block, tuple(layers)) for block, layers in blocks]


def _embeddings(settings: dict, states, attended, block: list, add):
    """What convolutions give -> what the first transformer unit takes."""
    layers = keras.layers
    if settings["feat_proj_layer_norm"]:
        states = add(block, _norm(settings, "projection_norm"), states)
    states = add(block, layers.Dense(settings["hidden_size"], name="projection"), states)
    states = add(block, layers.Dropout(settings["feat_proj_dropout"], name="projection_dropout"), states)
    shares = [settings[f"mask_{kind}_prob"] for kind in ("time", "feature")]
    if settings.get("masked_spec_embed", any(shares)):
        is_on = bool(settings["apply_spec_augment"])
        arguments = []
        for kind, share in zip(("time", "feature"), shares):
            arguments += [share * is_on, settings[f"mask_{kind}_length"], settings[f"mask_{kind}_min_masks"]]
        states = add(block, SpecAugment(*arguments, name="spec_augment"), states, attended)
    positions = PositionalConvolution(
        settings["num_conv_pos_embeddings"],
        settings["num_conv_pos_embedding_groups"],
        ACTIVATIONS[settings["feat_extract_activation"]],
        name="positions",
    )
    states = add(block, positions, states, attended)
    if not settings["do_stable_layer_norm"]:
        states = add(block, _norm(settings, "encoder_norm"), states)
    return add(block, layers.Dropout(settings["hidden_dropout"], name="embeddings_dropout"), states)


def _norm(settings: dict, name: str) -> keras.layers.Layer:
    return keras.layers.LayerNormalization(epsilon=settings["layer_norm_eps"], name=name)


def _unit(settings: dict, name: str) -> SpeechUnit:
    return SpeechUnit(
        settings["num_attention_heads"],
        settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        epsilon=settings["layer_norm_eps"],
        norm_first=settings["do_stable_layer_norm"],
        dropout=settings["hidden_dropout"],
        attention_dropout=settings["attention_dropout"],
        activation_dropout=settings["activation_dropout"],
        layerdrop=settings["layerdrop"],
        adapter_size=settings["adapter_attn_dim"],
        name=name,
    )
