"""Random changes to training images, stateless: each is a function of the image and a seed, nothing else.

Keras has RandAugment, MixUp, CutMix and RandomErasing layers, but they draw from seed generators (RandAugment even
where a seed is given), compute every operation for every image, and would mix in padding rows: hence our own.
"""

from __future__ import annotations

import math

import tensorflow as tf


def fold_in(seed, number: int):
    """Another seed [2] int32 from a seed and a number, one for each thing in this file that is drawn."""
    return tf.random.fold_in(seed, number)


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


def random_erasing(image, seed, probability: float):
    """With that probability, fill a random box with random pixels, 0 to 255. image: [height, width, 3] float32.

    Zhong et al. 2020 (arXiv 1708.04896), with their values: the box covers 2% to 40% of the image, height by width
    0.3 to 1/0.3, cut to fit where it would be longer than the image.
    """
    coin, area, shape, top, left = tf.unstack(tf.random.stateless_uniform([5], fold_in(seed, 1)))
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    area = (0.02 + (0.4 - 0.02) * area) * height * width
    shape = tf.exp((2.0 * shape - 1.0) * -math.log(0.3))  # as likely to be high as to be wide
    box_height = tf.minimum(tf.sqrt(area * shape), height)
    box_width = tf.minimum(tf.sqrt(area / shape), width)

    def erased():
        box = box_mask(image, top * (height - box_height), left * (width - box_width), box_height, box_width)
        noise = tf.random.stateless_uniform(tf.shape(image), fold_in(seed, 2), maxval=255.0)
        return tf.ensure_shape(image * (1.0 - box) + noise * box, image.shape)

    return tf.cond(coin < probability, erased, lambda: image)


def box_mask(image, top, left, height, width):
    """[height, width, 1] float32: 1 within a box given in pixels, else 0. image: [..., height, width, channels].

    To mix by: products with 0 and 1 are exact, and several times faster than tf.where.
    """
    rows = tf.range(tf.shape(image)[-3], dtype=tf.int32)[:, None]
    columns = tf.range(tf.shape(image)[-2], dtype=tf.int32)[None, :]
    top, left, bottom, right = (tf.cast(tf.round(x), tf.int32) for x in (top, left, top + height, left + width))
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return tf.cast(inside, tf.float32)[..., None]


# ---------------------------------------------------------------- RandAugment

OPERATIONS_PER_IMAGE = 2  # Cubuk et al. 2020 (arXiv 1909.13719), table 4: N = 2, M = 9 for ImageNet
MAGNITUDE = 9 / 30  # of the largest change of each operation below, as torchvision scales M


def rand_augment(image, seed):
    """Two random operations of RAND_AUGMENT, each at magnitude 9 of 30 in a random direction.

    Args:
        image: [height, width, 3] float32, 0 to 255; the result too.
        seed: [2] int32.
    """
    choices = tf.random.stateless_uniform([OPERATIONS_PER_IMAGE], fold_in(seed, 3), 0, len(RAND_AUGMENT), tf.int32)
    signs = tf.sign(tf.random.stateless_uniform([OPERATIONS_PER_IMAGE], fold_in(seed, 4), -1.0, 1.0))
    shape = image.shape

    def apply(image, drawn):
        choice, strength = drawn
        branches = [lambda op=op: tf.ensure_shape(op(image, strength), shape) for op in RAND_AUGMENT.values()]
        return tf.clip_by_value(tf.switch_case(choice, branches), 0.0, 255.0)

    # A loop in the graph: unrolled it would be twice as large, and start each epoch that much later.
    image = tf.clip_by_value(image, 0.0, 255.0)  # bicubic resizing overshoots
    return tf.foldl(apply, (choices, signs * MAGNITUDE), initializer=image)


def blend(other, image, strength):
    """Away from `other` or towards it by up to 0.9: what PIL's ImageEnhance does."""
    return other + (1.0 + 0.9 * strength) * (image - other)


def smoothed(image):
    """Each pixel averaged with its eight neighbours, itself five times: PIL's SMOOTH filter."""
    kernel = tf.constant([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13.0
    padded = tf.pad(image, [[1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    filters = tf.tile(kernel[..., None, None], [1, 1, 3, 1])
    return tf.nn.depthwise_conv2d(padded[None], filters, [1, 1, 1, 1], "VALID")[0]


def posterize(image, strength):
    """Keep the upper 8 bits less up to 4."""
    step = 2.0 ** tf.round(4.0 * tf.abs(strength))
    return tf.floor(image / step) * step


def solarize(image, strength):
    """Turn the brightest levels into their negative."""
    bright = tf.cast(image >= 255.0 * (1.0 - tf.abs(strength)), tf.float32)
    return image + bright * (255.0 - 2.0 * image)


def autocontrast(image):
    """Stretch each channel to 0 to 255; a channel of one value stays."""
    low, high = tf.reduce_min(image, (0, 1)), tf.reduce_max(image, (0, 1))
    low, factor = tf.where(high > low, low, 0.0), tf.where(high > low, tf.math.divide_no_nan(255.0, high - low), 1.0)
    return (image - low) * factor


def equalize(image):
    """Make each channel's histogram of 256 levels flat; a channel of one value stays."""

    def flattened(levels):
        cumulative = tf.cast(tf.cumsum(tf.math.bincount(levels, minlength=256)), tf.float32)
        lowest = cumulative[tf.reduce_min(levels)]
        table = tf.math.divide_no_nan(cumulative - lowest, cumulative[-1] - lowest) * 255.0
        return tf.gather(tf.where(cumulative[-1] > lowest, table, tf.range(256.0)), levels)

    levels = tf.cast(tf.round(image), tf.int32)
    return tf.stack([flattened(levels[..., channel]) for channel in range(3)], axis=-1)


def warp(image, matrix):
    """Output pixel (x, y), counted from the image's centre, shows input pixel matrix @ (x, y, 1); grey outside.

    Args:
        matrix: two rows of three scalars; shifts in pixels.
    """
    (a, b, shift_x), (c, d, shift_y) = matrix
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    x, y = (width - 1.0) / 2.0, (height - 1.0) / 2.0
    entries = [a, b, shift_x + x - a * x - b * y, c, d, shift_y + y - c * x - d * y, 0.0, 0.0]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack([tf.cast(entry, tf.float32) for entry in entries])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=128.0,  # as AutoAugment fills
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


def rotate(image, strength):
    angle = strength * (math.pi / 6)
    return warp(image, ((tf.cos(angle), -tf.sin(angle), 0.0), (tf.sin(angle), tf.cos(angle), 0.0)))


def side(image, axis: int):
    return tf.cast(tf.shape(image)[axis], tf.float32)


# (image, strength -1 to 1) -> image. The operations are the paper's; the largest changes are torchvision's: 0.9 of
# the enhancements, 4 bits, all levels, 0.45 of the side, 30 degrees, a shear of 0.3.
RAND_AUGMENT = {
    "identity": lambda image, strength: image,
    "brightness": lambda image, strength: blend(0.0, image, strength),
    "contrast": lambda image, strength: blend(tf.reduce_mean(tf.image.rgb_to_grayscale(image)), image, strength),
    "colour": lambda image, strength: blend(tf.image.rgb_to_grayscale(image), image, strength),
    "sharpness": lambda image, strength: blend(smoothed(image), image, strength),
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": lambda image, strength: autocontrast(image),
    "equalize": lambda image, strength: equalize(image),
    "translate_x": lambda image, strength: warp(image, ((1.0, 0.0, 0.45 * strength * side(image, 1)), (0.0, 1.0, 0.0))),
    "translate_y": lambda image, strength: warp(image, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.45 * strength * side(image, 0)))),
    "rotate": rotate,
    "shear_x": lambda image, strength: warp(image, ((1.0, 0.3 * strength, 0.0), (0.0, 1.0, 0.0))),
    "shear_y": lambda image, strength: warp(image, ((1.0, 0.0, 0.0), (0.3 * strength, 1.0, 0.0))),
}


# ---------------------------------------------------------------- mixing examples of a batch


def mix_batch(inputs, targets, weights, rows, seed, mixup: float, cutmix: float):
    """MixUp or CutMix of a batch, as `pipelines.data.dataset` makes it: each example with the next real one.

    MixUp (Zhang et al. 2018, arXiv 1710.09412) blends inputs: share * input + (1 - share) * partner. CutMix (Yun et
    al. 2019, arXiv 1905.04899) pastes a box of the partner, of area 1 - share. The share is one per batch, from
    Beta(A, A); where both are on, a fair coin picks one for the batch. Targets and weights are shared out so that the
    loss is exactly share * loss of the own target + (1 - share) * loss of the partner's, each with its own weight.

    Args:
        inputs: [b, height, width, channels] float32; for MixUp alone of any shape.
        targets: [b, classes] float32. weights: [b] float32. rows: [b] int32, -1 for padding, which stays out and last.
        seed: [2] int32, of the batch.
        mixup, cutmix: A of Beta(A, A), 0 for off; not both 0.
    """
    places = tf.range(tf.shape(rows)[0])
    real = tf.math.count_nonzero(rows >= 0, dtype=tf.int32)
    partners = tf.where(places < real, (places + 1) % tf.maximum(real, 1), places)

    def blended():
        share = beta(mixup, fold_in(seed, 5))
        return share * inputs + (1.0 - share) * tf.gather(inputs, partners), share

    def boxed():
        height, width = tf.unstack(tf.cast(tf.shape(inputs)[1:3], tf.float32))
        side_share = tf.sqrt(1.0 - beta(cutmix, fold_in(seed, 6)))
        y, x = tf.unstack(tf.random.stateless_uniform([2], fold_in(seed, 7)))  # the centre: a box may hang over
        top, left = (y - side_share / 2.0) * height, (x - side_share / 2.0) * width
        box = box_mask(inputs, top, left, side_share * height, side_share * width)
        return inputs * (1.0 - box) + tf.gather(inputs, partners) * box, 1.0 - tf.reduce_mean(box)

    if mixup and cutmix:
        mixed, share = tf.cond(tf.random.stateless_uniform([], fold_in(seed, 8)) < 0.5, blended, boxed)
    else:
        mixed, share = blended() if mixup else boxed()
    own, other = share * weights, (1.0 - share) * tf.gather(weights, partners)
    shared = own[:, None] * targets + other[:, None] * tf.gather(targets, partners)
    mixed_weights = own + other
    return tf.ensure_shape(mixed, inputs.shape), tf.math.divide_no_nan(shared, mixed_weights[:, None]), mixed_weights


def beta(concentration: float, seed):
    """A float32 from Beta(A, A), as the share of one of two gamma variates; 0 where both underflow (A below 0.1)."""
    first, second = tf.unstack(tf.random.stateless_gamma([2], seed, concentration))
    return tf.math.divide_no_nan(first, first + second)
