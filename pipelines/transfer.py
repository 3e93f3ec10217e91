"""Whether transfer is of use here: what was pretrained against random weights and against the bare input.

The same linear probe, on the same folds of a sample of the training set, gets the features of the pretrained backbone,
those of the same network with random weights, and the input itself: pixels, term weights (TF-IDF), log-mel statistics.
Probes judge feature extraction; the finished model is compared with the bare input on the test set, where that has won.
"""

from __future__ import annotations

import dataclasses
import math
import time

import keras
import numpy as np
import tensorflow as tf

from models import freezing
from models.backbone import Backbone, Block, load_backbone
from models.classifier import Classifier
from models.random_weights import random_copy
from pipelines.baselines import term_weights
from pipelines.callbacks import ProgressPrinter
from pipelines.config import budget_seconds
from pipelines.console import console
from pipelines.data import dataset, image_loader, targets_of
from pipelines.feeds import Feeds
from pipelines.frozen_part import Examples, FrozenPart
from pipelines.log_mel import statistics_of
from pipelines.phase import fit_phase
from pipelines.prediction import feed_predictor
from pipelines.probes import L2_PATH, fit, linear_probe, one_thread, paired_difference, scores
from pipelines.rank import sample_features, stratified_sample
from pipelines.training import class_weighted

MOST_EXAMPLES = 500  # of the training set that the probes get; more where that is less than two of each class
SIDE = 32  # pixels of the bare picture: more make a linear model slower, not better
MOST_LEARNED = 10_000  # training pictures that the linear model of bare pixels learns from: 120 MB
# Of the head; the rest of the network learns at a tenth of it.
SCRATCH_RATES = {"image": 1e-2, "text": 3e-3, "audio": 3e-3}
SCRATCH_MOMENTUM = 0.9  # of BatchNorm: with the usual 0.99 its averages lag behind, and validation stays at one class
INPUTS = {"image": "raw pixels", "text": "bare words", "audio": "log-mel statistics"}
RANDOM = "the same network with random weights"


def judge_transfer(
    model: Classifier,
    splits,
    loader,
    config,
    test_logits,
    read_inputs=None,
    raw_accuracy=None,
    probed=None,
    kind: str = "",
) -> dict:
    """The verdict on transfer, after training.

    Args:
        model: the finished model. Its pretrained backbone is loaded once more.
        loader, read_inputs: as for `pipelines.training.fit_two_phase`.
        probed: what `probe_verdict` gave, where it was asked before training went deeper.
        test_logits: [n, classes] of the finished model.
        raw_accuracy: on the test set, of a linear model of the bare input that was trained on all examples, where one
            is at hand; else it is trained here, if it comes to that.
        kind: "image", "text" or "audio"; "": as `read_inputs` tells.

    Returns:
        verdict: "helps", "hurts" or "no_difference", by the 95% interval of pretrained minus the better one of the
        other two, in `points` of accuracy with `interval`; `against`, which that was ("raw" or "random_weights").
        probes: accuracy and interval of pretrained, random_weights and raw; of several labels accuracy is the share of
        right yes-or-nos. examples, seconds. raw_test: only where raw won, as `finished_against_raw` gives it. scratch:
        only with --baseline scratch, as `train_from_scratch` gives it. sentence: all of it for people.
        Where too few examples leave nothing to probe: verdict None and the sentence that says so.
    """
    started = time.perf_counter()
    kind = kind or ("text" if read_inputs else "image")
    result = probed or probe_verdict(model, splits, loader, config, read_inputs, kind)
    if result["verdict"]:
        # Of texts with several labels the linear model gave no accuracy that could be compared.
        known = kind == "image" or raw_accuracy is not None
        if result["verdict"] == "hurts" and result["against"] == "raw" and known:
            result["raw_test"] = finished_against_raw(model, splits, test_logits, raw_accuracy)
        result["seconds"] = time.perf_counter() - started + (result["seconds"] if probed else 0.0)
        result["sentence"] = sentence(result, kind)
    if config.guards.baseline == "scratch":
        result["scratch"] = train_from_scratch(model, splits, loader, config, test_logits, read_inputs, kind)
        result["sentence"] += scratch_sentence(result["scratch"])
    return result


def probe_verdict(model: Classifier, splits, loader, config, read_inputs=None, kind: str = "") -> dict:
    """What the three probes find on a sample of the training set: `judge_transfer`'s result without the sentence.

    Its pretrained backbone is loaded once more. Arguments as there.
    """
    started, kind = time.perf_counter(), kind or ("text" if read_inputs else "image")
    seed, options = config.training.seed, config.cache
    only_train = dataclasses.replace(splits, val=splits.val.slice(0, 0))
    sample = stratified_sample(only_train, MOST_EXAMPLES, seed)
    targets = targets_of(sample, len(splits.class_names))
    groups = sample["group"].to_numpy()
    if targets.sum(axis=0).max() < 2 or len(np.unique(groups)) < 2:
        return {"verdict": None, "sentence": "Too few examples to ask whether transfer helps."}

    # The finished model's own backbone is no longer what was pretrained.
    backbone = untrained_backbone(model, config)
    common = {"class_count": len(splits.class_names), "batch_size": config.training.batch_size}
    strategy = tf.distribute.get_strategy()

    def frozen_part():
        copy = Classifier(backbone, len(splits.class_names), multi_label=splits.multi_label)
        return FrozenPart(copy, splits.white_level, loader, read_inputs, options, common, seed, strategy)

    inputs = {"pretrained": sample_features(frozen_part(), splits, sample)}
    random_copy(backbone, seed)
    examples = Examples(frozen_part(), " of random weights", [sample], needed=True)
    inputs["random_weights"] = examples.features(0).arrays[0][examples.places(sample)]
    inputs["raw"] = compact(raw_inputs([sample], splits, model.backbone.preprocess, kind)[0])

    labels = targets if splits.multi_label else sample["label"].to_numpy()
    probes = {
        name: linear_probe(values, labels, seed=seed, groups=groups, standardise=name != "raw" or kind == "audio")
        for name, values in inputs.items()
    }
    against = max(("raw", "random_weights"), key=lambda name: probes[name]["accuracy"])
    gap = in_points(paired_difference(probes["pretrained"]["correct"], probes[against]["correct"]))
    low, high = gap["interval"]
    seconds = time.perf_counter() - started
    console.print(f"  probes of transfer on {sample.num_rows:,} examples: {seconds:.1f} s")
    return {
        "verdict": "helps" if low > 0 else "hurts" if high < 0 else "no_difference",
        **gap,
        "against": against,
        "probes": {name: {key: probe[key] for key in ("accuracy", "interval", "l2")} for name, probe in probes.items()},
        "examples": sample.num_rows,
        "seconds": seconds,
    }


def untrained_backbone(model: Classifier, config) -> Backbone:
    """A model's backbone as it was loaded, fed as the model is."""
    pooling = getattr(config.model, "pooling", "auto")
    backbone = load_backbone(config.model.backbone, None if pooling == "auto" else pooling)
    backbone.preprocess = model.backbone.preprocess
    return backbone


def raw_inputs(tables: list, splits, preprocess, kind: str) -> list:
    """The bare input of each table: pixels [n, 3072] of small pictures, term weights [n, terms], sparse, or the mean
    and deviation of log-mel spectrograms [n, 160].

    Pictures are decoded and cropped as the backbone's are, whole where it would cut off a border.
    """
    if kind == "text":
        return term_weights(tables)
    if kind == "audio":
        return [statistics_of(table)["mean"] for table in tables]
    plain = {"mean": (0.0,) * 3, "deviation": (255.0,) * 3, "channel_order": "rgb", "crop_share": 1.0}
    small = dataclasses.replace(preprocess, image_size=(SIDE, SIDE), interpolation="bilinear", antialias=True, **plain)
    load = image_loader(small, splits.white_level, plain=splits.plain)
    found = []
    for table in tables:
        batches = dataset(table, load, class_count=len(splits.class_names), batch_size=64)
        pixels = np.concatenate([images.numpy() for images, *_ in batches])[: table.num_rows]
        found.append(pixels.reshape(table.num_rows, -1))
    return found


@one_thread
def compact(inputs) -> np.ndarray:
    """Inputs [n, d], sparse or not, as [n, n] with the same angles and lengths, where d > n.

    For a linear model with an L2 penalty the two are the same, and of any d the penalties then mean the same.
    """
    if inputs.shape[1] <= inputs.shape[0]:
        return inputs.toarray() if hasattr(inputs, "toarray") else inputs
    products = inputs @ inputs.T
    values, vectors = np.linalg.eigh(np.asarray(products.todense() if hasattr(products, "todense") else products))
    return vectors * np.sqrt(np.maximum(values, 0.0))


def finished_against_raw(model: Classifier, splits, test_logits, raw_accuracy: float | None) -> dict:
    """The finished model and a linear model of the bare input, both trained on the training set, on the test set.

    Returns:
        accuracy of the bare input's, model_accuracy, points between them (above 0: the finished model is better),
        interval (95%, paired; None where only the accuracy of the bare input's is known).
    """
    targets = targets_of(splits.test, len(splits.class_names))
    correct = scores(test_logits, targets, splits.multi_label)[1]
    figures = {"accuracy": raw_accuracy, "model_accuracy": float(correct.mean())}
    if raw_accuracy is not None:
        return {**figures, "points": 100 * (figures["model_accuracy"] - raw_accuracy), "interval": None}
    raw_correct = pixels_on_test(splits, model.backbone.preprocess)
    return {**figures, "accuracy": float(raw_correct.mean()), **in_points(paired_difference(correct, raw_correct))}


@one_thread
def pixels_on_test(splits, preprocess) -> np.ndarray:
    """What a logistic regression on small pictures has right on the test set, [n] float32; its L2 by validation."""
    tables = [splits.train.slice(0, MOST_LEARNED), splits.val, splits.test]
    targets = [targets_of(table, len(splits.class_names)) for table in tables]
    pixels = raw_inputs(tables, splits, preprocess, "image")
    mean, scale = pixels[0].mean(axis=0), math.sqrt(float(pixels[0].var(axis=0).sum())) or 1.0
    # Examples of mean squared length n, as `compact` and `probes.scaled` have it, so that penalties mean the same.
    scale /= math.sqrt(min(pixels[0].shape))
    inputs = [np.concatenate([(part - mean) / scale, np.ones((len(part), 1), np.float32)], axis=1) for part in pixels]
    parameters = np.zeros((inputs[0].shape[1], len(splits.class_names)), np.float32)
    lowest, right = math.inf, None
    for l2 in L2_PATH:
        parameters = fit(inputs[0], targets[0], l2, parameters, splits.multi_label)
        loss = scores(inputs[1] @ parameters, targets[1], splits.multi_label)[0].mean()
        if loss >= lowest:
            break
        lowest, right = loss, scores(inputs[2] @ parameters, targets[2], splits.multi_label)[1]
    return right


def train_from_scratch(model: Classifier, splits, loader, config, test_logits, read_inputs, kind: str) -> dict:
    """The same architecture trained from random weights, on one device, for as many epochs as both phases may have.

    All of it trains, BatchNorm too, at one rate; it does not stop early, but at --budget.

    Returns:
        accuracy on the test set, points by which the finished model is better, interval (95%, paired), epochs, seconds.
    """
    started = time.perf_counter()
    epochs = config.head.head_epochs + config.fine_tune.fine_tune_epochs
    console.print(f"[bold]From scratch[/]: the same architecture from random weights, {epochs} epochs")
    backbone = random_copy(untrained_backbone(model, config), config.training.seed)
    layers = tuple(layer for block in backbone.blocks for layer in block.layers)
    backbone.blocks, backbone.frozen_front = [Block("all", layers)], 0  # one block: one rate
    for layer in backbone.encoder._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = SCRATCH_MOMENTUM
    classes, options = len(splits.class_names), dataclasses.replace(config.training, patience=epochs)
    scratch = Classifier(backbone, classes, config.model.dropout, options.seed, splits.multi_label)
    freezing.unfreeze_all(scratch, train_batch_norm=True)
    train = class_weighted(splits.train, classes) if options.class_weights == "balanced" else splits.train
    strategy, changes = tf.distribute.get_strategy(), config.fine_tune
    feeds = Feeds(scratch, splits, train, loader, config, strategy, read_inputs)
    feed = feeds.whole(changes.augmentation, changes.random_erasing, mixup=changes.mixup, cutmix=changes.cutmix)
    more = {"learning_rate": SCRATCH_RATES[kind], "options": options, "strategy": strategy}
    more |= {"callbacks": [ProgressPrinter()], "deadline": started + budget_seconds(options.budget)}
    phase = fit_phase(scratch, "scratch", feed, train, splits.val, epochs=epochs, **more)
    targets = targets_of(splits.test, classes)
    logits = feed_predictor(feed.forward, feed.batches, strategy)(splits.test)
    correct, own = (scores(values, targets, splits.multi_label)[1] for values in (logits, test_logits))
    result = {"accuracy": float(correct.mean()), **in_points(paired_difference(own, correct))}
    result |= {"epochs": phase["epochs"], "seconds": time.perf_counter() - started}
    console.print(f"  from scratch: test accuracy {result['accuracy']:.3f}, {result['seconds']:.0f} s\n")
    return result


# ---------------------------------------------------------------- in words


def in_points(gap: dict) -> dict:
    """points and interval of what `pipelines.probes.paired_difference` gives as shares."""
    return {"points": 100 * gap["difference"], "interval": [100 * bound for bound in gap["interval"]]}


def with_interval(result: dict) -> str:
    """ "+2.0 points, +0.5 to +3.5", or the points alone where there is no interval."""
    text = f"{result['points']:+.1f} points"
    if result["interval"] is None:
        return text
    low, high = result["interval"]
    return f"{text}, {low:+.1f} to {high:+.1f}"


def sentence(result: dict, kind: str) -> str:
    """What one would tell a colleague; where transfer hurts, with the figures and what became of it."""
    names = {"raw": INPUTS[kind], "random_weights": RANDOM}
    probes, against = result["probes"], names[result["against"]]
    if result["verdict"] == "helps":
        low, high = result["interval"]
        return f"Transfer helps: {result['points']:+.1f} points ({low:+.1f} to {high:+.1f}) over {against}."
    if result["verdict"] == "no_difference":
        return f"Transfer makes no measurable difference: {with_interval(result)}, against {against}."
    text = (
        f"Transfer hurts feature extraction: pretrained features get {probes['pretrained']['accuracy']:.1%} right, "
        f"{names['raw']} {probes['raw']['accuracy']:.1%}, {names['random_weights']} "
        f"{probes['random_weights']['accuracy']:.1%} ({with_interval(result)})."
    )
    if "raw_test" not in result:
        return text
    raw = result["raw_test"]
    made_up = "makes up for it" if raw["points"] > 0 else "does not make up for it"
    return (
        f"{text} The finished model {made_up}: {raw['model_accuracy']:.1%} on the test set, {names['raw']} "
        f"{raw['accuracy']:.1%} ({with_interval(raw)})."
    )


def scratch_sentence(scratch: dict) -> str:
    """What training from scratch reached, to follow the verdict."""
    return (
        f" Trained from scratch, the same architecture gets {scratch['accuracy']:.1%} of the test set right: the "
        f"pretrained one is at {with_interval(scratch)}."
    )
