"""Texts of a table as token ids, in parts by length: a short text is never padded to the length of a long one."""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import tensorflow as tf

from models.backbone import TextPreprocess
from models.classifier import Classifier
from models.text_inputs import encoder_inputs, read_texts, token_counts, tokenize

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens; longer ones: the longest that is kept
SMALLEST_PART = 8  # texts; fewer are padded to the next longer part: each part makes a batch that is not full
AT_ONCE = 1024  # texts per call of the tokenizer


def texts_of(table: pa.Table) -> list[list[str]]:
    """The texts of a table: one list, or two where its examples are pairs."""
    return [table[name].to_pylist() for name in ("text", "text_b") if name in table.column_names]


def token_parts(
    table: pa.Table, preprocess: TextPreprocess | None, one_length: bool = False
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """A table in parts of about equal length: for each its rows [m], and the encoder's inputs [m, length] int32.

    one_length: all in one part, of the longest length: for a TPU, which compiles a program for each.

    For a model that takes strings (preprocess None) one part: the strings [n].
    """
    if preprocess is None:
        (texts,) = texts_of(table)
        return [(np.arange(len(texts)), [np.array([text.encode() for text in texts], object)])]
    tokens, segments = [], []
    run = traced(tokenize, preprocess, "text_b" in table.column_names)
    for texts in batches_of(table):
        some, their_segments = run(*texts)
        tokens.append(some)
        segments.append(their_segments)
    tokens, segments = tf.concat(tokens, 0), tf.concat(segments, 0)
    counts = tokens.row_lengths().numpy()
    longest = int(counts.max())
    steps = np.array([*(length for length in LENGTHS if length < longest), longest])
    if one_length:
        steps = np.array([preprocess.sequence_length])
    part_of = np.searchsorted(steps, counts)
    for part in range(len(steps) - 1):
        if 0 < (part_of == part).sum() < SMALLEST_PART:
            part_of[part_of == part] = part + 1
    found = []
    for part in np.unique(part_of):
        rows = np.flatnonzero(part_of == part)
        chosen = [tf.gather(values, rows) for values in (tokens, segments)]
        arrays = encoder_inputs(*chosen, preprocess, int(steps[part]))
        found.append((rows, [array.numpy() for array in arrays]))
    return found


def truncation_warning(splits, preprocess: TextPreprocess | None) -> list[str]:
    """What to tell the user of texts that are longer than `preprocess.sequence_length`: one sentence, or none."""
    if preprocess is None:
        return []
    count = traced(token_counts, preprocess, "text_b" in splits.train.column_names)
    counts = np.concatenate([count(*texts).numpy() for table in splits for texts in batches_of(table)])
    longer = counts > preprocess.sequence_length
    if not longer.any():
        return []
    return [
        f"{longer.mean():.1%} of examples lose text at {preprocess.sequence_length} tokens (half of all have up to "
        f"{np.median(counts):.0f}, the longest has {counts.max():,}). --sequence-length keeps more."
    ]


@functools.lru_cache(maxsize=8)  # tracing takes longer than the tokens of a small set
def traced(function, preprocess: TextPreprocess, pairs: bool):
    """`function(texts, preprocess, second)` of models/text_inputs.py as a graph, of one text or of `pairs`."""
    texts = [tf.TensorSpec([None], tf.string)] * (1 + pairs)
    return tf.function(
        lambda *texts: function(texts[0], preprocess, *texts[1:]), input_signature=texts, autograph=False
    )


def text_predictor(model: Classifier, preprocess: TextPreprocess | None, batch_size: int):
    """A function: table -> logits [n, classes] float32, from the strings through the whole model as it is served."""

    @tf.function(reduce_retracing=True, autograph=False)
    def predict(*texts):
        return model(read_texts(texts[0], preprocess, *texts[1:]), training=False)

    def logits_of(table: pa.Table) -> np.ndarray:
        logits = [predict(*texts).numpy() for texts in batches_of(table, batch_size)]
        return np.concatenate([np.zeros((0, model.head.units), np.float32), *logits])

    return logits_of


def batches_of(table: pa.Table, size: int = AT_ONCE):
    """Yield the texts of a table in batches: a tuple of one or two string tensors [b]."""
    columns = texts_of(table)
    for start in range(0, table.num_rows, size):
        yield tuple(tf.constant(texts[start : start + size]) for texts in columns)
