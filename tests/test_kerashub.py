"""KerasHub preset folders: the same features, the same preprocessing, ordered blocks."""

import json
import shutil

import keras_hub
import numpy as np
import pytest

from models import GraftError, inputs
from models.backbone import load_backbone
from models.classifier import Classifier


def test_blocks_hold_every_weight_in_order(tiny_preset):
    backbone = load_backbone(str(tiny_preset))
    assert [block.name for block in backbone.blocks] == ["stem", "block1a", "block2a", "block2b"]
    names = [layer.name for layer in backbone.blocks[-1].layers]
    assert "block2b_drop" in names and "top_conv" in names  # stochastic depth freezes with its block


def test_features_and_preprocessing_equal_kerashubs_own(tiny_preset):
    backbone = load_backbone(str(tiny_preset))
    images = np.random.default_rng(0).integers(0, 256, (3, 57, 40, 3)).astype("float32")
    converter = keras_hub.layers.ImageConverter.from_preset(str(tiny_preset))
    expected_input = converter(images)
    ours = inputs.scale_image(inputs.resize_image(images, backbone.preprocess), backbone.preprocess)
    scale = np.array(backbone.preprocess.deviation)
    assert np.abs((np.asarray(ours) - np.asarray(expected_input)) * scale).max() < 1  # levels of 255
    original = keras_hub.models.Backbone.from_preset(str(tiny_preset))
    expected = np.asarray(original(expected_input, training=False)).mean(axis=(1, 2))
    features = np.asarray(Classifier(backbone, 2).features(expected_input))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_foreign_or_damaged_folder_says_so(tiny_preset, tmp_path):
    with pytest.raises(GraftError, match=r"Backbone 'resnet51' is not known.*offline backbones \(efficientnet_lite0\)"):
        load_backbone("resnet51")
    with pytest.raises(GraftError, match=r"holds no config.json, so it is not a KerasHub preset"):
        load_backbone(str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_preset, damaged)
    (damaged / "model.weights.h5").write_bytes(b"not HDF5")
    with pytest.raises(GraftError, match=r"damaged \(EfficientNetBackbone\) could not be loaded"):
        load_backbone(str(damaged))
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "class_name": "BertBackbone"}))
    with pytest.raises(GraftError, match="holds a BertBackbone; Graft knows the blocks of EfficientNetBackbone"):
        load_backbone(str(damaged))
