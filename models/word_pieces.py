"""Word pieces (BERT and its relatives) and sentence pieces (T5, Llama 2, ALBERT, ...) as graphs of TF-Text's ops.

Both equal transformers' fast tokenizers, but that special tokens in a text are text: nobody who writes "[SEP]" into
a form can end a sentence for the model.
"""

from __future__ import annotations

import tensorflow as tf
import tensorflow_text as tf_text

from models.byte_pairs import SPACE, ZERO

LONGEST_WORD = 100  # characters; BERT takes a longer word for an unknown one (google-research/bert: tokenization.py)
# Punctuation and CJK ideographs are words of one character each (the same file, _is_punctuation, _is_chinese_char).
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"
IDEOGRAPH = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}"
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]"
)
# Control, format and private characters and U+FFFD, but no tabs and line ends: those are white space.
INVISIBLE = r"[\x{0}-\x{8}\x{b}\x{c}\x{e}-\x{1f}\x{7f}-\x{9f}\p{Cf}\p{Co}\x{fffd}]"
UNKNOWN_WORD = "\U0010ffff"  # no character, so in no vocabulary


class WordPieces(tf.Module):
    """Strings [n] of valid UTF-8 -> RaggedTensor [n, tokens] int32.

    Normalisation, words and pieces as in google-research/bert, tokenization.py.

    Args:
        vocabulary: tokens in the order of their ids.
        lowercase: the model is an uncased one.
        strip_accents: take accents off; None means as `lowercase` says.
        split_ideographs: CJK ideographs are words of one character each.
        unknown, suffix: the vocabulary's own token for what it lacks, and its mark of a piece inside a word.
    """

    def __init__(
        self,
        vocabulary: list[str],
        lowercase: bool,
        strip_accents: bool | None = None,
        split_ideographs: bool = True,
        unknown: str = "[UNK]",
        suffix: str = "##",
    ):
        super().__init__(name="word_pieces")
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        self.kept = f"{PUNCTUATION}|{IDEOGRAPH}" if split_ideographs else PUNCTUATION
        self.pieces = tf_text.FastWordpieceTokenizer(
            vocab=vocabulary,
            suffix_indicator=suffix,
            unknown_token=unknown,
            max_bytes_per_word=4 * LONGEST_WORD,
            token_out_type=tf.int32,
            no_pretokenization=True,
        )

    def __call__(self, texts, limit: int | None = None) -> tf.RaggedTensor:
        """Texts [n] -> token ids; with `limit` at least the first so many of each text: a word is at least one."""
        texts = tf.strings.regex_replace(texts, INVISIBLE, "")
        if self.strip_accents:
            texts = tf.strings.regex_replace(tf_text.normalize_utf8(texts, "NFD"), r"\p{Mn}", "")
        if self.lowercase:
            texts = lower(texts)
        words = tf_text.regex_split(texts, f"[{SPACE}]+|{self.kept}", self.kept)
        if limit is not None:
            words = words[:, :limit]
        too_long = tf.strings.length(words.flat_values, "UTF8_CHAR") > LONGEST_WORD
        words = words.with_flat_values(tf.where(too_long, UNKNOWN_WORD, words.flat_values))
        return self.pieces.tokenize(words).merge_dims(1, 2)


class SentencePieces(tf.Module):
    """Strings [n] of valid UTF-8 -> RaggedTensor [n, tokens] int32, by a sentencepiece model.

    Args:
        model: the file's bytes.
        shifted: ids are one more than the model's own, and 3 for an unknown piece, as in fairseq and XLM-R.
        rules: names of TEXT_RULES: what is done to a text before the model sees it, in this order.
    """

    def __init__(self, model: bytes, shifted: bool = False, rules: tuple[str, ...] = ()):
        super().__init__(name="sentence_pieces")
        self.shifted, self.rules = shifted, tuple(rules)
        self.pieces = tf_text.SentencepieceTokenizer(model, out_type=tf.int32)

    def __call__(self, texts, limit: int | None = None) -> tf.RaggedTensor:
        """Texts [n] -> token ids. All of them, whatever the limit: the pieces of a text depend on all of it."""
        for name in self.rules:
            texts = TEXT_RULES[name](texts)
        tokens = self.pieces.tokenize(texts)
        if self.shifted:
            return tokens.with_flat_values(tf.where(tokens.flat_values == 0, 3, tokens.flat_values + 1))
        return tokens


def lower(texts):
    """Lower case of each character by itself, in every language alike.

    ICU looks at a sigma's neighbours, and in a Turkish or Lithuanian environment at the dots of an i: those are
    replaced first, so that a server answers as the training machine does.
    """
    texts = tf.strings.lower(texts)  # ASCII only
    texts = tf.strings.regex_replace(texts, "Σ", "σ")
    texts = tf.strings.regex_replace(texts, "İ", "i\u0307")
    texts = tf.strings.regex_replace(texts, r"\x00", ZERO)  # the op would end the text there
    return tf.strings.regex_replace(tf.strings.lower(texts, encoding="utf-8"), ZERO, "\0")


# name -> texts [n] string to texts [n] string
TEXT_RULES = {
    "quotes": lambda texts: tf.strings.regex_replace(texts, "``|''", '"'),
    "single spaces": lambda texts: tf.strings.strip(tf.strings.regex_replace(texts, f"[{SPACE}]+", " ")),
    "fewer spaces": lambda texts: tf.strings.regex_replace(texts, rf"[{SPACE}]{{2,}}|[\n\r\t]", " "),
    "no spaces behind": lambda texts: tf.strings.regex_replace(texts, f"[{SPACE}]+$", ""),
    # The model puts a space before every text; transformers' LlamaTokenizer only before one that has none.
    "no first space": lambda texts: tf.strings.regex_replace(texts, "(?s)^ (.)", r"\1"),
    "compose": lambda texts: tf_text.normalize_utf8(texts, "NFC"),
    "decompose": lambda texts: tf_text.normalize_utf8(texts, "NFKD"),
    "no marks": lambda texts: tf.strings.regex_replace(texts, r"\p{M}", ""),
    "lowercase": lower,
}
