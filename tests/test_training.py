"""The loop: the same figures on any number of replicas and accumulation steps, every example counted once."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import GraftError, freezing
from models.classifier import Classifier
from models.optimizer import make_optimizer, weight_rules
from pipelines import prediction, steps, training
from pipelines.config import ImageConfig
from pipelines.data import dataset, image_loader, load_images, targets_of
from pipelines.sources import find_images
from pipelines.steps import make_train_step
from tests.conftest import tiny_backbone


@pytest.fixture(scope="module")
def splits(png_folder):
    return load_images(find_images(str(png_folder)))


def make_config(**options):
    config = ImageConfig()
    config.model.depth = "2"
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = 3, 3
    config.head.head_learning_rate = config.fine_tune.fine_tune_learning_rate = 0.05
    config.fine_tune.augmentation = "none"
    config.training.batch_size = 8
    config.cache.cache = "none"
    for name, value in options.items():
        group = next(g for g in dataclasses.fields(config) if hasattr(getattr(config, g.name), name))
        setattr(getattr(config, group.name), name, value)
    return config


def train(splits, strategy=None, dropout=0.0, backbone_dropout=0.0, frozen_front=0, hooks=None, **options):
    strategy = strategy or tf.distribute.get_strategy()
    config = make_config(**options)
    with strategy.scope():
        backbone = tiny_backbone(dropout=backbone_dropout)
        backbone.frozen_front = frozen_front
        model = Classifier(backbone, len(splits.class_names), dropout=dropout, seed=1)

    def loader(augmentation, random_erasing=0.0):
        return image_loader(backbone.preprocess, splits.white_level, augmentation, random_erasing)

    phases, _ = training.fit_two_phase(model, splits, loader, config, strategy, **(hooks or {}))
    return model, phases


ALL_CHANGES = {"augmentation": "rand-augment", "random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}


def losses(phases):
    return [(row["loss"], row["val_loss"]) for phase in phases for row in phase["history"]]


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_two_replicas_and_accumulation_give_the_losses_of_one(splits, mirrored, optimizer):
    options = {"optimizer": optimizer, "clip_norm": 0.5, "weight_decay": 0.1, "label_smoothing": 0.1}
    _, one = train(splits, **options)
    _, accumulated = train(splits, accumulation_steps=4, **options)
    _, two = train(splits, mirrored, accumulation_steps=2, **options)
    assert len(losses(one)) == 6
    np.testing.assert_allclose(losses(accumulated), losses(one), atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_mixing_averaging_and_augmentation_are_the_same_on_two_replicas(splits, mirrored):
    options = {"optimizer": "sgd", "head_epochs": 1, "fine_tune_epochs": 2, "ema": 0.9, **ALL_CHANGES}
    _, one = train(splits, **options)
    _, two = train(splits, mirrored, accumulation_steps=2, **options)
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5, rtol=0)


def one_batch(size=8):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(size, 16, 16, 3)).astype("float32")
    targets = np.eye(3, dtype="float32")[np.arange(size) % 3]
    return inputs, targets, np.linspace(0.5, 2, size, dtype="float32"), np.arange(size, dtype=np.int32)


def distributed(strategy, batch):
    batches = tf.data.Dataset.from_tensor_slices(batch).batch(len(batch[0]))
    return next(iter(strategy.experimental_distribute_dataset(batches)))


@pytest.mark.parametrize(("replicas", "accumulation_steps"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_models_own_losses_count_once_in_loss_and_gradient(mirrored, replicas, accumulation_steps):
    strategy = mirrored if replicas == 2 else tf.distribute.get_strategy()
    with strategy.scope():
        model = Classifier(tiny_backbone(), 3, dropout=0.0)
        freezing.unfreeze_top(model, 1)
        optimizer = make_optimizer("sgd", model, 0.5, weight_decay=0.0)
    for weight in model.encoder.get_layer("block2_conv").kernel, model.encoder.get_layer("block0_conv").kernel:
        weight.regularizer = keras.regularizers.L2(0.3)  # block 0 is frozen: its own does not count
    model.encoder.get_layer("block2_conv").activity_regularizer = keras.regularizers.L2(0.02)
    batch = one_batch()
    inputs, targets, weights, _ = batch
    with tf.GradientTape() as tape:
        losses = steps.cross_entropy(targets, model(inputs), False) * weights
        assert len(model.losses) == 2
        expected = tf.reduce_sum(losses) / weights.sum() + tf.add_n(model.losses)
    gradients = tape.gradient(expected, [weight.value for weight in model.trainable_weights])
    rules, before = weight_rules(model), [weight.numpy() for weight in model.trainable_weights]
    train_step = make_train_step(model, optimizer, strategy, accumulation_steps)
    sums = train_step(distributed(strategy, batch)).numpy()
    assert sums[0] / sums[1] == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > float(tf.reduce_sum(losses)) / weights.sum() + 0.1
    for weight, value, gradient in zip(model.trainable_weights, before, gradients):
        step = 0.5 * rules[id(weight)][0] * 1.9 * gradient.numpy()  # Nesterov momentum 0.9 from rest
        np.testing.assert_allclose(value - weight.numpy(), step, atol=1e-5, rtol=1e-3)


def test_averaged_weights_are_those_that_are_validated_and_kept(splits, mirrored):
    config = make_config(ema=0.6, depth="1", head_epochs=3, fine_tune_epochs=2, train_batch_norm=True)
    with mirrored.scope():
        model = Classifier(tiny_backbone(), 3, dropout=0.0, seed=1)
    steps, kept = {}, {}

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            steps[len(steps)] = [values()]

        def on_train_batch_end(self, batch, logs=None):
            steps[len(steps) - 1].append(values())

    def values():
        return [weight.numpy() for weight in model.weights]

    def loader(augmentation):
        return image_loader(model.backbone.preprocess, splits.white_level, augmentation)

    phases, _ = training.fit_two_phase(
        model,
        splits,
        loader,
        config,
        mirrored,
        callbacks=[Recorder()],
        on_best=lambda name, model: kept.update({name: values()}),
        on_end=lambda phase, logits_of: phase.update(left=values()),
    )
    assert [phase["kept"] for phase in phases] == [True, True]
    for index, phase in enumerate(phases):
        steps_per_epoch = (len(steps[index]) - 1) // phase["epochs"]
        averages = steps[index][0]
        for step, weights in enumerate(steps[index][1 : phase["best_epoch"] * steps_per_epoch + 1], start=1):
            decay = min(0.6, (1 + step) / (10 + step))
            averages = [decay * average + (1 - decay) * weight for average, weight in zip(averages, weights)]
        for average, saved, left in zip(averages, kept[phase["name"]], phase["left"]):
            np.testing.assert_allclose(left, average, atol=1e-6)
            np.testing.assert_array_equal(left, saved)
        assert max(np.abs(raw - left).max() for raw, left in zip(weights, phase["left"])) > 1e-3
    assert validation_loss(model, splits) == pytest.approx(phases[1]["val_loss"], abs=1e-5)


@pytest.mark.slow
def test_several_steps_in_one_graph_give_the_figures_of_single_steps(splits):
    options = {"dropout": 0.3, "backbone_dropout": 0.3, "head_epochs": 2, "fine_tune_epochs": 2, "ema": 0.9}
    model, single = train(splits, **options)
    other, several = train(splits, steps_per_call=3, **options)  # of 4: the last call of an epoch has one
    np.testing.assert_allclose(losses(several), losses(single), rtol=1e-6)
    for one, two in zip(model.weights, other.weights):
        np.testing.assert_allclose(one.numpy(), two.numpy(), atol=1e-6)


def test_rates_and_batch_grow_with_the_devices_where_that_is_asked_for():
    config = make_config(scale_batch="linear")
    grown = training.scaled(config, 4)
    assert (grown.training.batch_size, grown.head.head_learning_rate) == (32, 0.2)
    assert (config.training.batch_size, config.head.head_learning_rate) == (8, 0.05)
    assert training.scaled(make_config(), 4).training.batch_size == 8


def test_phases_move_what_they_should_and_nothing_else(splits):
    _, (head, fine_tune) = train(splits)
    assert head["weights"] == {"frozen": 18, "trainable": 2, "still": 0}
    assert fine_tune["weights"] == {"frozen": 14, "trainable": 6, "still": 0}  # BatchNorm among the frozen
    assert head["trainable_parameters"] == 8 * 3 + 3
    assert fine_tune["val_loss"] <= head["val_loss"]


def test_batch_norm_trains_when_asked_and_its_statistics_are_those_of_the_best_epoch(splits):
    options = {"train_batch_norm": True, "depth": "1", "schedule": "constant", "fine_tune_learning_rate": 1.0}
    model, (_, fine_tune) = train(splits, fine_tune_epochs=8, patience=2, label_smoothing=0.3, **options)
    assert fine_tune["weights"] == {"frozen": 12, "trainable": 8, "still": 0}  # gamma, beta, mean, variance
    assert fine_tune["best_epoch"] < fine_tune["epochs"] and fine_tune["val_loss"] > 1e-3
    assert validation_loss(model, splits) == pytest.approx(fine_tune["val_loss"], rel=1e-3)


def validation_loss(model, splits):
    strategy, load = tf.distribute.get_strategy(), image_loader(model.backbone.preprocess, 255)
    logits = prediction.predictor(model, strategy, load, batch_size=8)(splits.val)
    return steps.mean_loss_and_accuracy(targets_of(splits.val, 3), logits, multi_label=False)[0]


def test_the_same_seed_gives_the_same_figures_and_another_does_not(splits):
    options = {"dropout": 0.3, "backbone_dropout": 0.3, "head_epochs": 2, "fine_tune_epochs": 2, **ALL_CHANGES}
    _, first = train(splits, **options)
    _, again = train(splits, **options)
    _, other = train(splits, seed=7, **options)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_dropout_and_a_constant_rate_train_under_two_replicas(splits, mirrored):
    _, phases = train(splits, mirrored, dropout=0.3, head_epochs=2, depth="head", schedule="constant")
    assert phases[0]["history"][0]["learning_rate"] == pytest.approx(0.05)
    assert all(math.isfinite(value) for row in losses(phases) for value in row)


def test_a_fine_tuning_that_makes_validation_worse_is_undone(splits):
    saved = {}
    config = make_config(fine_tune_learning_rate=1e4, clip_norm=0.0, optimizer="sgd", schedule="constant")
    backbone = tiny_backbone()
    model = Classifier(backbone, 3, dropout=0.0)

    def remember(phase, logits_of):
        saved[phase["name"]] = [weight.numpy() for weight in model.weights]

    def loader(augmentation):
        return image_loader(backbone.preprocess, splits.white_level, augmentation)

    phases, _ = training.fit_two_phase(model, splits, loader, config, tf.distribute.get_strategy(), on_end=remember)
    assert not phases[1]["kept"] and phases[1]["best_epoch"] == 0
    for after_head, after_fine_tune in zip(saved["head"], saved["fine_tune"]):
        np.testing.assert_array_equal(after_head, after_fine_tune)


def test_early_stopping_restores_the_best_epoch(splits):
    model, (head,) = train(
        splits, depth="head", head_epochs=30, head_learning_rate=3.0, patience=2, schedule="constant"
    )
    values = [row["val_loss"] for row in head["history"]]
    assert head["epochs"] == head["best_epoch"] + 2 < 30
    assert head["val_loss"] == min(values) == values[head["best_epoch"] - 1]
    assert validation_loss(model, splits) == pytest.approx(head["val_loss"], abs=1e-6)


@pytest.mark.parametrize("batch_size", [2, 8, 10, 64])
def test_every_example_counts_once_whatever_the_batch_size(splits, mirrored, batch_size):
    with mirrored.scope():
        model = Classifier(tiny_backbone(), 3, dropout=0.0)
    load = image_loader(model.backbone.preprocess, 255)
    images = np.stack([load(path, tf.constant([0, 0])).numpy() for path in splits.train["path"].to_pylist()])
    expected = model(images, training=False).numpy()
    batches = dataset(splits.train, load, class_count=3, batch_size=batch_size, epoch=3, training=True)
    logits = prediction.predict_logits(steps.make_predict_step(model, mirrored), mirrored, batches, len(images))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    rows = np.concatenate([rows for _, _, _, rows in batches.as_numpy_iterator()])
    weights = np.concatenate([weights for _, _, weights, _ in batches.as_numpy_iterator()])
    assert sorted(rows[rows >= 0]) == list(range(len(images)))
    assert weights.sum() == len(images) and (weights[rows < 0] == 0).all()
    assert len(rows) % batch_size == 0


def test_the_loss_is_kerass_with_label_smoothing():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 5, 20), random.normal(size=(20, 5)).astype("float32")
    targets = {False: np.eye(5, dtype="float32")[labels], True: random.integers(0, 2, (20, 5)).astype("float32")}
    kinds = {False: keras.losses.CategoricalCrossentropy, True: keras.losses.BinaryCrossentropy}
    for multi_label, kind in kinds.items():
        for smoothing in (0.0, 0.1):
            reference = kind(from_logits=True, label_smoothing=smoothing, reduction=None)
            losses = steps.cross_entropy(targets[multi_label], logits, multi_label, smoothing)
            np.testing.assert_allclose(losses, reference(targets[multi_label], logits), rtol=1e-5)
        loss, accuracy = steps.mean_loss_and_accuracy(targets[multi_label], logits, multi_label)
        losses = steps.cross_entropy(targets[multi_label], logits, multi_label)
        assert loss == pytest.approx(float(tf.reduce_mean(losses)), rel=1e-5)
        right = (logits > 0) == (targets[True] > 0) if multi_label else logits.argmax(axis=1) == labels
        assert accuracy == pytest.approx(np.mean(right))


def test_balanced_class_weights(splits):
    table = splits.train.slice(0, 0)
    labels = [0] * 9 + [2] * 3
    table = splits.train.take(list(range(12))).set_column(2, "label", [np.array(labels)])
    weights = training.class_weighted(table, 3)["weight"].to_numpy()
    np.testing.assert_allclose(weights, [12 / (2 * 9)] * 9 + [12 / (2 * 3)] * 3, rtol=1e-6)


def test_a_batch_that_devices_cannot_share_is_refused(splits, mirrored):
    with pytest.raises(
        GraftError,
        match="--batch-size 10 cannot be shared evenly by 2 devices in 2 accumulation steps.*multiple of 4",
    ):
        train(splits, mirrored, batch_size=10, accumulation_steps=2)


def test_a_loss_that_is_not_finite_says_what_to_do(splits):
    with pytest.raises(GraftError, match="loss of phase head is not finite in epoch 1.*Lower the learning rate"):
        train(splits, head_learning_rate=1e38, clip_norm=0.0, optimizer="sgd", schedule="constant")


# ---- --depth auto


@pytest.mark.slow
def test_each_rung_gives_what_its_depth_alone_gives(splits):
    options = {"head_epochs": 2, "fine_tune_epochs": 2, "dropout": 0.2}
    _, climbed = train(splits, depth="auto", light_blocks=1, **options)
    assert [phase["name"] for phase in climbed] == ["head", "light", "full"]
    for rung, depth in zip(climbed[1:], ("1", "full")):
        _, (_, alone) = train(splits, depth=depth, **options)
        assert rung["weights"] == alone["weights"]
        np.testing.assert_allclose(losses([rung]), losses([alone]), rtol=1e-6)
    best = min(climbed, key=lambda phase: phase["climb"]["val_loss"])
    assert best["kept"] and climbed[0]["kept"]
    assert [row["epoch"] for phase in climbed for row in phase["history"]] == [1, 2, 3, 4, 5, 6]


def test_full_leaves_a_frozen_front_alone_and_runs_it_once(splits):
    options = {"head_epochs": 1, "fine_tune_epochs": 1, "cache": "memory"}
    _, (_, full) = train(splits, depth="full", frozen_front=1, **options)
    assert [row["trainable_parameters"] > 0 for row in full["blocks"]] == [False, True, True, True]
    _, (_, two) = train(splits, depth="2", **options)
    assert losses([full]) == losses([two])


class Wrecker(keras.callbacks.Callback):
    """Spoils the lowest block whenever it trains."""

    def on_train_batch_end(self, batch, logs=None):
        lowest = self.model.blocks[0].layers[0]
        if lowest.trainable:
            lowest.kernel.assign(lowest.kernel * 0.0)


def test_a_rung_that_makes_validation_worse_is_undone(splits):
    best, left = {}, []
    hooks = {
        "callbacks": [Wrecker()],
        "on_best": lambda name, model: best.update({name: [weight.numpy() for weight in model.weights]}),
        "on_end": lambda phase, logits_of: left.append(logits_of(splits.test)),
    }
    options = {"cache": "memory", "head_solver": "sgd", "fine_tune_epochs": 3, "fine_tune_learning_rate": 0.01}
    model, phases = train(splits, depth="auto", light_blocks=1, hooks=hooks, **options)
    assert [phase["kept"] for phase in phases] == [True, True, False]
    assert phases[2]["climb"]["val_loss"] > phases[1]["val_loss"] == phases[2]["val_loss"]
    assert set(best) == {"head", "light"}
    for weight, saved in zip(model.weights, best["light"], strict=True):
        np.testing.assert_array_equal(weight.numpy(), saved)
    np.testing.assert_array_equal(left[1], left[2])
    assert validation_loss(model, splits) == pytest.approx(phases[1]["val_loss"], abs=1e-5)


def test_a_depth_that_was_asked_for_is_kept_where_both_have_all_of_validation_right(splits):
    options = {"cache": "memory", "depth": "1", "fine_tune_epochs": 1, "fine_tune_learning_rate": 1e-3}
    _, (head, fine_tune) = train(splits, **options)
    assert head["climb"]["val_accuracy"] == fine_tune["climb"]["val_accuracy"] == 1
    assert fine_tune["kept"] and fine_tune["val_loss"] > head["val_loss"]


@pytest.mark.slow
def test_a_gain_that_is_excluded_ends_the_climb(splits, monkeypatch):
    monkeypatch.setattr(training.ladder, "LEAST_GAIN", 1.5)  # which no interval reaches
    _, phases = train(splits, depth="auto", head_epochs=1, fine_tune_epochs=1)
    assert [phase["name"] for phase in phases] == ["head", "light"]
    assert phases[1]["climb"]["because"].startswith("a gain of half a point is excluded")


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"depth": "auto", "target": 0.01}, "has reached the target of 0.01"),
        ({"depth": "2", "budget": "0.001s"}, "of the budget 0 s are left"),
    ],
)
def test_a_target_and_a_budget_end_phase_and_climb_after_an_epoch(splits, options, because):
    _, (head,) = train(splits, head_epochs=5, **options)
    assert head["epochs"] == 1 and head["kept"]
    assert because in head["climb"]["because"]


@pytest.mark.slow
def test_a_climb_on_two_replicas_is_that_on_one(splits, mirrored):
    options = {"depth": "auto", "optimizer": "sgd", "head_epochs": 1, "fine_tune_epochs": 2}
    _, one = train(splits, **options)
    _, two = train(splits, mirrored, **options)
    assert [phase["name"] for phase in two] == ["head", "light", "full"]
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5, rtol=0)
    assert [phase["kept"] for phase in two] == [phase["kept"] for phase in one]
