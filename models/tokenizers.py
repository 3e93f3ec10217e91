"""The tokenizer of a checkpoint's folder as a graph: KerasHub presets and Hugging Face folders.

`read_source` turns the files into one plain dict, `load_text_preprocess` builds from that.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

from models import GraftError
from models.backbone import TextPreprocess
from models.byte_pairs import BytePairs
from models.fast_tokenizers import pieces_of, read_fast_tokenizer
from models.layouts import read_json
from models.word_pieces import SentencePieces, WordPieces

RULES = 1  # raise it when the same files give other tokens: part of the identity
# Special tokens of an example: names of roles, and the token of each role where the files name no other one.
_BERT = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"}
_ROBERTA = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
_ENCODER = {"start": ("cls",), "separator": ("sep",), "end": ("sep",)}
FAMILIES = {
    "bert": {"tokens": _BERT, **_ENCODER, "segments": True},
    "distilbert": {"tokens": _BERT, **_ENCODER},
    "electra": {"tokens": _BERT, **_ENCODER, "segments": True},
    "albert": {"tokens": _BERT | {"pad": "<pad>", "unk": "<unk>"}, **_ENCODER, "segments": True},
    "deberta": {"tokens": _BERT, **_ENCODER},
    "roberta": {"tokens": _ROBERTA, **_ENCODER, "separator": ("sep", "sep")},
    "xlmr": {"tokens": _ROBERTA, **_ENCODER, "separator": ("sep", "sep")},
    "gpt2": {"tokens": {"eos": "<|endoftext|>"}, "separator": ("eos",)},
    "llama": {"tokens": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, "start": ("bos",), "separator": ("bos",)},
    "t5": {"tokens": {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}, "separator": ("eos",), "end": ("eos",)},
}
LLAMA3_TOKENS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
SEQUENCE_LENGTH = 128  # tokens kept unless the user says otherwise
SENTENCE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model", "vocabulary.spm")


def load_text_preprocess(folder: pathlib.Path, family: str, max_length: int) -> TextPreprocess:
    """The tokenizer and the special tokens of a KerasHub preset folder or a Hugging Face folder.

    Args:
        family: of FAMILIES.
        max_length: most tokens of an example, special ones included.

    Raises:
        GraftError: no tokenizer files that Graft reads, or files that lack a special token.
    """
    folder = pathlib.Path(folder)
    source = read_source(folder, family)
    ids, tokens, rules = source.pop("ids"), source.pop("tokens"), FAMILIES[family]

    wanted = {role: [tokens[name] for name in rules.get(role, ())] for role in ("start", "separator", "end")}
    needed = [token for names in wanted.values() for token in names]
    needed += [source["unknown"]] if "unknown" in source else []
    missing = [token for token in needed if token not in ids]
    if missing:
        raise GraftError(
            f"{folder}: its vocabulary has no token {missing[0]}, which a {family} example needs. The tokenizer "
            f"files of another model? Expected those that came with the weights"
        )
    facts = {role: tuple(ids[token] for token in names) for role, names in wanted.items()}
    if source.pop("no_start", False):
        facts["start"] = ()
    # Padding is masked, so where the vocabulary has no token for it, any will do.
    facts["pad"] = ids.get(tokens.get("pad"), ids.get(tokens.get("eos"), 0))
    return TextPreprocess(
        tokenizer=build_tokenizer(source, ids.get(tokens.get("unk"))),
        identity=identity_of(source, facts),
        max_length=max_length,
        segments=rules.get("segments", False),
        sequence_length=min(SEQUENCE_LENGTH, max_length),
        **facts,
    )


def build_tokenizer(source: dict, unknown: int | None):
    """The graph of `read_source`'s dict."""
    arguments = {name: value for name, value in source.items() if name != "kind"}
    if source["kind"] == "word pieces":
        return WordPieces(**arguments)
    if source["kind"] == "sentence pieces":
        return SentencePieces(**arguments)
    return BytePairs(**arguments, unknown=unknown)


def identity_of(source: dict, facts: dict) -> str:
    """SHA-256 of everything that the tokens of an example depend on."""
    known = {**source, **facts, "rules": RULES}
    text = json.dumps(known, sort_keys=True, default=lambda data: hashlib.sha256(data).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()


def read_source(folder: pathlib.Path, family: str) -> dict:
    """What the files say: `kind`, the arguments of its class, `tokens` (role -> token) and `ids` (token -> id)."""
    files = folder / "assets" / "tokenizer"
    if files.is_dir():  # a KerasHub preset
        settings = preset_settings(folder)
        names = {"vocabulary": "vocabulary.json", "words": "vocabulary.txt"}
    else:
        files, settings = folder, hub_settings(folder)
        names = {"vocabulary": "vocab.json", "words": "vocab.txt"}
    tokens = {**FAMILIES[family]["tokens"], **settings["tokens"]}
    sentence = next((files / name for name in SENTENCE_FILES if (files / name).is_file()), None)
    if sentence is not None:
        source = sentence_source(sentence.read_bytes(), family, settings)
    elif (files / names["words"]).is_file():
        words = (files / names["words"]).read_text("utf-8").split("\n")
        source = word_source([word.rstrip("\r") for word in words[: -1 if words[-1] == "" else None]], tokens, settings)
    elif (files / names["vocabulary"]).is_file() and (files / "merges.txt").is_file():
        vocabulary = json.loads((files / names["vocabulary"]).read_text("utf-8"))
        source = byte_source(vocabulary, read_merges(files / "merges.txt"), family, settings)
    elif (folder / "tokenizer.json").is_file() and files == folder:
        source = read_fast_tokenizer(folder / "tokenizer.json", family, tokens.get("unk"))
    else:
        raise GraftError(
            f"{files}: no tokenizer files. Expected {names['words']}, {names['vocabulary']} with merges.txt, "
            f"or one of {', '.join(SENTENCE_FILES)}" + (", or tokenizer.json" if files == folder else "")
        )
    if family == "llama" and source["kind"] == "byte pairs":
        tokens = {**LLAMA3_TOKENS, **settings["tokens"]}
    if family == "llama" and settings.get("add_bos_token") is False:
        source["no_start"] = True
    source["ids"] = {**settings["added"], **source["ids"]}
    return {**source, "tokens": tokens}


def word_source(words: list[str], tokens: dict, settings: dict) -> dict:
    """Word pieces: a vocabulary, a token a line, in the order of ids."""
    return {
        "kind": "word pieces",
        "vocabulary": words,
        "lowercase": settings["lowercase"],
        "strip_accents": settings["strip_accents"],
        "split_ideographs": settings["split_ideographs"],
        "unknown": tokens["unk"],
        "ids": {word: number for number, word in enumerate(words)},
    }


def byte_source(vocabulary: dict, merges: list, family: str, settings: dict) -> dict:
    """Byte pairs: a vocabulary in JSON, and merges."""
    return {
        "kind": "byte pairs",
        "vocabulary": vocabulary,
        "merges": merges,
        "pattern": "llama3" if family == "llama" else "gpt2",
        "prefix_space": settings["prefix_space"],
        "whole_words_first": family == "llama",
        "ids": vocabulary,
    }


def sentence_source(model: bytes, family: str, settings: dict) -> dict:
    """Sentence pieces: a model file. XLM-R's ids are shifted, and its special ones are not in the file.

    The rules before the model are those of transformers' AlbertTokenizer, DebertaV2Tokenizer and
    LlamaTokenizer.
    """
    ids = pieces_of(model)
    if family == "xlmr":
        special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        ids = {**{piece: number + 1 for piece, number in ids.items()}, **special}
    rules = []
    if family == "albert" and not settings["preset"]:
        rules = ["quotes", "single spaces"]
        rules += [] if settings["keep_accents"] else ["decompose", "no marks"]
        rules += ["lowercase"] if settings["lowercase"] else []
    if family == "deberta" and not settings["preset"]:
        rules = ["lowercase"] if settings["uncased"] else []
        rules += ["fewer spaces", "compose", "no spaces behind"]
    if family == "llama" and not settings["preset"]:
        rules = ["no first space"]
    return {
        "kind": "sentence pieces",
        "model": model,
        "shifted": family == "xlmr",
        "rules": rules,
        "ids": ids,
    }


def read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """The lines of merges.txt: two tokens each; a first line that gives the format's version is none."""
    lines = path.read_text("utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [tuple(line.rstrip("\r").split(" ")) for line in lines if line.count(" ") == 1]


def preset_settings(folder: pathlib.Path) -> dict:
    """Settings of a KerasHub preset: the arguments of its tokenizer class."""
    path = folder / "tokenizer.json"
    config = read_json(path)["config"] if path.is_file() else {}
    names = {"bos": config.get("bos_token"), "eos": config.get("eos_token"), "unk": config.get("oov_token")}
    return {
        "preset": True,
        "lowercase": bool(config.get("lowercase", False)),
        "strip_accents": bool(config.get("strip_accents", config.get("lowercase", False))),
        "split_ideographs": bool(config.get("split_on_cjk", True)),
        "prefix_space": bool(config.get("add_prefix_space", False)),
        "tokens": {role: name for role, name in names.items() if name},
        "added": {},
    }


def hub_settings(folder: pathlib.Path) -> dict:
    """Settings of a Hugging Face folder; what its files do not say is transformers' own default."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_json(folder / name)
    if config.get("split_by_punct"):
        raise GraftError(f"{folder}: tokenizer_config.json says split_by_punct, which Graft does not know")
    names = {}
    for role in ("cls", "sep", "pad", "unk", "bos", "eos"):
        token = config.get(f"{role}_token")
        names[role] = token.get("content") if isinstance(token, dict) else token
    added = {}
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
    added |= {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
    return {
        "preset": False,
        "lowercase": bool(config.get("do_lower_case", True)),
        "strip_accents": config.get("strip_accents"),
        "split_ideographs": bool(config.get("tokenize_chinese_chars", True)),
        "uncased": bool(config.get("do_lower_case", False)),  # unlike `lowercase`, where nothing is said it is cased
        "keep_accents": bool(config.get("keep_accents", False)),
        "prefix_space": bool(config.get("add_prefix_space", False)),
        "add_bos_token": config.get("add_bos_token"),
        "tokens": {role: name for role, name in names.items() if name},
        "added": added,
    }
