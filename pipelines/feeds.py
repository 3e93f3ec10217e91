"""What a phase trains on: images through the whole model, or what a frozen prefix gave once through the rest of it.

A frozen prefix gives the same numbers in every epoch, so it is run once over all examples: phase 1 trains on pooled
features, phase 2 on the tensors that cross the cut below the thawed blocks. With augmentation there are as many
different numbers as there are views of an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import tensorflow as tf

from models.classifier import Classifier, run_encoder
from models.frozen import frozen_function
from models.split import split
from pipelines import cache
from pipelines.cache import Activations
from pipelines.console import console, progress_bar
from pipelines.data import Splits, cached_dataset, dataset

UNCHANGED = ("none", 0.0)  # augmentation and random erasing


@dataclasses.dataclass
class Feed:
    """What a phase trains on, and the part of the model that makes logits of it."""

    forward: Callable  # (inputs, training=False) -> logits [b, classes]
    train_batches: Callable  # (epoch of the phase, epoch of the run) -> tf.data of an epoch of the training set
    batches: Callable  # table -> tf.data in the table's order, to validate and to test
    features: Callable | None = None  # table -> pooled features [n, d] float32, where they are at hand


class Feeds:
    """Makes the feed of each phase; what was computed for one serves the next."""

    def __init__(self, model: Classifier, splits: Splits, train: pa.Table, loader, config, strategy):
        """`train` is the training table with the weights that count; `loader` as for `fit_two_phase`."""
        self.model, self.splits, self.train, self.loader = model, splits, train, loader
        self.fine_tuning, self.options, self.seed = config.fine_tune, config.cache, config.training.seed
        self.strategy = strategy
        self.common = {"class_count": len(splits.class_names), "batch_size": config.training.batch_size}
        # Every example once, by content: equal images give equal numbers.
        everything = pa.concat_tables([splits.train, splits.val, splits.test])
        self.ids, first = np.unique(ids_of(everything), return_index=True)
        self.examples = everything.take(first)
        self.crossings = {}  # cut -> Activations of all examples, or None

    def whole(self, augmentation="none", random_erasing=0.0, **mixing) -> Feed:
        """Images through the whole model, in every epoch anew."""
        load, plain = self.load(augmentation, random_erasing), self.load()

        def train_batches(view, epoch):
            more = {"epoch": epoch, "view": view, "training": True, "seed": self.seed}
            return dataset(self.train, load, **more, **self.common, **mixing)

        return Feed(self.model, train_batches, lambda table: dataset(table, plain, **self.common))

    def head(self, cut: int) -> Feed:
        """Phase 1, on pooled features; cut: the number of the lowest block that phase 2 thaws, 0 for none or all."""
        features = None if self.options.cache == "none" else self.pooled_features(cut)
        if features is None:
            return self.whole()
        return Feed(
            lambda inputs, training=False: self.model.logits(inputs[0], training),
            lambda view, epoch: self.cached(features, self.train, epoch),
            lambda table: self.cached(features, table),
            lambda table: features.arrays[0][self.places(table)],
        )

    def fine_tune(self, cut: int) -> Feed:
        """Phase 2, on the tensors that cross the cut below block number `cut`."""
        options = self.fine_tuning
        changes, mixing = (options.augmentation, options.random_erasing), (options.mixup, options.cutmix)
        plain = first = None
        # Blends of images are not blends of what a network makes of them.
        if cut and self.options.cache != "none" and not any(mixing):
            plain = first = self.crossing_of_all(cut)
        changed = changes != UNCHANGED
        if plain and changed:
            first = self.crossing(cut, self.train, 0, *changes)
        if first is None:
            return self.whole(*changes, mixup=options.mixup, cutmix=options.cutmix)
        _, suffix = split(self.model.backbone, cut)
        views = {0: first}  # each is made when its epoch comes: a phase that stops early needs no more

        def forward(inputs, training=False):
            return self.model.logits(self.model.features(list(inputs), training, suffix), training)

        def train_batches(view, epoch):
            if not changed:
                return self.cached(plain, self.train, epoch)
            number = view % self.options.views
            if number not in views:
                views[number] = self.crossing(cut, self.train, number, *changes) or first
            return self.cached(views[number], self.train, epoch, np.arange(self.train.num_rows))

        return Feed(forward, train_batches, lambda table: self.cached(plain, table))

    # ---------------------------------------------------------------- batches

    def load(self, augmentation="none", random_erasing=0.0):
        """The loader's function for these changes; loaders of other kinds of data know no random erasing."""
        return self.loader(augmentation, **({"random_erasing": random_erasing} if random_erasing else {}))

    def places(self, table: pa.Table) -> np.ndarray:
        """Where the examples of a table lie among all."""
        return np.searchsorted(self.ids, ids_of(table))

    def cached(self, activations: Activations, table: pa.Table, epoch: int | None = None, places=None):
        """Batches of a table from what was computed; shuffled for training where an epoch is given."""
        places = self.places(table) if places is None else places
        more = {} if epoch is None else {"epoch": epoch, "training": True, "seed": self.seed}
        return cached_dataset(table, activations.arrays, places, **more, **self.common)

    # ---------------------------------------------------------------- what is computed once

    def pooled_features(self, cut: int) -> Activations | None:
        """Pooled features of all examples; made from the tensors at the cut where phase 2 needs those anyway."""
        crossing = self.crossing_of_all(cut) if cut else None

        def compute():
            if crossing is None:
                batches, part = dataset(self.examples, self.load(), **self.common), self.model.features
            else:
                _, suffix = split(self.model.backbone, cut)
                batches = self.cached(crossing, self.examples)
                part = lambda *inputs: self.model.features(list(inputs), False, suffix)  # noqa: E731
            return self.run(part, batches, "features")

        return self.kept("features", self.model.encoder, self.ids, compute, self.model.backbone.pooling)

    def crossing_of_all(self, cut: int) -> Activations | None:
        """The tensors at a cut, of all examples as they are."""
        if cut not in self.crossings:
            self.crossings[cut] = self.crossing(cut, self.examples)
        return self.crossings[cut]

    def crossing(self, cut, table, view=0, augmentation="none", random_erasing=0.0) -> Activations | None:
        """The tensors at a cut, of one view of a table's examples; None where they cannot be had or kept."""
        try:
            prefix, _ = split(self.model.backbone, cut)
        except ValueError:  # all of the backbone is one layer
            return None
        changed = (augmentation, random_erasing) != UNCHANGED
        load = self.load(augmentation, random_erasing)

        def compute():
            batches = dataset(table, load, view=view, seed=self.seed, **self.common)
            return self.run(lambda images: run_encoder(prefix, images, training=False), batches, "frozen blocks")

        changes = (augmentation, random_erasing, view, self.seed) if changed else ()
        name = f"view {view + 1}" if changed else "activations"
        return self.kept(f"{name} below {self.model.blocks[cut].name}", prefix, ids_of(table), compute, *changes)

    def kept(self, name, part, ids, compute, *changes) -> Activations | None:
        """What the cache has or keeps under this part, these examples and these changes; says so."""
        root = cache.cache_root(self.options.cache_dir) if self.options.cache == "auto" else None
        key = cache.entry_key(part, self.model.backbone.preprocess, self.splits.white_level, ids, *changes)
        memory_bytes = self.options.cache_memory * 1e9 or None
        found = cache.activations(root, key, len(ids), compute, memory_bytes)
        if found is None:
            console.print(f"  {name}: larger than memory and disk allow; computed anew in every epoch")
            return None
        size = f"{len(ids):,} examples, {found.nbytes / 1e6:,.1f} MB {'in memory' if found.in_memory else 'on disk'}"
        did = "found in the cache" if found.found else f"computed in {found.seconds:.0f} s"
        console.print(f"  {name}: {did} ({size})")
        return found

    def run(self, part, batches, what: str):
        """Run a frozen part over batches; yields a list of arrays per batch, without the padding."""
        shapes = [spec.shape[1:] for spec in tf.nest.flatten(batches.element_spec[0])]
        if self.strategy.num_replicas_in_sync == 1:
            frozen = frozen_function(part, shapes)

            def step(batch):
                return frozen(*tf.nest.flatten(batch[0])), batch[-1]
        else:

            @tf.function(autograph=False)
            def step(batch):
                def on_replica(inputs, targets, weights, rows):
                    return tf.nest.flatten(part(*tf.nest.flatten(inputs))), rows

                return self.strategy.run(on_replica, args=batch)

        with progress_bar() as bar:
            task = bar.add_task(what, total=len(batches), note="")
            for batch in self.strategy.experimental_distribute_dataset(batches):
                outputs, rows = step(batch)
                real = gathered(self.strategy, rows) >= 0
                yield [gathered(self.strategy, output)[real] for output in outputs]
                bar.advance(task)


def gathered(strategy, value) -> np.ndarray:
    """The parts of all replicas, one after the other."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def ids_of(table: pa.Table) -> np.ndarray:
    return table["id"].to_numpy()
