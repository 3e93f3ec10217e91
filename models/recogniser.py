"""A backbone of speech and a head of characters: waveform -> a transcript, by connectionist temporal classification.

Graves et al. 2006: each frame gives a character or a blank; of a run of equal ones one is read, blanks are left out.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from models.backbone import Backbone
from models.classifier import Classifier

CERTAIN = -1e4  # logit of every character in the padding, where the blank has 0


@keras.saving.register_keras_serializable("graft")
class Recogniser(Classifier):
    """Backbone -> states of frames -> dropout -> one Dense layer giving float32 logits [batch, frames, n + 1].

    The last class is the blank. Padding behind a clip's own frames, where the states are zeros, is blank for certain.
    """

    def __init__(self, backbone: Backbone, characters: str, dropout: float = 0.1, seed: int = 0):
        """characters: the vocabulary; their places are the classes."""
        super().__init__(backbone, len(characters) + 1, dropout, seed)
        self.characters = characters

    def logits(self, features, training=False):
        """States [batch, frames, d], zeros in the padding -> logits."""
        real = tf.reduce_any(features != 0, axis=-1)[..., None]
        blank = tf.one_hot(len(self.characters), len(self.characters) + 1, on_value=0.0, off_value=CERTAIN)
        return tf.where(real, super().logits(features, training), blank)


def frame_counts(logits):
    """How many frames of logits [b, frames, n + 1] are no padding: [b] int32."""
    return tf.reduce_sum(tf.cast(tf.reduce_max(logits[..., :-1], axis=-1) > CERTAIN / 2, tf.int32), axis=1)


def ctc_losses(targets, logits):
    """Negative log-likelihood per character, in nats: [b] float32; 0 where a transcript is too long for its frames.

    targets: [b, longest], places in the vocabulary, -1 behind the end.
    """
    targets = tf.cast(targets, tf.int32)
    places = tf.where(targets >= 0)
    labels = tf.SparseTensor(places, tf.gather_nd(targets, places), tf.shape(targets, tf.int64))
    losses = tf.compat.v1.nn.ctc_loss(
        labels=labels,
        inputs=tf.cast(logits, tf.float32),
        sequence_length=frame_counts(logits),
        ignore_longer_outputs_than_inputs=True,
        time_major=False,
    )
    lengths = tf.reduce_sum(tf.cast(targets >= 0, tf.float32), axis=1)
    return losses / tf.maximum(lengths, 1.0)


def greedy(logits):
    """The most probable class of each frame, read as a transcript.

    Returns:
        Places in the vocabulary [b, any] int32, ragged; confidence [b] float32: the mean probability of the characters
        where they begin, and where there are none that of the blanks.
    """
    blank = tf.shape(logits)[-1] - 1
    best = tf.argmax(logits, axis=-1, output_type=tf.int32)  # [b, frames]
    before = tf.pad(best[:, :-1], [[0, 0], [1, 0]], constant_values=-1)
    begins = (best != blank) & (best != before)
    frames = tf.sequence_mask(frame_counts(logits), tf.shape(logits)[1])
    counted = tf.where(tf.reduce_any(begins, axis=1, keepdims=True), begins, frames)
    weights = tf.cast(counted, tf.float32)
    sure = tf.reduce_max(tf.nn.softmax(tf.cast(logits, tf.float32)), axis=-1)
    confidence = tf.math.divide_no_nan(tf.reduce_sum(sure * weights, axis=1), tf.reduce_sum(weights, axis=1))
    return tf.ragged.boolean_mask(best, begins), confidence


def transcripts(logits, characters: str):
    """Logits -> (transcript [b] string, confidence [b] float32): what `greedy` reads, without spaces at the ends."""
    places, confidence = greedy(logits)
    padded = places.to_tensor(len(characters))  # behind the end stands what adds nothing
    return tf.strings.strip(tf.strings.reduce_join(tf.gather([*characters, ""], padded), axis=1)), confidence
