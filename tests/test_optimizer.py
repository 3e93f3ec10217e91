"""Per-layer rates are exact, decay follows them, and Keras' private hooks are where they were."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import freezing
from models.classifier import Classifier
from models.optimizer import block_multipliers, make_optimizer, warmup_cosine
from tests.conftest import tiny_backbone

RATE = 0.05
PLAIN = {  # stock Keras optimizers, by the names of ours
    "adamw": keras.optimizers.AdamW,
    "sgd": lambda **options: keras.optimizers.SGD(**options, momentum=0.9, nesterov=True),
    "lion": keras.optimizers.Lion,
    "adafactor": lambda **options: keras.optimizers.Adafactor(**options, relative_step=False),
}


@pytest.fixture(scope="module")
def model():
    model = Classifier(tiny_backbone(), class_count=3, dropout=0.0)
    freezing.unfreeze_all(model)
    return model


def test_multipliers_follow_the_formula(model):
    assert block_multipliers(model) == pytest.approx(
        {"block2": 0.1, "block1": 0.1 * 0.8, "block0": 0.1 * 0.8**2, "head": 1.0}
    )


def random_gradients(model, count):
    random = np.random.default_rng(0)
    return [[random.normal(size=w.shape).astype("float32") for w in model.trainable_weights] for _ in range(count)]


def block_of(model, weight):
    return next((b.name for b in model.blocks if any(weight is w for w in b.weights)), "head")


@pytest.mark.parametrize("name", list(PLAIN))
def test_each_block_moves_as_under_its_own_plain_optimizer(model, name):
    """The reference: stock Keras optimizers, one per weight, at the multiplied rate, decay on matrices only."""
    start = [w.numpy() for w in model.trainable_weights]
    optimizer = make_optimizer(name, model, RATE, weight_decay=0.1)
    references = [keras.Variable(value) for value in start]
    plain = []
    for weight in model.trainable_weights:
        options = {"learning_rate": RATE * block_multipliers(model)[block_of(model, weight)]}
        options["weight_decay"] = 0.1 if len(weight.shape) > 1 else 0.0
        plain.append(PLAIN[name](**options))
    for gradients in random_gradients(model, 5):
        gradients = [tf.constant(gradient) for gradient in gradients]
        optimizer.apply(gradients, model.trainable_weights)
        for reference, one, gradient in zip(references, plain, gradients):
            one.apply([gradient], [reference])
    for weight, reference, value in zip(model.trainable_weights, references, start):
        moved = np.abs(reference.numpy() - value).max()
        assert moved > 0
        np.testing.assert_allclose(
            weight.numpy(), reference.numpy(), rtol=0, atol=2e-7 * max(1, moved), err_msg=weight.path
        )
        weight.assign(value)


def test_biases_do_not_decay(model):
    start = [w.numpy() for w in model.trainable_weights]
    optimizer = make_optimizer("sgd", model, RATE, weight_decay=0.5)
    optimizer.apply([tf.zeros(w.shape) for w in model.trainable_weights], model.trainable_weights)
    for weight, value in zip(model.trainable_weights, start):
        factor = 1.0 if len(weight.shape) == 1 else 1 - 0.5 * RATE * block_multipliers(model)[block_of(model, weight)]
        np.testing.assert_allclose(weight.numpy(), value * np.float32(factor), rtol=1e-6)
        weight.assign(value)


def test_clipping_uses_the_global_norm(model):
    start = [w.numpy() for w in model.trainable_weights]
    freezing.freeze(model)
    optimizer = make_optimizer("sgd", model, 1.0, weight_decay=0.0, clip_norm=1.0)
    optimizer.momentum = 0.0  # plain steps of the clipped gradient
    gradients = [tf.fill(w.shape, 3.0) for w in model.trainable_weights]
    norm = float(tf.linalg.global_norm(gradients))
    before = [w.numpy() for w in model.trainable_weights]
    optimizer.apply(gradients, model.trainable_weights)
    for weight, value in zip(model.trainable_weights, before):
        np.testing.assert_allclose(weight.numpy() - value, np.full(weight.shape, -3.0 / norm), rtol=1e-4)
    freezing.unfreeze_all(model)
    for weight, value in zip(model.trainable_weights, start):
        weight.assign(value)


@pytest.mark.parametrize("name", list(PLAIN))
def test_two_replicas_move_as_one_device_clipping_included(name, mirrored):
    def weights_after_three_updates(strategy):
        with strategy.scope():
            model = Classifier(tiny_backbone(), class_count=3, dropout=0.0)
            freezing.unfreeze_all(model)
            optimizer = make_optimizer(name, model, RATE, weight_decay=0.1, clip_norm=0.5)
        for gradients in random_gradients(model, 3):
            shares = [tf.constant(gradient / strategy.num_replicas_in_sync) for gradient in gradients]
            strategy.run(lambda shares=shares: optimizer.apply(shares, model.trainable_weights))
        return [weight.numpy() for weight in model.trainable_weights]

    for one, two in zip(*map(weights_after_three_updates, (tf.distribute.get_strategy(), mirrored))):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)


def test_adafactors_rate_is_the_schedules(model):
    start = [w.numpy() for w in model.trainable_weights]
    moves = {}
    for rate in (0.01, 0.02):
        optimizer = make_optimizer("adafactor", model, warmup_cosine(rate, steps=10, warmup_share=0.0), 0.0)
        optimizer.apply([tf.ones(w.shape) for w in model.trainable_weights], model.trainable_weights)
        moves[rate] = [weight.numpy() - value for weight, value in zip(model.trainable_weights, start)]
        for weight, value in zip(model.trainable_weights, start):
            weight.assign(value)
    for slow, fast in zip(moves[0.01], moves[0.02]):
        np.testing.assert_allclose(fast, 2 * slow, rtol=1e-2, atol=1e-7)


def test_warmup_cosine():
    schedule = warmup_cosine(1e-3, steps=100, warmup_share=0.1)
    assert float(schedule(0)) == 0
    assert float(schedule(10)) == pytest.approx(1e-3)
    assert float(schedule(55)) == pytest.approx(0.5e-3, rel=0.02)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-9)
    assert float(warmup_cosine(1e-3, 100, 0.0)(0)) == pytest.approx(1e-3)
