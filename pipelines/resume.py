"""`graft resume`: a run that was stopped, killed or cut off goes on, and ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib

import tyro

from models import GraftError
from pipelines import options, runs
from pipelines.config import read_config
from pipelines.console import console


@dataclasses.dataclass
class ResumeConfig:
    """Go on with a run that was stopped, killed or cut off; it ends as if nothing had happened."""

    run: tyro.conf.Positional[str]
    """Run folder."""


def resume_run(argv: list[str]) -> int:
    """Go on with the run of a folder, with the flags that it was begun with."""
    return go_on(pathlib.Path(tyro.cli(ResumeConfig, args=argv, prog="graft resume").run))


def begun(run_options) -> pathlib.Path | None:
    """The folder of the run that --resume asks to go on with; None where it has not begun, or was not asked for.

    run_options: `pipelines.common_options.RunOptions`.
    """
    if not run_options.resume:
        return None
    if not run_options.out:
        raise GraftError("--resume needs --out, which says what run to go on with.")
    folder = pathlib.Path(run_options.out)
    return folder if (folder / "config.yaml").is_file() else None


def go_on(run_dir: pathlib.Path) -> int:
    """Go on with a run; nothing is done where it is complete.

    Raises:
        GraftError: no run folder, or its working directory is gone.
    """
    run_dir = run_dir.absolute()
    if not (run_dir / "config.yaml").is_file():
        raise GraftError(
            f"{run_dir} is not a run that can go on: it holds no config.yaml. Give the folder that `graft image` or "
            f"`graft text` wrote; a run that was stopped while it still read its data has none: start that again."
        )
    if (run_dir / "metrics.json").is_file():
        console.print(f"{run_dir} is complete: nothing to go on with.")
        return 0
    state = json.loads((run_dir / "checkpoints" / "state.json").read_text())
    place = state.get("working_directory", os.getcwd())
    if not os.path.isdir(place):
        raise GraftError(f"{run_dir} was begun in {place}, where its paths lead from, and that is gone.")
    os.chdir(place)
    kind = runs.kind_of(state)
    config = read_config(run_dir / "config.yaml", getattr(options, f"{kind.capitalize()}Config"))
    console.print(f"Going on with {run_dir}")
    importlib.import_module(f"pipelines.{kind}").run(config, run_dir)
    return 0
