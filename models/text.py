"""Folders of text models -> Backbone: flat graphs on KerasHub's own layers, with the pooling inside."""

from __future__ import annotations

import pathlib
import re
import warnings

import keras

from models.backbone import Backbone, Block
from models.checkpoints import file_sha256
from models.hubs import weight_files
from models.kerashub import load_preset
from models.layouts import folder_layout, licence, read_config
from models.text_families import choose_pooling, family_of
from models.text_layers import HoldPositions, PoolTokens, PositionBias, RelativePositions
from models.text_settings import LONGEST
from models.text_weights import load_transformers
from models.tokenizers import load_text_preprocess

# KerasHub's T5 says so of itself whenever it is made, and the mask is in its position bias all the same.
warnings.filterwarnings("ignore", message=r"Layer '(self|cross)_attention' \(of type T5MultiHeadAttention\) was passed")

# The layers of one transformer unit, by name; the first group is the block's name. ALBERT calls the layers of a
# group again and again, so that a group is the least that can be frozen or thawed.
UNITS = r"^(transformer_layer_\d+|disentangled_attention_encoder_layer_\d+|transformer_encoder_layer_\d+|group_\d+)"


def load_text_folder(folder: pathlib.Path, pooling: str | None = None) -> Backbone:
    """Load a text model from a KerasHub preset, or from a folder in transformers' layout.

    The encoder takes token_ids, padding_mask (1 = real token) and, where the family has them, segment_ids, each
    [batch, tokens] int32, and gives one vector per example [batch, d] float32.

    Args:
        pooling: "mean" (over real tokens), "cls" (the first token) or "last" (the last real token); None: as the
            folder's sentence-transformers files say, else the family's own.

    Raises:
        GraftError: damaged folder, an architecture that KerasHub's differs from, or a pooling that does not fit.
    """
    folder = folder.absolute()  # KerasHub takes a relative path for a built-in name where it is called like one
    config = read_config(folder)
    family = family_of(config)
    pooling = choose_pooling(folder, family, pooling)
    if folder_layout(folder) == "kerashub":
        original = load_preset(folder, config)
        longest, architecture = getattr(original, "max_sequence_length", LONGEST), config["class_name"]
    else:
        original, longest = load_transformers(folder, family, config)
        architecture = f"transformers {config.get('model_type', family)}"
    encoder = flat_encoder(original, family, pooling)
    files = weight_files(folder)
    return Backbone(
        name=folder.resolve().name,
        encoder=encoder,
        preprocess=load_text_preprocess(folder, family, longest),
        blocks=text_blocks(encoder),
        feature_size=int(encoder.output_shape[-1]),
        pooling="none",
        source={
            "folder": folder.name,
            "architecture": architecture,
            "text_pooling": pooling,
            "file": ", ".join(file.name for file in files),
            "sha256": ", ".join(file_sha256(file) for file in files),
            "licence": licence(folder, config),
        },
    )


def flat_encoder(original: keras.Model, family: str, pooling: str) -> keras.Model:
    """What of a KerasHub text backbone leads to the pooled hidden states, on its very layers, as a flat graph.

    What nothing leads from is left out: BERT's pooler, T5's decoder, the output embeddings of a language model.
    """
    if family in REBUILT:
        tokens = keras.Input((None,), dtype="int32", name="token_ids")
        mask = keras.Input((None,), dtype="int32", name="padding_mask")
        inputs, states = [tokens, mask], REBUILT[family](original, tokens, mask)
    else:
        names = ["token_ids", "padding_mask", "segment_ids"]
        inputs = [original.input[name] for name in names if name in original.input]
        mask = original.input["padding_mask"]
        states = original.output["sequence_output"] if isinstance(original.output, dict) else original.output
    return keras.Model(inputs, PoolTokens(pooling, name="pooling")(states, mask), name=original.name)


def text_blocks(encoder: keras.Model) -> list[Block]:
    """The embeddings, then one block per transformer unit; what follows the last unit belongs to it."""
    blocks = {"embeddings": []}
    current = "embeddings"
    for layer in encoder.layers:
        match = re.search(UNITS, layer.name)
        if match:
            current = match[1]
        # Inputs go wherever they are needed; Keras lists some of them late.
        place = "embeddings" if isinstance(layer, keras.layers.InputLayer) else current
        blocks.setdefault(place, []).append(layer)
    return [Block(name, tuple(layers)) for name, layers in blocks.items()]


def _input_embedding(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The token embedding without the output embeddings that an untied language model keeps in the same layer."""
    if not hasattr(layer, "reverse_embeddings"):
        return layer
    plain = keras.layers.Embedding(layer.input_dim, layer.output_dim, dtype=layer.dtype_policy, name=layer.name)
    plain.build()
    plain.embeddings.assign(layer.embeddings)
    return plain


def _llama(original, tokens, mask):
    """Order of the calls: LlamaBackbone in keras_hub/src/models/llama/llama_backbone.py."""
    states = _input_embedding(original.token_embedding)(tokens)
    for unit in original.transformer_layers:
        states = unit(states, decoder_padding_mask=mask)
    return original.layer_norm(states)


def _t5(original, tokens, mask):
    """The encoder alone. Order of the calls: T5Backbone in keras_hub/src/models/t5/t5_backbone.py.

    There the first unit hands its position bias to all others, [batch, heads, tokens, tokens], more than the
    hidden states themselves; here each computes it from the first one's table, so that it need not be cached.
    """
    states = original.encoder_embedding_dropout(_input_embedding(original.token_embedding)(tokens))
    table = original.encoder_transformer_layers[0].self_attention
    for unit in original.encoder_transformer_layers:
        bias = PositionBias(table, name=f"{unit.name}_position_bias")(states, mask)
        states, _ = unit(states, position_bias=bias)
    return original.encoder_dropout(original.encoder_layer_norm(states))


def _deberta(original, tokens, mask):
    """Order of the calls: DebertaV3Backbone in keras_hub/src/models/deberta_v3/deberta_v3_backbone.py.

    There the relative positions, [batch, 2 x bucket, d], go from below to every unit; here each unit computes
    them, the same from the same weights, so that they need not be cached.
    """
    states = original.embeddings_dropout(original.embeddings_layer_norm(original.token_embedding(tokens)))
    positions = original.relative_embeddings
    states = HoldPositions(positions, name="relative_positions")(states)
    for unit in original.transformer_layers:
        relative = RelativePositions(positions, name=f"{unit.name}_relative_positions")(states)
        states = unit(states, rel_embeddings=relative, padding_mask=mask)
    return states


# Families whose KerasHub graph cannot be used as it is: for weights that no feature needs, or for what crosses a cut.
REBUILT = {"llama": _llama, "t5": _t5, "deberta": _deberta}
