"""Where a phase is: how far it has come, what it has found, and the variables that belong to it. No TensorFlow here."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np

EXPLODED = 100.0  # times the loss of guessing, or of the phase's first step if that is more
MOST_ROLLBACKS = 3  # times that training goes back to the last good step in a phase, at a lower rate each time


class Diverged(Exception):
    """A loss that is no number, or far too large."""

    def __init__(self, loss: float):
        super().__init__(f"loss {loss}")
        self.loss = loss


@dataclasses.dataclass
class Progress:
    """How far a phase is: `step` steps of epoch number `epoch` are done, counted from 0."""

    epoch: int = 0
    step: int = 0
    sums: list = dataclasses.field(default_factory=lambda: [0.0] * 4)  # of this epoch: loss, weight, correct, examples
    history: list = dataclasses.field(default_factory=list)  # a row per epoch
    ended: bool = False  # by early stopping and its like
    forgot: bool = False  # went beyond --forgetting-limit
    best_epoch: int = 0  # of those that were kept; counted from 1
    best_val_loss: float = math.inf
    own_epoch: int = 0  # of all of this phase, kept or not; counted from 1
    own_loss: float = math.inf
    first_loss: float | None = None  # of the phase's first step
    is_whole: bool = True  # false within a call of several steps, where only some may be done
    rate_factor: float = 1.0  # of the learning rate, after rollbacks
    rollbacks: list = dataclasses.field(default_factory=list)
    best_weights: list = dataclasses.field(default_factory=list)  # numpy arrays, as are those of `right`
    right: np.ndarray | None = None

    def add(self, sums: np.ndarray, guessing_loss: float) -> None:
        """Count a step in; raises Diverged where its loss is no number or far too large."""
        loss = float(sums[0] / sums[1]) if sums[1] else 0.0
        limit = EXPLODED * max(guessing_loss, self.first_loss or loss)
        spent = len(self.rollbacks) == MOST_ROLLBACKS  # a large loss is then let be: the phase is undone in the end
        if not math.isfinite(loss) or (loss > limit and not spent):
            raise Diverged(loss)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.step += 1
        self.sums = [float(a) + float(b) for a, b in zip(self.sums, sums)]

    def book(self, val_loss: float, right: np.ndarray, best_weights: list | None) -> None:
        """Note what validation gave; best_weights: of an epoch that is the best so far, and is kept."""
        if best_weights is not None:
            self.best_val_loss, self.best_epoch, self.best_weights = val_loss, self.epoch + 1, best_weights
        if val_loss < self.own_loss:
            self.own_loss, self.own_epoch, self.right = val_loss, self.epoch + 1, right

    def end_epoch(self, row: dict) -> None:
        """Append a row of history and turn to the next epoch."""
        self.history.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0] * 4

    def outcome(self) -> dict:
        """What became of the phase, for its dict."""
        rollbacks = {"rollbacks": self.rollbacks} if self.rollbacks else {}
        kept = {"kept": self.best_epoch > 0, "val_loss": self.best_val_loss}
        return {**rollbacks, **kept, "right": self.right, "forgot": self.forgot}

    @property
    def mean_loss(self) -> float:
        return self.sums[0] / self.sums[1]

    @property
    def accuracy(self) -> float:
        return self.sums[2] / self.sums[3]


def take(progress: Progress, variables: list) -> tuple[dict, dict]:
    """A copy of where a phase is: facts and arrays, as `write_state` takes them.

    variables: what training changes besides `progress`, in an order that is always the same.
    """
    facts = {
        field.name: getattr(progress, field.name)
        for field in dataclasses.fields(progress)
        if field.name not in ("best_weights", "right")
    }
    arrays = {f"variable{index}": value_of(variable) for index, variable in enumerate(variables)}
    arrays |= {f"best{index}": value for index, value in enumerate(progress.best_weights)}
    if progress.right is not None:
        arrays["right"] = progress.right
    return json.loads(json.dumps(facts, default=float)), arrays


def put_back(state: tuple[dict, dict], variables: list) -> Progress:
    """Give variables the values of a state; returns the progress that belongs to them."""
    facts, arrays = state
    for index, variable in enumerate(variables):
        variable.assign(arrays[f"variable{index}"])
    best = [arrays[f"best{index}"] for index in range(sum(name.startswith("best") for name in arrays))]
    facts = json.loads(json.dumps(facts))  # a copy: the state may be needed again
    facts.pop("seconds", None)
    return Progress(**facts, best_weights=best, right=arrays.get("right"))


def value_of(variable) -> np.ndarray:
    """The value of a variable of TensorFlow or Keras, mirrored or not, as an array of its own."""
    return np.array(variable.numpy())


def is_good(state: tuple[dict, dict]) -> bool:
    """Whether all that training goes on from is a number."""
    return all(np.isfinite(value).all() for name, value in state[1].items() if value.dtype.kind == "f")
