"""EfficientNet-Lite0 computes what the PyTorch original computes, from the same weights."""

import pathlib

import numpy as np
import pytest

from models import GraftError, offline
from models.backbone import check_blocks
from models.checkpoints import read_torch
from models.efficientnet_lite import (
    assign_torch_weights,
    block_layers,
    efficientnet_lite,
    load_efficientnet_lite0,
)

REFERENCE = pathlib.Path(__file__).parent / "fixtures" / "efficientnet_lite0" / "reference.npz"


@pytest.fixture(scope="module")
def backbone():
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def state():
    return read_torch(offline.fetch("efficientnet_lite0"))


@pytest.mark.parametrize(
    ("name", "seed", "shape"),
    [("native", 0, (2, 224, 224, 3)), ("odd", 1, (1, 161, 97, 3)), ("even", 2, (1, 96, 130, 3))],
)
def test_features_and_logits_equal_the_original(backbone, name, seed, shape):
    """At odd and even sizes too, where symmetric padding would shift every window."""
    reference = np.load(REFERENCE)
    pixels = np.random.RandomState(seed).randint(0, 256, shape).astype(np.float32)
    inputs = (pixels - backbone.preprocess.mean) / backbone.preprocess.deviation
    features = backbone.pooled(backbone.encoder(inputs.astype(np.float32), training=False)).numpy()
    kernel, bias = backbone.source_head
    logits = features @ kernel + bias
    np.testing.assert_allclose(features, reference[f"{name}_pooled"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(logits, reference[f"{name}_logits"], atol=1e-3, rtol=0)
    if name == "native":
        assert logits.argmax(axis=1).tolist() == [21, 21]
        np.testing.assert_allclose(logits.max(axis=1), [7.1327, 6.1825], atol=1e-3)


def test_blocks_are_the_stem_and_sixteen_units(backbone):
    names = " ".join(block.name for block in backbone.blocks)
    assert names == (
        "stem block1a block2a block2b block3a block3b block4a block4b block4c"
        " block5a block5b block5c block6a block6b block6c block6d block7a"
    )
    check_blocks(backbone.name, backbone.encoder, backbone.blocks)
    assert [layer.name for layer in backbone.blocks[0].layers] == ["stem_conv", "stem_bn", "stem_activation"]
    assert [layer.name for layer in backbone.blocks[-1].layers][-3:] == [
        "top_conv",
        "top_bn",
        "top_activation",
    ]
    assert backbone.feature_size == backbone.encoder.output_shape[-1] == 1280
    assert backbone.source_head[0].shape == (1280, 1000)
    assert backbone.source["file"] == "efficientnet-lite0-57934424.pth"


# Parameters below the classifier, as make_fixture.py counts them in the original; units by the formula.
@pytest.mark.parametrize(
    ("variant", "parameters", "units"),
    [
        ("lite1", 4_135_680, 21),
        ("lite4", 11_725_568, 30),
    ],
)
def test_variants_have_the_size_of_the_original(variant, parameters, units):
    model = efficientnet_lite(variant)
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == parameters
    assert len(block_layers(model)) == 1 + units


def test_unknown_variant():
    with pytest.raises(GraftError, match="lite7: no such EfficientNet-Lite; there are lite0, lite1"):
        efficientnet_lite("lite7")


def test_every_tensor_must_fit(state):
    encoder = efficientnet_lite()
    state = {name: value for name, value in state.items() if not name.startswith("_fc.")}
    assign_torch_weights(encoder, state)
    broken = dict(state)
    broken["_bn0.weightt"] = broken.pop("_bn0.weight")
    broken["_blocks.3._project_conv.weight"] = np.zeros((24, 144, 3, 3), np.float32)
    with pytest.raises(GraftError) as error:
        assign_torch_weights(encoder, broken)
    for part in (
        "not the weights of efficientnet_lite0",
        "_bn0.weight is missing",
        "_bn0.weightt is left over",
        "_blocks.3._project_conv.weight has the shape (3, 3, 144, 24), expected (1, 1, 144, 40)",
    ):
        assert part in str(error.value)
