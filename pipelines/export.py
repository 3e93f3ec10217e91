"""`graft export`: export a run again as its next version, or make a model of what a stopped run had learned."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib

import tyro

from models import GraftError
from pipelines import facts, runs
from pipelines.console import console
from pipelines.results import NOTE


@dataclasses.dataclass
class ExportConfig:
    """Export a run again as its next version, or make a model of what a stopped run had learned."""

    run: tyro.conf.Positional[str]
    """Run folder."""


def export_run(argv: list[str]) -> int:
    """Rebuild the model from the run's best weights, export and verify it."""
    run_dir = pathlib.Path(tyro.cli(ExportConfig, args=argv, prog="graft export").run)
    if not (run_dir / "config.yaml").is_file():
        raise GraftError(
            f"{run_dir} is not a run folder: it holds no config.yaml. Give the folder that `graft image`, "
            f"`graft text`, `graft audio` or `graft speech` wrote."
        )
    checkpoint = runs.find_checkpoint(run_dir)
    if checkpoint is None:
        raise GraftError(
            f"{run_dir} holds no saved weights: its training stopped before the first epoch ended. Train again."
        )
    (run_dir / NOTE).unlink(missing_ok=True)  # a version of its own, even where a stopped run has published one
    state = json.loads((run_dir / "checkpoints" / "state.json").read_text())
    with runs.explained(run_dir):
        version, checked = importlib.import_module(f"pipelines.{runs.kind_of(state)}").export_again(run_dir, state)
    (run_dir / NOTE).unlink(missing_ok=True)
    console.print(f"Exported the weights of {checkpoint.name} to {version}\n{facts.served_line(checked)}")
    return 0
