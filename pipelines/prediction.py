"""Logits of a table's examples, in its order, on any number of replicas."""

from __future__ import annotations

import numpy as np

from models.classifier import Classifier
from pipelines.console import progress_bar
from pipelines.data import dataset
from pipelines.steps import gathered, make_predict_step


def predict_logits(predict_step, strategy, batches, count: int, on_batch=lambda: None) -> np.ndarray:
    """Logits [count, classes] float32 in the order of the table; padding rows are dropped."""
    logits = None
    for batch in strategy.experimental_distribute_dataset(batches):
        outputs, rows = predict_step(batch)
        outputs, rows = gathered(strategy, outputs), gathered(strategy, rows)
        if logits is None:
            logits = np.full((count, outputs.shape[-1]), np.nan, np.float32)
        logits[rows[rows >= 0]] = outputs[rows >= 0]
        on_batch()
    return logits


def predictor(model: Classifier, strategy, load, batch_size: int):
    """A function: table -> logits [n, classes] float32 of its images; the graph is traced once."""
    common = {"class_count": model.head.units, "batch_size": batch_size}
    return feed_predictor(model, lambda table: dataset(table, load, **common), strategy)


def feed_predictor(forward, batches_of, strategy):
    """As `predictor`, from `forward` and `batches` of a `pipelines.feeds.Feed`; with a progress bar."""
    steps = {}  # by the shapes of the batches: those of the test set may be others than those of the validation set

    def logits_of(table) -> np.ndarray:
        batches = batches_of(table)
        spec = strategy.experimental_distribute_dataset(batches).element_spec
        if repr(spec) not in steps:
            steps[repr(spec)] = make_predict_step(forward, strategy, spec)
        with progress_bar() as bar:
            task = bar.add_task("evaluating", total=len(batches), note="")
            return predict_logits(steps[repr(spec)], strategy, batches, table.num_rows, lambda: bar.advance(task))

    return logits_of
