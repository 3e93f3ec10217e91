"""Strings -> encoder input: the only such code. tf.data runs it in training, the SavedModel in serving.

Every string is answered: invalid UTF-8 is replaced by U+FFFD, an empty text is its special tokens, and one without
any is a single padding token that counts as real, so that no row is empty.
"""

from __future__ import annotations

import tensorflow as tf

from models.backbone import TextPreprocess


def tokenize(texts, preprocess: TextPreprocess, second=None) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
    """Texts [n] string -> token ids and segment ids, both RaggedTensor [n, tokens] int32, special tokens included.

    At most `preprocess.sequence_length` tokens of an example are kept. Of a pair the first text keeps its tokens
    first and `second` [n] gets what room is left (KerasHub's "waterfall"): the op that would shorten both by turns is
    missing in TF Serving up to 2.19.
    """
    room = max(preprocess.sequence_length - special_count(preprocess, second is not None), 0)
    first = text_tokens(texts, preprocess, room)[:, :room]
    if second is None:
        return pack(preprocess, first)
    rest = text_tokens(second, preprocess, room)
    kept = tf.minimum(rest.row_lengths(), room - first.row_lengths())
    rest = tf.ragged.boolean_mask(rest, tf.ragged.range(rest.row_lengths()) < kept[:, None])
    return pack(preprocess, first, rest)


def token_counts(texts, preprocess: TextPreprocess, second=None):
    """Tokens [n] int32 of each example before truncation, special ones included."""
    counts = text_tokens(texts, preprocess).row_lengths()
    if second is not None:
        counts += text_tokens(second, preprocess).row_lengths()
    counts += special_count(preprocess, second is not None)
    return tf.cast(tf.maximum(counts, 1), tf.int32)


def encoder_inputs(tokens: tf.RaggedTensor, segments: tf.RaggedTensor, preprocess: TextPreprocess, length) -> list:
    """Tokens of `tokenize` -> [n, length] int32 each: token ids, padding mask (1: real), segment ids where taken."""
    # A length that is known makes a shape that is.
    shape = [None, length] if isinstance(length, int) else tf.stack([tokens.nrows(), tf.cast(length, tf.int64)])
    mask = tf.ones_like(tokens).to_tensor(0, shape=shape)
    inputs = [tokens.to_tensor(preprocess.pad, shape=shape), mask]
    return [*inputs, segments.to_tensor(0, shape=shape)] if preprocess.segments else inputs


def read_texts(texts, preprocess: TextPreprocess | None, second=None):
    """Texts [n] string -> `encoder_inputs` padded to the longest of the batch; what the served graph runs.

    A model that takes strings (preprocess None) gets them as they are.
    """
    if preprocess is None:
        return texts
    tokens, segments = tokenize(texts, preprocess, second)
    return encoder_inputs(tokens, segments, preprocess, tokens.bounding_shape(1))


def text_tokens(texts, preprocess: TextPreprocess, limit: int | None = None) -> tf.RaggedTensor:
    """Texts [n] string -> RaggedTensor [n, tokens] int32; with `limit` at least the first so many of each."""
    texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
    return preprocess.tokenizer(texts, limit)


def special_count(preprocess: TextPreprocess, pair: bool) -> int:
    """How many special tokens an example has."""
    return len(preprocess.start) + len(preprocess.end) + (len(preprocess.separator) if pair else 0)


def pack(preprocess: TextPreprocess, first, second=None) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
    """Put special tokens around the tokens of one text or two; return token ids and segment ids."""
    count = first.nrows()

    def special(ids):
        return tf.RaggedTensor.from_tensor(tf.tile(tf.constant([ids], tf.int32, [1, len(ids)]), [count, 1]))

    parts = [special(preprocess.start), first]
    if second is None:
        parts.append(special(preprocess.end))
        tokens = tf.concat(parts, 1)
        segments = tf.zeros_like(tokens)
    else:
        parts.append(special(preprocess.separator))
        ahead, behind = tf.concat(parts, 1), tf.concat([second, special(preprocess.end)], 1)
        tokens = tf.concat([ahead, behind], 1)
        segments = tf.concat([tf.zeros_like(ahead), tf.ones_like(behind)], 1)
    lent = tf.RaggedTensor.from_row_lengths(
        tf.fill([tf.reduce_sum(tf.cast(tokens.row_lengths() == 0, tf.int32))], preprocess.pad),
        tf.cast(tokens.row_lengths() == 0, tf.int64),
    )
    return tf.concat([tokens, lent], 1), tf.concat([segments, tf.zeros_like(lent)], 1)
