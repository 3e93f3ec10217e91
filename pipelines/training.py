"""Both phases: the head on the frozen backbone first, then the top blocks too; each is one of `pipelines/phase.py`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np

from models import GraftError, freezing
from models import optimizer as optimizers
from models.classifier import Classifier
from pipelines import ladder
from pipelines.config import budget_seconds, depth_blocks
from pipelines.console import console
from pipelines.data import Splits
from pipelines.distribute import chief_says, summed
from pipelines.feeds import Feeds
from pipelines.guards import ForgettingGuard
from pipelines.phase import fit_phase, head_fit
from pipelines.prediction import feed_predictor
from pipelines.recovery import Recovery
from pipelines.steps import objective_of
from pipelines.weight_average import average_kept


def class_weighted(table, class_count: int):
    """The table with each example's weight divided by its class's share: every class weighs the same in the loss."""
    labels = table["label"].to_numpy()
    counts = np.bincount(labels, minlength=class_count)
    weights = (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)
    return table.set_column(table.schema.get_field_index("weight"), "weight", [weights])


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
    leaves with the weights of the best one. (Where validation cannot tell, see `pipelines.ladder.must_beat`.)

    Args:
        loader: augmentation name -> `load` function for `pipelines.data.dataset`; also called with
            `random_erasing=probability` where that is asked for.
        config: `pipelines.options.ImageConfig` or its like.
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
        fit = functools.partial(fit, feed=feed, train=train, val=splits.val, options=options, on_best=save)
        phase, seconds = fit_or_find(model, name, fit, recovery, clock)
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
        feed = feeds.fine_tune(cuts[len(phases)], tuning)
        more = {"epochs": epochs, "learning_rate": rate, "deadline": clock.deadline, "guard": guard.begin(feed)}
        more |= {"recovery": recovery, **ladder.after(phases, depth), **by_steps}
        fit = functools.partial(fit_phase, model, name, **more)
        run_phase(name, feed, rate, functools.partial(ladder.fit_from, start, fit))
    if config.guards.wise_ft:
        average_kept(guard, best["feed"], best["logits_of"], splits.val, phases, on_best)
    return phases, best["logits_of"]


def fit_or_find(model: Classifier, name: str, fit: Callable, recovery: Recovery, clock) -> tuple[dict, float]:
    """What a phase gives, and its seconds: trained here, or by an earlier process of this run, which has noted it."""
    recovery.begin(name)
    weights = freezing.moving_weights(model)
    phase = recovery.ended_phase(weights)
    if phase is not None:
        return phase, clock.stop(recovery.spent_s)
    phase = fit()
    seconds = clock.stop(recovery.spent_s)
    recovery.end(phase, weights, seconds)
    return phase, seconds
