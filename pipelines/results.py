"""What follows training, for every kind of data: figures, a verified version, and the report."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from models import GraftError
from pipelines import facts, runs
from pipelines.advice import run_advice
from pipelines.calibration import calibrate, calibration_of_run, calibration_warnings
from pipelines.console import console
from pipelines.data import targets_of
from pipelines.evaluate_multi_label import choose_thresholds
from pipelines.leakage import copies_warnings, exact_pairs, near_warnings, score_without_copies
from pipelines.mistakes import worst_mistakes
from pipelines.overfitting import gap_warnings, judge_gap, tuning_advice

VERIFIED_EXAMPLES = 200  # most test examples whose served answers are compared with training's


def thresholds_for(val, logits: np.ndarray) -> np.ndarray:
    """The threshold of each class, [classes] float32, that suits the validation set of a multi-label model best."""
    return choose_thresholds(targets_of(val, logits.shape[1]), facts.probabilities_of(logits, multi_label=True))


def score(splits, logits_of, config) -> tuple[dict, dict, np.ndarray | None, dict, dict]:
    """Calibrated logits of val and test, their metrics, thresholds (else None), calibration, the gap to training."""
    logits = {"val": logits_of(splits.val), "test": logits_of(splits.test)}
    thresholds = thresholds_for(splits.val, logits["val"]) if splits.multi_label else None
    calibration, logits = calibrate(splits, logits, config.guards, config.training.seed)
    gap = judge_gap(splits, logits_of, logits["val"], config.guards.gap_limit)
    return logits, facts.metrics_of(splits, logits, thresholds, config), thresholds, calibration, gap


NOTE = "checkpoints/resume/published.json"  # what was checked of a version that is about to get its number


def published_before(folder: pathlib.Path, note: pathlib.Path) -> tuple[pathlib.Path, dict] | None:
    """The version that a run had published when it was killed, and what was checked of it; None without."""
    if not note.is_file():
        return None
    noted = json.loads(note.read_text())
    new = sorted({path.name for path in folder.glob("[0-9]*")} - set(noted["before"]), key=int)
    return (folder / new[0], noted["checked"]) if new else None


def publish(
    run_dir: pathlib.Path, write, samples: list, expected, otherwise=None, contract: dict | None = None
) -> tuple[pathlib.Path, dict]:
    """Export to RUN/serving/NAME/NUMBER, verified on examples before it gets its number.

    Args:
        write: (folder) -> what became of the weights; writes the SavedModel.
        otherwise: as `write`, used where constants change an answer too much, which noise did not show.
        samples: what the served model is asked, a list of bytes, or of pairs of bytes.
        expected: training's answers to them, as `serving.verify.verify` takes them.
        contract: what training made of the probe of `serving.contract`; None: not known.

    Returns:
        The version's folder, and what was checked.
    """
    from serving.new_version import publish_version
    from serving.verify import VerificationError, verify

    folder, note = run_dir / "serving" / runs.serving_name(run_dir), run_dir / NOTE
    earlier = published_before(folder, note)
    if earlier:
        return earlier
    checked, before = {}, sorted(path.name for path in folder.glob("[0-9]*"))

    def write_and_note(folder):
        checked["weights"] = write(folder)["kept_as"]

    def check(temporary):
        checked.update(verify(temporary, samples, expected, contract=contract))
        checked["input_contract"] = contract
        if note.parent.is_dir():  # of a run that can be resumed
            runs.write_json(note, {"before": before, "checked": checked})

    try:
        with console.status("exporting and verifying the SavedModel"):
            version = publish_version(write_and_note, folder, check)
    except VerificationError as error:
        if otherwise is None or checked["weights"] == "variables":
            raise
        why = str(error).partition("verification failed at ")[2]
        console.print(
            f"[yellow]Note: weights stay variables, which answer as training does, if slower. As constants they failed "
            f"verification at {why}"
        )
        return publish(run_dir, otherwise, samples, expected, contract=contract)
    return version, checked


def write_results(
    run_dir,
    config,
    kind: str,
    splits,
    backbone,
    phases,
    scored,
    version,
    checked,
    clock,
    transfer,
    examined,
    baselines=(),
):
    """Write the report, the model card and, last, metrics.json: a run that has it is complete.

    Args:
        kind: "image", "text" or "audio".
        scored: what `score` gave.
        version, checked: what `publish` gave; None and {} without an export.
        transfer: what `pipelines.transfer.judge_transfer` gave.
        examined: what `pipelines.label_checks.examiner` has found.
        baselines: as `pipelines.baselines` gives them.

    Returns:
        Everything that was gathered, and the path of the report.
    """
    from pipelines.baselines import baseline_verdict
    from pipelines.model_card import write_model_card
    from pipelines.report import write_report

    noun = facts.NOUNS[kind].removesuffix("s")
    logits, metrics, thresholds, calibration, gap = scored
    probabilities = facts.probabilities_of(logits["test"], splits.multi_label)
    gathered = facts.about_run(config, splits, backbone, phases, metrics, kind)
    gathered |= {
        **({"thresholds": thresholds.tolist()} if splits.multi_label else {}),
        "mistakes": worst_mistakes(
            splits.test, probabilities, splits.class_names, splits.white_level, config.report.report_inputs, thresholds
        ),
        "timings": clock.laps,
        **({"serving": {"folder": str(version.relative_to(run_dir)), **checked}} if version else {}),
        "transfer": transfer,
        "calibration": calibration,
        "overfitting": {**gap, "advice": tuning_advice(phases, gathered["settings"], gap, kind)} if gap else {},
        "exact_copies": score_without_copies(splits, logits["test"]),
        "exact_pairs": exact_pairs(splits, config.report.report_inputs),
        **examined,
    }
    gathered["warnings"] = [
        *gathered["warnings"],
        *gap_warnings(gap, gathered["overfitting"].get("advice", "")),
        *calibration_warnings(calibration),
        *copies_warnings(gathered["exact_copies"], noun),
        *(near_warnings(examined["near_copies"], noun) if examined else []),
    ]
    # Where transfer hurts, that is the first thing to say.
    place = 0 if transfer["verdict"] == "hurts" else len(gathered["verdicts"])
    gathered["verdicts"].insert(place, transfer["sentence"])
    if baselines:
        gathered["baselines"] = list(baselines)
        headline = metrics["test"]["headline"]
        compared = (baseline_verdict(headline, row, facts.NOUNS[kind]) for row in baselines)
        gathered["verdicts"] = [*gathered["verdicts"], *compared]
    gathered["advice"] = run_advice(gathered)
    report = write_report(run_dir, gathered)
    write_model_card(run_dir, gathered)
    runs.write_json(run_dir / "metrics.json", facts.machine_metrics(gathered))
    return gathered, report


class StrictVerdict(GraftError):
    """A verdict that --strict does not let pass; the run itself is complete."""

    exit_code = 3


def check_strict(config, gathered: dict, run_dir: pathlib.Path) -> None:
    """Raise StrictVerdict where transfer hurts and --strict was given; after all that the run writes and says."""
    if config.guards.strict and gathered["transfer"]["verdict"] == "hurts":
        raise StrictVerdict(
            f"--strict: {gathered['transfer']['sentence']} {run_dir} is complete. "
            f"Try another backbone (graft rank), or go on without the flag."
        )


def thresholds_of_run(run_dir: pathlib.Path, logits_of) -> np.ndarray:
    """The thresholds of a multi-label run: those it ended with; of a stopped run chosen on its validation set."""
    if (run_dir / "metrics.json").is_file():
        return np.array(json.loads((run_dir / "metrics.json").read_text())["thresholds"], np.float32)
    val = runs.read_split(run_dir, "val", multi_label=True)
    if not val.num_rows:
        raise GraftError(
            f"{run_dir}: thresholds are chosen on the validation examples, and all of those that splits.csv lists "
            f"are gone or changed. Put them back, or train again."
        )
    return thresholds_for(val, logits_of(val))


def as_it_ended(run_dir: pathlib.Path, config, state: dict, logits_of) -> tuple:
    """What a later export of a run takes besides its model: test examples, thresholds, calibration, contract.

    state: what `pipelines.runs.start_run_folder` noted; logits_of: of a table, by the model of the run.
    """
    multi_label = state.get("multi_label", False)
    samples = runs.read_split(run_dir, "test", VERIFIED_EXAMPLES, multi_label)
    thresholds = thresholds_of_run(run_dir, logits_of) if multi_label else None
    calibration = None if multi_label else calibration_of_run(run_dir, config, logits_of)
    return samples, thresholds, calibration, state.get("input_contract")
