"""Random weights: the same architecture, nothing of the checkpoint, activations in range, the same for a seed."""

import numpy as np
import pytest

from models.backbone import load_backbone
from models.names import check_backbone_name
from models.random_weights import random_copy, refresh_batch_norm
from tests import tiny_presets, tiny_text_presets
from tests.conftest import tiny_backbone


@pytest.mark.parametrize("family", ["efficientnet", "vit"])
def test_no_weight_of_an_image_model_is_what_it_was(tmp_path, family):
    folder = tiny_presets.WRITERS[family](tmp_path / family)
    loaded = load_backbone(str(folder))
    for weight in loaded.encoder.weights:  # as if it had been trained
        weight.assign(weight.numpy() + 0.37)
    before = [weight.numpy() for weight in loaded.encoder.weights]
    backbone = random_copy(loaded)
    after = [weight.numpy() for weight in backbone.encoder.weights]
    assert backbone.name == f"random:{family}" and backbone.source_head is None
    assert not any(np.array_equal(x, y) for x, y in zip(before, after))
    kernels = [value for value in after if value.ndim >= 2]
    assert all(value.std() > 0 for value in kernels)
    # Kernels of one shape are different draws.
    assert len({value.ravel()[:4].tobytes() for value in kernels}) == len(kernels)
    means = [value for weight, value in zip(backbone.encoder.weights, after) if weight.name == "moving_mean"]
    assert all(mean.any() for mean in means) and bool(means) == (family == "efficientnet")
    images = np.random.default_rng(0).uniform(-1, 1, (8, 32, 32, 3)).astype("float32")
    features = np.asarray(backbone.pooled(backbone.encoder(images, training=False)))
    assert np.isfinite(features).all() and 1e-3 < features.std(axis=0).max() < 100


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "gpt2", "llama", "albert"))]
)
def test_text_models_too(tmp_path, family):
    folder = tiny_text_presets.write(family, tmp_path / family)
    pretrained, backbone = load_backbone(str(folder)), load_backbone(f"random:{folder}")
    pairs = list(zip(pretrained.encoder.weights, backbone.encoder.weights, strict=True))
    assert pairs and not any(np.array_equal(x, y) for x, y in pairs)
    norms = [w.numpy() for _, w in pairs if w.name in ("gamma", "scale", "weight")]
    assert norms and all((norm == 1).all() for norm in norms)
    assert all(0 < w.numpy().std() < 1 for _, w in pairs if len(w.shape) >= 2)


def test_a_seed_makes_the_same_weights():
    def weights(seed):
        return [weight.numpy() for weight in random_copy(tiny_backbone(seed=5), seed).encoder.weights]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(np.array_equal(x, y) for x, y in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_batch_norm_takes_its_statistics_layer_upon_layer():
    backbone = tiny_backbone()
    norms = [layer for layer in backbone.encoder.layers if "bn" in layer.name]
    norms[0].trainable = False
    inputs = np.random.default_rng(0).normal(5, 3, (64, 16, 16, 3)).astype("float32")
    refresh_batch_norm(backbone.encoder, inputs)
    x = inputs
    for layer in backbone.encoder.layers[1:]:
        x = np.asarray(layer(x, training=False))
        if layer in norms:
            np.testing.assert_allclose(x.mean(axis=(0, 1, 2)), 0, atol=1e-3)
            np.testing.assert_allclose(x.std(axis=(0, 1, 2)), 1, atol=0.05)
    assert not norms[0].trainable and norms[1].trainable and all(norm.momentum == 0.99 for norm in norms)


def test_the_name_is_checked_like_any_other():
    check_backbone_name("random:efficientnet_lite0")
    with pytest.raises(Exception, match="random:minilm_l6|minilm_l6.*not an image model"):
        check_backbone_name("random:minilm_l6")
