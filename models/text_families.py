"""The text families that Graft knows: the one table that names, loaders and tokenizers read. No TensorFlow."""

from __future__ import annotations

import pathlib

from models import GraftError
from models.layouts import OLD_BERT_KEYS, read_json

# family: `classes`, KerasHub's backbones; `types`, transformers' model_type; `presets`, KerasHub's folders of
# built-in presets; `pooling`, how hidden states become one vector per example unless the user says otherwise, and
# `poolings`, what the user may say: the first token of a decoder has seen nothing but itself, and T5 has no [CLS].
_ENCODER = {"pooling": "mean", "poolings": ("mean", "cls")}
_DECODER = {"pooling": "last", "poolings": ("last", "mean")}
FAMILIES = {
    "bert": {"classes": ("BertBackbone",), "types": ("bert",), "presets": ("bert",), **_ENCODER},
    "distilbert": {
        "classes": ("DistilBertBackbone",),
        "types": ("distilbert",),
        "presets": ("distil_bert",),
        **_ENCODER,
    },
    "roberta": {"classes": ("RobertaBackbone",), "types": ("roberta",), "presets": ("roberta",), **_ENCODER},
    "xlmr": {"classes": ("XLMRobertaBackbone",), "types": ("xlm-roberta",), "presets": ("xlm_roberta",), **_ENCODER},
    "albert": {"classes": ("AlbertBackbone",), "types": ("albert",), "presets": ("albert",), **_ENCODER},
    "deberta": {"classes": ("DebertaV3Backbone",), "types": ("deberta-v2",), "presets": ("deberta_v3",), **_ENCODER},
    "electra": {"classes": ("ElectraBackbone",), "types": ("electra",), "presets": ("electra",), **_ENCODER},
    "gpt2": {"classes": ("GPT2Backbone",), "types": ("gpt2",), "presets": ("gpt2",), **_DECODER},
    "llama": {
        "classes": ("LlamaBackbone", "Llama3Backbone"),
        "types": ("llama",),
        "presets": ("llama", "llama3"),
        **_DECODER,
    },
    "t5": {
        "classes": ("T5Backbone",),
        "types": ("t5",),
        "presets": ("t5",),
        "pooling": "mean",
        "poolings": ("mean", "last"),
    },
}
# sentence-transformers' word for a pooling -> ours.
_SENTENCE_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "mean": "mean", "cls": "cls"}


def family_of(config: dict) -> str | None:
    """The family of a folder's config.json, of a KerasHub preset or a transformers model; None where it is no text."""
    if "model_type" in config:
        return next((name for name, family in FAMILIES.items() if config["model_type"] in family["types"]), None)
    if "class_name" in config:
        return next((name for name, family in FAMILIES.items() if config["class_name"] in family["classes"]), None)
    return "bert" if set(config) >= OLD_BERT_KEYS else None


def text_types() -> list[str]:
    """transformers' names of all the types that Graft reads."""
    return [kind for family in FAMILIES.values() for kind in family["types"]]


def choose_pooling(folder: pathlib.Path, family: str, asked: str | None) -> str:
    """The pooling to use: the one asked for, else that of sentence-transformers' files, else the family's own.

    Of sentence-transformers' modules only the pooling is honoured: a scaling to length 1 (Normalize) that may
    follow it is left out, since the head is trained on the vectors as they are.

    Raises:
        GraftError: a pooling that makes no sense for the family, or one in the files that Graft has not.
    """
    table = FAMILIES[family]
    if asked is not None:
        if asked not in table["poolings"]:
            raise GraftError(
                f"Pooling {asked!r} does not fit {folder.name}, a model of the family {family}: choose "
                f"{' or '.join(table['poolings'])}, or leave it out for {table['pooling']}."
            )
        return asked
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return table["pooling"]
    settings = read_json(path)
    modes = [name.removeprefix("pooling_mode_") for name, value in settings.items() if value is True]
    modes = [name for name in modes if name != "include_prompt"] or [settings.get("pooling_mode")]
    if len(modes) != 1 or modes[0] not in _SENTENCE_POOLINGS:
        raise GraftError(
            f"{path} asks for the pooling {' + '.join(map(str, modes))}, which Graft has not; name one yourself: "
            f"{' or '.join(table['poolings'])}."
        )
    return _SENTENCE_POOLINGS[modes[0]]
