"""KerasHub preset folders of small random text models with their tokenizers, one per family: `write(family, folder)`.

The vocabularies are those of tests/fixtures/text. Each model has three transformer units of width 16 (T5: two, and
as many in its decoder; ALBERT: two groups that are called twice) and takes 64 tokens.
"""

from __future__ import annotations

import json
import pathlib

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "text"
SIZES = {"num_layers": 3, "hidden_dim": 16, "intermediate_dim": 32}
ENCODER = SIZES | {"num_heads": 2, "max_sequence_length": 64, "dropout": 0.1}
LLAMA = SIZES | {"num_query_heads": 2, "num_key_value_heads": 1}
ALBERT = ENCODER | {"num_layers": 4, "num_groups": 2, "embedding_dim": 8}
# family -> KerasHub's backbone and tokenizer without those words, the folder of the vocabulary, arguments of the
# backbone. llama has the vocabulary of Llama 2, llama3 the byte pairs of Llama 3; both are of the family llama.
MODELS = {
    "bert": ("Bert", "bert", ENCODER),
    "distilbert": ("DistilBert", "bert", ENCODER),
    "electra": ("Electra", "bert", ENCODER | {"embedding_dim": 8}),
    "roberta": ("Roberta", "roberta", ENCODER),
    "xlmr": ("XLMRoberta", "xlmr", ENCODER),
    "albert": ("Albert", "albert", ALBERT),
    "deberta": ("DebertaV3", "deberta", ENCODER | {"bucket_size": 8}),
    "gpt2": ("GPT2", "gpt2", ENCODER),
    "llama": ("Llama", "llama", LLAMA),
    "llama3": ("Llama3", "llama3", LLAMA),
    "t5": ("T5", "t5", SIZES | {"num_layers": 2, "num_heads": 2, "use_gated_activation": False}),
}
PROTOS = ("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model")


def write(family: str, folder: pathlib.Path) -> pathlib.Path:
    """The preset of one family in `folder`: config.json, weights, tokenizer.json and what that needs."""
    import keras
    import keras_hub

    name, vocabulary, arguments = MODELS[family]
    keras.utils.set_random_seed(0)
    tokenizer = make_tokenizer(getattr(keras_hub.models, f"{name}Tokenizer"), FIXTURES / vocabulary)
    size = {"vocab_size" if family == "electra" else "vocabulary_size": tokenizer.vocabulary_size()}
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**size, **arguments)
    for weight in backbone.trainable_weights:  # so that no bias is 0, and units differ from passing their input on
        weight.assign_add(keras.random.normal(weight.shape, stddev=0.2))
    backbone.save_to_preset(str(folder))
    tokenizer.save_to_preset(str(folder))
    return folder


def make_tokenizer(kind: type, source: pathlib.Path):
    """A KerasHub tokenizer of the given class with the vocabulary in `source`."""
    if (source / "vocab.txt").is_file():
        return kind(vocabulary=str(source / "vocab.txt"), lowercase=True)
    if (source / "merges.txt").is_file():
        return kind(vocabulary=str(source / "vocab.json"), merges=str(source / "merges.txt"))
    proto = next((source / name for name in PROTOS if (source / name).is_file()), None)
    if proto:
        return kind(proto=str(proto))
    content = json.loads((source / "tokenizer.json").read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    return kind(
        vocabulary=content["model"]["vocab"] | special,
        merges=merges,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        misc_special_tokens=set(special),
    )
