"""KerasHub preset folders: the same features, the same preprocessing, ordered blocks."""

import hashlib
import json
import shutil

import keras_hub
import numpy as np
import pytest

from models import GraftError, freezing, inputs
from models.backbone import load_backbone
from models.blocks import BLOCK_PATTERNS, blocks_by_name
from models.classifier import Classifier, run_encoder
from tests.conftest import two_phase_run
from tests.tiny_presets import resnet_backbone, save

# Fixture of each family's preset: block names bottom to top, and layers that top the last unit.
FAMILIES = {
    "tiny_preset": (["stem", "block1a", "block2a", "block2b"], ["top_conv", "top_bn"]),
    "tiny_resnet_preset": (["stem", "stack0_block0", "stack1_block0", "stack1_block1"], []),
    "tiny_resnet_v2_preset": (["stem", "stack0_block0", "stack1_block0", "stack1_block1"], ["post_bn"]),
    "tiny_mobilenet_preset": (["stem", "block_0_0", "block_1_0", "block_2_0", "block_2_1"], ["block_3_0"]),
    "tiny_vit_preset": (["stem", "transformer_block_1", "transformer_block_2", "transformer_block_3"], ["ln"]),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A preset folder of each family, its block names and the layers on top of the last unit."""
    return request.getfixturevalue(request.param), *FAMILIES[request.param]


def test_blocks_are_the_units_in_order_and_depth_1_thaws_the_top_one(family):
    folder, names, tops = family
    backbone = load_backbone(str(folder))
    assert [block.name for block in backbone.blocks] == names
    assert [layer for block in backbone.blocks for layer in block.layers] == backbone.encoder.layers
    top = backbone.blocks[-1].layers
    assert all(layer.name.startswith(names[-1]) for layer in top if layer.weights and layer.name not in tops)
    assert set(tops) <= {layer.name for layer in top}
    model = Classifier(backbone, 2)
    freezing.unfreeze_top(model, 1, train_batch_norm=True)
    statistics = ("moving_mean", "moving_variance", "seed_generator_state")
    expected = {id(weight) for weight in backbone.blocks[-1].weights if weight.name not in statistics}
    assert {id(weight) for weight in backbone.encoder.trainable_weights} == expected


def test_resnet_vd_pools_its_shortcut_within_the_unit():
    encoder = resnet_backbone("bottleneck_block_vd", False)
    blocks = blocks_by_name(encoder, BLOCK_PATTERNS["ResNetBackbone"])
    assert [block.name for block in blocks] == ["stem", "stack0_block0", "stack1_block0", "stack1_block1"]
    pooled = [block.name for block in blocks for layer in block.layers if "average_pooling" in layer.name]
    assert pooled == ["stack1_block0"]


def test_stochastic_depth_freezes_with_its_unit(tiny_preset):
    backbone = load_backbone(str(tiny_preset))
    assert "block2b_drop" in [layer.name for layer in backbone.blocks[-1].layers]


def test_features_and_preprocessing_equal_kerashubs_own(family):
    folder = family[0]
    backbone = load_backbone(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (3, 57, 40, 3)).astype("float32")
    converter = keras_hub.layers.ImageConverter.from_preset(str(folder))
    expected_input = converter(images)
    ours = inputs.scale_image(inputs.resize_image(images, backbone.preprocess), backbone.preprocess)
    scale = np.array(backbone.preprocess.deviation)
    assert np.abs((np.asarray(ours) - np.asarray(expected_input)) * scale).max() < 1  # levels of 255
    original = keras_hub.models.Backbone.from_preset(str(folder))
    expected = np.asarray(original(expected_input, training=False))
    expected = expected.mean(axis=(1, 2)) if expected.ndim == 4 else expected[:, 0]
    features = np.asarray(Classifier(backbone, 2).features(expected_input))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_flat_vit_equals_the_nested_one(tiny_vit_preset):
    backbone = load_backbone(str(tiny_vit_preset))
    nested = keras_hub.models.Backbone.from_preset(str(tiny_vit_preset))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    difference = np.asarray(backbone.encoder(images, training=False)) - np.asarray(nested(images, training=False))
    assert np.abs(difference).max() == 0


def test_dropout_of_a_vit_unit_works_only_where_thawed(tiny_vit_preset):
    model = Classifier(load_backbone(str(tiny_vit_preset)), 2, dropout=0.0)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    plain = np.asarray(model(images, training=False))
    freezing.freeze(model)
    assert np.abs(np.asarray(model(images, training=True)) - plain).max() == 0
    freezing.unfreeze_top(model, 1)
    once, again = (np.asarray(run_encoder(model.encoder, images, True)) for _ in range(2))
    assert np.abs(once - again).max() > 1e-3
    assert np.abs(np.asarray(model(images, training=True)) - plain).max() > 1e-3


def test_a_vit_of_another_size_than_its_converter_says_so(tiny_vit_preset, tmp_path):
    folder = tmp_path / "vit"
    shutil.copytree(tiny_vit_preset, folder)
    text = (folder / "image_converter.json").read_text()
    config = json.loads(text)
    config["config"]["image_size"] = [48, 48]
    (folder / "image_converter.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match=r"resizes images to 48 x 48 pixels.*built for 32 x 32"):
        load_backbone(str(folder))


def test_a_foreign_or_damaged_folder_says_so(tiny_preset, tmp_path):
    listed = r"offline backbones \(efficientnet_lite0, minilm_l6, whisper_tiny_en\)"
    with pytest.raises(GraftError, match=f"Backbone 'resnet51' is not known.*{listed}"):
        load_backbone("resnet51")
    with pytest.raises(GraftError, match=r"holds no config.json, so it is not a KerasHub preset"):
        load_backbone(str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_preset, damaged)
    (damaged / "model.weights.h5").write_bytes(b"not HDF5")
    with pytest.raises(GraftError, match=r"damaged \(EfficientNetBackbone\) could not be loaded"):
        load_backbone(str(damaged))
    config = json.loads((damaged / "config.json").read_text())
    text_config = {**config, "class_name": "MoonshineBackbone", "config": {"vocabulary_size": 100}}
    (damaged / "config.json").write_text(json.dumps(text_config))
    with pytest.raises(GraftError, match="holds a MoonshineBackbone, which is not an image model"):
        load_backbone(str(damaged))
    (damaged / "config.json").write_text("{")
    with pytest.raises(GraftError, match="config.json could not be read as JSON"):
        load_backbone(str(damaged))
    (damaged / "config.json").rename(damaged / "saved_model.pb")
    with pytest.raises(GraftError, match=r"is a SavedModel. To use it as a TF-Hub module: tfhub:.*damaged"):
        load_backbone(str(damaged))


def test_a_family_without_a_pattern_is_cut_by_its_graph(tmp_path):
    encoder = keras_hub.models.DenseNetBackbone([2, 1], growth_rate=4, image_shape=(32, 32, 3))
    folder = save(tmp_path / "tiny_densenet", encoder, "DenseNetImageConverter")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    backbone = load_backbone(str(folder))
    assert [block.name for block in backbone.blocks][:2] == ["stem", "stack1_block1_1_conv"]
    assert len(backbone.blocks) == 5
    assert backbone.source == {
        "folder": "tiny_densenet",
        "architecture": "DenseNetBackbone",
        "file": "model.weights.h5",
        "sha256": hashlib.sha256((folder / "model.weights.h5").read_bytes()).hexdigest(),
        "licence": "apache-2.0",
    }
    model = Classifier(backbone, 2)
    freezing.unfreeze_top(model, 1)
    trained = {weight.path.split("/")[0] for weight in backbone.encoder.trainable_weights}
    assert trained == {"stack2_block1_1_conv", "stack2_block1_2_conv"}


@pytest.mark.parametrize("preset", ["tiny_resnet_preset", "tiny_vit_preset"])
def test_the_presets_own_classifier_is_kept(preset, request, tmp_path):
    original = request.getfixturevalue(preset)
    encoder = keras_hub.models.Backbone.from_preset(str(original))
    converter = keras_hub.layers.ImageConverter.from_preset(str(original))
    classifier_class = next(
        kind
        for kind in (keras_hub.models.ResNetImageClassifier, keras_hub.models.ViTImageClassifier)
        if kind.backbone_cls is type(encoder)
    )
    preprocessor = classifier_class.preprocessor_cls(converter)
    task = classifier_class(encoder, num_classes=5, preprocessor=preprocessor)
    task.output_dense.bias.assign(np.arange(5))
    task.save_to_preset(str(tmp_path / "task"))
    backbone = load_backbone(str(tmp_path / "task"))
    kernel, bias = backbone.source_head
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    features = np.asarray(Classifier(backbone, 2).features(images))
    np.testing.assert_allclose(features @ kernel + bias, np.asarray(task(images, training=False)), atol=1e-5)
    config = json.loads((tmp_path / "task" / "task.json").read_text())
    config["config"]["pooling"] = "max"  # of other features than ours
    (tmp_path / "task" / "task.json").write_text(json.dumps(config))
    assert load_backbone(str(tmp_path / "task")).source_head is None
    assert load_backbone(str(original)).source_head is None


def test_an_image_model_that_gives_no_single_feature_map_says_so(tmp_path):
    encoder = keras_hub.models.HGNetV2Backbone(
        depths=[1, 1],
        embedding_size=8,
        hidden_sizes=[16, 16],
        stem_channels=[3, 4, 8],
        hidden_act="relu",
        use_learnable_affine_block=False,
        stackwise_stage_filters=[(8, 4, 16, 1, 1, 3), (16, 8, 16, 1, 1, 3)],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        image_shape=(32, 32, 3),
    )
    encoder.save_to_preset(str(tmp_path / "hgnet"))
    with pytest.raises(GraftError, match=r"hgnet \(HGNetV2Backbone\) gives .*, expected one feature map"):
        load_backbone(str(tmp_path / "hgnet"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny_resnet_preset", "tiny_vit_preset", "tiny_mobilenet_preset"])
def test_both_phases_export_and_verification(preset, request, png_folder, tmp_path):
    metrics, version = two_phase_run(png_folder, request.getfixturevalue(preset), tmp_path / "run")
    assert metrics["phases"][1]["trainable_parameters"] > metrics["phases"][0]["trainable_parameters"]
    # Of a ViT the bias of the keys may stay: softmax does not feel it.
    assert metrics["phases"][1]["weights"]["still"] <= 1 and (version / "saved_model.pb").is_file()


def test_older_names_in_a_converter_are_understood(tiny_preset, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(tiny_preset, folder)
    converter = json.loads((folder / "image_converter.json").read_text())
    for name in ("scale", "offset", "image_size"):
        del converter["config"][name]
    older = {"scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "variance": [0.04, 0.09, 0.16], "height": 48, "width": 40}
    converter["config"] |= older
    (folder / "image_converter.json").write_text(json.dumps(converter))
    preprocess = load_backbone(str(folder)).preprocess
    assert preprocess.image_size == (48, 40)
    np.testing.assert_allclose(preprocess.mean, np.multiply(older["mean"], 255))
    np.testing.assert_allclose(preprocess.deviation, np.sqrt(older["variance"]) * 255)
    (folder / "image_converter.json").write_text("{}")
    with pytest.raises(GraftError, match="image_converter.json could not be loaded"):
        load_backbone(str(folder))


def test_an_encoder_of_fixed_size_refuses_another(tiny_vit_preset):
    from pipelines.config import ImageConfig
    from pipelines.image import build_model

    config = ImageConfig()
    config.model.backbone, config.model.image_size = str(tiny_vit_preset), 64
    with pytest.raises(GraftError, match=r"--image-size 64: .* was built for \d+ x \d+ pixels and takes no other size"):
        build_model(config, ["a", "b"])
