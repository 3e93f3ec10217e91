"""How far probabilities can be trusted: a temperature that makes them honest, and when to say `unsure`.

Both are found on the validation set and become part of the exported graph. Labels are never changed by either: a
temperature keeps their order, and an unsure answer keeps its label.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np

from models import GraftError
from pipelines import runs
from pipelines.evaluate import expected_calibration_error, reliability_bins, softmax_and_cross_entropy

LIMIT = math.log(10.0)  # temperatures from 1/10 to 10 are tried
FEWEST = 20  # validation examples: fewer say nothing of a temperature
FOLDS = 5
CONFIDENCE = 0.9  # one-sided, that the precision asked for holds at the threshold
STEPS = 20  # shares of the validation set that are tried, surest first: 5%, 10%, ... 100%
NEVER_SURE = 2.0  # a threshold that no probability reaches


# ---------------------------------------------------------------- temperature


def find_temperature(labels, logits, seed: int = 0) -> dict:
    """The temperature by which logits are divided: Guo et al. 2017, "On Calibration of Modern Neural Networks".

    It stays 1 where there are fewer than FEWEST examples, and where temperatures found on four fifths of them make the
    loss of the other fifth no better.

    Args:
        labels: [n] int. logits: [n, classes] float32, of examples that were not trained on.

    Returns:
        temperature; because, a word on how it was found; val_loss_before and val_loss_after, mean cross-entropy in
        nats; cross_validated_loss, None where it was not asked for.
    """
    logits = np.asarray(logits, np.float64)
    before = mean_loss(labels, logits)
    figures = {"val_loss_before": before, "val_loss_after": before, "cross_validated_loss": None}
    if len(labels) < FEWEST:
        because = f"{len(labels)} validation examples are too few to find another"
        return {"temperature": 1.0, "because": because, **figures}
    fold_of = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    held_out = logits.copy()
    for fold in range(FOLDS):
        seen = fold_of != fold
        held_out[~seen] /= drawn_temperature(labels[seen], logits[seen])
    figures["cross_validated_loss"] = mean_loss(labels, held_out)
    temperature = drawn_temperature(labels, logits)
    if temperature == 1.0 or figures["cross_validated_loss"] >= before:
        return {"temperature": 1.0, "because": "another makes held-out validation examples no likelier", **figures}
    # As the graph has it.
    temperature = float(np.float32(temperature))
    figures["val_loss_after"] = mean_loss(labels, logits / temperature)
    return {"temperature": temperature, "because": "fitted on the validation set", **figures}


def drawn_temperature(labels, logits) -> float:
    """The temperature with the least loss, its logarithm drawn towards 0 by as much as it is uncertain.

    With t the best logarithm and v its variance, that is t * max(0, 1 - v / t^2), the positive part of James and Stein
    1961, "Estimation with Quadratic Loss". v is the larger one of what the curvature of the loss says (Fisher) and of
    what also asks for the spread of its slopes (Huber 1967, the sandwich). A best one at the end of the range is none:
    without a mistake, surer is always better.
    """
    from scipy import optimize

    bounds = (-LIMIT, LIMIT)
    found = optimize.minimize_scalar(
        lambda t: mean_loss(labels, logits / math.exp(t)), bounds=bounds, method="bounded", options={"xatol": 1e-4}
    )
    best = float(found.x)
    if LIMIT - abs(best) < 1e-2 or best == 0.0:
        return 1.0
    scaled = logits / math.exp(best)
    probabilities, _ = softmax_and_cross_entropy(labels, scaled)
    mean = (probabilities * scaled).sum(axis=1)
    slopes = np.take_along_axis(scaled, labels[:, None], axis=1)[:, 0] - mean  # of each loss, by t
    curvature = float((probabilities * (scaled - mean[:, None]) ** 2).sum())  # of their sum, where slopes cancel
    if curvature <= 0:
        return 1.0
    variance = max(1 / curvature, float((slopes**2).sum()) / curvature**2)
    return math.exp(best * max(0.0, 1 - variance / best**2))


def mean_loss(labels, logits) -> float:
    """Mean cross-entropy in nats."""
    return float(softmax_and_cross_entropy(labels, logits)[1].mean())


def calibration_error(labels, logits) -> float:
    """Expected calibration error, as `pipelines.evaluate` has it."""
    probabilities, _ = softmax_and_cross_entropy(labels, np.asarray(logits, np.float64))
    return expected_calibration_error(
        reliability_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    )


# ---------------------------------------------------------------- abstaining


def unsure_threshold(top, right, precision: float) -> float:
    """The top probability below which an answer is unsure, so that those above have the precision asked for.

    Of the surest 5%, 10%, ... 100% of the validation set the largest share is taken whose precision has a one-sided
    90% lower bound (Clopper and Pearson 1934) of at least `precision`; NEVER_SURE where no share has: then every
    answer is unsure. With no mistake among them, 45 answers are needed for 0.95 and 230 for 0.99.

    Args:
        top: [n] float32, the largest probability of each example. right: [n] bool, whether its label is right.
    """
    from scipy import stats

    found = NEVER_SURE
    ordered = np.sort(np.asarray(top, np.float32))[::-1]
    for step in range(1, STEPS + 1):
        threshold = ordered[math.ceil(len(ordered) * step / STEPS) - 1]
        sure = top >= threshold  # equal ones with it
        hits, count = int(right[sure].sum()), int(sure.sum())
        if hits and stats.beta.ppf(1 - CONFIDENCE, hits, count - hits + 1) >= precision:
            found = float(threshold)
    return found


def sure_figures(top, right, threshold: float) -> dict:
    """coverage, the share of answers that are sure; their precision and its 95% interval (None without any); sure."""
    from scipy import stats

    sure = top >= np.float32(threshold)
    hits, count = int(right[sure].sum()), int(sure.sum())
    figures = {"examples": len(top), "sure": count, "coverage": count / len(top), "precision": None, "interval": None}
    if count:
        low = stats.beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
        high = stats.beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
        figures |= {"precision": hits / count, "interval": [float(low), float(high)]}
    return figures


# ---------------------------------------------------------------- of a run


def calibrate(splits, logits: dict, options, seed: int = 0) -> tuple[dict, dict]:
    """What calibration finds on the validation set, and what it does to the test set.

    Args:
        splits: `pipelines.data.Splits`. logits: {"val", "test"}, [n, classes] float32 each.
        options: `pipelines.common_options.GuardOptions`.

    Returns:
        What metrics.json holds under `calibration`: `find_temperature`'s figures; examples; test_loss_before,
        test_loss_after, test_calibration_error_before and test_calibration_error_after; with a precision asked for
        abstain: precision, threshold, and val and test as `sure_figures` gives them. Of several labels only
        temperature, 1, and because. And the logits divided by the temperature.
    """
    if splits.multi_label:
        return {"temperature": 1.0, "because": "thresholds are chosen on the probabilities as they are"}, logits
    labels = {name: getattr(splits, name)["label"].to_numpy() for name in logits}
    facts = fitted(labels["val"], logits["val"], options, seed)
    calibrated = {name: values / np.float32(facts["temperature"]) for name, values in logits.items()}
    for when, values in (("before", logits["test"]), ("after", calibrated["test"])):
        facts[f"test_loss_{when}"] = mean_loss(labels["test"], np.asarray(values, np.float64))
        facts[f"test_calibration_error_{when}"] = calibration_error(labels["test"], values)
    if "abstain" in facts:
        facts["abstain"]["test"] = sure_figures(*top_and_right(labels["test"], calibrated["test"]), unsure_below(facts))
    return facts, calibrated


def fitted(labels, logits, options, seed: int = 0) -> dict:
    """Temperature and threshold for validation examples: labels [n] int, logits [n, classes] float32."""
    facts = {"examples": len(labels)}
    if options.calibrate:
        facts |= find_temperature(labels, logits, seed)
    else:
        facts |= {"temperature": 1.0, "because": "--no-calibrate"}
    precision = options.abstain_below_precision
    if precision:
        top, right = top_and_right(labels, logits / np.float32(facts["temperature"]))
        threshold = unsure_threshold(top, right, precision)
        facts["abstain"] = {
            "precision": precision,
            "threshold": threshold,
            "val": sure_figures(top, right, threshold),
        }
    return facts


def top_and_right(labels, logits) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability [n] float32 of each example, and whether it is that of its label [n] bool."""
    probabilities, _ = softmax_and_cross_entropy(labels, np.asarray(logits, np.float64))
    return probabilities.max(axis=1).astype(np.float32), probabilities.argmax(axis=1) == labels


def unsure_below(facts: dict) -> float | None:
    """The threshold of a run's calibration; None where no precision was asked for."""
    return facts["abstain"]["threshold"] if "abstain" in facts else None


def exported(facts: dict | None) -> dict:
    """temperature and unsure_below, as the functions of `serving.export` take them; None is a run without any."""
    return {"temperature": facts["temperature"], "unsure_below": unsure_below(facts)} if facts else {"temperature": 1.0}


def calibration_warnings(facts: dict) -> list[str]:
    """What the user should know: that no threshold reaches the precision asked for."""
    if unsure_below(facts) != NEVER_SURE:
        return []
    return [
        f"--abstain-below-precision {facts['abstain']['precision']:g}: no threshold is known to reach it on "
        f"{facts['examples']:,} validation examples, so every answer is marked unsure. More of them, or a lower "
        f"precision, would help."
    ]


def calibration_sentences(facts: dict | None) -> list[str]:
    """What `calibrate` found, for the report."""
    if not facts or "test_loss_before" not in facts:
        return [f"The temperature is 1: {facts['because']}."] if facts else []
    if facts["temperature"] == 1.0:
        sentences = [f"The temperature of its probabilities is 1: {facts['because']}."]
    else:
        sentences = [
            f"Its probabilities have a temperature of {facts['temperature']:.2f}, {facts['because']} "
            f"({facts['examples']:,} examples): loss on validation {facts['val_loss_before']:.3f} before, "
            f"{facts['val_loss_after']:.3f} after; on test {facts['test_loss_before']:.3f} and "
            f"{facts['test_loss_after']:.3f}, calibration error {facts['test_calibration_error_before']:.1%} and "
            f"{facts['test_calibration_error_after']:.1%}. The exported model has it inside; every figure of this page "
            f"about the whole model is with it."
        ]
    if "abstain" in facts:
        sentences.append(abstain_sentence(facts["abstain"]))
    return sentences


def abstain_sentence(abstain: dict) -> str:
    """From which probability an answer is sure, and what that gives on the test set."""
    test, wanted = abstain["test"], f"a precision of {abstain['precision']:g}"
    if abstain["threshold"] == NEVER_SURE:
        return f"Every answer is marked unsure: validation shows of no threshold that it has {wanted}."
    text = (
        f"Answers below a probability of {abstain['threshold']:.3f} are marked unsure, chosen on validation for "
        f"{wanted}. On test {test['coverage']:.1%} of the answers are sure"
    )
    if test["precision"] is None:
        return f"{text}."
    low, high = test["interval"]
    return f"{text}, and {test['precision']:.1%} of those are right (95% interval {low:.1%} to {high:.1%})."


def calibration_of_run(run_dir: pathlib.Path, config, logits_of) -> dict:
    """Temperature and threshold of a run: those it ended with; of a stopped run found on its validation set.

    A run without them, from an earlier version, has temperature 1.

    Raises:
        GraftError: a threshold is wanted, and all validation examples of a stopped run are gone.
    """
    if (run_dir / "metrics.json").is_file():
        return json.loads((run_dir / "metrics.json").read_text()).get("calibration", {"temperature": 1.0})
    val = runs.read_split(run_dir, "val")
    if val.num_rows:
        return fitted(val["label"].to_numpy(), logits_of(val), config.guards, config.training.seed)
    if config.guards.abstain_below_precision:
        raise GraftError(
            f"{run_dir}: the threshold of --abstain-below-precision is chosen on the validation examples, and all of "
            f"those that splits.csv lists are gone or changed. Put them back, or train again."
        )
    return {"temperature": 1.0}
