"""The training loop and the two phases.

The loop is ours because `Model.fit` under a strategy averages, clips and counts wrongly (see the
tests): `strategy.run` inside one tf.function, full batches padded with weight 0, losses divided by the
weight of the global batch, so that any number of replicas and of accumulation steps gives the same update.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable

import keras
import numpy as np

from models import GraftError, freezing
from models import optimizer as optimizers
from models.classifier import Classifier
from models.precision import set_precision
from pipelines import ladder, stopping
from pipelines.config import budget_seconds, depth_blocks
from pipelines.console import console
from pipelines.data import Splits, targets_of
from pipelines.distribute import chief_says, distributed, from_chief, is_chief, shard_of, summed
from pipelines.epochs import Updates, make_updates, train_epoch
from pipelines.feeds import Feed, Feeds
from pipelines.guards import ForgettingGuard
from pipelines.head_solver import ROWS_AT_ONCE, solve_head
from pipelines.prediction import feed_predictor, predict_logits
from pipelines.recovery import Diverged, Progress, Recovery, put_back
from pipelines.steps import make_predict_step, objective_of, share_correct
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
    recovery: Recovery | None = None,
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
        recovery: saves where training is, and knows where an earlier process has been; turned to this phase.

    Returns:
        What `phase_facts` gives, with a row of history per epoch; kept and val_loss of the best one; right [val]: what
        the epoch of this phase with the lowest validation loss had right, kept or not, as `share_correct` gives it;
        forgot: whether the limit was passed; rollbacks, where there were any: epoch, step, loss, new learning_rate.

    Raises:
        GraftError: a loss that is no number, at lower rates too.
    """
    started, recovery = time.perf_counter(), recovery or Recovery()
    if not recovery.name:
        recovery.begin(name)
    steps = len(feed.train_batches(0, first_epoch))
    val_targets = targets_of(val, model.head.units)
    spec = distributed(strategy, feed.batches(val)).element_spec
    objective = objective_of(model)
    predict_step = make_predict_step(feed.forward, strategy, spec, objective.outputs)
    before, moving = freezing.checksums(model), freezing.moving_weights(model)

    def prepare(state) -> tuple[Updates, Progress]:
        """What updates the weights, and how far it is: from the beginning, or as a state says."""
        rate = learning_rate * (state[0]["rate_factor"] if state else 1.0)
        updates = make_updates(model, feed, rate, steps * epochs, moving, options, strategy, spec)
        model.optimizer = updates.optimizer  # what Keras callbacks read
        new = {"best_val_loss": best_val_loss, "best_weights": [weight.numpy() for weight in moving]}
        progress = put_back(state, updates.variables) if state else Progress(**new)
        recovery.watch(progress, updates.variables)
        return updates, progress

    updates, progress = prepare(recovery.newest_state())
    model.stop_training = False
    done = (progress.epoch, progress.step)
    observers = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=epochs, steps=steps, done=done)
    observers.on_train_begin()
    set_precision(model, options.precision)
    try:
        with recovery.saved_when_stopped():
            while progress.epoch < epochs and not progress.ended:
                epoch_started, number = time.perf_counter(), first_epoch + progress.epoch
                observers.on_epoch_begin(epochs_aside + number)
                try:
                    batches = distributed(strategy, feed.train_batches(progress.epoch, number, progress.step))
                    train_epoch(updates, batches, observers, progress, recovery, steps, number * steps, model)
                    with updates.validating():
                        logits = predict_logits(predict_step, strategy, feed.batches(val), val.num_rows)
                        figures = objective.figures(val_targets, logits)
                    val_loss, val_accuracy = chief_says(strategy, figures)
                    if not math.isfinite(val_loss):
                        raise Diverged(val_loss)
                except Diverged as diverged:
                    updates, progress = prepare(recovery.go_back(diverged.loss, learning_rate))
                    continue
                with stopping.held():
                    with updates.validating():
                        drift, forgot = guard() if guard else ({}, False)
                        (forgot,) = map(bool, chief_says(strategy, [forgot]))
                        is_best = val_loss < progress.best_val_loss and not forgot
                        if is_best:
                            on_best(model)
                        right = objective.shares(val_targets, logits)
                        progress.book(val_loss, right, [weight.numpy() for weight in moving] if is_best else None)
                    row = {"loss": progress.mean_loss, "accuracy": progress.accuracy}
                    row |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
                    row["learning_rate"] = float(keras.ops.convert_to_numpy(updates.optimizer.learning_rate))
                    seconds = {"seconds": time.perf_counter() - epoch_started}
                    progress.end_epoch({"epoch": epochs_aside + number + 1, **row, **drift, **seconds})
                    shown = row | {key: drift[key] for key in drift if key != "weight_distance"}
                    observers.on_epoch_end(epochs_aside + number, shown)
                    late = time.perf_counter() + recovery.spent_s > deadline
                    ended = forgot or late or model.stop_training or has_enough(progress, options)
                    progress.forgot, progress.ended = map(bool, chief_says(strategy, [forgot, ended]))
                    recovery.save()
    finally:  # after Ctrl-C too: the progress bar gives the terminal back
        set_precision(model, "float32")
        observers.on_train_end()

    moved = freezing.check_moved(model, before)
    for weight, value in zip(moving, progress.best_weights):
        weight.assign(value)
    started -= recovery.spent_s
    facts = phase_facts(model, name, started, learning_rate, moved, progress.history, progress.best_epoch)
    facts |= {"rollbacks": progress.rollbacks} if progress.rollbacks else {}
    facts |= {"kept": progress.best_epoch > 0, "val_loss": progress.best_val_loss}
    return {**facts, "right": progress.right, "forgot": progress.forgot}


def has_enough(progress: Progress, options) -> bool:
    """Whether a phase has waited long enough for a better epoch, or reached --target."""
    # For itself: a deeper phase may need longer to pass the one before.
    waited = progress.epoch - progress.own_epoch >= options.patience
    reached = 0 < options.target <= progress.history[-1]["val_accuracy"]
    return waited or (reached and progress.best_epoch == progress.epoch)


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


def fit_head_by_lbfgs(
    model: Classifier, strategy, feed: Feed, train, val, *, options, on_best=lambda model: None
) -> dict:
    """Phase 1 where the features are at hand: the best logistic regression becomes the head.

    Every device or worker could find it; with several workers the chief does, and tells the others.

    Returns:
        What `fit_phase` gives, and solver "lbfgs"; history has a row per penalty tried (l2, iterations), and
        epochs and best_epoch count those. No learning rate, no dropout: the penalty is what regularises.
        `simplest` is the (kernel, bias) that phase 2 should start from.
    """
    started = time.perf_counter()
    before = freezing.checksums(model)
    classes = model.head.units
    val_features, val_targets = feed.features(val), targets_of(val, model.head.units)
    found = None
    if is_chief(strategy):
        weights, smoothing = train["weight"].to_numpy(), options.label_smoothing
        examples = feed.features(train), targets_of(train, classes), weights, val_features, val_targets
        heads, path, best, simplest = solve_head(*examples, model.multi_label, smoothing)
        arrays = zip(("kernel", "bias", "simple_kernel", "simple_bias"), (*heads[best], *heads[simplest]))
        found = {"path": path, "best": best}, dict(arrays)
    facts, arrays = from_chief(strategy, found)
    path, best, kernel, bias = facts["path"], facts["best"], arrays["kernel"], arrays["bias"]
    model.head.kernel.assign(kernel)
    model.head.bias.assign(bias)
    on_best(model)
    starts = range(0, val.num_rows, ROWS_AT_ONCE)
    logits = np.concatenate([val_features[first : first + ROWS_AT_ONCE] @ kernel + bias for first in starts])
    right = share_correct(val_targets, logits, model.multi_label).numpy()
    facts = phase_facts(model, "head", started, 0.0, freezing.check_moved(model, before), path, best + 1)
    figures = {"solver": "lbfgs", "kept": True, "val_loss": path[best]["val_loss"]}
    return {**facts, **figures, "simplest": (arrays["simple_kernel"], arrays["simple_bias"]), "right": right}


def head_fit(model: Classifier, feed: Feed, options, strategy, **more) -> tuple[float, Callable]:
    """How phase 1 is trained: its learning rate (0 by L-BFGS, which has none), and `fit_phase` or its like.

    options: `pipelines.options.HeadOptions`; more: arguments of `fit_phase`.
    """
    at_hand = summed(strategy, np.float64([feed.features is not None]))[0] == shard_of(strategy)[1]  # for every worker
    if at_hand and options.head_solver == "auto":
        return 0.0, functools.partial(fit_head_by_lbfgs, model, strategy)
    rate = options.head_learning_rate
    more |= {"epochs": options.head_epochs, "learning_rate": rate, "strategy": strategy}
    return rate, functools.partial(fit_phase, model, "head", **more)


# ---------------------------------------------------------------- two phases


def scaled(config, replicas: int):
    """The configuration, with batch and rates times the replicas under --scale-batch linear."""
    if config.training.scale_batch == "none" or replicas == 1:
        return config
    config = copy.deepcopy(config)
    config.training.batch_size *= replicas
    config.head.head_learning_rate *= replicas
    config.fine_tune.fine_tune_learning_rate *= replicas
    return config


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
    recovery: Recovery | None = None,
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
        recovery: what an earlier process of this run has saved; phases that have ended are not trained again.
        on_end: (phase dict of `fit_phase`, function of a table -> logits), after each phase; it may add to the dict.

    Returns:
        The phase dicts, each with `climb` (`pipelines.ladder.climb_facts`, went_on and because), and a function of a
        table of the splits -> logits [n, classes] of the model as it leaves (the outputs of its own objective, where
        it has one).
    """
    config, recovery = scaled(config, strategy.num_replicas_in_sync), recovery or Recovery()
    options, phases = config.training, []
    total, thawable = len(model.blocks), freezing.thawable_blocks(model)
    check_batch_size(options, strategy.num_replicas_in_sync)
    train = splits.train
    if options.class_weights == "balanced":
        train = class_weighted(train, len(splits.class_names))
    epochs = config.fine_tune.fine_tune_epochs
    depth = config.model.depth if epochs else "head"
    rungs = ladder.rungs_of(depth, depth_blocks(depth), config.model.light_blocks, thawable)
    cuts = [total - (blocks or thawable) for _, blocks in rungs]
    feeds = Feeds(model, splits, train, loader, config, strategy, read_inputs)
    recovery.start_run({"the data": splits.fingerprint, "the backbone": feeds.frozen.digest})
    guard = ForgettingGuard(model, train, config.guards.forgetting_limit, functools.partial(summed, strategy))
    clock, best = ladder.Clock(budget_seconds(options.budget)), {}

    def run_phase(name, feed, rate, fit) -> None:
        """Train, compare with the best phase so far, and decide whether to go on."""
        if on_start:
            on_start(name, freezing.trainable_table(model, rate, optimizers.block_multipliers(model)))
        save = (lambda model: on_best(name, model)) if on_best else lambda model: None
        recovery.begin(name)
        weights = freezing.moving_weights(model)
        phase = recovery.ended_phase(weights)
        anew = phase is None
        if anew:
            phase = fit(feed=feed, train=train, val=splits.val, options=options, on_best=save)
        seconds = clock.stop(recovery.spent_s)
        if anew:
            recovery.end(phase, weights, seconds)
        right = phase.pop("right")
        phase["climb"] = ladder.climb_facts(phase, seconds, right, best.get("right"))
        if phase["kept"]:
            outputs = objective_of(model).outputs
            best.update(right=right, feed=feed, logits_of=feed_predictor(feed.forward, feed.batches, strategy, outputs))
        phases.append(phase)
        needed = ladder.seconds_needed(phases, rungs, thawable, epochs)
        went_on, because = ladder.decide(phases, rungs, options.target, clock.left, needed)
        went_on = bool(*chief_says(strategy, [went_on]))  # workers' clocks differ
        phase["climb"] |= {"went_on": went_on, "because": because}
        if on_end:
            on_end(phase, best["logits_of"])
        if name == "head":
            far = on_features(feed.features) if on_features and feed.features else False
            best["far"] = bool(*chief_says(strategy, [bool(far)]))
        if depth == "auto" or (not went_on and len(phases) < len(rungs)):
            console.print(f"  {'Going on' if went_on else 'No further'}: {because}.\n")
        clock.start()

    by_steps = {"strategy": strategy, "callbacks": callbacks}
    freezing.freeze(model)
    feed = feeds.head(cuts[1] if len(rungs) > 1 else 0)
    rate, fit = head_fit(model, feed, config.head, deadline=clock.deadline, recovery=recovery, **by_steps)
    run_phase("head", feed, rate, fit)
    simplest = phases[0].pop("simplest", None)

    start = None
    while phases[-1]["climb"]["went_on"]:
        name, blocks = rungs[len(phases)]
        tuning = ladder.far_options(config.fine_tune, best["far"] and blocks is None)
        if tuning is not config.fine_tune:
            console.print(ladder.FAR)
        rate = tuning.fine_tune_learning_rate
        freezing.unfreeze_top(model, blocks or thawable, config.model.train_batch_norm)
        if start is None:
            weights = freezing.moving_weights(model) if len(rungs) > 2 else model.head.weights
            start = ladder.starting_weights(weights, model.head.weights, simplest)
        # The order of the data is that of a run of this phase alone: full gives what --depth full would have given.
        first_epoch = 0 if "solver" in phases[0] else phases[0]["epochs"]
        more = {"first_epoch": first_epoch, "epochs_aside": sum(phase["epochs"] for phase in phases[1:])}
        more |= {"learning_rate": rate, "best_val_loss": ladder.best_phase(phases)["val_loss"], **by_steps}
        feed = feeds.fine_tune(cuts[len(phases)], tuning)
        more |= {"epochs": epochs, "deadline": clock.deadline, "guard": guard.begin(feed), "recovery": recovery}
        fit = functools.partial(fit_phase, model, name, **more)
        run_phase(name, feed, rate, functools.partial(ladder.fit_from, start, fit))
    if config.guards.wise_ft:
        average_kept(guard, best["feed"], best["logits_of"], splits.val, phases, on_best)
    return phases, best["logits_of"]
