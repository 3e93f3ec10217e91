"""A run that was stopped goes on: what training has reached lies in RUN/checkpoints/resume, each file whole or absent.

A resumed run goes through the same story again. A phase that had ended is not trained but read (NUMBER-NAME.ended.npz);
the one that was running goes on from its newest state (NUMBER-NAME.STEPS.npz, the last two are kept): a position
(epoch, step), and the weights, optimizer slots, averages, best weights, history and loss sums that belong to it. Order,
augmentation and dropout are pure functions of seed and position, so that the run ends as if nothing had happened.

A loss that is no number, or EXPLODED times too large, takes training back to the last good step, at a lower rate.
No TensorFlow here.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import shutil
import time

from models import GraftError
from pipelines.console import PHASE_TITLES, console
from pipelines.progress import MOST_ROLLBACKS, Progress, is_good, take, value_of
from pipelines.runs import write_json
from pipelines.states import unpack, write_state

STATES_KEPT = 2  # of the phase that is running: where the last one is damaged, the one before is taken
GOOD_STEPS = 100  # steps after which what training may go back to is noted anew; also at the start of each epoch
ROLLBACK_RATE = 0.25  # by which the learning rate is multiplied when training goes back


class Recovery:
    """What a run has saved of its training, and saves; without a folder it only knows what to go back to."""

    def __init__(self, run_dir: pathlib.Path | None = None, every_s: float = math.inf, from_chief=lambda found: found):
        """every_s: seconds from one saved state of a phase to the next.

        from_chief: of several workers, of whom only the chief has a folder: what it has read -> that, on all of them.
        """
        self.folder = run_dir / "checkpoints" / "resume" if run_dir else None
        self.every_s, self.from_chief = every_s, from_chief
        self.trusted = True  # until a phase is trained anew: what follows it on disk then no longer counts
        self.number, self.progress, self.variables, self.good = 0, None, [], None
        self.begin("")

    def start_run(self, identity: dict[str, str]) -> None:
        """Note what a resumed run must find again, or compare with what was noted.

        identity: such as the data's fingerprint, by what a user would call it.

        Raises:
            GraftError: something is no longer what the run began with.
        """
        if not self.folder:
            return
        noted = self.folder / "run.json"
        if not noted.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(noted, identity)
            return
        known = json.loads(noted.read_text())
        changed = [name for name in identity if known.get(name) != identity[name]]
        if changed:
            raise GraftError(
                f"{self.folder.parents[1]} cannot go on: {' and '.join(changed)} changed since it began. Put back what "
                f"was there, or train anew into another folder."
            )

    # ---- one phase

    def begin(self, name: str) -> None:
        """Turn to the next phase."""
        self.number, self.name, self.good = self.number + (name != ""), name, None
        self.spent_s, self.started, self.last_saved = 0.0, time.monotonic(), time.monotonic()

    def ended_phase(self, weights: list) -> dict | None:
        """What a phase gave that an earlier process has trained to its end, its weights put into place; or None."""
        found = self._read([self._path("ended")])
        if not found:
            return None
        facts, arrays = found
        for index, weight in enumerate(weights):
            weight.assign(arrays[f"weight{index}"])
        phase = {**facts["phase"], "right": arrays["right"]}
        if "kernel" in arrays:
            phase["simplest"] = (arrays["kernel"], arrays["bias"])
        self.spent_s = facts["seconds"]
        console.print(f"  {self.name}: had ended when the run was stopped")
        return phase

    def newest_state(self) -> tuple[dict, dict] | None:
        """The newest whole state of this phase, where an earlier process has left one."""
        found = self._read(self._states())
        if found:
            self.spent_s = found[0]["seconds"]
            place = f"epoch {found[0]['epoch'] + 1}, after {found[0]['step']} steps"
            console.print(f"  {self.name}: going on in {place}")
        return found

    def watch(self, progress: Progress, variables: list) -> None:
        """Progress and variables are what is saved from now on, and what training goes back to if need be."""
        self.progress, self.variables = progress, variables
        self.good = self.good or self.state()

    def state(self) -> tuple[dict, dict]:
        """Where the phase is now."""
        facts, arrays = take(self.progress, self.variables)
        return facts | {"seconds": self.spent_s + time.monotonic() - self.started}, arrays

    def is_due(self) -> bool:
        return self.folder is not None and time.monotonic() - self.last_saved > self.every_s

    def between_steps(self, due: bool, steps: int) -> None:
        """After so many steps in one go: save where a save is due, else note every GOOD_STEPS what to go back to."""
        if due:
            self.save()
        elif self.progress.step // GOOD_STEPS > (self.progress.step - steps) // GOOD_STEPS:
            state = self.state()
            self.good = state if is_good(state) else self.good

    def save(self) -> None:
        """Save where the phase is; the last STATES_KEPT stay. Not where a weight is no longer a number."""
        state = self.state()
        if is_good(state):
            self.good = state
            self.write()

    def write(self) -> None:
        """Write the last good state."""
        if self.folder:
            states = self._states()
            serial = int(states[0].name.split(".")[-2]) + 1 if states else 1
            write_state(self._path(f"{serial:06}"), *self.good)
            for path in self._states()[STATES_KEPT:]:
                path.unlink(missing_ok=True)
        self.last_saved = time.monotonic()

    @contextlib.contextmanager
    def saved_when_stopped(self):
        """Around the training of a phase: what stops it (SIGTERM, a file that is gone) is passed on after a save."""
        try:
            yield
        except KeyboardInterrupt:
            self.save()
            raise
        except Exception as error:
            if is_missing_file(error) and self.progress.is_whole:
                self.save()
            raise

    def go_back(self, loss: float, learning_rate: float) -> tuple[dict, dict]:
        """The last good state, and from now on a lower rate; learning_rate: the phase's at its beginning.

        Raises:
            GraftError: training has gone back MOST_ROLLBACKS times already.
        """
        now = self.progress
        if len(now.rollbacks) == MOST_ROLLBACKS:
            raise GraftError(
                f"The loss of phase {self.name} is not finite in epoch {now.epoch + 1} ({loss}), nor was it at "
                f"{MOST_ROLLBACKS} higher rates. Lower the learning rate ({learning_rate:g} at first, "
                f"{learning_rate * now.rate_factor:g} now)."
            )
        factor = now.rate_factor * ROLLBACK_RATE
        rollback = {
            "epoch": now.epoch + 1,
            "step": now.step + 1,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no word for it
            "learning_rate": learning_rate * factor,
        }
        facts, arrays = self.good
        self.good = facts | {"rate_factor": factor, "rollbacks": [*now.rollbacks, rollback]}, arrays
        console.print(f"[yellow]  {rollback_sentence(rollback)}")
        self.write()
        return self.good

    def end(self, phase: dict, weights: list, seconds: float) -> None:
        """Note what a phase gave; its states are no longer needed. seconds: what it took of --budget."""
        self.trusted = False
        if not self.folder:
            return
        arrays = {f"weight{index}": value_of(weight) for index, weight in enumerate(weights)}
        arrays |= dict(zip(("kernel", "bias"), phase.get("simplest", ()))) | {"right": phase["right"]}
        facts = {name: value for name, value in phase.items() if name not in ("right", "simplest")}
        write_state(self._path("ended"), {"phase": facts, "seconds": seconds}, arrays)
        for path in self._states():
            path.unlink(missing_ok=True)

    # ---- files

    def remove(self) -> None:
        """The run is complete: nothing of this is needed any more, nor what killed writers left half done."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            run_dir = self.folder.parents[1]
            for pattern in (".tmp-*", "checkpoints/.tmp-*", "serving/*/.tmp-*"):
                for path in run_dir.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _path(self, what: str) -> pathlib.Path | None:
        return self.folder / f"{self.number}-{self.name}.{what}.npz" if self.folder else None

    def _states(self) -> list[pathlib.Path]:
        """The states of this phase, newest first."""
        return sorted(self.folder.glob(f"{self.number}-{self.name}.[0-9]*.npz"), reverse=True) if self.folder else []

    def _read(self, paths: list[pathlib.Path]) -> tuple[dict, dict] | None:
        """The first of some files that is whole; says so where one is damaged."""
        if not self.trusted:
            return None
        found = None
        for path in paths if self.folder else ():
            try:
                found = unpack(path.read_bytes())
                break
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                console.print(f"[yellow]  {path} is {error}. Going on from what was saved before it.")
        return self.from_chief(found)


def is_missing_file(error: BaseException) -> bool:
    """Whether TensorFlow or Python says that a file is not there."""
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"


# ---------------------------------------------------------------- what is said of it


def rollback_sentence(rollback: dict) -> str:
    what = "was no longer a number" if rollback["loss"] is None else f"exploded to {rollback['loss']:.3g}"
    return (
        f"The loss {what} in epoch {rollback['epoch']}, step {rollback['step']}: training went back to the last good "
        f"step, and on at a learning rate of {rollback['learning_rate']:.2g}."
    )


def verdicts(phases: list[dict]) -> list[str]:
    """What one would tell a colleague about rollbacks."""
    return [
        f"{PHASE_TITLES.get(phase['name'], phase['name'])}: {rollback_sentence(rollback)}"
        for phase in phases
        for rollback in phase.get("rollbacks", ())
    ]
