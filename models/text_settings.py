"""What transformers' config.json says of a text model -> the arguments of KerasHub's backbones. No TensorFlow."""

from __future__ import annotations

import pathlib

from models import GraftError

LONGEST = 512  # tokens, where a model has no position embeddings that end
_SIZES = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
}
# family: argument of KerasHub's backbone -> key of config.json, which must be there.
ARGUMENTS = {
    "bert": _SIZES | {"num_segments": "type_vocab_size"},
    "distilbert": {
        "vocabulary_size": "vocab_size",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "hidden_dim": "dim",
        "intermediate_dim": "hidden_dim",
        "max_sequence_length": "max_position_embeddings",
    },
    "roberta": _SIZES,
    "xlmr": _SIZES,
    "albert": _SIZES
    | {
        "embedding_dim": "embedding_size",
        "num_groups": "num_hidden_groups",
        "num_inner_repetitions": "inner_group_num",
        "num_segments": "type_vocab_size",
    },
    "deberta": _SIZES | {"bucket_size": "position_buckets"},
    "electra": {"vocab_size" if name == "vocabulary_size" else name: key for name, key in _SIZES.items()}
    | {"embedding_dim": "embedding_size", "num_segments": "type_vocab_size"},
    "gpt2": {
        "vocabulary_size": "vocab_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "hidden_dim": "n_embd",
        "max_sequence_length": "n_positions",
    },
    "llama": {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_query_heads": "num_attention_heads",
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
    },
    "t5": {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "hidden_dim": "d_model",
        "intermediate_dim": "d_ff",
        "key_value_dim": "d_kv",
    },
}
# Key of config.json -> (the only value that KerasHub's architecture has, transformers' default).
_ABSOLUTE = {"position_embedding_type": ("absolute", "absolute"), "is_decoder": (False, False)}
REQUIRED = {
    **dict.fromkeys(("bert", "roberta", "xlmr", "electra", "albert"), _ABSOLUTE),
    "distilbert": {},
    "deberta": {
        "relative_attention": (True, False),
        "share_att_key": (True, False),
        "position_biased_input": (False, True),
        "norm_rel_ebd": ("layer_norm", "none"),
        "type_vocab_size": (0, 0),
        "max_relative_positions": (-1, -1),
    },
    "gpt2": {
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, False),
        "add_cross_attention": (False, False),
    },
    "llama": {"attention_bias": (False, False), "mlp_bias": (False, False), "hidden_act": ("silu", "silu")},
    "t5": {"relative_attention_num_buckets": (32, 32), "relative_attention_max_distance": (128, 128)},
}
# family: (key, transformers' default) of the activation, of the norms' epsilon, and of the dropouts.
_DROPOUTS = {"embedding": "hidden_dropout_prob", "hidden": "hidden_dropout_prob"}
_DROPOUTS |= {"attention": "attention_probs_dropout_prob"}
_ACTIVATION = dict.fromkeys(("bert", "roberta", "xlmr", "electra", "deberta"), ("hidden_act", "gelu"))
_ACTIVATION |= {"albert": ("hidden_act", "gelu_new"), "distilbert": ("activation", "gelu")}
_ACTIVATION |= {"gpt2": ("activation_function", "gelu_new")}
_EPSILON = dict.fromkeys(("bert", "roberta", "xlmr", "electra", "albert"), ("layer_norm_eps", 1e-12))
_EPSILON |= {"deberta": ("layer_norm_eps", 1e-7), "gpt2": ("layer_norm_epsilon", 1e-5)}
_EPSILON |= {"distilbert": ("", 1e-12)}  # transformers' DistilBERT takes no other
_DROPOUT = dict.fromkeys(("bert", "roberta", "xlmr", "electra", "albert", "deberta"), _DROPOUTS)
_DROPOUT |= {"distilbert": {"embedding": "dropout", "hidden": "dropout", "attention": "attention_dropout"}}
_DROPOUT |= {"gpt2": {"embedding": "embd_pdrop", "hidden": "resid_pdrop", "attention": "attn_pdrop"}}
# transformers' names of activations -> ours.
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "tanh", "gelu_fast": "tanh"}
ACTIVATIONS |= {"gelu_pytorch_tanh": "tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def check_settings(folder: pathlib.Path, family: str, config: dict) -> None:
    """Raise GraftError for settings under which the same weights would compute something else."""
    required = REQUIRED[family].items()
    found = {key: config.get(key, default) for key, (value, default) in required if config.get(key, default) != value}
    if family == "deberta":
        kinds = config.get("pos_att_type")
        kinds = kinds.split("|") if isinstance(kinds, str) else kinds or []
        if set(kinds) != {"p2c", "c2p"}:
            found["pos_att_type"] = kinds
    if family in _ACTIVATION:
        key, default = _ACTIVATION[family]
        if config.get(key, default) not in ACTIVATIONS:
            found[key] = config[key]
    if family == "llama":
        found |= _llama_differences(config)
    if family == "t5" and config.get("feed_forward_proj", "relu") not in ("relu", "gated-gelu"):
        found["feed_forward_proj"] = config["feed_forward_proj"]
    if found:
        raise GraftError(
            f"{folder / 'config.json'} has {', '.join(f'{name} = {value}' for name, value in found.items())}, with "
            f"which a {family} computes something that KerasHub's does not. Use a checkpoint without that."
        )


def _llama_differences(config: dict) -> dict:
    found = {}
    heads, rope = config.get("num_attention_heads") or 1, _rope(config)
    if config.get("head_dim") and config["head_dim"] * heads != config.get("hidden_size"):
        found["head_dim"] = config["head_dim"]
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        found["rope_type"] = rope["rope_type"]
    return found


def _rope(config: dict) -> dict:
    """Llama's rotary positions: transformers 5 has rope_parameters, older ones rope_theta and rope_scaling."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    return {"rope_type": rope.get("type", "default"), **rope}


def backbone_settings(folder: pathlib.Path, family: str, config: dict) -> tuple[dict, int]:
    """What a KerasHub backbone is to be made with, and the most tokens that it then takes.

    Returns:
        `arguments` of its constructor, and what must be set afterwards: `activation` ("gelu", "tanh", "relu",
        "silu"), `epsilon` and `dropouts` (embedding, hidden, attention), each None where the arguments say it;
        `first_position`, the row of the position table that a RoBERTa's first token takes.

    Raises:
        GraftError: config.json lacks a size, or has none there.
    """
    arguments = {}
    for name, key in ARGUMENTS[family].items():
        if type(config.get(key)) is not int or config[key] < 1:
            raise GraftError(f"{folder / 'config.json'} has {config.get(key)!r} as {key}; expected a size above 0.")
        arguments[name] = config[key]
    settings = {"arguments": arguments, "activation": None, "epsilon": None, "dropouts": None}
    if family in _ACTIVATION:
        key, default = _ACTIVATION[family]
        settings["activation"] = ACTIVATIONS[config.get(key, default)]
        settings["epsilon"] = config.get(*_EPSILON[family])
        settings["dropouts"] = {kind: config.get(key, 0.1) for kind, key in _DROPOUT[family].items()}
        arguments["dropout"] = max(settings["dropouts"].values())  # where it is 0, Keras makes no source of noise
    if family in ("roberta", "xlmr"):
        padding = config.get("pad_token_id")
        settings["first_position"] = (1 if padding is None else padding) + 1
        arguments["max_sequence_length"] -= settings["first_position"]
    if family == "gpt2":
        arguments["intermediate_dim"] = config.get("n_inner") or 4 * config["n_embd"]
    if family == "llama":
        arguments |= _llama_arguments(config)
    if family == "t5":
        gated = config.get("feed_forward_proj", "relu") == "gated-gelu"
        settings["activation"] = "tanh" if gated else "relu"
        arguments |= {
            "use_gated_activation": gated,
            "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
            "dropout": config.get("dropout_rate", 0.1),
        }
    longest = config.get("max_position_embeddings", LONGEST) if family == "llama" else LONGEST
    return settings, arguments.get("max_sequence_length", longest)


def _llama_arguments(config: dict) -> dict:
    """Tied embeddings always: the output embeddings of a language model are not part of an encoder."""
    rope = _rope(config)
    arguments = {
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope_max_wavelength": rope["rope_theta"],
        "layer_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": True,
    }
    if rope["rope_type"] == "linear":
        arguments["rope_position_scaling_factor"] = rope["factor"]
    if rope["rope_type"] == "llama3":
        arguments |= {
            "rope_frequency_adjustment_factor": rope["factor"],
            "rope_low_freq_factor": rope["low_freq_factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_pretraining_sequence_length": rope["original_max_position_embeddings"],
        }
    return arguments
