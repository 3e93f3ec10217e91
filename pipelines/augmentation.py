"""Random changes to training images, stateless: each is a function of the image and a seed, nothing else."""

from __future__ import annotations

import tensorflow as tf


def random_crop(image, seed, smallest_share: float = 0.7):
    """Cut a random box whose sides are a random share, smallest_share to 1, of the image's; stateless.

    Args:
        image: [height, width, 3] float32.
        seed: [2] int32.
    """
    share, top, left = tf.unstack(tf.random.stateless_uniform([3], seed))
    size = tf.cast(tf.shape(image)[:2], tf.float32)
    box = tf.maximum(1.0, tf.round(size * (smallest_share + (1.0 - smallest_share) * share)))
    corner = tf.cast((size - box) * tf.stack([top, left]), tf.int32)
    return tf.image.crop_to_bounding_box(image, corner[0], corner[1], *tf.unstack(tf.cast(box, tf.int32)))


def random_flip(image, seed):
    """Mirror left to right, or not, by a stateless coin. image: [height, width, 3]; seed: [2] int32."""
    return tf.image.stateless_random_flip_left_right(image, seed + tf.constant([0, 1 << 30]))
