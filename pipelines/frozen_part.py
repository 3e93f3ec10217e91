"""The frozen part of a model, run once over each example: what it gives is kept and found again by content.

Examples of different lengths (texts, sounds) lie in parts, by length; all of a part have tensors of one shape.
"""

from __future__ import annotations

import keras
import numpy as np
import psutil
import pyarrow as pa
import tensorflow as tf

from models.classifier import Classifier, has_windows, run_encoder, run_on_windows
from models.frozen import frozen_function
from models.split import between, split
from pipelines import cache
from pipelines.cache import Activations
from pipelines.console import console, progress_bar
from pipelines.data import cached_dataset, dataset
from pipelines.distribute import local_strategy
from pipelines.steps import gathered


class FrozenPart:
    """What all sets of examples share: the model as it was loaded, the cache, and steps that were traced."""

    def __init__(
        self, model: Classifier, white_level: int, loader, read_inputs, options, batch: dict, seed, strategy, steps=1
    ):
        """options: `pipelines.common_options.CacheOptions`; batch: class_count and batch_size of every data set.

        steps: gradient accumulation, which takes its parts from one batch;
        loader and read_inputs as for `pipelines.training.fit_two_phase`.
        """
        self.model, self.white_level, self.options = model, white_level, options
        self.loader, self.read_inputs = loader, read_inputs
        # Each of several workers computes all that it has not: what is kept is then whole everywhere.
        self.batch, self.seed, self.strategy = batch, seed, local_strategy(strategy)
        # Long texts are few: a batch of them that is mostly padding would take as long as all short ones.
        # Replicas and accumulated steps need parts of one size.
        self.trim = bool(read_inputs) and strategy.num_replicas_in_sync == 1 and steps == 1
        # Sounds have both: parts of equally many windows as they are, and one random window where they are changed.
        self.shape = {"trim": self.trim, "windows": bool(read_inputs and loader)}
        self.prefixes, self.steps = {}, {}  # made once: building and tracing take seconds
        self.memory_left = options.cache_memory * 1e9 or cache.MEMORY_SHARE * psutil.virtual_memory().available
        # Weights as they are now: phase 2 changes those above its cut, and asks for more afterwards.
        self.digest = cache.model_digest(model.encoder) if options.cache != "none" else ""

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

    def key(self, what, table: pa.Table, *more) -> str:
        """The key of what is kept of a table; what: "features" or the number of a cut."""
        preprocess = self.model.backbone.preprocess
        return cache.entry_key(self.digest, what, preprocess, self.white_level, table["id"].to_numpy(), *more)

    def is_kept(self, key: str) -> bool:
        """Whether an earlier run has left an entry."""
        return self.root() is not None and (self.root() / key / "entry.json").is_file()

    def kept(self, key: str, count: int, compute, needed: bool = False) -> Activations | None:
        """What the cache has or keeps under a key, within what is left of the memory, or beyond it where `needed`."""
        found = cache.activations(self.root(), key, count, compute, self.memory_left)
        if found is None and needed:
            found = cache.activations(None, key, count, compute, np.inf)
        if found and found.in_memory:
            self.memory_left -= found.nbytes
        return found

    def say(self, name: str, count: int, parts: list) -> None:
        """Tell the user what of `count` examples was computed or found."""
        if None in parts:
            if self.prefix(1):
                console.print(f"  {name}: larger than memory and disk allow; computed anew in every epoch")
            return
        where = "in memory" if all(part.in_memory for part in parts) else "on disk"
        size = f"{count:,} examples, {sum(part.nbytes for part in parts) / 1e6:,.1f} MB {where}"
        seconds = sum(part.seconds for part in parts if not part.found)
        did = "found in the cache" if all(part.found for part in parts) else f"computed in {seconds:.0f} s"
        console.print(f"  {name}: {did} ({size})")

    def load(self, augmentation="none", random_erasing=0.0):
        """The loader's function for these changes; loaders of other kinds of data know no random erasing."""
        return self.loader(augmentation, **({"random_erasing": random_erasing} if random_erasing else {}))

    def view(self, cut: int, view: int, table: pa.Table, *changes) -> Activations | None:
        """The tensors at a cut of one view of a table's examples, in its order."""
        load = self.load(*changes)

        def compute():
            batches = dataset(table, load, view=view, seed=self.seed, **self.batch)
            return self.run(f"blocks 0 to {cut}", self.prefix(cut), batches)

        # What a partial loader was given, such as the loudness of noise, is part of what it makes.
        settings = sorted(getattr(self.loader, "keywords", {}).items())
        found = self.kept(self.key(cut, table, *changes, view, self.seed, *settings), table.num_rows, compute)
        self.say(f"view {view + 1} below {self.model.blocks[cut].name}", table.num_rows, [found])
        return found

    def run(self, what: str, part: keras.Model, batches, function=None):
        """Run a frozen part of the model over batches; yields a list of arrays per batch, without the padding.

        A tensor that is the same for all examples (a position bias, [1, ...]) comes once, with the first batch.

        Args:
            what: names the step, which is made once, and the progress bar.
            function: what to compute of the part's inputs; the part's outputs where it is not given.
        """
        function = function or (lambda inputs: run_part(part, inputs))
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

    def frozen_step(self, part: keras.Model, batches, function):
        """A function of a distributed batch -> (outputs, rows), with the weights as they are now."""
        if self.strategy.num_replicas_in_sync == 1:
            if self.read_inputs:
                # Of texts the length is open, as in the encoder's own input, of sounds the number of windows: one
                # graph for all parts. There is no BatchNorm to fold, so that weights need not become constants, which
                # takes seconds.
                given = tf.nest.flatten(batches.element_spec[0])
                specs = [tf.TensorSpec([None] * len(spec.shape), spec.dtype) for spec in given]
                specs = [narrowed(spec, tensor) for spec, tensor in zip(specs, part.inputs, strict=True)]
                frozen = tf.function(function, input_signature=specs, autograph=False)
            else:
                specs = tf.nest.flatten(batches.element_spec[0])
                frozen = frozen_function(function, [(spec.shape[1:], spec.dtype) for spec in specs])
            return lambda batch: (tf.nest.flatten(frozen(*tf.nest.flatten(batch[0]))), batch[-1])

        @tf.function(autograph=False)
        def step(batch):
            def on_replica(inputs, targets, weights, rows):
                return tf.nest.flatten(function(*tf.nest.flatten(inputs))), rows

            return self.strategy.run(on_replica, args=batch)

        return step


class Examples:
    """Some of the splits, and what the frozen part gives for their examples, computed when it is asked for."""

    def __init__(self, frozen: FrozenPart, name: str, tables: list[pa.Table], needed: bool = False):
        """name: what the user is told of them; needed: their features are held even where no memory is left."""
        self.frozen, self.name, self.needed = frozen, name, needed
        # Every example once, by content: equal examples give equal numbers. They lie part after part.
        everything = pa.concat_tables(tables)
        self.ids, first = np.unique(everything["id"].to_numpy(), return_index=True)
        examples = everything.take(first)
        parts = frozen.read_inputs(examples) if frozen.read_inputs else [(np.arange(len(first)), None)]
        order = np.concatenate([rows for rows, _ in parts])
        self.table, self.place_of = examples.take(order), np.argsort(order)
        self.starts = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        self.inputs = [arrays for _, arrays in parts] if frozen.read_inputs else None
        self.known = {}  # "features" or the number of a cut -> what was computed, or None
        self.collected = None  # pooled features of a pass that computes what crosses a cut, batch by batch

    def holds(self, table: pa.Table) -> bool:
        return bool(np.isin(table["id"].to_numpy(), self.ids).all())

    def places(self, table: pa.Table) -> np.ndarray:
        """Where the examples of a table lie among all."""
        return self.place_of[np.searchsorted(self.ids, table["id"].to_numpy())]

    def batches(self, parts: list, table: pa.Table, epoch: int | None = None, first: int = 0, shard=(0, 1)):
        """Batches of a table from what is at hand, all in one array or by part; shuffled where an epoch is given.

        first and shard as `first_batch` and `shard` of `pipelines.data.dataset`.

        The examples of a batch are of one part even where one array holds all: the same batches with and without cache.
        """
        places = self.places(table)
        part_of = np.searchsorted(self.starts, places, side="right") - 1
        if len(parts) == len(self.starts) - 1:
            places = places - self.starts[part_of]
        else:
            parts = parts * (len(self.starts) - 1)
        more = {} if epoch is None else {"epoch": epoch, "training": True, "seed": self.frozen.seed}
        more |= {**self.frozen.shape, "first_batch": first, "shard": shard}
        return cached_dataset(table, parts, part_of, places, **more, **self.frozen.batch)

    def raw_batches(self):
        """All examples as the model takes them, in order."""
        if self.inputs:
            return self.batches(self.inputs, self.table)
        return dataset(self.table, self.frozen.load(), **self.frozen.batch)

    def part(self, number: int) -> pa.Table:
        """The examples of a part."""
        return self.table.slice(self.starts[number], self.starts[number + 1] - self.starts[number])

    def features(self, cut: int) -> Activations | None:
        """Pooled features of all; made with the tensors at the cut, or from them, where phase 2 needs those (0: no)."""
        if "features" not in self.known:
            self.known["features"] = self._features(cut)
        return self.known["features"]

    def features_key(self) -> str:
        """The key under which the pooled features of all are kept."""
        lengths = [arrays[0].shape[1:] for arrays in self.inputs or []]
        return self.frozen.key("features", self.table, self.frozen.model.backbone.pooling, lengths)

    def _features(self, cut: int) -> Activations | None:
        frozen, model = self.frozen, self.frozen.model
        key = self.features_key()
        count, size = self.table.num_rows, 4 * model.backbone.feature_size
        if cut and count * size < frozen.memory_left and not frozen.is_kept(key):
            self.collected = []
        crossing = self.crossing(cut) if cut else None
        collected, self.collected = self.collected or [], None

        def compute():
            if sum(map(len, collected)) == count:
                return ([features] for features in collected)
            encoder, batches = model.encoder, None
            if crossing is not None:
                _, encoder = split(model.backbone, cut)
                batches = self.batches([part.arrays for part in crossing], self.table)
            what = f"features from {cut if crossing else 0}"
            return frozen.run(what, encoder, batches or self.raw_batches(), lambda x: model.features(x, False, encoder))

        found = frozen.kept(key, count, compute, self.needed)
        frozen.say(f"features{self.name}", count, [found])
        return found

    def crossing(self, cut: int) -> list[Activations] | None:
        """The tensors at a cut of all examples as they are, part by part; None where they cannot be had or kept."""
        if cut not in self.known:
            found = []
            for number in range(len(self.starts) - 1):
                found.append(self._crossing(cut, number))
                if found[-1] is None:
                    break
            block = self.frozen.model.blocks[cut].name
            self.frozen.say(f"activations below {block}{self.name}", self.table.num_rows, found)
            self.known[cut] = None if None in found else found
        return self.known[cut]

    def _crossing(self, cut: int, number: int) -> Activations | None:
        frozen, prefix, table = self.frozen, self.frozen.prefix(cut), self.part(number)
        if prefix is None:
            return None

        def compute():
            part, batches = prefix, None
            lower, arrays = self._lower_crossing(cut, number)
            if lower:
                part = between(frozen.prefix(lower), prefix)
            elif self.inputs:
                arrays = self.inputs[number]
            else:
                batches = dataset(table, frozen.load(), **frozen.batch)
            if batches is None:
                rows = np.arange(table.num_rows)
                first = np.zeros_like(rows)
                batches = cached_dataset(table, [arrays], first, rows, **frozen.shape, **frozen.batch)
            what = f"blocks {lower or 0} to {cut}"
            return frozen.run(what, part, batches) if self.collected is None else self._run_on(what, part, batches, cut)

        return frozen.kept(self._crossing_key(cut, number), table.num_rows, compute)

    def _crossing_key(self, cut: int, number: int) -> str:
        return self.frozen.key(cut, self.part(number), *([self.inputs[number][0].shape[1:]] if self.inputs else []))

    def _run_on(self, what: str, part: keras.Model, batches, cut: int):
        """As `run` for what ends at a cut, and on to the pooled features, which are collected on the way."""
        model = self.frozen.model
        _, suffix = split(model.backbone, cut)

        def function(inputs):
            tensors = tf.nest.flatten(run_part(part, inputs))
            return [*tensors, model.features(unwrapped(tensors), False, suffix)]

        for *tensors, features in self.frozen.run(f"{what} and features", part, batches, function):
            self.collected.append(features)
            yield tensors

    def _lower_crossing(self, cut: int, number: int):
        """The next lower cut at which an earlier run has left a part's tensors, and these; (None, None) without."""
        if self.frozen.root():
            count = self.part(number).num_rows
            for lower in range(cut - 1, 0, -1):
                arrays = cache.open_entry(self.frozen.root() / self._crossing_key(lower, number), count, 0)
                if arrays:
                    return lower, arrays
        return None, None


def run_part(part: keras.Model, inputs):
    """A frozen part of a model on a batch, window by window where its examples have several."""
    return (run_on_windows if has_windows(part, inputs) else run_encoder)(part, inputs, training=False)


def narrowed(spec: tf.TensorSpec, tensor) -> tf.TensorSpec:
    """A spec of open dimensions with those of a part's input; one of windows has an axis more, which stays open."""
    dimensions = tensor.shape[1:]
    return tf.TensorSpec([None] * (len(spec.shape) - len(dimensions)) + list(dimensions), spec.dtype)


def unwrapped(inputs):
    """Inputs of a call as the encoder takes them: a single tensor as it is, several in a list."""
    return inputs[0] if len(inputs) == 1 else list(inputs)
