"""Byte-pair encoding as a graph of core ops and one of TF-Text, with tables that never grow.

KerasHub's tokenizer keeps every word it has ever seen in a MutableHashTable, which a server fills for as long
as it lives. Here the merges of all the words of a batch run at once, over flat arrays of token ids, and the only
tables are static: whole words that are one token, and pairs with their rank.

Byte-pair encoding: Sennrich et al. 2016, algorithm 1, over bytes as in GPT-2 (Radford et al. 2019, section 2.2).
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

LONGEST_WORD_BYTES = 1024  # a longer run without a break is cut there: its merges would take seconds
NO_RANK = np.iinfo(np.int32).max  # of a pair that is not in the table
# Two code points that are no characters (Unicode, section 23.7), so that texts do not hold them: BREAK is put where
# words must part, ZERO stands for the byte 0, at which RegexSplitWithOffsets would end the text.
BREAK, ZERO = "\U0010ffff", "\U0010fffe"
# White space as Unicode defines it (property White_Space); RE2's own \s is ASCII only.
BLANK = r"\t\x{b}\f \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"  # no line break
SPACE = rf"{BLANK}\r\n"
OTHER = rf"[^{SPACE}\p{{L}}\p{{N}}\x{{10ffff}}]"
# The published patterns end in `\s+(?!\S)|\s+`: of white space before a word all but the last character is a word of
# its own. RE2 cannot look ahead, so a BREAK is put before that last character; the rest of the pattern is as it was.
# name -> (white space of two characters or more and what follows, the words)
PATTERNS = {
    # GPT-2: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    "gpt2": (
        rf"([{SPACE}]+)([{SPACE}][^{SPACE}])",
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?{OTHER}+|[{SPACE}]+",
    ),
    # Llama 3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
    # |\s+(?!\S)|\s+
    "llama3": (
        rf"([{BLANK}]+)([{BLANK}][^{SPACE}])",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}\x{10ffff}]?\p{L}+|\p{N}{1,3}"
        rf"| ?{OTHER}+[\r\n]*|[{SPACE}]*[\r\n]+|[{SPACE}]+",
    ),
}


def byte_characters() -> list[str]:
    """The character that stands for each byte in vocabularies of GPT-2 and its relatives; 256 of them.

    Printable bytes of Latin-1 stand for themselves, the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


class BytePairs(tf.Module):
    """Strings [n] -> RaggedTensor [n, tokens] int32, in tf.data and in a served graph alike.

    A word longer than LONGEST_WORD_BYTES is cut there. Around such a cut the ids may differ from those of an
    implementation without a bound, which would merge across it.

    Args:
        vocabulary: token, written in `byte_characters`, -> id.
        merges: pairs of tokens, most important first.
        pattern: how a text parts into words, of PATTERNS.
        prefix_space: put a space before a text that does not start with one.
        whole_words_first: a word that is a token is that token, whatever the merges say (`ignore_merges`).
        unknown: id of a byte that the vocabulary lacks; None leaves such bytes out.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        pattern: str = "gpt2",
        prefix_space: bool = False,
        whole_words_first: bool = False,
        unknown: int | None = None,
    ):
        super().__init__(name="byte_pairs")
        self.before_word, self.words = PATTERNS[pattern]
        self.prefix_space, self.unknown = prefix_space, unknown
        characters = byte_characters()
        self.no_token = max(vocabulary.values()) + 1  # stands for a byte without a token: in no merge
        self.byte_ids = np.array([vocabulary.get(character, self.no_token) for character in characters], np.int32)
        self.may_be_empty = unknown is None and self.no_token in self.byte_ids  # a word, where bytes are left out
        known = [pair for pair in dict.fromkeys(merges) if {*pair, "".join(pair)} <= vocabulary.keys()]
        left, right, merged = (
            np.array([vocabulary[token] for token in tokens], np.int64)
            for tokens in ([a for a, _ in known], [b for _, b in known], [a + b for a, b in known])
        )
        self.merged = np.append(merged, 0).astype(np.int32)  # by rank
        # A table must not be empty; the added key is no pair of tokens.
        keys = np.append(left * (self.no_token + 1) + right, -1)
        self.ranks = static_table(keys, np.arange(len(keys)), NO_RANK)
        byte_of = {ord(character): byte for byte, character in enumerate(characters)}
        texts = {
            bytes(byte_of[ord(character)] for character in token): number
            for token, number in vocabulary.items()
            if all(ord(character) in byte_of for character in token)
        }
        self.longest_token = max(map(len, texts), default=1)  # bytes
        self.whole_words = None
        if whole_words_first:
            self.whole_words = static_table(np.array(list(texts), object), list(texts.values()), -1)

    def __call__(self, texts, limit: int | None = None) -> tf.RaggedTensor:
        """Texts [n] string of valid UTF-8 -> token ids; with `limit` at least the first so many of each text.

        A token has at most `longest_token` bytes, and a word at least one token: words behind the first `limit`
        ones, or behind `limit * longest_token` bytes, hold none of the first `limit` tokens and are not encoded.
        """
        words = self.split(texts)
        if limit is not None and not self.may_be_empty:
            lengths = tf.strings.length(words.flat_values)
            before = tf.cumsum(lengths, exclusive=True)
            before -= tf.repeat(tf.gather(tf.concat([before, [0]], 0), words.row_starts()), words.row_lengths())
            number = tf.ragged.range(words.row_lengths()).flat_values
            needed = (number < limit) & (before < limit * self.longest_token)
            words = tf.ragged.boolean_mask(words, words.with_flat_values(needed))
        distinct, place = tf.unique(words.flat_values)
        tokens = tf.gather(self.encode(distinct), place)  # [words, tokens]
        return tf.RaggedTensor.from_nested_row_splits(
            tokens.flat_values, [tf.gather(tokens.row_splits, words.row_splits)]
        )

    def split(self, texts) -> tf.RaggedTensor:
        """Texts [n] string -> words [n, words], which together are the text."""
        texts = tf.strings.regex_replace(texts, f"[{BREAK}{ZERO}]", "\ufffd")
        texts = tf.strings.regex_replace(texts, r"\x00", ZERO)
        if self.prefix_space:
            spaced = tf.strings.regex_full_match(texts, "(?s)( .*)?")
            texts = tf.where(spaced, texts, tf.strings.join([" ", texts]))
        texts = tf.strings.regex_replace(texts, self.before_word, rf"\1{BREAK}\2")
        words = tf_text.regex_split(texts, f"{self.words}|{BREAK}", f"(?s)[^{BREAK}].*")
        words = words.with_flat_values(tf.strings.regex_replace(words.flat_values, ZERO, "\0"))
        pieces = -(-tf.strings.length(words.flat_values) // LONGEST_WORD_BYTES)  # 1 for nearly all
        word = tf.repeat(tf.range(tf.size(pieces)), pieces)
        start = tf.ragged.range(pieces).flat_values * LONGEST_WORD_BYTES
        cut = tf.strings.substr(tf.gather(words.flat_values, word), start, tf.fill(tf.shape(start), LONGEST_WORD_BYTES))
        ends = tf.concat([[0], tf.cumsum(pieces)], 0)
        return tf.RaggedTensor.from_row_splits(cut, tf.cast(tf.gather(ends, words.row_splits), tf.int64))

    def encode(self, words) -> tf.RaggedTensor:
        """Distinct words [w] string -> RaggedTensor [w, tokens] int32."""
        tokens = self.merge(words) if self.whole_words is None else self.merge_others(words)
        lacking = tokens.flat_values == self.no_token
        if self.unknown is not None:
            return tokens.with_flat_values(tf.where(lacking, self.unknown, tokens.flat_values))
        return tf.ragged.boolean_mask(tokens, tokens.with_flat_values(~lacking))

    def merge_others(self, words) -> tf.RaggedTensor:
        """As `merge`, but for words that are tokens themselves."""
        whole = tf.cast(self.whole_words.lookup(words), tf.int32)
        is_whole = whole >= 0
        merged = self.merge(tf.boolean_mask(words, ~is_whole))
        tokens = tf.concat([tf.RaggedTensor.from_tensor(tf.boolean_mask(whole, is_whole)[:, None]), merged], 0)
        order = tf.concat([tf.where(is_whole), tf.where(~is_whole)], 0)  # back to that of `words`
        return tf.gather(tokens, tf.scatter_nd(order, tf.range(tf.size(words)), tf.shape(words, tf.int64)))

    def merge(self, words) -> tf.RaggedTensor:
        """Words [w] string -> RaggedTensor [w, tokens] int32, by merges alone.

        One round merges, in every word, all occurrences of its most important pair: there are as many rounds as
        the longest word has different merges. Arrays are flat: one item per token of any word, in order.
        """
        count = tf.size(words, tf.int64)
        lengths = tf.strings.length(words)
        data = tf.io.decode_raw(tf.strings.reduce_join(words), tf.uint8)
        ids = tf.gather(tf.constant(self.byte_ids), tf.cast(data, tf.int32))
        word = tf.repeat(tf.range(tf.size(words)), lengths)
        ranks = self.pair_ranks(ids, word, tf.range(tf.size(ids)))

        def one_round(ids, word, ranks):
            best = tf.math.unsorted_segment_min(ranks, word, tf.size(words))
            chosen = (ranks == tf.gather(best, word)) & (ranks < NO_RANK)
            chosen &= ~odd_in_run(chosen)  # of `aaa` the first two merge
            ids = tf.where(chosen, tf.gather(tf.constant(self.merged), tf.minimum(ranks, len(self.merged) - 1)), ids)
            after_chosen = tf.concat([[False], chosen], 0)[: tf.size(ids)]
            kept = tf.where(~after_chosen)[:, 0]
            ids, word, ranks, chosen = (tf.gather(values, kept) for values in (ids, word, ranks, chosen))
            # A merge changes the pair that it starts, and the one that it ends.
            changed = tf.where(chosen | tf.concat([chosen[1:], [False]], 0)[: tf.size(ids)])
            new = self.pair_ranks(ids, word, tf.cast(changed[:, 0], tf.int32))
            return ids, word, tf.tensor_scatter_nd_update(ranks, changed, new)

        ids, word, _ = tf.while_loop(
            lambda ids, word, ranks: tf.reduce_any(ranks < NO_RANK),
            one_round,
            [ids, word, ranks],
            shape_invariants=[tf.TensorShape([None])] * 3,
            parallel_iterations=1,
        )
        return tf.RaggedTensor.from_value_rowids(ids, tf.cast(word, tf.int64), count)

    def pair_ranks(self, ids, word, places):
        """Rank [p] int32 of the pairs that start at `places` [p]; NO_RANK at the end of a word."""
        following = tf.minimum(places + 1, tf.size(ids) - 1)
        left, right = (tf.cast(tf.gather(ids, place), tf.int64) for place in (places, following))
        inside = (places < following) & (tf.gather(word, places) == tf.gather(word, following))
        ranks = tf.cast(self.ranks.lookup(left * (self.no_token + 1) + right), tf.int32)
        return tf.where(inside, ranks, NO_RANK)


def odd_in_run(chosen):
    """Whether an item of a boolean vector is the second, fourth, ... of a run of true ones."""
    first = chosen & ~tf.concat([[False], chosen], 0)[: tf.size(chosen)]
    starts = tf.concat([[0], tf.cast(tf.where(first)[:, 0], tf.int32)], 0)
    distance = tf.range(tf.size(chosen)) - tf.gather(starts, tf.cumsum(tf.cast(first, tf.int32)))
    return chosen & (distance % 2 == 1)


def static_table(keys, values, default: int) -> tf.lookup.StaticHashTable:
    """A table that only its making writes to; values int64."""
    keys = tf.constant(keys, tf.string if np.asarray(keys).dtype == object else tf.int64)
    rows = tf.lookup.KeyValueTensorInitializer(keys, tf.constant(values, tf.int64))
    return tf.lookup.StaticHashTable(rows, tf.constant(default, tf.int64))
