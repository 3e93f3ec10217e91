"""Text folders in transformers' layout -> KerasHub's backbones with those weights.

KerasHub has converters for some of these types, but they read only model.safetensors, leave out what its
architectures fix (the exact GELU, the epsilon of norms), and there are none for ELECTRA, DeBERTa and T5. So all
are read here the same way: the settings that KerasHub's layers can take are set, other ones are refused, and a
weight that the architecture has no place for is an error.
"""

from __future__ import annotations

import pathlib
import re

import keras
import keras_hub
import numpy as np

from models import GraftError, layouts
from models.huggingface_weights import Weights, read_weights
from models.text_families import FAMILIES
from models.text_layers import gelu_tanh
from models.text_settings import backbone_settings, check_settings

# What stands before the encoder's names where a checkpoint has a head; the heads are then left out.
PREFIXES = {family: f"{family}." for family in ("bert", "distilbert", "roberta", "albert", "deberta", "electra")}
PREFIXES |= {"xlmr": "roberta.", "gpt2": "transformer.", "llama": "model.", "t5": ""}
# Weights that no hidden state depends on: poolers, heads, T5's decoder, tables that PyTorch kept as buffers.
UNUSED = (
    r"pooler\..+|lm_head\..+|decoder\..+|(?:.+\.)?position_ids|embeddings\.token_type_ids|.+\.rotary_emb\.inv_freq"
    r"|h\.\d+\.attn\.(?:masked_)?bias|encoder\.embed_tokens\.weight"
)
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}
_DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "wide": "ffn.lin1",
    "narrow": "ffn.lin2",
    "norm": "output_layer_norm",
}
_ALBERT = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "wide": "ffn",
    "narrow": "ffn_output",
    "norm": "full_layer_layer_norm",
}
_DEBERTA = _BERT | {part: f"attention.self.{part}_proj" for part in ("query", "key", "value")}
# How each family of encoders names unit number N, and the unit's parts.
UNITS = {
    **dict.fromkeys(("bert", "roberta", "xlmr", "electra"), ("encoder.layer.{}", _BERT)),
    "distilbert": ("transformer.layer.{}", _DISTILBERT),
    "deberta": ("encoder.layer.{}", _DEBERTA),
}
# The words of models.text_settings for activations.
FUNCTIONS = {"gelu": keras.activations.gelu, "relu": keras.activations.relu, "silu": keras.activations.silu}
FUNCTIONS |= {"tanh": gelu_tanh}


def load_transformers(folder: pathlib.Path, family: str, config: dict) -> tuple[keras.Model, int]:
    """KerasHub's backbone with a folder's weights, computing in float32, and the most tokens that it takes.

    Raises:
        GraftError: a file missing or damaged, or settings or weights of another architecture.
    """
    files = layouts.transformers_files(folder)
    check_settings(folder, family, config)
    state = Weights(folder, encoder_names(read_weights(files), PREFIXES[family]))
    settings, longest = backbone_settings(folder, family, config)
    if family == "t5":
        settings["arguments"]["activation"] = FUNCTIONS[settings["activation"]]
    class_name = FAMILIES[family]["classes"][-1]
    try:
        backbone = getattr(keras_hub.models, class_name)(**settings["arguments"])
    except (ValueError, TypeError, ZeroDivisionError) as error:  # KerasHub's own checks
        raise GraftError(f"{folder} does not fit KerasHub's {class_name}: {error}") from error
    if family in _ASSIGN:
        _ASSIGN[family](state, backbone)
    else:
        _assign_encoder(state, backbone, family, settings.get("first_position", 0))
    state.check_all_used()
    set_details(backbone, settings)
    return backbone, longest


def encoder_names(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of the encoder alone, without the prefix that a model with a head puts before their names.

    The LayerNorms of checkpoints that came from TensorFlow have gamma and beta for weight and bias.
    """
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    if "shared.weight" not in state and "encoder.embed_tokens.weight" in state:  # a T5EncoderModel's own name for it
        state = state | {"shared.weight": state["encoder.embed_tokens.weight"]}
    new_names = {"gamma": "weight", "beta": "bias"}
    renamed = {}
    for name, array in state.items():
        if not re.fullmatch(UNUSED, name):
            start, _, end = name.rpartition(".")
            renamed[f"{start}.{new_names.get(end, end)}"] = array
    return renamed


def set_details(backbone: keras.Model, settings: dict) -> None:
    """Set what KerasHub's constructors have no argument for: the activation, the epsilon, each kind of dropout."""
    attention = set()
    for layer in backbone._flatten_layers():
        if settings["activation"] and hasattr(layer, "_feedforward_intermediate_dense"):
            # In the unit as well, here and below: its config, which tells one graph from another, is read there.
            layer.activation = layer._feedforward_intermediate_dense.activation = FUNCTIONS[settings["activation"]]
        if settings["epsilon"] is not None and hasattr(layer, "layer_norm_epsilon"):
            layer.layer_norm_epsilon = settings["epsilon"]
        if settings["epsilon"] is not None and isinstance(layer, keras.layers.LayerNormalization):
            layer.epsilon = settings["epsilon"]
        for name in ("_dropout_layer", "_attn_dropout_layer", "_position_dropout_layer"):
            if hasattr(layer, name):
                attention.add(id(getattr(layer, name)))
        if isinstance(layer, keras.layers.MultiHeadAttention) and settings["dropouts"]:
            layer._dropout = settings["dropouts"]["attention"]
    for layer in backbone._flatten_layers():
        if isinstance(layer, keras.layers.Dropout) and settings["dropouts"]:
            kind = "embedding" if layer.name == "embeddings_dropout" else "hidden"
            layer.rate = settings["dropouts"]["attention" if id(layer) in attention else kind]


def _assign_unit(state: Weights, unit, start: str, parts: dict[str, str]) -> None:
    """A TransformerEncoder of KerasHub, or DeBERTa's encoder unit, whose attention names its layers otherwise."""
    attention = unit._self_attention_layer
    for part in ("query", "key", "value", "output"):
        layer = getattr(attention, f"{part}_dense", None) or getattr(attention, f"_{part}_dense")
        state.assign_dense(layer, f"{start}.{parts[part]}")
    state.assign_norm(unit._self_attention_layer_norm, f"{start}.{parts['attention_norm']}")
    state.assign_dense(unit._feedforward_intermediate_dense, f"{start}.{parts['wide']}")
    state.assign_dense(unit._feedforward_output_dense, f"{start}.{parts['narrow']}")
    state.assign_norm(unit._feedforward_layer_norm, f"{start}.{parts['norm']}")


def _assign_encoder(state: Weights, backbone, family: str, first_position: int) -> None:
    """BERT and its relatives: embeddings, their norm, then units of one and the same form."""
    state.assign(backbone.token_embedding.embeddings, "embeddings.word_embeddings.weight")
    state.assign_norm(backbone.embeddings_layer_norm, "embeddings.LayerNorm")
    if family in ("roberta", "xlmr"):
        _assign_roberta_positions(state, backbone.embeddings.position_embedding.position_embeddings, first_position)
    elif family == "deberta":
        state.assign(backbone.relative_embeddings.rel_embeddings, "encoder.rel_embeddings.weight")
        state.assign_norm(backbone.relative_embeddings.layer_norm, "encoder.LayerNorm")
    else:
        embedding = backbone.embeddings if family == "distilbert" else backbone
        state.assign(embedding.position_embedding.position_embeddings, "embeddings.position_embeddings.weight")
    if hasattr(backbone, "segment_embedding"):
        state.assign(backbone.segment_embedding.embeddings, "embeddings.token_type_embeddings.weight")
    if hasattr(backbone, "embeddings_projection"):
        name = "encoder.embedding_hidden_mapping_in" if family == "albert" else "embeddings_project"
        state.assign_dense(backbone.embeddings_projection, name)
    if family == "albert":
        for group, units in enumerate(backbone.transformer_layers):
            for place, unit in enumerate(units):
                _assign_unit(state, unit, f"encoder.albert_layer_groups.{group}.albert_layers.{place}", _ALBERT)
        return
    start, parts = UNITS[family]
    for index, unit in enumerate(backbone.transformer_layers):
        _assign_unit(state, unit, start.format(index), parts)


def _assign_roberta_positions(state: Weights, variable: keras.Variable, first_position: int) -> None:
    """RoBERTa's first position is the one after padding's; its one segment is added to every position.

    KerasHub's RoBERTa knows no segments. In released checkpoints theirs is a row of zeros.
    """
    length, width = variable.shape
    positions = state.take("embeddings.position_embeddings.weight", (length + first_position, width))
    segment = state.take("embeddings.token_type_embeddings.weight", (1, width))
    variable.assign(positions[first_position:] + segment)


def _assign_gpt2(state: Weights, backbone) -> None:
    """GPT-2 keeps query, key and value in one kernel, and all kernels as [in, out]."""
    state.assign(backbone.token_embedding.embeddings, "wte.weight")
    state.assign(backbone.position_embedding.position_embeddings, "wpe.weight")
    for index, unit in enumerate(backbone.transformer_layers):
        start, attention = f"h.{index}", unit._self_attention_layer
        for kind in ("weight", "bias"):
            name = f"{start}.attn.c_attn.{kind}"
            together = state.take(name, state.shape(name))
            for part, array in zip("qkv", np.split(together, 3, axis=-1), strict=True):
                state.state[f"{start}.attn.{part}.{kind}"] = array
        for part, layer in (("q", "query_dense"), ("k", "key_dense"), ("v", "value_dense"), ("c_proj", "output_dense")):
            state.assign_dense(getattr(attention, layer), f"{start}.attn.{part}", transposed=False)
        state.assign_norm(unit._self_attention_layer_norm, f"{start}.ln_1")
        state.assign_norm(unit._feedforward_layer_norm, f"{start}.ln_2")
        state.assign_dense(unit._feedforward_intermediate_dense, f"{start}.mlp.c_fc", transposed=False)
        state.assign_dense(unit._feedforward_output_dense, f"{start}.mlp.c_proj", transposed=False)
    state.assign_norm(backbone.layer_norm, "ln_f")


def _assign_llama(state: Weights, backbone) -> None:
    state.assign(backbone.token_embedding.embeddings, "embed_tokens.weight")
    for index, unit in enumerate(backbone.transformer_layers):
        start, attention = f"layers.{index}", unit._self_attention_layer
        for part in ("query", "key", "value", "output"):
            state.assign_dense(getattr(attention, f"_{part}_dense"), f"{start}.self_attn.{part[0]}_proj")
        state.assign(unit._self_attention_layernorm.scale, f"{start}.input_layernorm.weight")
        state.assign(unit._feedforward_layernorm.scale, f"{start}.post_attention_layernorm.weight")
        state.assign_dense(unit._feedforward_gate_dense, f"{start}.mlp.gate_proj")
        state.assign_dense(unit._feedforward_intermediate_dense, f"{start}.mlp.up_proj")
        state.assign_dense(unit._feedforward_output_dense, f"{start}.mlp.down_proj")
    state.assign(backbone.layer_norm.scale, "norm.weight")


def _assign_t5(state: Weights, backbone) -> None:
    """The encoder alone."""
    state.assign(backbone.token_embedding.embeddings, "shared.weight")
    table = backbone.encoder_transformer_layers[0].self_attention.relative_attention_bias
    state.assign(table, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    for index, unit in enumerate(backbone.encoder_transformer_layers):
        start = f"encoder.block.{index}.layer"
        for part in ("query", "key", "value", "output"):
            layer = getattr(unit.self_attention, f"{part}_projector")
            state.assign_dense(layer, f"{start}.0.SelfAttention.{part[0]}")
        state.assign(unit.self_attention_layer_norm.weight, f"{start}.0.layer_norm.weight")
        state.assign(unit.layer_norm.weight, f"{start}.1.layer_norm.weight")
        wide = "wi_0" if unit.use_gated_activation else "wi"
        state.assign_dense(unit.input_projector, f"{start}.1.DenseReluDense.{wide}")
        if unit.use_gated_activation:
            state.assign_dense(unit.gate_projector, f"{start}.1.DenseReluDense.wi_1")
        state.assign_dense(unit.output_projector, f"{start}.1.DenseReluDense.wo")
    state.assign(backbone.encoder_layer_norm.weight, "encoder.final_layer_norm.weight")


_ASSIGN = {"gpt2": _assign_gpt2, "llama": _assign_llama, "t5": _assign_t5}
