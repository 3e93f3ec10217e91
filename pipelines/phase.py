"""One phase of training: the loop over epochs, or for the head alone L-BFGS.

The loop is ours because `Model.fit` under a strategy averages, clips and counts wrongly (see the
tests): `strategy.run` inside one tf.function, full batches padded with weight 0, losses divided by the
weight of the global batch, so that any number of replicas and of accumulation steps gives the same update.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import numpy as np

from models import freezing
from models import optimizer as optimizers
from models.classifier import Classifier
from models.precision import computing_in
from pipelines import stopping
from pipelines.callbacks import observed
from pipelines.data import targets_of
from pipelines.distribute import chief_says, distributed, from_chief, is_chief, shard_of, summed
from pipelines.epochs import Updates, make_updates, train_epoch, validator
from pipelines.feeds import Feed
from pipelines.head_solver import ROWS_AT_ONCE, solve_head
from pipelines.progress import Diverged, Progress, put_back
from pipelines.recovery import Recovery
from pipelines.steps import share_correct


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
    or_all_right: bool = False,
    deadline: float = math.inf,
    guard=None,
    recovery: Recovery | None = None,
) -> dict:
    """Train what is flagged trainable, stop early, and leave the model with its best weights, computing in float32.

    With `options.ema` the weights that are validated and kept are the averaged ones.

    Args:
        name: "head" or "fine_tune"; "light" or "full" under --depth auto.
        feed: what to train on; train, val: tables of the training and the validation set.
        options: `pipelines.common_options.TrainingOptions`.
        on_best: called with the model whenever validation has improved, to save it.
        first_epoch: epochs of earlier phases: data order and logs go on from there.
        epochs_aside: of phases that this one does not go on from: only the logs go on from there.
        best_val_loss: what must be beaten; if no epoch does, the model leaves as it came.
        or_all_right: an epoch that has all of validation right need not beat it, only the others of its phase.
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
    spec = distributed(strategy, feed.batches(val)).element_spec
    validate = validator(model, feed, val, strategy, spec)
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
    observing = observed(model, callbacks, epochs, steps, done=(progress.epoch, progress.step))
    with observing as observers, computing_in(model, options.precision), recovery.saved_when_stopped():
        while progress.epoch < epochs and not progress.ended:
            epoch_started, number = time.perf_counter(), first_epoch + progress.epoch
            observers.on_epoch_begin(epochs_aside + number)
            try:
                batches = distributed(strategy, feed.train_batches(progress.epoch, number, progress.step))
                train_epoch(updates, batches, observers, progress, recovery, steps, number * steps, model)
                val_loss, val_accuracy, right = validate(updates)
            except Diverged as diverged:
                updates, progress = prepare(recovery.go_back(diverged.loss, learning_rate))
                continue
            with stopping.held():
                with updates.validating():
                    drift, forgot = look_back(guard, strategy)
                    good = val_loss < best_val_loss or (or_all_right and val_accuracy == 1)
                    first = progress.best_epoch == 0
                    is_best = good and not forgot and (first or val_loss < progress.best_val_loss)
                    if is_best:
                        on_best(model)
                    progress.book(val_loss, right, [weight.numpy() for weight in moving] if is_best else None)
                row = {"loss": progress.mean_loss, "accuracy": progress.accuracy}
                row |= {"val_loss": val_loss, "val_accuracy": val_accuracy, "learning_rate": updates.learning_rate}
                seconds = {"seconds": time.perf_counter() - epoch_started}
                progress.end_epoch({"epoch": epochs_aside + number + 1, **row, **drift, **seconds})
                shown = row | {key: drift[key] for key in drift if key != "weight_distance"}
                observers.on_epoch_end(epochs_aside + number, shown)
                late = time.perf_counter() + recovery.spent_s > deadline
                ended = forgot or late or model.stop_training or has_enough(progress, options)
                progress.forgot, progress.ended = map(bool, chief_says(strategy, [forgot, ended]))
                recovery.save()

    moved = freezing.check_moved(model, before)
    for weight, value in zip(moving, progress.best_weights):
        weight.assign(value)
    started -= recovery.spent_s
    facts = phase_facts(model, name, started, learning_rate, moved, progress.history, progress.best_epoch)
    return facts | progress.outcome()


def look_back(guard, strategy) -> tuple[dict, bool]:
    """What a guard says of the features now, and whether they are beyond its limit; nothing without one."""
    drift, forgot = guard() if guard else ({}, False)
    return drift, bool(*chief_says(strategy, [forgot]))


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

    options: `pipelines.common_options.HeadOptions`; more: arguments of `fit_phase`.
    """
    at_hand = summed(strategy, np.float64([feed.features is not None]))[0] == shard_of(strategy)[1]  # for every worker
    if at_hand and options.head_solver == "auto":
        return 0.0, functools.partial(fit_head_by_lbfgs, model, strategy)
    if not getattr(model, "objective", None):
        # From zeros, as L-BFGS: what is random where the training set has no say stays, and is wrong elsewhere. On
        # unseen voices of `spoken_words` such heads got 0.931 to 0.975 right, those from zeros 0.975 to 0.981.
        model.head.kernel.assign(np.zeros(model.head.kernel.shape, np.float32))
    rate = options.head_learning_rate
    more |= {"epochs": options.head_epochs, "learning_rate": rate, "strategy": strategy}
    return rate, functools.partial(fit_phase, model, "head", **more)
