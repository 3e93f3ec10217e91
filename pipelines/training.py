"""The training loop and the two phases.

The loop is ours because `Model.fit` under a strategy averages, clips and counts wrongly (see the
tests): `strategy.run` inside one tf.function, full batches padded with weight 0, losses divided by the
weight of the global batch, so that any number of replicas and of accumulation steps gives the same update.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable

import keras
import numpy as np

from models import GraftError, freezing
from models import optimizer as optimizers
from models.classifier import Classifier
from models.precision import LossScale, set_precision
from pipelines.config import depth_blocks
from pipelines.data import Splits, targets_of
from pipelines.feeds import Feed, Feeds
from pipelines.head_solver import solve_head
from pipelines.prediction import feed_predictor, predict_logits
from pipelines.steps import MovingAverage, make_predict_step, make_train_step, mean_loss_and_accuracy


def class_weighted(table, class_count: int):
    """The table with each example's weight divided by its class's share: every class weighs the same in the loss."""
    labels = table["label"].to_numpy()
    counts = np.bincount(labels, minlength=class_count)
    weights = (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)
    return table.set_column(table.schema.get_field_index("weight"), "weight", [weights])


# ---------------------------------------------------------------- one phase


def fit_phase(
    model: Classifier,
    name: str,
    feed: Feed,
    train,
    val,
    *,
    epochs: int,
    learning_rate: float,
    options,
    strategy,
    callbacks=(),
    on_best=lambda model: None,
    first_epoch: int = 0,
    best_val_loss: float = math.inf,
) -> dict:
    """Train what is flagged trainable, stop early, and leave the model with its best weights, computing in float32.

    With `options.ema` the weights that are validated and kept are the averaged ones.

    Args:
        name: "head" or "fine_tune".
        feed: what to train on; train, val: tables of the training and the validation set.
        options: `pipelines.config.TrainingOptions`.
        on_best: called with the model whenever validation has improved, to save it.
        first_epoch: epochs of earlier phases: data order and logs go on from there.
        best_val_loss: what must be beaten; if no epoch does, the model leaves as it came.

    Returns:
        What `phase_facts` gives, with a row of history per epoch; kept and val_loss of the best one.
    """
    started = time.perf_counter()
    steps = len(feed.train_batches(0, first_epoch))
    val_targets = targets_of(val, model.head.units)
    spec = strategy.experimental_distribute_dataset(feed.batches(val)).element_spec
    optimizer, train_step, average = make_updates(model, feed, learning_rate, steps * epochs, options, strategy, spec)
    predict_step = make_predict_step(feed.forward, strategy, spec)
    set_dropout_seeds = dropout_seeder(model, options.seed)
    before = freezing.checksums(model)
    moving = freezing.moving_weights(model)
    best_weights = [weight.numpy() for weight in moving]
    best_epoch, history = 0, []

    model.optimizer, model.stop_training = optimizer, False  # what Keras callbacks read
    observers = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=epochs, steps=steps)
    observers.on_train_begin()
    set_precision(model, options.precision)
    try:
        for epoch in range(epochs):
            epoch_started = time.perf_counter()
            observers.on_epoch_begin(first_epoch + epoch)
            batches = strategy.experimental_distribute_dataset(feed.train_batches(epoch, first_epoch + epoch))
            first_step = (first_epoch + epoch) * steps
            loss, accuracy = train_epoch(train_step, batches, observers, set_dropout_seeds, first_step)
            with average.in_place() if average else contextlib.nullcontext():
                logits = predict_logits(predict_step, strategy, feed.batches(val), val.num_rows)
                val_loss, val_accuracy = mean_loss_and_accuracy(val_targets, logits, model.multi_label)
                check_finite(name, epoch + 1, loss, val_loss, learning_rate)
                if val_loss < best_val_loss:
                    best_val_loss, best_epoch = val_loss, epoch + 1
                    best_weights = [weight.numpy() for weight in moving]
                    on_best(model)
            row = {"loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
            row["learning_rate"] = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            seconds = time.perf_counter() - epoch_started
            history.append({"epoch": first_epoch + epoch + 1, **row, "seconds": seconds})
            observers.on_epoch_end(first_epoch + epoch, row)
            if epoch + 1 - best_epoch >= options.patience or model.stop_training:
                break
    finally:  # after Ctrl-C too: the progress bar gives the terminal back
        set_precision(model, "float32")
        observers.on_train_end()

    moved = freezing.check_moved(model, before)
    for weight, value in zip(moving, best_weights):
        weight.assign(value)
    facts = phase_facts(model, name, started, learning_rate, moved, history, best_epoch)
    return {**facts, "kept": best_epoch > 0, "val_loss": best_val_loss}


def phase_facts(model, name: str, started: float, learning_rate: float, moved: dict, history, best_epoch) -> dict:
    """What is said of every phase.

    Returns:
        name, seconds since `started`, trainable_parameters, learning_rate, blocks (the trainable table), weights
        (counts of frozen and trainable, as `freezing.check_moved` gives them), epochs, best_epoch and history.
    """
    return {
        "name": name,
        "seconds": time.perf_counter() - started,
        "trainable_parameters": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "learning_rate": learning_rate,
        "blocks": freezing.trainable_table(model, learning_rate, optimizers.block_multipliers(model)),
        "weights": moved,
        "epochs": len(history),
        "best_epoch": best_epoch,
        "history": history,
    }


def fit_head_by_lbfgs(model: Classifier, feed: Feed, train, val, *, options, on_best=lambda model: None) -> dict:
    """Phase 1 where the features are at hand: the best logistic regression becomes the head.

    Returns:
        What `fit_phase` gives, and solver "lbfgs"; history has a row per penalty tried (l2, iterations), and
        epochs and best_epoch count those. No learning rate, no dropout: the penalty is what regularises.
        `simplest` is the (kernel, bias) that phase 2 should start from.
    """
    started = time.perf_counter()
    before = freezing.checksums(model)
    classes = model.head.units
    heads, path, best, simplest = solve_head(
        feed.features(train),
        targets_of(train, classes),
        train["weight"].to_numpy(),
        feed.features(val),
        targets_of(val, classes),
        model.multi_label,
        options.label_smoothing,
    )
    set_head(model, heads[best])
    on_best(model)
    facts = phase_facts(model, "head", started, 0.0, freezing.check_moved(model, before), path, best + 1)
    return {**facts, "solver": "lbfgs", "kept": True, "val_loss": path[best]["val_loss"], "simplest": heads[simplest]}


def set_head(model: Classifier, head: tuple) -> None:
    """head: kernel [d, classes] and bias [classes]."""
    model.head.kernel.assign(head[0])
    model.head.bias.assign(head[1])


def fit_from(model: Classifier, head: tuple, fit: Callable, **arguments) -> dict:
    """Run a phase from another head than the model's; where the phase is not kept, the model gets its own back."""
    own = model.head.kernel.numpy(), model.head.bias.numpy()
    set_head(model, head)
    phase = fit(**arguments)
    if not phase["kept"]:
        set_head(model, own)
    return phase


def make_updates(model: Classifier, feed: Feed, learning_rate: float, total_steps: int, options, strategy, spec=None):
    """What updates the weights in a phase: the optimizer, the train step and the moving average (None without)."""
    schedule = learning_rate
    if options.schedule == "cosine":
        schedule = optimizers.warmup_cosine(learning_rate, total_steps, options.warmup)
    with strategy.scope():
        optimizer = optimizers.make_optimizer(
            options.optimizer, model, schedule, options.weight_decay, options.clip_norm or None
        )
        loss_scale = LossScale() if options.precision == "float16" else None
        average = MovingAverage(model, options.ema) if options.ema else None
    train_step = make_train_step(
        model,
        optimizer,
        strategy,
        options.accumulation_steps,
        options.label_smoothing,
        loss_scale,
        average,
        feed.forward,
        spec,
    )
    return optimizer, train_step, average


def check_finite(phase: str, epoch: int, loss: float, val_loss: float, learning_rate: float) -> None:
    """Raise GraftError for a loss that is no number. epoch: counted from 1 within the phase."""
    if not math.isfinite(loss + val_loss):
        raise GraftError(
            f"The loss of phase {phase} is not finite in epoch {epoch} (train {loss}, validation {val_loss}). "
            f"Lower the learning rate ({learning_rate:g} now)."
        )


def train_epoch(train_step, batches, observers, set_dropout_seeds, first_step: int) -> tuple[float, float]:
    """One pass over the batches: the epoch's mean loss (as trained on) and share of correct answers."""
    sums = np.zeros(4)
    for step, batch in enumerate(batches):
        set_dropout_seeds(first_step + step)
        observers.on_train_batch_begin(step)
        sums += train_step(batch).numpy()
        observers.on_train_batch_end(step, {"loss": sums[0] / sums[1], "accuracy": sums[2] / sums[3]})
    return float(sums[0] / sums[1]), float(sums[2] / sums[3])


def dropout_seeder(model: Classifier, seed: int):
    """A function of the step that sets every dropout layer's random state: dropout is a function of (seed, step)."""
    generators = [layer.seed_generator for layer in model._flatten_layers() if hasattr(layer, "seed_generator")]

    def set_seeds(step: int) -> None:
        for index, generator in enumerate(generators):
            state = np.array([seed * 1_000_003 + index, step * 65_536], np.uint64) % 2**32
            generator.state.assign(state.astype(np.uint32))

    return set_seeds


# ---------------------------------------------------------------- two phases


def check_batch_size(options, replicas: int) -> None:
    """Raise GraftError where the replicas cannot share a batch evenly in its accumulation steps."""
    if options.batch_size % (replicas * options.accumulation_steps):
        raise GraftError(
            f"--batch-size {options.batch_size} cannot be shared evenly by {replicas} devices in "
            f"{options.accumulation_steps} accumulation steps. "
            f"Give a multiple of {replicas * options.accumulation_steps}."
        )


def fit_two_phase(
    model: Classifier,
    splits: Splits,
    loader,
    config,
    strategy,
    *,
    callbacks=(),
    on_start=None,
    on_best=None,
    on_end=None,
    read_inputs=None,
) -> tuple[list[dict], Callable]:
    """Phase 1: the head on the frozen backbone. Phase 2: the top `--depth` blocks too, at reduced rates.

    A phase 2 that does not improve validation is undone: the model leaves with the weights of phase 1.

    Args:
        loader: augmentation name -> `load` function for `pipelines.data.dataset`; also called with
            `random_erasing=probability` where that is asked for.
        config: `pipelines.config.ImageConfig` or its like.
        on_start: (name, trainable table), before each phase.
        on_best: (name, model), whenever validation has improved.
        read_inputs: of data without a loader: examples -> a list of (rows, arrays [n, ...] that the model takes),
            each a part of the examples of one length.
        on_end: (phase dict of `fit_phase`, function of a table -> logits), after each phase; it may add to the dict.

    Returns:
        The phase dicts, and the last phase's function of a table of the splits -> logits [n, classes].
    """
    options, phases = config.training, []
    check_batch_size(options, strategy.num_replicas_in_sync)
    train = splits.train
    if options.class_weights == "balanced":
        train = class_weighted(train, len(splits.class_names))
    count = depth_blocks(config.model.depth) if config.fine_tune.fine_tune_epochs else 0
    cut = len(model.blocks) - count if count else 0
    feeds = Feeds(model, splits, train, loader, config, strategy, read_inputs)

    def run_phase(name, feed, rate, fit, **more):
        if on_start:
            on_start(name, freezing.trainable_table(model, rate, optimizers.block_multipliers(model)))
        save = (lambda model: on_best(name, model)) if on_best else lambda model: None
        phases.append(fit(feed=feed, train=train, val=splits.val, options=options, on_best=save, **more))
        logits_of = feed_predictor(feed.forward, feed.batches, strategy)
        if on_end:
            on_end(phases[-1], logits_of)
        return logits_of

    by_steps = {"strategy": strategy, "callbacks": callbacks}
    freezing.freeze(model)
    feed, head = feeds.head(cut), config.head
    if feed.features and head.head_solver == "auto" and strategy.num_replicas_in_sync == 1:
        logits_of = run_phase("head", feed, 0.0, functools.partial(fit_head_by_lbfgs, model))
    else:
        fit = functools.partial(fit_phase, model, "head", epochs=head.head_epochs, **by_steps)
        rate = head.head_learning_rate
        logits_of = run_phase("head", feed, rate, fit, learning_rate=rate)
    simplest = phases[0].pop("simplest", None)
    if count == 0:
        return phases, logits_of

    if count is None:
        freezing.unfreeze_all(model, config.model.train_batch_norm)
    else:
        freezing.unfreeze_top(model, count, config.model.train_batch_norm)
    fit = functools.partial(fit_phase, model, "fine_tune", epochs=config.fine_tune.fine_tune_epochs, **by_steps)
    if simplest:
        fit = functools.partial(fit_from, model, simplest, fit)
    rate = config.fine_tune.fine_tune_learning_rate
    first_epoch = 0 if "solver" in phases[0] else phases[0]["epochs"]
    more = {"learning_rate": rate, "first_epoch": first_epoch, "best_val_loss": phases[0]["val_loss"]}
    return phases, run_phase("fine_tune", feeds.fine_tune(cut), rate, fit, **more)
