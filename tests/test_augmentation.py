"""Augmentation stays inside the image and varies with the seed alone."""

import numpy as np
import tensorflow as tf

from pipelines import augmentation


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
