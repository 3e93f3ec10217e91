"""Logits of a table's examples, in its order, on any number of replicas."""

from __future__ import annotations

import numpy as np

from models.classifier import Classifier
from pipelines.console import progress_bar
from pipelines.data import dataset
from pipelines.distribute import distributed, shard_of, summed
from pipelines.steps import gathered, make_predict_step


def predict_logits(predict_step, strategy, batches, count: int, on_batch=lambda: None) -> np.ndarray:
    """Logits [count, classes] float32 in the order of the table; padding rows are dropped.

    With several workers each has those of its own share, and the sum over all holds every example once.
    """
    logits = None
    for batch in distributed(strategy, batches):
        outputs, rows = predict_step(batch)
        outputs, rows = gathered(strategy, outputs), gathered(strategy, rows)
        if logits is None:
            logits = np.zeros((count, outputs.shape[-1]), np.float32)
        logits[rows[rows >= 0]] = outputs[rows >= 0]
        on_batch()
    return summed(strategy, logits)


def predictor(model: Classifier, strategy, load, batch_size: int):
    """A function: table -> logits [n, classes] float32 of its images; the graph is traced once."""
    common = {"class_count": model.head.units, "batch_size": batch_size, "shard": shard_of(strategy)}
    return feed_predictor(model, lambda table: dataset(table, load, **common), strategy)


def feed_predictor(forward, batches_of, strategy, outputs=lambda targets, logits: logits):
    """As `predictor`, from `forward` and `batches` of a `pipelines.feeds.Feed`; with a progress bar.

    outputs: as of `pipelines.steps.make_predict_step`.
    """
    steps = {}  # by the shapes of the batches: those of the test set may be others than those of the validation set

    def logits_of(table) -> np.ndarray:
        batches = batches_of(table)
        spec = distributed(strategy, batches).element_spec
        if repr(spec) not in steps:
            steps[repr(spec)] = make_predict_step(forward, strategy, spec, outputs)
        with progress_bar() as bar:
            task = bar.add_task("evaluating", total=len(batches), note="")
            return predict_logits(steps[repr(spec)], strategy, batches, table.num_rows, lambda: bar.advance(task))

    return logits_of
