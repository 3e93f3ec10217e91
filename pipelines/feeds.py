"""What a phase trains on: examples through the whole model, or what a frozen prefix gave once through the rest of it.

A frozen prefix gives the same numbers in every epoch, so it is run once over all examples: phase 1 trains on pooled
features, phase 2 on the tensors that cross the cut below the thawed blocks. With augmentation there are as many
different numbers as there are views of an example. Examples of different lengths (texts) lie in parts, by length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import psutil
import pyarrow as pa
import tensorflow as tf

from models.classifier import Classifier, run_encoder
from models.frozen import frozen_function
from models.split import split
from pipelines import cache
from pipelines.cache import Activations, Rows
from pipelines.console import console, progress_bar
from pipelines.data import Splits, cached_dataset, dataset
from pipelines.steps import gathered

UNCHANGED = ("none", 0.0)  # augmentation and random erasing


@dataclasses.dataclass
class Feed:
    """What a phase trains on, and the part of the model that makes logits of it."""

    forward: Callable  # (inputs, training=False) -> logits [b, classes]
    train_batches: Callable  # (epoch of the phase, epoch of the run) -> tf.data of an epoch of the training set
    batches: Callable  # table -> tf.data of a table, to validate and to test
    features: Callable | None = None  # table -> `cache.Rows` of pooled features [n, d], where they are at hand


class Feeds:
    """Makes the feed of each phase; what was computed for one serves the next."""

    def __init__(self, model: Classifier, splits: Splits, train: pa.Table, loader, config, strategy, read_inputs=None):
        """`train` is the training table with the weights that count; the other arguments as for `fit_two_phase`."""
        self.model, self.splits, self.train, self.loader = model, splits, train, loader
        self.fine_tuning, self.options, self.seed = config.fine_tune, config.cache, config.training.seed
        self.strategy = strategy
        self.common = {"class_count": len(splits.class_names), "batch_size": config.training.batch_size}
        # Every example once, by content: equal examples give equal numbers. They lie part after part.
        everything = pa.concat_tables([splits.train, splits.val, splits.test])
        self.ids, first = np.unique(ids_of(everything), return_index=True)
        examples = everything.take(first)
        parts = read_inputs(examples) if read_inputs else [(np.arange(len(first)), None)]
        order = np.concatenate([rows for rows, _ in parts])
        self.examples, self.place_of = examples.take(order), np.argsort(order)
        self.starts = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        self.inputs = [arrays for _, arrays in parts] if read_inputs else None
        self.crossings = {}  # cut -> a list of Activations, one per part, or None
        self.views = {}  # (cut, view) -> Activations
        self.prefixes, self.steps = {}, {}  # made once: building and tracing take seconds
        self.collected = None  # pooled features of a pass that computes what crosses a cut, batch by batch
        memory = self.options.cache_memory * 1e9 or cache.MEMORY_SHARE * psutil.virtual_memory().available
        self.memory_left = memory
        # Weights as they are now: phase 2 changes those above its cut, and asks for further views afterwards.
        self.digest = cache.model_digest(model.encoder) if self.options.cache != "none" else ""

    def whole(self, augmentation="none", random_erasing=0.0, **mixing) -> Feed:
        """Examples through the whole model, in every epoch anew."""
        if self.inputs:
            return Feed(
                lambda inputs, training=False: self.model(unwrapped(inputs), training=training),
                lambda view, epoch: self.cached(self.inputs, self.train, epoch),
                lambda table: self.cached(self.inputs, table),
            )
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
            lambda view, epoch: self.cached([features.arrays], self.train, epoch),
            lambda table: self.cached([features.arrays], table),
            lambda table: Rows(features.arrays[0], self.places(table)),
        )

    def fine_tune(self, cut: int) -> Feed:
        """Phase 2, on the tensors that cross the cut below block number `cut`."""
        options = self.fine_tuning
        changes, mixing = (options.augmentation, options.random_erasing), (options.mixup, options.cutmix)
        plain = None
        # Blends of images are not blends of what a network makes of them.
        if cut and self.options.cache != "none" and not any(mixing):
            plain = self.crossing_of_all(cut)
        changed = changes != UNCHANGED
        if plain is None or (changed and self.view(cut, 0, *changes) is None):
            return self.whole(*changes, mixup=options.mixup, cutmix=options.cutmix)
        _, suffix = split(self.model.backbone, cut)
        arrays = [part.arrays for part in plain]

        def forward(inputs, training=False):
            return self.model.logits(self.model.features(list(inputs), training, suffix), training)

        def train_batches(view, epoch):
            if not changed:
                return self.cached(arrays, self.train, epoch)
            # Each view is made when its epoch comes: a phase that stops early needs no more.
            found = self.view(cut, view % self.options.views, *changes) or self.view(cut, 0, *changes)
            return self.cached([found.arrays], self.train, epoch, np.arange(self.train.num_rows))

        return Feed(forward, train_batches, lambda table: self.cached(arrays, table))

    # ---------------------------------------------------------------- batches

    def load(self, augmentation="none", random_erasing=0.0):
        """The loader's function for these changes; loaders of other kinds of data know no random erasing."""
        return self.loader(augmentation, **({"random_erasing": random_erasing} if random_erasing else {}))

    def places(self, table: pa.Table) -> np.ndarray:
        """Where the examples of a table lie among all."""
        return self.place_of[np.searchsorted(self.ids, ids_of(table))]

    def cached(self, parts: list, table: pa.Table, epoch: int | None = None, places=None):
        """Batches of a table from what was computed, all in one array or by part; shuffled where an epoch is given."""
        places = self.places(table) if places is None else places
        part_of = np.zeros_like(places)
        if len(parts) > 1:
            part_of = np.searchsorted(self.starts, places, side="right") - 1
            places = places - self.starts[part_of]
        more = {} if epoch is None else {"epoch": epoch, "training": True, "seed": self.seed}
        return cached_dataset(table, parts, part_of, places, **more, **self.common)

    def part(self, number: int) -> pa.Table:
        """The examples of a part."""
        return self.examples.slice(self.starts[number], self.starts[number + 1] - self.starts[number])

    # ---------------------------------------------------------------- what is computed once

    def pooled_features(self, cut: int) -> Activations | None:
        """Pooled features of all examples; made with the tensors at the cut, or from them, if phase 2 needs those."""
        lengths = [arrays[0].shape[1:] for arrays in self.inputs or []]
        key = self.key("features", self.examples, self.model.backbone.pooling, lengths)
        count, size = self.examples.num_rows, 4 * self.model.backbone.feature_size
        if count * size < self.memory_left and not self.is_kept(key):
            self.collected = []
        crossing = self.crossing_of_all(cut) if cut else None
        collected, self.collected = self.collected or [], None

        def compute():
            if sum(map(len, collected)) == count:
                return ([features] for features in collected)
            encoder = self.model.encoder
            if crossing is not None:
                _, encoder = split(self.model.backbone, cut)
                batches = self.cached([part.arrays for part in crossing], self.examples)
            elif self.inputs:
                batches = self.cached(self.inputs, self.examples)
            else:
                batches = dataset(self.examples, self.load(), **self.common)
            return self.run("features", encoder, batches, lambda x: self.model.features(x, False, encoder))

        found = self.kept(key, count, compute)
        self.say("features", [found])
        return found

    def crossing_of_all(self, cut: int) -> list[Activations] | None:
        """The tensors at a cut of all examples as they are, part by part; None where they cannot be had or kept."""
        if cut not in self.crossings:
            found = []
            for number in range(len(self.starts) - 1):
                found.append(self.crossing(cut, number))
                if found[-1] is None:
                    break
            self.say(f"activations below {self.model.blocks[cut].name}", found)
            self.crossings[cut] = None if None in found else found
        return self.crossings[cut]

    def crossing(self, cut: int, number: int) -> Activations | None:
        """The tensors at a cut of the examples of a part."""
        prefix = self.prefix(cut)
        if prefix is None:
            return None
        table = self.part(number)

        def compute():
            part, batches = prefix, None
            lower, arrays = self.lower_crossing(cut, number)
            if lower:
                part = keras.Model(self.prefix(lower).outputs, prefix.outputs)
            elif self.inputs:
                arrays = self.inputs[number]
            else:
                batches = dataset(table, self.load(), **self.common)
            if batches is None:
                rows = np.arange(table.num_rows)
                batches = cached_dataset(table, [arrays], np.zeros_like(rows), rows, **self.common)
            what = f"blocks {lower or 0} to {cut}"
            return self.run(what, part, batches) if self.collected is None else self.run_on(what, part, batches, cut)

        return self.kept(self.crossing_key(cut, number), table.num_rows, compute)

    def run_on(self, what: str, part: keras.Model, batches, cut: int):
        """As `run` for what ends at a cut, and on to the pooled features, which are collected on the way."""
        _, suffix = split(self.model.backbone, cut)

        def function(inputs):
            tensors = tf.nest.flatten(run_encoder(part, inputs, training=False))
            return [*tensors, self.model.features(unwrapped(tensors), False, suffix)]

        for *tensors, features in self.run(f"{what} and features", part, batches, function):
            self.collected.append(features)
            yield tensors

    def lower_crossing(self, cut: int, number: int):
        """The next lower cut at which an earlier run has left a part's tensors, and these; (None, None) without."""
        if self.options.cache == "auto":
            count = self.part(number).num_rows
            for lower in range(cut - 1, 0, -1):
                arrays = cache.open_entry(self.root() / self.crossing_key(lower, number), count, 0)
                if arrays:
                    return lower, arrays
        return None, None

    def view(self, cut: int, view: int, *changes) -> Activations | None:
        """The tensors at a cut of one view of the training set, in its order."""
        if (cut, view) not in self.views:
            prefix, load = self.prefix(cut), self.load(*changes)

            def compute():
                batches = dataset(self.train, load, view=view, seed=self.seed, **self.common)
                return self.run(f"blocks 0 to {cut}", prefix, batches)

            key = self.key(cut, self.train, *changes, view, self.seed)
            found = self.kept(key, self.train.num_rows, compute)
            self.say(f"view {view + 1} below {self.model.blocks[cut].name}", [found])
            self.views[cut, view] = found
        return self.views[cut, view]

    def prefix(self, cut: int) -> keras.Model | None:
        """What lies below a cut; None where all of the backbone is one layer."""
        if cut not in self.prefixes:
            try:
                self.prefixes[cut], _ = split(self.model.backbone, cut)
            except ValueError:
                self.prefixes[cut] = None
        return self.prefixes[cut]

    def root(self):
        return cache.cache_root(self.options.cache_dir) if self.options.cache == "auto" else None

    def key(self, cut, table: pa.Table, *more) -> str:
        preprocess, white_level = self.model.backbone.preprocess, self.splits.white_level
        return cache.entry_key(self.digest, cut, preprocess, white_level, ids_of(table), *more)

    def crossing_key(self, cut: int, number: int) -> str:
        return self.key(cut, self.part(number), *([self.inputs[number][0].shape[1:]] if self.inputs else []))

    def is_kept(self, key: str) -> bool:
        """Whether an earlier run has left an entry."""
        return self.root() is not None and (self.root() / key / "entry.json").is_file()

    def kept(self, key: str, count: int, compute) -> Activations | None:
        """What the cache has or keeps under a key, within what is left of the memory."""
        found = cache.activations(self.root(), key, count, compute, self.memory_left)
        if found and found.in_memory:
            self.memory_left -= found.nbytes
        return found

    def say(self, name: str, parts: list) -> None:
        """Tell the user what was computed or found."""
        if None in parts:
            if self.prefix(1):
                console.print(f"  {name}: larger than memory and disk allow; computed anew in every epoch")
            return
        where = "in memory" if all(part.in_memory for part in parts) else "on disk"
        size = f"{self.examples.num_rows:,} examples, {sum(part.nbytes for part in parts) / 1e6:,.1f} MB {where}"
        seconds = sum(part.seconds for part in parts if not part.found)
        did = "found in the cache" if all(part.found for part in parts) else f"computed in {seconds:.0f} s"
        console.print(f"  {name}: {did} ({size})")

    def frozen_step(self, part: keras.Model, batches, function):
        """A function of a distributed batch -> (outputs, rows), with the weights as they are now."""
        if self.strategy.num_replicas_in_sync == 1:
            # Of texts the length is open, as in the encoder's own input: one graph for all parts.
            specs = part.inputs if self.inputs else tf.nest.flatten(batches.element_spec[0])
            frozen = frozen_function(function, [(spec.shape[1:], spec.dtype) for spec in specs])
            return lambda batch: (frozen(*tf.nest.flatten(batch[0])), batch[-1])

        @tf.function(autograph=False)
        def step(batch):
            def on_replica(inputs, targets, weights, rows):
                return tf.nest.flatten(function(*tf.nest.flatten(inputs))), rows

            return self.strategy.run(on_replica, args=batch)

        return step

    def run(self, what: str, part: keras.Model, batches, function=None):
        """Run a frozen part of the model over batches; yields a list of arrays per batch, without the padding.

        A tensor that is the same for all examples (a position bias, [1, ...]) comes once, with the first batch.

        Args:
            what: names the step, which is made once, and the progress bar.
            function: what to compute of the part's inputs; the part's outputs where it is not given.
        """
        function = function or (lambda inputs: run_encoder(part, inputs, training=False))
        if what not in self.steps:
            self.steps[what] = self.frozen_step(part, batches, lambda *inputs: function(unwrapped(inputs)))
        step = self.steps[what]
        with progress_bar() as bar:
            task = bar.add_task(f"computing {what}", total=len(batches), note="")
            for number, batch in enumerate(self.strategy.experimental_distribute_dataset(batches)):
                outputs, rows = step(batch)
                outputs = [gathered(self.strategy, output) for output in outputs]
                real = gathered(self.strategy, rows) >= 0
                shared = [len(output) < len(real) for output in outputs]
                yield [x[: 1 - min(number, 1)] if same else x[real] for x, same in zip(outputs, shared, strict=True)]
                bar.advance(task)


def unwrapped(inputs):
    """Inputs of a call as the encoder takes them: a single tensor as it is, several in a list."""
    return inputs[0] if len(inputs) == 1 else list(inputs)


def ids_of(table: pa.Table) -> np.ndarray:
    return table["id"].to_numpy()
