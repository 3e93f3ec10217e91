"""Training as part of a run: what is saved to go on from, and what looks on: screen, TensorBoard, tests, probes."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from pipelines import facts, runs
from pipelines.callbacks import ProgressPrinter, tensorboard
from pipelines.console import print_trainable_table
from pipelines.distribute import from_chief, is_chief
from pipelines.label_checks import examiner
from pipelines.recovery import Recovery
from pipelines.training import fit_two_phase
from pipelines.transfer import probe_verdict


@dataclasses.dataclass
class Trained:
    """What training has given a run, and what was found on the way."""

    phases: list[dict]
    logits_of: Callable  # of a table, by the model as it was kept
    examined: dict  # as `pipelines.label_checks.examiner` fills it
    probed: dict  # as `pipelines.transfer.probe_verdict` gives it
    recovery: Recovery  # to be removed when the run is complete


def train_run(
    run_dir: pathlib.Path, config, kind: str, model, splits, loader, strategy, contract: dict, read_inputs=None
) -> Trained:
    """Begin the run folder, or find what an earlier process has left there, and train both phases.

    Args:
        kind: "image", "text" or "audio".
        loader, read_inputs: as for `pipelines.training.fit_two_phase`.
        contract: as `pipelines.runs.start_run_folder` takes it.
    """
    chief = is_chief(strategy)  # of several workers, the one that writes
    if chief:
        runs.start_run_folder(run_dir, config, splits, contract)
    every_s = config.training.checkpoint_seconds
    recovery = Recovery(run_dir if chief else None, every_s, functools.partial(from_chief, strategy))

    # Near copies across splits and wrong labels, once the frozen backbone has seen the examples; and whether what was
    # pretrained is of use here at all: where the bare input says more, features have to change a lot.
    examined, examine = examiner(splits, config)
    probed = {}

    def examine_features(features):
        examine(features)
        probed.update(probe_verdict(model, splits, loader, config, read_inputs, kind))
        return probed["verdict"] == "hurts"

    def test_phase(phase, logits_of):
        """Test figures after each phase, for the report only: nothing is chosen by them."""
        facts.add_test_figures(phase, splits, logits_of(splits.test))

    phases, logits_of = fit_two_phase(
        model,
        splits,
        loader,
        config,
        strategy,
        callbacks=[ProgressPrinter(), tensorboard(run_dir)] if chief else [],
        on_start=print_trainable_table,
        on_best=functools.partial(runs.save_checkpoint, run_dir) if chief else None,
        on_end=test_phase,
        on_features=examine_features if chief else None,
        read_inputs=read_inputs,
        recovery=recovery,
    )
    return Trained(phases, logits_of, examined, probed, recovery)
