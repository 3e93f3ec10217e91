"""tokenizer.json of a Hugging Face folder -> the arguments of a tokenizer; sentencepiece models out of it too.

The format: huggingface/tokenizers. Only what the families of Graft use is read; anything else is refused by name,
since a rule left out would give other tokens than those the model was trained on.
"""

from __future__ import annotations

import base64
import pathlib

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from models import GraftError
from models.layouts import read_json
from models.word_pieces import LONGEST_WORD

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# A step of Unigram's tokenizer.json -> the rule of models/word_pieces.py; None: the sentencepiece model does it itself.
SENTENCE_RULES = {
    ("Precompiled", None): None,
    ("Metaspace", None): None,
    ("WhitespaceSplit", None): "single spaces",
    ("Lowercase", None): "lowercase",
    ("NFC", None): "compose",
    ("NFKD", None): "decompose",
    ("StripAccents", None): "no marks",
    ("Replace", "``"): "quotes",
    ("Replace", "''"): "quotes",
    ("Replace", " {2,}"): None,
    ("Replace", r"\s{2,}|[\n\r\t]"): "fewer spaces",
    ("Strip", None): "no spaces behind",
}


def read_fast_tokenizer(path: pathlib.Path, family: str, unknown: str | None) -> dict:
    """tokenizer.json -> `kind`, the arguments of its class, and `ids` (token -> id).

    Raises:
        GraftError: a model, a normalizer or a pre-tokenizer that Graft does not know.
    """
    content = read_json(path)
    model, added = content["model"], {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    kind = model.get("type") or ("WordPiece" if "continuing_subword_prefix" in model else "BPE")
    readers = {"WordPiece": read_word_pieces, "BPE": read_byte_pairs, "Unigram": read_unigram}
    if kind not in readers:
        raise GraftError(f"{path}: a tokenizer of the type {kind}; Graft reads {', '.join(readers)}")
    source = readers[kind](path, content)
    if kind == "WordPiece":
        source["unknown"] = model.get("unk_token", unknown)
    return {**source, "ids": {**added, **source["ids"]}}


def steps_of(part: dict | None, inner: str) -> list[dict]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for each in part[inner] for step in steps_of(each, inner)] if part["type"] == "Sequence" else [part]


def refuse(path: pathlib.Path, step: dict) -> None:
    raise GraftError(
        f"{path}: the step {step['type']} is set in a way that Graft does not know: {str(step)[:200]}. "
        f"Use a folder that has the original vocabulary files"
    )


def read_word_pieces(path: pathlib.Path, content: dict) -> dict:
    normalizers = steps_of(content.get("normalizer"), "normalizers")
    splits = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    for step in [*normalizers, *splits]:
        if step["type"] not in ("BertNormalizer", "BertPreTokenizer") or step.get("clean_text") is False:
            refuse(path, step)
    if len(normalizers) != 1 or len(splits) != 1:
        raise GraftError(f"{path}: word pieces without BertNormalizer and BertPreTokenizer, expected both")
    (rules,) = normalizers
    model = content["model"]
    if model.get("max_input_chars_per_word", LONGEST_WORD) != LONGEST_WORD:
        raise GraftError(f"{path}: words of up to {model['max_input_chars_per_word']} characters, expected 100")
    return {
        "kind": "word pieces",
        "vocabulary": sorted(model["vocab"], key=model["vocab"].get),
        "lowercase": rules["lowercase"],
        "strip_accents": rules.get("strip_accents"),
        "split_ideographs": rules["handle_chinese_chars"],
        "suffix": model["continuing_subword_prefix"],
        "ids": model["vocab"],
    }


def read_byte_pairs(path: pathlib.Path, content: dict) -> dict:
    model, pattern, prefix_space = content["model"], None, False
    for step in steps_of(content.get("normalizer"), "normalizers"):
        refuse(path, step)
    for step in steps_of(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            prefix_space = step["add_prefix_space"]
            pattern = "gpt2" if step.get("use_regex", True) else pattern
        elif step["type"] == "Split" and step["pattern"].get("Regex") in (GPT2_PATTERN, LLAMA3_PATTERN):
            pattern = "llama3" if step["pattern"]["Regex"] == LLAMA3_PATTERN else "gpt2"
        else:
            refuse(path, step)
    if pattern is None:
        raise GraftError(f"{path}: byte pairs that are not of bytes (no ByteLevel step): put tokenizer.model beside it")
    return {
        "kind": "byte pairs",
        "vocabulary": model["vocab"],
        "merges": [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]],
        "pattern": pattern,
        "prefix_space": prefix_space,
        "whole_words_first": bool(model.get("ignore_merges", False)),
        "ids": model["vocab"],
    }


def read_unigram(path: pathlib.Path, content: dict) -> dict:
    normalizers = steps_of(content.get("normalizer"), "normalizers")
    rules = []
    for step in [*normalizers, *steps_of(content.get("pre_tokenizer"), "pretokenizers")]:
        pattern = step.get("pattern", {})
        key = (step["type"], pattern.get("String") or pattern.get("Regex"))
        if key not in SENTENCE_RULES or step.get("strip_left"):
            refuse(path, step)
        rules.append(SENTENCE_RULES[key])
    rules = [rule for rule in dict.fromkeys(rules) if rule]
    charsmap = next((step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"), None)
    special = {token["content"] for token in content.get("added_tokens", []) if token["special"]}
    return {
        "kind": "sentence pieces",
        "model": unigram_model(content["model"], base64.b64decode(charsmap or ""), special),
        "rules": rules,
        "ids": {piece: number for number, (piece, _) in enumerate(content["model"]["vocab"])},
    }


def unigram_model(model: dict, charsmap: bytes, special: set[str]) -> bytes:
    """A sentencepiece model file (google/sentencepiece: sentencepiece_model.proto) of pieces with scores."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    for number, (piece, score) in enumerate(model["vocab"]):
        kind = kinds.CONTROL if piece in special else kinds.NORMAL
        proto.pieces.add(piece=piece, score=score, type=kinds.UNKNOWN if number == model["unk_id"] else kind)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.trainer_spec.unk_id = model["unk_id"]
    proto.normalizer_spec.precompiled_charsmap = charsmap
    return proto.SerializeToString()


def pieces_of(model: bytes) -> dict[str, int]:
    """Piece -> id of a sentencepiece model file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
