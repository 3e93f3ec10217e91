"""How deep to go: from the head over the top blocks to the whole backbone, for as long as it may pay (--depth auto).

The rungs are head, light (the top `--light-blocks` blocks too) and full. The rung with the lowest validation loss is
kept, every other is undone. Which rungs are tried is decided on validation:

- light follows head, unless head has everything right on 100 validation examples or more (nor does full follow
  such a light): no gain could show there, and a lower loss of answers that are all right says only that they are
  surer. Whoever knows that validation is easier than what will be asked can say `--depth 2`: see `must_beat`.
- full follows light unless a gain of half a point can be excluded: unless the upper bound of the one-sided 80%
  interval of (accuracy of light - accuracy of head), example by example, lies below +0.5 points. What the top blocks
  bring is the evidence for what the others would. Few examples exclude little, and what is not excluded is tried:
  where light has lost one of 50 validation examples and won none, full is still tried; where it has lost two of 200,
  or lost five of 2,000 and won five others, it is not.
- No rung follows one that has reached `--target` or gone beyond `--forgetting-limit`, nor where `--budget` has too
  little left for it.

No TensorFlow here: these are the rules, and `pipelines.training.fit_two_phase` climbs by them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

TELLING = 100  # validation examples from which "all right" is no matter of luck
LEAST_GAIN = 0.005  # of accuracy: half a point is what a deeper rung must still be able to bring
FAR_RATE = 10  # times the usual one, of the whole backbone where transfer hurts
FAR = (
    "  The bare input says more than the pretrained features, so these have to change: the whole backbone learns "
    "faster, without flips."
)
QUANTILE = 0.8416  # of the standard normal distribution: 80% lie below


def rungs_of(depth: str, blocks: int | None, light_blocks: int, total: int) -> list[tuple[str, int | None]]:
    """The phases that may be trained one after the other: (name, blocks of the backbone that it thaws; None: all).

    Args:
        depth: --depth; blocks: what `pipelines.config.depth_blocks` makes of it.
        light_blocks: --light-blocks, of --depth auto.
        total: blocks of the backbone above its frozen front. One of a single block has no light rung.
    """
    if depth == "auto":
        light = min(light_blocks, total - 1)
        return [("head", 0), *([("light", light)] if light else []), ("full", None)]
    return [("head", 0)] if blocks == 0 else [("head", 0), ("fine_tune", blocks)]


def paired_gain(right: np.ndarray, best: np.ndarray) -> dict:
    """How much more often one model is right than another on the same examples, with one-sided 80% bounds.

    The adjusted interval of Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data": as if there were two more examples, one won and one lost. So the interval has
    a width even where the two models never differ.

    Args:
        right, best: [n] 0 or 1 per example; with several labels the share of right yes-or-nos.

    Returns:
        gain: the mean difference; interval: [low, high], each bound with 80% of the probability inside of it.
    """
    difference = np.asarray(right, np.float64) - np.asarray(best, np.float64)
    count = len(difference) + 2
    centre = difference.sum() / count
    variance = ((difference**2).sum() + 2) / count - centre**2
    reach = QUANTILE * (variance / count) ** 0.5
    return {"gain": float(difference.mean()), "interval": [float(centre - reach), float(centre + reach)]}


class Clock:
    """Seconds of training, without those of testing in between."""

    def __init__(self, budget_s: float):
        self.left, self.started = budget_s, time.perf_counter()

    @property
    def deadline(self) -> float:
        """Of time.perf_counter(): when the budget ends if training goes on from here."""
        return self.started + self.left

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self, more: float = 0.0) -> float:
        """The seconds since the last start, which the budget now lacks; more: what earlier processes took besides."""
        seconds = time.perf_counter() - self.started + more
        self.left -= seconds
        return seconds


def climb_facts(phase: dict, seconds: float, right: np.ndarray, best_right: np.ndarray | None) -> dict:
    """What a phase was like as a rung: seconds, val_loss and val_accuracy of its own best epoch, kept or not.

    Also val_examples, how many there are, and what `paired_gain` gives of it and the best phase before it, where there
    is one.
    """
    own = min(phase["history"], key=lambda row: row["val_loss"])
    gain = {} if best_right is None else paired_gain(right, best_right)
    figures = {"val_loss": own["val_loss"], "val_accuracy": own["val_accuracy"], "val_examples": len(right)}
    return {"seconds": seconds, **figures, **gain}


def seconds_needed(phases: list[dict], rungs: list[tuple], total: int, epochs: int) -> float:
    """A guess at the seconds of the next rung, from those of the last one.

    After the head, one pass over the frozen backbone for every epoch: about what augmented views and the gradients of
    the top blocks take. After light, in proportion to the number of thawed blocks. A rung that takes longer ends with
    the epoch in which time runs out.

    Args:
        phases, rungs: as `decide` takes them.
        total: blocks that full thaws; epochs: most epochs of the next rung.
    """
    if len(phases) == len(rungs):
        return 0.0
    last, blocks = phases[-1], rungs[len(phases)][1] or total
    if last["name"] == "head":
        passes = 1 if "solver" in last else last["epochs"]
        return last["climb"]["seconds"] * epochs / passes
    return last["climb"]["seconds"] * blocks / max(thawed_blocks(last), 1)


def decide(phases: list[dict], rungs: list[tuple], target: float, left: float, needed: float) -> tuple[bool, str]:
    """Whether the next rung is begun, and why or why not, in words.

    Args:
        phases: phase dicts so far, each with `climb` as `climb_facts` gives it.
        rungs: as `rungs_of` gives them.
        target: validation accuracy that is enough; 0: none.
        left, needed: seconds that the budget has, and that the next rung takes.
    """
    last, reached = phases[-1]["climb"], best_phase(phases)["climb"]["val_accuracy"]
    if target and reached >= target:
        return False, f"validation accuracy {reached:.3f} has reached the target of {target:g}"
    if phases[-1].get("forgot"):
        return False, f"training {name_of(phases[-1])} went beyond --forgetting-limit"
    if len(phases) == len(rungs):
        return False, "there is nothing more to thaw" if rungs[-1][1] is None else "no more was asked for"
    name, blocks = rungs[len(phases)]
    if name in ("light", "full") and reached == 1 and last.get("val_examples", 0) >= TELLING:
        tip = f"if what it will be asked is harder, try --depth {blocks or 'full'}"
        return False, f"all {last['val_examples']:,} validation examples are right: no gain could show; {tip}"
    if left <= 0 or needed > left:
        return False, f"of the budget {max(left, 0):.0f} s are left, and {name} may take {needed:.0f} s"
    if name != "full" or "interval" not in last:
        return True, f"{name} is always tried"
    high = last["interval"][1]
    excluded = high < LEAST_GAIN
    return not excluded, f"a gain of half a point is {'' if excluded else 'not '}excluded ({100 * high:+.1f} at most)"


def far_options(options, far: bool):
    """Options of a deeper phase: those asked for, or for a longer way where that is `far`.

    Where a linear model of the bare input beats one of the pretrained features, small steps away from these lead
    nowhere: the whole backbone then learns at FAR_RATE times the rate. Nor is the data like photographs, whose mirror
    images show the same: crops remain, flips do not. On `digits` (96 pixels, 4 epochs) the rate lowers the validation
    loss from 0.208 to 0.165, the two together to 0.082. On other data validation decides, as of any phase. A rate that
    the user chose stays, and all else with it.

    Args:
        options: `pipelines.image_options.FineTuneOptions` or its like.
    """
    usual = type(options)()
    if not far or options.fine_tune_learning_rate != usual.fine_tune_learning_rate:
        return options
    changed = {"fine_tune_learning_rate": FAR_RATE * options.fine_tune_learning_rate}
    if options.augmentation == "flip-crop":
        changed["augmentation"] = "crop"
    return dataclasses.replace(options, **changed)


def starting_weights(weights: list, head: list, simplest: tuple | None) -> list[tuple]:
    """(weight, value) pairs that every rung above the head starts from: the pretrained backbone and a head.

    Going on from the rung below instead took as long and ended at a higher loss, on validation and on test, with
    `topics` and with `textures`: what has learned its training set leaves little gradient to learn from.

    Args:
        weights: those of the model, as they are now, that the rungs before the last may change.
        head: the head's own; simplest: what these start from; None: what they hold.
    """
    instead = dict(zip(map(id, head), simplest or ()))
    return [(weight, instead.get(id(weight), weight.numpy())) for weight in weights]


def fit_from(start: list[tuple], fit: Callable, **arguments) -> dict:
    """Run a phase from other weights than the model's; where it is not kept, the model gets its own back.

    start: as `starting_weights` gives it.
    """
    own = [(weight, weight.numpy()) for weight, _ in start]
    for weight, value in start:
        weight.assign(value)
    phase = fit(**arguments)
    if not phase["kept"]:
        for weight, value in own:
            weight.assign(value)
    return phase


def after(phases: list[dict], depth: str) -> dict:
    """What `fit_phase` is told of the phases before the next one: where order and logs go on, what must be beaten."""
    # The order of the data is that of a run of this phase alone: full gives what --depth full would have given.
    first_epoch = 0 if "solver" in phases[0] else phases[0]["epochs"]
    aside = sum(phase["epochs"] for phase in phases[1:])
    return {"first_epoch": first_epoch, "epochs_aside": aside, **must_beat(phases, depth)}


def must_beat(phases: list[dict], depth: str) -> dict:
    """What an epoch of the next phase must be better than to be kept, as `fit_phase` takes it.

    The lowest validation loss so far. But where the head has all of validation right, a lower loss says only that it
    is surer, and validation cannot choose: a depth that was asked for is then kept where it has all right too.
    """
    all_right = phases[0]["climb"]["val_accuracy"] == 1
    return {"best_val_loss": best_phase(phases)["val_loss"], "or_all_right": all_right and depth != "auto"}


def best_phase(phases: list[dict]) -> dict:
    """The phase whose weights the model has: the last one that was better than all before it."""
    return [phase for phase in phases if phase["kept"]][-1]


def thawed_blocks(phase: dict) -> int:
    """How many blocks of the backbone trained in a phase."""
    return sum(row["trainable_parameters"] > 0 for row in phase["blocks"][:-1])


def name_of(phase: dict) -> str:
    """What trained in a phase, in words."""
    if phase["name"] in ("head", "full"):
        return {"head": "the head alone", "full": "the whole backbone"}[phase["name"]]
    count = thawed_blocks(phase)
    return "the top block" if count == 1 else f"the top {count} blocks"


def gain_verdict(what: str, head: dict, best: dict) -> str:
    """A sentence on what a phase brought over the head phase, on the test set; what: "Fine-tuning the top block"."""
    metric = "mean_average_precision" if "mean_average_precision" in head["test"] else "accuracy"
    before = head["test"][metric]
    gain = 100 * (best["test"][metric] - before)
    if gain > 0:
        return f"{what} was worth it: {gain:+.1f} points over the head alone ({before:.3f})."
    words = metric.replace("_", " ")
    change = f"cost {-gain:.1f} points of test {words}" if gain < 0 else f"left test {words} as it was"
    lower = best["climb"]["val_loss"] < head["climb"]["val_loss"]
    did = "lowered the validation loss" if lower else "had all of validation right, as the head alone has"
    return f"{what} {did}, yet {change} (head alone: {before:.3f})."


def verdicts(phases: list[dict]) -> list[str]:
    """What one would tell a colleague about the climb."""
    head, best = phases[0], best_phase(phases)
    undone = [f"fine-tuning {name_of(phase)}" for phase in phases if not phase["kept"]]
    said = [] if best is head else [gain_verdict(f"Fine-tuning {name_of(best)}", head, best)]
    if undone:
        kept = "the head alone" if best is head else "what was best before"
        said.append(f"{' and '.join(undone).capitalize()} did not improve validation: {kept} was kept.")
    because = phases[-1]["climb"]["because"]
    if len(phases) == 1:
        said.append(f"Only the head was trained: {because}.")
    elif phases[-1]["name"] != "full":
        said.append(f"No deeper phase was tried: {because}.")
    return said


def story(phases: list[dict]) -> dict:
    """The climb as one table and one sentence, for the report and for metrics.json.

    Returns:
        best: the rung that was kept in the end; sentence; rungs: a row for each that was trained, with rung,
        trainable_parameters, seconds (features that had to be computed included), val_loss and val_accuracy of its
        own best epoch, gain and interval over the best rung before it (from the second on), kept (it was better than
        all before it), went_on and because.
    """
    rungs = [
        {
            "rung": phase["name"],
            "trainable_parameters": phase["trainable_parameters"],
            "kept": phase["kept"],
            **phase["climb"],
        }
        for phase in phases
    ]
    best = best_phase(phases)
    tried = " and ".join(name_of(phase) for phase in phases[1:])
    sentence = (
        f"Started from the head alone{', tried ' + tried if tried else ''}, and stopped: "
        f"{rungs[-1]['because']}. The lowest validation loss, {best['climb']['val_loss']:.3f}, is that of "
        f"{name_of(best)}, which is what was tested and exported."
    )
    return {"best": best["name"], "sentence": sentence, "rungs": rungs}
