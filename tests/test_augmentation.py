"""Augmentation varies with the seed alone, does what its names say, and mixes real examples only."""

import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipelines import augmentation
from pipelines.config import ImageConfig
from pipelines.data import dataset, image_loader, load_images
from pipelines.sources import find_images
from tests.conftest import tiny_backbone

STRENGTH = 0.3


@pytest.fixture(scope="module")
def picture():
    """A coloured, smooth picture with some noise, [40, 48, 3] float32 of whole numbers."""
    rows, columns = np.mgrid[0:40, 0:48]
    channels = np.stack([3 * rows + 40, 2 * columns + 80, 2 * rows + columns + 20], axis=-1)
    return (channels + np.random.default_rng(0).integers(0, 12, channels.shape)).astype(np.float32)


def test_random_crop_and_flip_stay_inside_and_vary():
    ramp = np.tile(np.arange(40, dtype=np.float32)[None, :, None], (30, 1, 3))
    widths, directions = set(), set()
    for index in range(40):
        crop = augmentation.random_crop(ramp, tf.constant([1, index])).numpy()
        assert 21 <= crop.shape[0] <= 30 and 28 <= crop.shape[1] <= 40
        assert crop.min() >= 0 and crop.max() <= 39
        widths.add(crop.shape[1])
        directions.add(bool(augmentation.random_flip(ramp, tf.constant([1, index])).numpy()[0, 0, 0] > 20))
    assert len(widths) > 5 and directions == {True, False}


def applied(name, picture, strength=STRENGTH):
    result = augmentation.RAND_AUGMENT[name](tf.constant(picture), tf.constant(strength))
    return np.clip(result, 0, 255)


def test_changes_of_colour_are_pils(picture):
    image = Image.fromarray(picture.astype(np.uint8))
    factor = 1 + 0.9 * STRENGTH
    references = {
        "identity": image,
        "brightness": ImageEnhance.Brightness(image).enhance(factor),
        "contrast": ImageEnhance.Contrast(image).enhance(factor),
        "colour": ImageEnhance.Color(image).enhance(factor),
        "posterize": ImageOps.posterize(image, 7),
        "solarize": ImageOps.solarize(image, math.ceil(255 * (1 - STRENGTH))),
        "autocontrast": ImageOps.autocontrast(image),
    }
    for name, reference in references.items():
        difference = np.abs(applied(name, picture) - np.asarray(reference, np.float32))
        assert difference.max() <= 1.6, name
    large = picture.repeat(8, axis=0).repeat(8, axis=1)  # PIL rounds, coarsely where there are few pixels
    equalized = np.asarray(ImageOps.equalize(Image.fromarray(large.astype(np.uint8))), np.float32)
    assert np.abs(applied("equalize", large) - equalized).max() <= 5
    sharp = np.asarray(ImageEnhance.Sharpness(image).enhance(factor), np.float32)
    assert np.abs(applied("sharpness", picture) - sharp)[1:-1, 1:-1].max() <= 1.6
    assert np.abs(sharp - np.asarray(image.filter(ImageFilter.SMOOTH))).max() > 3
    flat = np.full((8, 8, 3), 7.0, np.float32)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(applied(name, flat), flat)


def test_changes_of_shape_move_pixels_where_they_say(picture):
    shift = 0.45 * STRENGTH * 48
    moved = applied("translate_x", picture)
    columns = np.arange(48) + shift
    left, right = picture[:, columns[:41].astype(int)], picture[:, columns[:41].astype(int) + 1]
    np.testing.assert_allclose(moved[:, :41], left + (right - left) * (shift % 1), atol=0.1)
    assert (moved[:, 43:] == 128).all()  # grey comes in
    np.testing.assert_allclose(applied("translate_y", picture.transpose(1, 0, 2)), moved.transpose(1, 0, 2), atol=1e-3)
    upright = applied("rotate", picture[:, :40], 3.0)  # three times 30 degrees
    np.testing.assert_allclose(upright, np.rot90(picture[:, :40]), atol=0.1)
    sheared = applied("shear_x", picture, 1 / 0.3 / 19.5)  # one pixel at the edge rows, none in the middle
    np.testing.assert_allclose(sheared[0, 1:], picture[0, :-1], atol=0.1)
    np.testing.assert_allclose(sheared[-1, :-1], picture[-1, 1:], atol=0.1)
    np.testing.assert_allclose(
        applied("shear_y", picture.transpose(1, 0, 2), 1 / 0.3 / 19.5), sheared.transpose(1, 0, 2), atol=1e-3
    )


def test_rand_augment_and_erasing_are_functions_of_the_seed(picture):
    for change in (augmentation.rand_augment, lambda image, seed: augmentation.random_erasing(image, seed, 0.5)):
        results = [change(tf.constant(picture), tf.constant([1, index])).numpy() for index in range(24)]
        again = [change(tf.constant(picture), tf.constant([1, index])).numpy() for index in range(24)]
        for result, same in zip(results, again):
            np.testing.assert_array_equal(result, same)
            assert result.shape == picture.shape and result.min() >= 0 and result.max() <= 255
        changed = [not np.array_equal(result, picture) for result in results]
        assert 6 <= sum(changed) <= 24 and len({result.tobytes() for result in results}) > 0.8 * sum(changed)


def test_erased_boxes_have_the_papers_sizes(picture):
    shares = []
    for index in range(60):
        erased = augmentation.random_erasing(tf.constant(picture), tf.constant([0, index]), 1.0).numpy()
        rows, columns = np.nonzero((erased != picture).any(axis=-1))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert len(rows) > 0.95 * box  # one whole box
        shares.append(box / picture[..., 0].size)
    assert 0.01 < min(shares) < 0.1 and 0.3 < max(shares) < 0.45
    untouched = augmentation.random_erasing(tf.constant(picture), tf.constant([0, 0]), 0.0)
    np.testing.assert_array_equal(untouched, picture)


# ---- mixing examples


def batch(size=6, padding=2):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(size, 16, 20, 3)).astype(np.float32)
    inputs[size - padding :] = 1e6
    targets = np.eye(size, dtype=np.float32)
    weights = np.where(np.arange(size) < size - padding, 1 + np.arange(size), 0).astype(np.float32)
    rows = np.where(np.arange(size) < size - padding, np.arange(size), -1).astype(np.int32)
    return tuple(map(tf.constant, (inputs, targets, weights, rows)))


def test_mixup_blends_each_example_with_another_real_one():
    inputs, targets, weights, _ = (part.numpy() for part in batch())
    shares = []
    for index in range(20):
        mixed, mixed_targets, mixed_weights = (
            part.numpy() for part in augmentation.mix_batch(*batch(), tf.constant([0, index]), mixup=1.0, cutmix=0.0)
        )
        partners = [1, 2, 3, 0]
        share = float(mixed_targets[0, 0] * mixed_weights[0] / weights[0])
        shares.append(share)
        np.testing.assert_allclose(mixed[:4], share * inputs[:4] + (1 - share) * inputs[partners], atol=1e-5)
        # The loss, linear in targets, is the two losses, each with its weight.
        expected = share * weights[:4, None] * targets[:4] + (1 - share) * weights[partners, None] * targets[partners]
        np.testing.assert_allclose(mixed_targets[:4] * mixed_weights[:4, None], expected, atol=1e-5)
        np.testing.assert_allclose(mixed_targets[:4].sum(axis=1), 1, atol=1e-5)
        np.testing.assert_array_equal(mixed_weights[4:], 0)
        np.testing.assert_array_equal(mixed_targets[4:], 0)
        assert np.abs(mixed[:4]).max() < 100  # no padding came in
    assert min(shares) < 0.3 and max(shares) > 0.7


def test_cutmix_pastes_a_box_and_shares_labels_by_its_area():
    inputs = batch()[0].numpy()
    shares = []
    for index in range(20):
        mixed, targets, weights = (
            part.numpy() for part in augmentation.mix_batch(*batch(), tf.constant([0, index]), mixup=0.0, cutmix=1.0)
        )
        for place, partner in enumerate([1, 2, 3, 0]):
            pasted = (mixed[place] == inputs[partner]).all(axis=-1)
            assert (pasted | (mixed[place] == inputs[place]).all(axis=-1)).all()
            own, other = (1 - pasted.mean()) * (1 + place), pasted.mean() * (1 + partner)
            assert weights[place] == pytest.approx(own + other, abs=1e-5)
            assert targets[place, place] == pytest.approx(own / (own + other), abs=1e-5)
            shares.append(pasted.mean())
        np.testing.assert_array_equal(weights[4:], 0)
    assert min(shares) < 0.2 and max(shares) > 0.6


def test_with_both_each_batch_takes_one_by_a_coin_that_is_the_seeds():
    inputs, kinds = batch()[0].numpy(), []
    for index in range(20):
        mixed, again = (augmentation.mix_batch(*batch(), tf.constant([3, index]), 1.0, 1.0)[0].numpy() for _ in "ab")
        np.testing.assert_array_equal(mixed, again)
        kinds.append(bool(((mixed[0] == inputs[0]) | (mixed[0] == inputs[1])).all()))
    assert 4 <= sum(kinds) <= 16


def test_a_lone_real_example_and_small_concentrations():
    lone = batch(size=4, padding=3)
    mixed, targets, _ = augmentation.mix_batch(*lone, tf.constant([0, 0]), mixup=1.0, cutmix=0.0)
    np.testing.assert_allclose(mixed[0], lone[0][0], atol=1e-6)
    np.testing.assert_allclose(targets[0], lone[1][0], atol=1e-6)
    shares = [float(augmentation.beta(0.02, tf.constant([0, index]))) for index in range(100)]
    assert 25 <= sum(share > 0.5 for share in shares) <= 75 and np.isfinite(shares).all()
    shares = [float(augmentation.beta(1.0, tf.constant([0, index]))) for index in range(200)]
    np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.1)


def test_batches_are_functions_of_seed_and_epoch(png_folder):
    splits = load_images(find_images(str(png_folder)))
    load = image_loader(tiny_backbone().preprocess, 255, "flip-crop", 0.5)

    def batches(epoch, seed=0, **mixing):
        made = dataset(splits.train, load, class_count=3, batch_size=8, epoch=epoch, training=True, seed=seed, **mixing)
        return [part for whole in made.as_numpy_iterator() for part in whole]

    mixing = {"mixup": 0.4, "cutmix": 1.0}
    first = batches(1, **mixing)
    for one, same in zip(first, batches(1, **mixing)):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(first[0], batches(2, **mixing)[0])
    assert not np.array_equal(first[0], batches(1, seed=1, **mixing)[0])
    plain = batches(1)
    assert not np.array_equal(first[0], plain[0]) and np.array_equal(first[3], plain[3])
    assert first[0].shape == plain[0].shape and ((first[1] > 0).sum(axis=1) <= 2).all()
    assert sum(part.sum() for part in first[2::4]) == pytest.approx(splits.train.num_rows, rel=1e-5)


def test_off_by_default():
    options = ImageConfig().fine_tune
    assert (options.augmentation, options.mixup, options.cutmix, options.random_erasing) == ("flip-crop", 0, 0, 0)
