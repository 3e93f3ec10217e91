"""Frozen parts as graphs of constants: the model's own numbers, as it was when they were made."""

import numpy as np
import pytest
import tensorflow as tf

from models.backbone import load_backbone
from models.classifier import run_encoder
from models.frozen import frozen_function
from models.split import split


@pytest.mark.parametrize("preset", ["tiny_preset", "tiny_resnet_v2_preset", "tiny_mobilenet_preset", "tiny_vit_preset"])
def test_it_gives_what_the_model_gives(preset, request):
    backbone = load_backbone(str(request.getfixturevalue(preset)))
    height, width = backbone.preprocess.image_size
    images = tf.random.stateless_normal([3, height, width, 3], [0, 0])
    prefix, suffix = split(backbone, 1)
    below = frozen_function(lambda x: run_encoder(prefix, x, False), [(images.shape[1:], "float32")])
    crossing = [(tensor.shape[1:], "float32") for tensor in below(images)]
    above = frozen_function(lambda *x: run_encoder(suffix, list(x), False), crossing)
    (features,) = above(*below(images))
    np.testing.assert_allclose(features, run_encoder(backbone.encoder, images, False), rtol=1e-4, atol=1e-4)
    # As it was: a weight that changes later changes nothing.
    for weight in backbone.encoder.weights:
        weight.assign(tf.zeros_like(weight))
    np.testing.assert_array_equal(above(*below(images))[0], features)
