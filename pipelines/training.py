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
from pipelines import ladder
from pipelines.config import budget_seconds, depth_blocks
from pipelines.console import console
from pipelines.data import Splits, targets_of
from pipelines.feeds import Feed, Feeds
from pipelines.guards import ForgettingGuard
from pipelines.head_solver import ROWS_AT_ONCE, solve_head
from pipelines.prediction import feed_predictor, predict_logits
from pipelines.steps import (
    MovingAverage,
    dropout_seeder,
    make_predict_step,
    make_train_step,
    mean_loss_and_accuracy,
    share_correct,
    train_epoch,
)
from pipelines.weight_average import average_kept


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
    epochs_aside: int = 0,
    best_val_loss: float = math.inf,
    deadline: float = math.inf,
    guard=None,
) -> dict:
    """Train what is flagged trainable, stop early, and leave the model with its best weights, computing in float32.

    With `options.ema` the weights that are validated and kept are the averaged ones.

    Args:
        name: "head" or "fine_tune"; "light" or "full" under --depth auto.
        feed: what to train on; train, val: tables of the training and the validation set.
        options: `pipelines.config.TrainingOptions`.
        on_best: called with the model whenever validation has improved, to save it.
        first_epoch: epochs of earlier phases: data order and logs go on from there.
        epochs_aside: of phases that this one does not go on from: only the logs go on from there.
        best_val_loss: what must be beaten; if no epoch does, the model leaves as it came.
        deadline: of time.perf_counter(); the epoch in which it passes is the last.
        guard: a `ForgettingGuard`: its figures go into the history; an epoch beyond its limit is the last, not kept.

    Returns:
        What `phase_facts` gives, with a row of history per epoch; kept and val_loss of the best one; right [val]: what
        the epoch of this phase with the lowest validation loss had right, kept or not, as `share_correct` gives it;
        forgot: whether the limit was passed.
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
    own_loss, own_epoch, right = math.inf, 0, None

    model.optimizer, model.stop_training = optimizer, False  # what Keras callbacks read
    observers = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=epochs, steps=steps)
    observers.on_train_begin()
    set_precision(model, options.precision)
    try:
        for epoch in range(epochs):
            epoch_started = time.perf_counter()
            shown = epochs_aside + first_epoch + epoch
            observers.on_epoch_begin(shown)
            batches = strategy.experimental_distribute_dataset(feed.train_batches(epoch, first_epoch + epoch))
            first_step = (first_epoch + epoch) * steps
            loss, accuracy = train_epoch(train_step, batches, observers, set_dropout_seeds, first_step)
            with average.in_place() if average else contextlib.nullcontext():
                logits = predict_logits(predict_step, strategy, feed.batches(val), val.num_rows)
                val_loss, val_accuracy = mean_loss_and_accuracy(val_targets, logits, model.multi_label)
                check_finite(name, epoch + 1, loss, val_loss, learning_rate)
                drift, forgot = guard() if guard else ({}, False)
                if val_loss < own_loss:
                    own_loss, own_epoch = val_loss, epoch + 1
                    right = share_correct(val_targets, logits, model.multi_label).numpy()
                if val_loss < best_val_loss and not forgot:
                    best_val_loss, best_epoch = val_loss, epoch + 1
                    best_weights = [weight.numpy() for weight in moving]
                    on_best(model)
            row = {"loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
            row["learning_rate"] = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            history.append({"epoch": shown + 1, **row, **drift, "seconds": time.perf_counter() - epoch_started})
            observers.on_epoch_end(shown, row | {key: drift[key] for key in drift if key != "weight_distance"})
            waited = epoch + 1 - own_epoch >= options.patience  # for itself: a deeper phase may need longer to pass
            enough = best_epoch == epoch + 1 and 0 < options.target <= val_accuracy
            if forgot or waited or enough or model.stop_training or time.perf_counter() > deadline:
                break
    finally:  # after Ctrl-C too: the progress bar gives the terminal back
        set_precision(model, "float32")
        observers.on_train_end()

    moved = freezing.check_moved(model, before)
    for weight, value in zip(moving, best_weights):
        weight.assign(value)
    facts = phase_facts(model, name, started, learning_rate, moved, history, best_epoch)
    return {**facts, "kept": best_epoch > 0, "val_loss": best_val_loss, "right": right, "forgot": forgot}


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
    val_features, val_targets = feed.features(val), targets_of(val, model.head.units)
    heads, path, best, simplest = solve_head(
        feed.features(train),
        targets_of(train, classes),
        train["weight"].to_numpy(),
        val_features,
        val_targets,
        model.multi_label,
        options.label_smoothing,
    )
    kernel, bias = heads[best]
    model.head.kernel.assign(kernel)
    model.head.bias.assign(bias)
    on_best(model)
    starts = range(0, val.num_rows, ROWS_AT_ONCE)
    logits = np.concatenate([val_features[first : first + ROWS_AT_ONCE] @ kernel + bias for first in starts])
    right = share_correct(val_targets, logits, model.multi_label).numpy()
    facts = phase_facts(model, "head", started, 0.0, freezing.check_moved(model, before), path, best + 1)
    figures = {"solver": "lbfgs", "kept": True, "val_loss": path[best]["val_loss"]}
    return {**facts, **figures, "simplest": heads[simplest], "right": right}


def head_fit(model: Classifier, feed: Feed, options, strategy, **more) -> tuple[float, Callable]:
    """How phase 1 is trained: its learning rate (0 by L-BFGS, which has none), and `fit_phase` or its like.

    options: `pipelines.options.HeadOptions`; more: arguments of `fit_phase`.
    """
    if feed.features and options.head_solver == "auto" and strategy.num_replicas_in_sync == 1:
        return 0.0, functools.partial(fit_head_by_lbfgs, model)
    rate = options.head_learning_rate
    more |= {"epochs": options.head_epochs, "learning_rate": rate, "strategy": strategy}
    return rate, functools.partial(fit_phase, model, "head", **more)


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
    on_features=None,
) -> tuple[list[dict], Callable]:
    """The head on the frozen backbone first, then the top `--depth` blocks too, at reduced rates.

    With --depth auto the phases are the rungs of `pipelines.ladder`: head, light and full, for as long as it may pay.
    With any other depth they are head and fine_tune. A phase that does not improve validation is undone: the model
    leaves with the weights of the best one.

    Args:
        loader: augmentation name -> `load` function for `pipelines.data.dataset`; also called with
            `random_erasing=probability` where that is asked for.
        config: `pipelines.config.ImageConfig` or its like.
        on_start: (name, trainable table), before each phase.
        on_best: (name, model), whenever validation has improved.
        read_inputs: of data without a loader: examples -> a list of (rows, arrays [n, ...] that the model takes),
            each a part of the examples of one length.
        on_features: (function of a table -> pooled pretrained features), once phase 1 has them; not without a cache.
            Where it gives True, the features have to change a lot: a full phase has `ladder.far_options`.
        on_end: (phase dict of `fit_phase`, function of a table -> logits), after each phase; it may add to the dict.

    Returns:
        The phase dicts, each with `climb` (`pipelines.ladder.climb_facts`, went_on and because), and a function of a
        table of the splits -> logits [n, classes] of the model as it leaves.
    """
    options, phases, total = config.training, [], len(model.blocks)
    check_batch_size(options, strategy.num_replicas_in_sync)
    train = splits.train
    if options.class_weights == "balanced":
        train = class_weighted(train, len(splits.class_names))
    epochs = config.fine_tune.fine_tune_epochs
    depth = config.model.depth if epochs else "head"
    rungs = ladder.rungs_of(depth, depth_blocks(depth), config.model.light_blocks, total)
    cuts = [total - blocks if blocks else 0 for _, blocks in rungs]
    feeds = Feeds(model, splits, train, loader, config, strategy, read_inputs)
    guard = ForgettingGuard(model, train, config.guards.forgetting_limit)
    clock, best = ladder.Clock(budget_seconds(options.budget)), {}

    def run_phase(name, feed, rate, fit) -> None:
        """Train, compare with the best phase so far, and decide whether to go on."""
        if on_start:
            on_start(name, freezing.trainable_table(model, rate, optimizers.block_multipliers(model)))
        save = (lambda model: on_best(name, model)) if on_best else lambda model: None
        phase = fit(feed=feed, train=train, val=splits.val, options=options, on_best=save)
        right = phase.pop("right")
        phase["climb"] = ladder.climb_facts(phase, clock.stop(), right, best.get("right"))
        if phase["kept"]:
            best.update(right=right, feed=feed, logits_of=feed_predictor(feed.forward, feed.batches, strategy))
        phases.append(phase)
        needed = ladder.seconds_needed(phases, rungs, total, epochs)
        went_on, because = ladder.decide(phases, rungs, options.target, clock.left, needed)
        phase["climb"] |= {"went_on": went_on, "because": because}
        if on_end:
            on_end(phase, best["logits_of"])
        if on_features and name == "head" and feed.features:
            best["far"] = on_features(feed.features)
        if depth == "auto" or (not went_on and len(phases) < len(rungs)):
            console.print(f"  {'Going on' if went_on else 'No further'}: {because}.\n")
        clock.start()

    by_steps = {"strategy": strategy, "callbacks": callbacks}
    freezing.freeze(model)
    feed = feeds.head(cuts[1] if len(rungs) > 1 else 0)
    rate, fit = head_fit(model, feed, config.head, deadline=clock.deadline, **by_steps)
    run_phase("head", feed, rate, fit)
    simplest = phases[0].pop("simplest", None)

    start = None
    while phases[-1]["climb"]["went_on"]:
        name, blocks = rungs[len(phases)]
        tuning = ladder.far_options(config.fine_tune, bool(best.get("far")) and blocks is None)
        if tuning is not config.fine_tune:
            console.print(ladder.FAR)
        rate = tuning.fine_tune_learning_rate
        freezing.unfreeze_top(model, blocks or total, config.model.train_batch_norm)
        if start is None:
            weights = freezing.moving_weights(model) if len(rungs) > 2 else model.head.weights
            start = ladder.starting_weights(weights, model.head.weights, simplest)
        # The order of the data is that of a run of this phase alone: full gives what --depth full would have given.
        first_epoch = 0 if "solver" in phases[0] else phases[0]["epochs"]
        more = {"first_epoch": first_epoch, "epochs_aside": sum(phase["epochs"] for phase in phases[1:])}
        more |= {"learning_rate": rate, "best_val_loss": ladder.best_phase(phases)["val_loss"], **by_steps}
        feed = feeds.fine_tune(cuts[len(phases)], tuning)
        more |= {"epochs": epochs, "deadline": clock.deadline, "guard": guard.begin(feed)}
        fit = functools.partial(fit_phase, model, name, **more)
        run_phase(name, feed, rate, functools.partial(ladder.fit_from, start, fit))
    if config.guards.wise_ft:
        average_kept(guard, best["feed"], best["logits_of"], splits.val, phases, on_best)
    return phases, best["logits_of"]
