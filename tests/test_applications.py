"""keras.applications with weights from a file: the same features as Keras's own model, for every scaling."""

import hashlib

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from models import GraftError, applications, inputs
from models.backbone import check_blocks, load_backbone
from models.blocks import blocks_by_name, find_blocks
from models.classifier import Classifier

# A small model per way of scaling: in the network, TensorFlow's, torch's, and the slow one, Caffe's (BGR).
MODELS = [
    "MobileNetV3Small",
    "MobileNetV2",
    pytest.param("DenseNet121", marks=pytest.mark.slow),
    pytest.param("ResNet50", marks=pytest.mark.slow),
    pytest.param("EfficientNetV2B0", marks=pytest.mark.slow),
    pytest.param("ConvNeXtTiny", marks=pytest.mark.slow),
]

# Module -> its first model, which stands for the others: their names and units are made the same way.
FIRST = {entry[0]: name for name, entry in reversed(applications.APPLICATIONS.items())}


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    """Keras's folder of weights, of this test alone."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "keras" / "models").mkdir(parents=True)
    return tmp_path / "keras"


def save_random(name, file, include_top):
    """Save a random model of keras.applications, its BatchNorm statistics moved from where they start."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, include_top=include_top)
    random = np.random.default_rng(0)
    for weight in model.weights:
        if "moving_mean" in weight.path or "beta" in weight.path:
            weight.assign(random.normal(0, 0.1, weight.shape))
        elif "moving_variance" in weight.path:
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
    if file.name.endswith(".weights.h5"):
        model.save_weights(file)
    else:  # the layout of Keras's own files, which Keras 3 reads but saves no more
        with h5py.File(file, "w") as group:
            legacy_h5_format.save_weights_to_hdf5_group(group, model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_those_of_kerass_own_model(name, tmp_path):
    file = tmp_path / "my.weights.h5"
    model = save_random(name, file, include_top=False)
    backbone = load_backbone(f"applications:{name}:{file}")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype("float32")
    module = getattr(keras.applications, applications.APPLICATIONS[name][0])
    expected = np.asarray(model(module.preprocess_input(pixels.copy()), training=False)).mean(axis=(1, 2))
    features = np.asarray(Classifier(backbone, 2).features(inputs.scale_image(pixels, backbone.preprocess)))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert features.std() > 0
    assert backbone.source_head is None
    assert backbone.source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (backbone.source["hub"], backbone.source["handle"]) == ("keras.applications", name)


@pytest.mark.parametrize("module", applications.SCALINGS)
def test_scaling_equals_kerass_own(module):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype("float32")
    expected = getattr(keras.applications, module).preprocess_input(pixels.copy())
    scaled = np.asarray(inputs.scale_image(pixels, applications.image_preprocess(FIRST[module])))
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=2e-5)


def test_models_that_scale_inside_get_pixels_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 4, 3)).astype("float32")
    for name, (module, side, _, _) in applications.APPLICATIONS.items():
        if module not in applications.SCALINGS:
            rule = applications.image_preprocess(name)
            own = getattr(keras.applications, module).preprocess_input(pixels.copy())
            assert np.abs(np.asarray(inputs.scale_image(pixels, rule)) - own).max() == 0
            assert rule.image_size == (side, side)


def test_the_classifier_of_a_file_that_has_one_is_kept(keras_home):
    """The file that Keras itself would have brought, in the old HDF5 layout that it still has."""
    file = keras_home / "models" / applications.own_files("MobileNetV2")[0]
    model = save_random("MobileNetV2", file, include_top=True)
    backbone = load_backbone("applications:MobileNetV2")
    kernel, bias = backbone.source_head
    pixels = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype("float32")
    expected = np.asarray(model(pixels / 127.5 - 1, training=False))
    features = np.asarray(Classifier(backbone, 2).features(inputs.scale_image(pixels, backbone.preprocess)))
    answer = np.asarray(keras.ops.softmax(features @ kernel + bias))
    np.testing.assert_allclose(answer, expected, rtol=1e-3)
    assert applications.cached_applications() == ["applications:MobileNetV2"]
    assert backbone.source["file"] == file.name


def test_files_that_do_not_fit_say_so(tmp_path):
    file = tmp_path / "small.weights.h5"
    save_random("MobileNetV3Small", file, include_top=False)
    with pytest.raises(GraftError, match=r"small.weights.h5 holds 939,120 parameters; MobileNetV2 has 2,257,984 with"):
        load_backbone(f"applications:MobileNetV2:{file}")
    file.write_bytes(b"not HDF5")
    with pytest.raises(GraftError, match="is not an HDF5 weights file"):
        load_backbone(f"applications:MobileNetV2:{file}")


@pytest.mark.slow
@pytest.mark.parametrize("module", FIRST)
def test_the_names_of_kerass_files_are_those_that_keras_asks_for(module, monkeypatch):
    from keras.src.utils import file_utils

    asked = []

    def get_file(fname, origin, **options):
        asked.append((fname, origin))
        raise FileNotFoundError(fname)

    monkeypatch.setattr(file_utils, "get_file", get_file)  # the network, which tests do without
    name = FIRST[module]
    for include_top in (True, False):
        with pytest.raises(FileNotFoundError):
            getattr(keras.applications, name)(weights="imagenet", include_top=include_top)
    assert tuple(fname for fname, _ in asked) == applications.own_files(name)
    assert all(origin.startswith(applications.HOST) for _, origin in asked)


@pytest.mark.slow
@pytest.mark.parametrize("module", FIRST)
def test_models_are_cut_into_their_units(module):
    encoder = getattr(keras.applications, FIRST[module])(weights=None, include_top=False, input_shape=(None, None, 3))
    blocks = find_blocks(encoder, applications.PATTERNS.get(module))
    check_blocks(module, encoder, blocks)
    if module in applications.PATTERNS:
        named = blocks_by_name(encoder, applications.PATTERNS[module])
        assert [block.name for block in blocks] == [block.name for block in named]
    else:
        assert len(blocks) == {"vgg16": 13, "vgg19": 16, "inception_v3": 16, "inception_resnet_v2": 49}[module]
    assert len(encoder.output_shape) == 4
