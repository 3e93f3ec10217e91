"""Cutting a backbone: suffix of prefix is the whole, at every block of every family, gradients included."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.backbone import Backbone, Block, ImagePreprocess, load_backbone
from models.classifier import run_encoder
from models.split import between, split
from tests.conftest import tiny_backbone

PRESETS = ("tiny_preset", "tiny_resnet_preset", "tiny_resnet_v2_preset", "tiny_mobilenet_preset", "tiny_vit_preset")


def check_every_cut(backbone, inputs) -> int:
    """Assert that each cut is exact, gradients included; how many there were."""
    for block in backbone.blocks:
        for layer in block.layers:
            layer.trainable = True
    weights = [weight.value for weight in backbone.encoder.trainable_weights]
    with tf.GradientTape() as tape:
        whole = run_encoder(backbone.encoder, inputs, training=False)
        loss = tf.reduce_mean(whole**2)
    expected = dict(zip(map(id, weights), tape.gradient(loss, weights)))
    lower = None  # the prefix of the cut below and what crosses there
    for cut in range(1, len(backbone.blocks)):
        prefix, suffix = split(backbone, cut)
        crossing = run_encoder(prefix, inputs, training=False)
        if lower:
            joined = run_encoder(between(lower[0], prefix), lower[1], training=False)
            for found, tensor in zip(tf.nest.flatten(joined), tf.nest.flatten(crossing), strict=True):
                np.testing.assert_array_equal(found, tensor)
        lower = prefix, crossing
        above = [weight.value for block in backbone.blocks[cut:] for weight in block.weights if weight.trainable]
        assert {id(weight.value) for weight in suffix.trainable_weights} == set(map(id, above))
        with tf.GradientTape() as tape:
            joined = run_encoder(suffix, crossing, training=False)
            loss = tf.reduce_mean(joined**2)
        np.testing.assert_array_equal(joined, whole)
        for weight, gradient in zip(above, tape.gradient(loss, above)):
            if gradient is None or expected[id(weight)] is None:
                assert gradient is expected[id(weight)] is None
            else:
                np.testing.assert_allclose(gradient, expected[id(weight)], rtol=1e-5, atol=1e-7)
    return cut


@pytest.mark.parametrize("preset", PRESETS)
def test_every_cut_of_every_family_is_exact(preset, request):
    backbone = load_backbone(str(request.getfixturevalue(preset)))
    height, width = backbone.preprocess.image_size
    inputs = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype("float32")
    assert check_every_cut(backbone, tf.constant(inputs)) == len(backbone.blocks) - 1


def test_several_tensors_cross_a_cut_masks_and_inputs_among_them():
    tokens, mask = keras.Input((6, 4), name="tokens"), keras.Input((6,), name="mask")
    first, second, third = (keras.layers.Dense(4, activation="tanh", name=name) for name in ("one", "two", "three"))
    bias = keras.layers.Dense(4, name="bias")
    low = first(tokens)
    position = bias(low)  # computed low, used at the very top
    middle = second(low) * keras.ops.expand_dims(mask, -1)
    top = third(middle + low + position) * keras.ops.expand_dims(mask, -1)
    backbone = Backbone(
        name="masked",
        encoder=keras.Model([tokens, mask], top),
        preprocess=ImagePreprocess((1, 1)),
        blocks=[Block("low", (first, bias)), Block("middle", (second,)), Block("top", (third,))],
        feature_size=4,
        pooling="tokens",
    )
    random = np.random.default_rng(0)
    inputs = [tf.constant(random.normal(size=(2, 6, 4)), tf.float32), tf.constant(random.random((2, 6)), tf.float32)]
    assert check_every_cut(backbone, inputs) == 2
    prefix, _ = split(backbone, 1)
    assert len(prefix.outputs) == 4  # low, position, and the mask twice, spread over channels


def test_training_the_suffix_changes_the_backbone():
    backbone = tiny_backbone()
    prefix, suffix = split(backbone, 2)
    inputs = tf.random.stateless_normal([2, 16, 16, 3], [0, 0])
    before = run_encoder(backbone.encoder, inputs, training=False).numpy()
    kernel = suffix.trainable_weights[0]
    kernel.assign_add(keras.ops.ones_like(kernel) * 0.1)
    after = run_encoder(backbone.encoder, inputs, training=False).numpy()
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(suffix(prefix(inputs), training=False), after)


def test_frozen_layers_of_a_suffix_stay_in_inference_mode():
    backbone = tiny_backbone(dropout=0.5)
    prefix, suffix = split(backbone, 1)
    crossing = prefix(tf.random.stateless_normal([2, 16, 16, 3], [0, 0]))
    expected = run_encoder(suffix, crossing, training=False)
    for trainable in (False, True):
        for layer in suffix.layers:
            layer.trainable = trainable
        assert np.array_equal(run_encoder(suffix, crossing, training=True), expected) != trainable


def test_a_cut_that_is_not_there():
    with pytest.raises(ValueError, match="tiny can be cut before block 1 to 2, not 3"):
        split(tiny_backbone(), 3)
