"""Frozen means frozen: flags, BatchNorm, dropout, and the proof after a phase."""

import keras
import numpy as np
import pytest

from models import GraftError, freezing
from models.backbone import Backbone, Block
from models.classifier import Classifier
from tests.conftest import tiny_backbone


@pytest.fixture
def model():
    return Classifier(tiny_backbone(dropout=0.5), class_count=3, dropout=0.0)


def trainable_names(model):
    return {weight.path.split("/")[-2] for weight in model.trainable_weights}


def test_freeze_leaves_the_head_only(model):
    freezing.freeze(model)
    assert trainable_names(model) == {"head"}


def test_unfreeze_top_thaws_the_top_blocks_but_no_batch_norm(model):
    freezing.unfreeze_top(model, 2)
    assert trainable_names(model) == {"block1_conv", "block2_conv", "head"}
    freezing.unfreeze_top(model, 1)  # back up: what was thawed freezes again
    assert trainable_names(model) == {"block2_conv", "head"}
    freezing.unfreeze_top(model, 1, train_batch_norm=True)
    assert trainable_names(model) == {"block2_conv", "block2_bn", "head"}


def test_unfreeze_all_and_matching(model):
    freezing.unfreeze_all(model)
    assert trainable_names(model) == {"block0_conv", "block1_conv", "block2_conv", "head"}
    freezing.unfreeze_matching(model, [r"block0_"])
    assert trainable_names(model) == {"block0_conv", "head"}


def test_a_frozen_front_thaws_only_when_it_is_asked_for(model):
    model.backbone.frozen_front = 1
    freezing.unfreeze_all(model)
    assert trainable_names(model) == {"block1_conv", "block2_conv", "head"}
    freezing.unfreeze_top(model, 3)
    assert trainable_names(model) == {"block0_conv", "block1_conv", "block2_conv", "head"}


def test_a_pattern_that_matches_nothing_lists_the_layers(model):
    with pytest.raises(GraftError, match=r"'blok1' matches no layer of tiny.*block0_conv, block0_bn"):
        freezing.unfreeze_matching(model, ["blok1"])


@pytest.mark.parametrize("count", [0, 4, 99])
def test_a_depth_that_is_not_there(model, count):
    with pytest.raises(
        GraftError, match=f"Depth {count} is not possible: tiny has 3 blocks. Give head, a number from 1 to 3"
    ):
        freezing.unfreeze_top(model, count)


def test_frozen_layers_run_in_inference_mode_whatever_training_says(model):
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
    freezing.freeze(model)
    still = model(images, training=False).numpy()
    norms = [layer for layer in model.encoder.layers if isinstance(layer, keras.layers.BatchNormalization)]
    before = [norm.moving_mean.numpy() for norm in norms]
    np.testing.assert_array_equal(model(images, training=True).numpy(), still)  # no dropout, no batch statistics
    freezing.unfreeze_top(model, 1)
    assert np.abs(model(images, training=True).numpy() - still).max() > 1e-3  # the top block's dropout works
    for norm, value in zip(norms, before):
        np.testing.assert_array_equal(norm.moving_mean.numpy(), value)


def test_trainable_table(model):
    freezing.unfreeze_top(model, 1)
    rows = freezing.trainable_table(model, 1e-3, {"block0": 0.064, "block1": 0.08, "block2": 0.1, "head": 1.0})
    assert [row["name"] for row in rows] == ["block0", "block1", "block2", "head"]
    assert [row["trainable_parameters"] for row in rows] == [0, 0, 8 * 8 * 9 + 8, 8 * 3 + 3]
    assert [row["batch_norm"] for row in rows] == ["frozen", "frozen", "frozen", "none"]
    assert rows[2]["learning_rate"] == pytest.approx(1e-4) and rows[0]["learning_rate"] == 0


def test_check_moved_finds_a_frozen_weight_that_changed(model):
    freezing.freeze(model)
    before = freezing.checksums(model)
    model.head.kernel.assign(model.head.kernel + 1)
    assert freezing.check_moved(model, before) == {"frozen": 18, "trainable": 2, "still": 1}
    model.blocks[0].layers[0].kernel.assign(model.blocks[0].layers[0].kernel + 1e-7)
    with pytest.raises(RuntimeError, match="Frozen weights changed during training: .*block0/0"):
        freezing.check_moved(model, before)


def test_blocks_must_hold_every_weight_exactly_once():
    good = tiny_backbone()

    def rebuilt(blocks):
        return Backbone("x", good.encoder, good.preprocess, blocks, 8)

    with pytest.raises(ValueError, match=r"In no block: \['block0_conv/kernel'"):
        rebuilt(good.blocks[1:])
    with pytest.raises(ValueError, match=r"In several: \['block0_conv/kernel'"):
        rebuilt(good.blocks + [Block("again", good.blocks[0].layers)])
