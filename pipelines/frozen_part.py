"""The frozen part of a model, run once over each example: what it gives is kept and found again by content.

Examples of different lengths (texts) lie in parts, by length; all of a part have tensors of one shape.
"""

from __future__ import annotations

import keras
import numpy as np
import psutil
import pyarrow as pa
import tensorflow as tf

from models.classifier import Classifier, run_encoder
from models.frozen import frozen_function
from models.split import split
from pipelines import cache
from pipelines.cache import Activations
from pipelines.console import console, progress_bar
from pipelines.data import cached_dataset, dataset
from pipelines.steps import gathered


class FrozenPart:
    """What all sets of examples share: the model as it was loaded, the cache, and steps that were traced."""

    def __init__(self, model: Classifier, white_level: int, options, batch: dict, seed: int, strategy):
        """options: `pipelines.options.CacheOptions`; batch: class_count and batch_size of every data set."""
        self.model, self.white_level, self.options = model, white_level, options
        self.batch, self.seed, self.strategy = batch, seed, strategy
        self.prefixes, self.steps = {}, {}  # made once: building and tracing take seconds
        memory = options.cache_memory * 1e9 or cache.MEMORY_SHARE * psutil.virtual_memory().available
        self.memory_left = memory
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

    def kept(self, key: str, count: int, compute) -> Activations | None:
        """What the cache has or keeps under a key, within what is left of the memory."""
        found = cache.activations(self.root(), key, count, compute, self.memory_left)
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

    def view(self, cut: int, view: int, table: pa.Table, load, *changes) -> Activations | None:
        """The tensors at a cut of one view of a table's examples, in its order."""

        def compute():
            batches = dataset(table, load, view=view, seed=self.seed, **self.batch)
            return self.run(f"blocks 0 to {cut}", self.prefix(cut), batches)

        found = self.kept(self.key(cut, table, *changes, view, self.seed), table.num_rows, compute)
        self.say(f"view {view + 1} below {self.model.blocks[cut].name}", table.num_rows, [found])
        return found

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

    def frozen_step(self, part: keras.Model, batches, function):
        """A function of a distributed batch -> (outputs, rows), with the weights as they are now."""
        if self.strategy.num_replicas_in_sync == 1:
            specs = tf.nest.flatten(batches.element_spec[0])
            # Where the encoder leaves a size open and examples differ in it, one graph serves all of them.
            shapes = [spec.shape[1:] if spec.dtype == tf.float32 else tensor.shape[1:] for spec, tensor in
                      zip(specs, part.inputs, strict=True)]  # fmt: skip
            if any(spec.dtype != tf.float32 for spec in specs) or self.batch.get("lengths_differ"):
                shapes = [tensor.shape[1:] for tensor in part.inputs]
            frozen = frozen_function(function, [(shape, spec.dtype) for shape, spec in zip(shapes, specs)])
            return lambda batch: (frozen(*tf.nest.flatten(batch[0])), batch[-1])

        @tf.function(autograph=False)
        def step(batch):
            def on_replica(inputs, targets, weights, rows):
                return tf.nest.flatten(function(*tf.nest.flatten(inputs))), rows

            return self.strategy.run(on_replica, args=batch)

        return step
