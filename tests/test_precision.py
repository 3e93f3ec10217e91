"""Mixed precision: 16 bits inside the encoder while it trains, float32 weights, logits and exports."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import freezing
from models.backbone import Backbone, Block, ImagePreprocess, load_backbone
from models.classifier import Classifier
from models.optimizer import make_optimizer
from models.precision import LossScale, set_precision
from pipelines.data import load_images
from pipelines.sources import find_images
from pipelines.steps import MovingAverage, make_train_step
from serving.export import export_image_classifier
from tests.conftest import tiny_backbone
from tests.test_training import distributed, losses, one_batch, train


@pytest.fixture(scope="module")
def splits(png_folder):
    return load_images(find_images(str(png_folder)))


def computed_in(model, inputs):
    """The types in which the model's convolutions and matrix products compute."""
    graph = tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec(inputs.shape, tf.float32)).graph
    kinds = ("Conv2D", "MatMul", "BatchMatMulV2", "Einsum")
    return [operation.outputs[0].dtype.name for operation in graph.get_operations() if operation.type in kinds]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_encoder_computes_in_16_bits_and_back_again(precision):
    model, inputs = Classifier(tiny_backbone(), 3), one_batch()[0]
    exact = model(inputs).numpy()
    set_precision(model, precision)
    assert computed_in(model, inputs) == [precision] * 3 + ["float32"]
    logits = model(inputs)
    assert logits.dtype == tf.float32 and 0 < np.abs(logits.numpy() - exact).max() < 0.02
    assert {weight.dtype for weight in model.weights} == {"float32"}
    set_precision(model, "float32")
    assert computed_in(model, inputs) == ["float32"] * 4
    np.testing.assert_array_equal(model(inputs), exact)


def test_layers_within_layers_and_layers_that_refuse(tiny_vit_preset):
    model, inputs = Classifier(load_backbone(str(tiny_vit_preset)), 3), np.zeros((2, 32, 32, 3), np.float32)
    units = len(computed_in(model, inputs)) - 1
    set_precision(model, "bfloat16")
    assert computed_in(model, inputs) == ["bfloat16"] * units + ["float32"] and units > 10

    class Fixed(keras.layers.Layer):
        def call(self, inputs):
            assert inputs.dtype == self.compute_dtype == "float32"
            return inputs * tf.constant(2.0)

    inputs = keras.Input((4, 4, 3))
    fixed, conv = Fixed(autocast=False), keras.layers.Conv2D(2, 1)
    outputs = conv(fixed(inputs))
    blocks = [Block("fixed", (fixed,)), Block("conv", (conv,))]
    backbone = Backbone("fixed", keras.Model(inputs, outputs), ImagePreprocess((4, 4)), blocks, feature_size=2)
    model = Classifier(backbone, 3)
    set_precision(model, "float16")
    assert computed_in(model, np.zeros((2, 4, 4, 3))) == ["float16", "float32"]


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_losses_are_near_those_of_float32_and_evaluation_and_export_are_float32(splits, tmp_path, precision):
    options = {"head_epochs": 1, "fine_tune_epochs": 2, "optimizer": "sgd", "fine_tune_learning_rate": 0.02}
    _, exact = train(splits, **options)
    model, mixed = train(splits, precision=precision, **options)
    assert losses(mixed) != losses(exact)
    np.testing.assert_allclose(losses(mixed), losses(exact), rtol=0.03)
    assert {weight.dtype for weight in model.weights} == {"float32"}

    # The model leaves as one that was never mixed.
    inputs = one_batch()[0]
    plain = Classifier(tiny_backbone(), 3, dropout=0.0)
    for weight, trained in zip(plain.weights, model.weights):
        weight.assign(trained.numpy())
    np.testing.assert_array_equal(model(inputs), plain(inputs))
    export_image_classifier(model, model.backbone.preprocess, splits.class_names, tmp_path / "1")
    signatures = tf.saved_model.load(str(tmp_path / "1")).signatures
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.float32)
    served = signatures["pixels"](pixels=tf.constant(pixels))
    assert served["probabilities"].dtype == served["scores"].dtype == tf.float32
    np.testing.assert_allclose(served["probabilities"], tf.nn.softmax(plain((pixels - 127) / 128)), atol=1e-5)


def float16_step(strategy):
    with strategy.scope():
        model = Classifier(tiny_backbone(), 3, dropout=0.0)
        freezing.unfreeze_all(model)
        optimizer = make_optimizer("adamw", model, 0.01, clip_norm=1.0)
        loss_scale, average = LossScale(), MovingAverage(model, 0.9)
    set_precision(model, "float16")
    train_step = make_train_step(model, optimizer, strategy, loss_scale=loss_scale, average=average)

    def state():
        return [value.numpy() for value in (*model.weights, *optimizer.variables, *average.averages)]

    return train_step, loss_scale, state


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(mirrored, replicas):
    strategy = mirrored if replicas == 2 else tf.distribute.get_strategy()
    train_step, loss_scale, state = float16_step(strategy)
    batch = one_batch()
    before = state()
    too_large = (batch[0].copy(), *batch[1:])
    too_large[0][-1] = 1e6  # infinite in float16, on the last replica only
    train_step(distributed(strategy, too_large))
    for value, same in zip(before, state()):
        np.testing.assert_array_equal(value, same)
    assert float(loss_scale.scale.numpy()) == 2.0**14 and int(loss_scale.good_steps.numpy()) == 0

    train_step(distributed(strategy, batch))
    assert sum(not np.array_equal(value, other) for value, other in zip(before, state())) > 20
    assert float(loss_scale.scale.numpy()) == 2.0**14 and int(loss_scale.good_steps.numpy()) == 1
    loss_scale.good_steps.assign(LossScale.GROWTH_STEPS - 1)
    train_step(distributed(strategy, batch))
    assert float(loss_scale.scale.numpy()) == 2.0**15 and int(loss_scale.good_steps.numpy()) == 0


def test_scaling_leaves_the_update_as_it_is():
    moved = []
    for scale in (1.0, 2.0**12):
        train_step, loss_scale, state = float16_step(tf.distribute.get_strategy())
        loss_scale.scale.assign(scale)
        before = state()
        train_step(distributed(tf.distribute.get_strategy(), one_batch()))
        moved.append([after - value for value, after in zip(before[:20], state()[:20])])
    assert max(np.abs(move).max() for move in moved[0]) > 1e-3
    weights = zip(*moved)
    for small, large in weights:
        np.testing.assert_allclose(np.linalg.norm(large), np.linalg.norm(small), rtol=0.05, atol=1e-5)
