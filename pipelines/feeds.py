"""What a phase trains on: examples through the whole model, or what a frozen prefix gave once through the rest of it.

A frozen prefix gives the same numbers in every epoch, so it is run once over all examples: phase 1 trains on pooled
features, phase 2 on the tensors that cross the cut below the thawed blocks. With augmentation there are as many
different numbers as there are views of an example. Examples of different lengths (texts) lie in parts, by length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from models.classifier import Classifier
from models.split import split
from pipelines.cache import Activations, Rows
from pipelines.data import Splits, cached_dataset, dataset
from pipelines.distribute import shard_of
from pipelines.frozen_part import Examples, FrozenPart, unwrapped

UNCHANGED = ("none", 0.0)  # augmentation and random erasing


@dataclasses.dataclass
class Feed:
    """What a phase trains on, and the part of the model that makes logits of it."""

    forward: Callable  # (inputs, training=False) -> logits [b, classes]
    train_batches: Callable  # (epoch of the phase, epoch of the run, first batch=0) -> tf.data of an epoch of training
    batches: Callable  # table -> tf.data of a table, to validate and to test
    # With several workers the two give this worker's share of each batch.
    features: Callable | None = None  # table -> `cache.Rows` of pooled features [n, d], where they are at hand
    pooled: Callable | None = None  # inputs -> pooled features [b, d], of a feed of phase 2


class Feeds:
    """Makes the feed of each phase; what was computed for one serves the next."""

    def __init__(self, model: Classifier, splits: Splits, train: pa.Table, loader, config, strategy, read_inputs=None):
        """`train` is the training table with the weights that count; the other arguments as for `fit_two_phase`."""
        self.model, self.train, self.seed = model, train, config.training.seed
        self.options, self.tuning = config.cache, config.fine_tune
        self.common = {"class_count": len(splits.class_names), "batch_size": config.training.batch_size}
        self.own = {"shard": shard_of(strategy)}
        self.frozen = FrozenPart(
            model, splits.white_level, loader, read_inputs, config.cache, self.common, self.seed, strategy,
            steps=config.training.accumulation_steps,
        )  # fmt: skip
        # What the test set gives is computed when it is first asked for, which need not be before training.
        self.learning = Examples(self.frozen, "", [splits.train, splits.val])
        self.testing = Examples(self.frozen, " of the test set", [splits.test], needed=True)
        self.views = {}  # (cut, view) -> Activations

    def examples_of(self, table: pa.Table) -> Examples:
        """Those among which a table's examples are."""
        return self.learning if self.learning.holds(table) else self.testing

    def whole(self, augmentation="none", random_erasing=0.0, **mixing) -> Feed:
        """Examples through the whole model, in every epoch anew."""
        if self.frozen.read_inputs:

            def batches(table):
                examples = self.examples_of(table)
                return examples.batches(examples.inputs, table, **self.own)

            def train_batches(view, epoch, first=0):
                if self.frozen.loader is None or (augmentation, random_erasing) == UNCHANGED:
                    return self.learning.batches(self.learning.inputs, self.train, epoch, first, **self.own)
                more = {"epoch": epoch, "view": view, "training": True, "seed": self.seed, "first_batch": first}
                return dataset(self.train, self.frozen.load(augmentation), **more, **self.common, **self.own)

            return Feed(
                lambda inputs, training=False: self.model(unwrapped(inputs), training=training),
                train_batches,
                batches,
                pooled=lambda inputs: self.model.features(unwrapped(inputs)),
            )
        load, plain = self.frozen.load(augmentation, random_erasing), self.frozen.load()

        def train_batches(view, epoch, first=0):
            more = {"epoch": epoch, "view": view, "training": True, "seed": self.seed, "first_batch": first}
            return dataset(self.train, load, **more, **self.common, **self.own, **mixing)

        batches = functools.partial(dataset, load=plain, **self.common, **self.own)
        return Feed(self.model, train_batches, batches, pooled=self.model.features)

    def head(self, cut: int) -> Feed:
        """Phase 1, on pooled features; cut: the number of the lowest block that phase 2 thaws, 0 for none or all.

        On what crosses the highest cut where nothing is pooled: a recogniser's head answers for every frame.
        """
        if getattr(self.model, "objective", None):
            return self.fine_tune(len(self.model.blocks) - 1, self.tuning)
        learned = None if self.options.cache == "none" else self.learning.features(cut)
        if learned is None:
            return self.whole()

        def features(table):
            examples = self.examples_of(table)
            return Rows(examples.features(cut).arrays[0], examples.places(table))

        def batches(table):
            examples = self.examples_of(table)
            return examples.batches([examples.features(cut).arrays], table, **self.own)

        return Feed(
            lambda inputs, training=False: self.model.logits(inputs[0], training),
            lambda view, epoch, first=0: self.learning.batches([learned.arrays], self.train, epoch, first, **self.own),
            batches,
            features,
        )

    def fine_tune(self, cut: int, options) -> Feed:
        """Phase 2, on the tensors that cross the cut below block number `cut`.

        options: `pipelines.image_options.FineTuneOptions` or its like.
        """
        changes, mixing = (options.augmentation, options.random_erasing), (options.mixup, options.cutmix)
        plain = None
        # Blends of images are not blends of what a network makes of them.
        if cut and self.options.cache != "none" and not any(mixing) and self.testing.crossing(cut):
            plain = self.learning.crossing(cut)
        changed = changes != UNCHANGED
        if plain is None or (changed and self.view(cut, 0, *changes) is None):
            return self.whole(*changes, mixup=options.mixup, cutmix=options.cutmix)
        _, suffix = split(self.model.backbone, cut)

        def forward(inputs, training=False):
            return self.model.logits(self.model.features(list(inputs), training, suffix), training)

        def batches(table, epoch=None, first=0):
            examples = self.examples_of(table)
            return examples.batches([part.arrays for part in examples.crossing(cut)], table, epoch, first, **self.own)

        def train_batches(view, epoch, first=0):
            if not changed:
                return batches(self.train, epoch, first)
            # Each view is made when its epoch comes: a phase that stops early needs no more.
            found = self.view(cut, view % self.options.views, *changes) or self.view(cut, 0, *changes)
            places = np.arange(self.train.num_rows)
            more = {"epoch": epoch, "training": True, "seed": self.seed, "first_batch": first, **self.own}
            more["windows"] = self.frozen.shape["windows"]
            return cached_dataset(self.train, [found.arrays], np.zeros_like(places), places, **more, **self.common)

        return Feed(
            forward,
            train_batches,
            batches,
            pooled=lambda inputs: self.model.features(list(inputs), encoder=suffix),
        )

    def view(self, cut: int, view: int, *changes) -> Activations | None:
        """The tensors at a cut of one view of the training set, in its order."""
        if (cut, view) not in self.views:
            self.views[cut, view] = self.frozen.view(cut, view, self.train, *changes)
        return self.views[cut, view]
