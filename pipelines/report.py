"""The report: one self-contained HTML page about a run, for people who were not there.

The layout is `report.html.j2`; this file works out what it shows. Jinja2 is worth its place as a
dependency because it escapes every class name and path by default and keeps the page in one HTML file.
"""

from __future__ import annotations

import base64
import math
import pathlib
import shlex

from pipelines import plots, runs
from pipelines.calibration import calibration_sentences
from pipelines.facts import NOUNS
from pipelines.overfitting import gap_sentence

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")
MATRIX_CLASSES = 50  # with more, the confusion matrix is too fine to read
MATRIX_FIRST_TO = 30  # above, the table of confused pairs comes first and is longer
BALANCE_SHOWN = 30  # classes whose number of examples is drawn
CLASSES_SHOWN = 20  # more rows of the per-class table are folded away
PICTURE_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
FILES = {"image": ("new-pictures/", "picture.jpg"), "audio": ("new-clips/", "clip.wav")}  # kind -> names in examples
TIMING_TITLES = {
    "data": "Reading and checking the data",
    "head": "Training the head",
    "fine_tune": "Fine-tuning",
    "evaluate": "Evaluating",
    "export": "Exporting",
    "verify": "Verifying the served answers",
}
DATA_TITLES = {
    "fingerprint": "Fingerprint of the data",
    "white_level": "White level of 16-bit pictures",
    "duplicates": "Duplicates",
    "exif_rotated": "Pictures with an EXIF rotation, which is ignored",
}
METRICS = (  # key, title, is a share shown in percent, what it says
    (
        "mean_average_precision",
        "Mean average precision",
        False,
        "Area under the precision-recall curve, a mean over classes; 1 is perfect.",
    ),
    ("micro_f1", "Micro F1", False, "Balance of precision and recall over all decisions alike; 1 is perfect."),
    ("accuracy", "Accuracy", True, "Share of right answers."),
    ("top_5_accuracy", "Top-5 accuracy", True, "Share where the truth is among the five likeliest answers."),
    (
        "balanced_accuracy",
        "Balanced accuracy",
        True,
        "Share of each class that was found, a mean over classes.",
    ),
    ("macro_f1", "Macro F1", False, "Balance of precision and recall, a mean over classes; 1 is perfect."),
    ("subset_accuracy", "Wholly right", True, "Share with exactly the right labels, none missing, none too many."),
    ("auroc", "AUROC", False, "Chance that a member of a class outranks a non-member; 0.5 is a coin toss."),
    ("average_precision", "Average precision", False, "Area under the precision-recall curve; 1 is perfect."),
    ("loss", "Loss", False, "Mean cross-entropy in nats; punishes being sure and wrong; 0 is perfect."),
    ("expected_calibration_error", "Calibration error", True, "Mean gap between how sure and how right."),
)


def write_report(run_dir, facts) -> pathlib.Path:
    """Write report.html into the folder `run_dir`, whole or not at all, and return its path.

    facts: a plain dict. Needed: title, kind, class_names and metrics ({"test" and / or "val": the dict of
    pipelines.evaluate.evaluate or of pipelines.evaluate_multi_label}). Every other key adds a section or a
    line where it is given and not empty: created, command, verdicts, warnings, advice, examples, class_counts, phases,
    transfer (as pipelines.transfer.judge_transfer gives it), calibration (as
    pipelines.calibration.calibrate gives it), forgetting (as pipelines.guards.story gives it),
    overfitting (as pipelines.overfitting.judge_gap gives it, with advice),
    exact_copies, exact_pairs, near_copies and near_pairs (pipelines.leakage), label_check and doubtful_labels
    (pipelines.label_checks), baselines (as pipelines.baselines gives them), mistakes, settings, backbone, data,
    timings, serving, versions, machine. Raises OSError where the page cannot be written.
    """
    target = pathlib.Path(run_dir) / "report.html"
    # A path may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
    runs.write_text(target, render(facts, run_dir).encode("utf-8", "backslashreplace").decode("utf-8"))
    return target


def render(facts, run_dir=".") -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent, "decimal": decimal, "count": count, "duration": duration, "rate": rate,
        "probability": probability, "data_uri": data_uri, "sound_uri": sound_uri, "phase_title": plots.phase_title,
    }  # fmt: skip
    split = "test" if facts["metrics"].get("test") else "val"
    figures = facts["metrics"][split]
    phases = [phase for phase in facts.get("phases") or [] if phase["history"]]
    by_epochs = [phase for phase in phases if "solver" not in phase]
    stages = [[phase] for phase in phases if "solver" in phase] + ([by_epochs] if by_epochs else [])
    curves = [(stage, key) for stage in stages for key in ("loss", "accuracy") if key in stage[0]["history"][0]]
    multi_label = "confusion" not in figures
    confusion = {}  # of one label only: of several, none is taken for another
    if not multi_label:
        classes = len(figures["confusion"])
        confusion = {
            "pairs": confused_pairs(figures, 15 if classes > MATRIX_FIRST_TO else 8),
            "matrix": confusion_matrix(figures) if classes <= MATRIX_CLASSES else None,
            "matrix_first": classes <= MATRIX_FIRST_TO,
        }
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        **confusion,
        facts=facts,
        figures=figures,
        multi_label=multi_label,
        split={"test": "test", "val": "validation"}[split],
        validation=facts["metrics"].get("val") if split == "test" else None,
        noun=NOUNS.get(facts["kind"], "examples"),
        with_texts=any(mistake.get("texts") for mistake in facts.get("mistakes") or []),
        metrics=[metric for metric in METRICS if figures.get(metric[0]) is not None],
        yardstick=yardstick(figures, facts.get("phases") or [], facts.get("baselines") or []),
        curves=[plots.learning_curve(stage, key) for stage, key in curves],
        stages=stages,
        reliability=plots.reliability_plot(figures["reliability"], multi_label),
        sureness=sureness(figures["reliability"]),
        gap_text=gap_sentence(facts["overfitting"]) if facts.get("overfitting") else "",
        calibrated=calibration_sentences(facts.get("calibration")),
        classes=class_rows(figures, facts.get("class_counts") or {}),
        classes_shown=CLASSES_SHOWN,
        balance=class_balance(facts["class_names"], facts.get("class_counts") or {}),
        blocks=block_rows(facts.get("phases") or []),
        with_source=any("source_agreement" in row for phase in phases for row in phase["history"]),
        data=titled(facts.get("data"), DATA_TITLES),
        timings=timing_rows(facts.get("timings") or {}),
        serving=serving_commands(facts.get("serving"), facts["kind"], run_dir),
    )


def yardstick(figures, phases, baselines=()) -> list[dict]:
    """Bars that put the headline into proportion: an answer without looking, simpler methods, earlier phases, this."""
    headline = figures["headline"]
    metric, low, high = headline["metric"], *headline["interval"]
    if "chance_value" in headline:
        rows = [{"name": "Guessing by how common classes are", "value": headline["chance_value"]}]
    else:
        rows = [{"before": "Always ", "name": headline["majority_class"], "value": headline["majority_value"]}]
    rows += [{"name": row["name"], "value": row["value"]} for row in baselines if row["metric"] == metric]
    kept = [phase for phase in phases if phase["kept"]]
    for phase in phases:
        value = (phase.get("test") or {}).get(metric)
        if value is not None and not (kept and phase is kept[-1]):
            note = "" if phase["kept"] else ", not kept"
            rows.append({"name": plots.phase_title(phase["name"]) + note, "value": value})
    rows.append({"name": "This model", "value": headline["value"], "low": low, "high": high})
    return rows


def sureness(bins) -> dict:
    """Mean confidence and accuracy [0 to 1] over all answers."""
    filled = [row for row in bins if row["count"]]
    total = sum(row["count"] for row in filled)
    return {key: sum(row["count"] * row[key] for row in filled) / total for key in ("confidence", "accuracy")}


def confused_pairs(figures, limit) -> list[dict]:
    """The most frequent mistakes as {true, predicted, count, share of its class}, frequent ones first."""
    names = [entry["name"] for entry in figures["per_class"]]
    pairs = [
        {"true": names[i], "predicted": names[j], "count": cell, "share": cell / sum(row)}
        for i, row in enumerate(figures["confusion"])
        for j, cell in enumerate(row)
        if cell and i != j
    ]
    return sorted(pairs, key=lambda pair: (-pair["count"], -pair["share"]))[:limit]


def confusion_matrix(figures) -> list[dict]:
    """Rows of {name, total, cells: [{count, share of the row, right}]}."""
    rows = []
    for i, (entry, row) in enumerate(zip(figures["per_class"], figures["confusion"])):
        total = max(sum(row), 1)
        cells = [{"count": cell, "share": cell / total, "right": i == j} for j, cell in enumerate(row)]
        rows.append({"name": entry["name"], "total": sum(row), "cells": cells})
    return rows


def class_rows(figures, class_counts) -> list[dict]:
    """The per-class table, worst first, untested classes last: by F1, with several labels by average precision."""
    train_counts = class_counts.get("train") or [None] * len(figures["per_class"])
    if "confusion" not in figures:
        rows = [{**entry, "train": count} for entry, count in zip(figures["per_class"], train_counts)]
        return sorted(rows, key=lambda row: (row["average_precision"] is None, row["average_precision"] or 0))
    rows = []
    for index, (entry, confused) in enumerate(zip(figures["per_class"], figures["confusion"])):
        wrong = [(cell, -j) for j, cell in enumerate(confused) if cell and j != index]
        often, taken_for = max(wrong, default=(0, 0))
        rows.append(
            {
                **entry,
                "train": train_counts[index],
                "taken_for": figures["per_class"][-taken_for]["name"] if wrong else None,
                "often": often,
            }
        )
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"] or 0))


def class_balance(class_names, class_counts) -> list[dict]:
    """Training examples of each class, most first, as a share of the most; of many classes the two ends alone."""
    if not class_counts.get("train"):
        return []
    counts = [class_counts.get(split) or class_counts["train"] for split in ("train", "val", "test")]
    most = max(1, *counts[0])
    rows = [
        {"name": name, "train": train, "val": val, "test": test, "share": train / most}
        for name, train, val, test in zip(class_names, *counts)
    ]
    rows.sort(key=lambda row: -row["train"])
    half = BALANCE_SHOWN // 2
    return rows if len(rows) <= BALANCE_SHOWN else rows[:half] + rows[-half:]


def block_rows(phases) -> list[dict]:
    """Blocks from the output down, one row each; three and more in a row that never trained share one."""
    phases = [phase for phase in phases if phase.get("blocks")]
    if not phases:
        return []
    rows = []
    for index, block in reversed(list(enumerate(phases[0]["blocks"]))):
        states = [phase["blocks"][index] for phase in phases]
        frozen = not any(state["trainable_parameters"] for state in states)
        row = {"names": [block["name"]], "layers": block["layers"], "parameters": block["parameters"]}
        rows.append({**row, "frozen": frozen, "states": states})
    merged = []
    for row in rows:
        if merged and row["frozen"] and merged[-1][0]["frozen"]:
            merged[-1].append(row)
        else:
            merged.append([row])
    result = []
    for run in merged:
        if len(run) < 3:
            result += run
            continue
        sums = {key: sum(row[key] for row in run) for key in ("layers", "parameters")}
        result.append({**run[0], **sums, "names": [name for row in run for name in row["names"]]})
    return result


def titled(values, titles) -> list[tuple]:
    """(title, value) pairs of a dict, titles in words, without what is None."""
    given = {key: value for key, value in (values or {}).items() if value is not None}
    return [(titles.get(key, key.replace("_", " ").capitalize()), value) for key, value in given.items()]


def timing_rows(timings) -> list[dict]:
    """Rows of {title, seconds, share of the total}."""
    total = sum(timings.values()) or 1
    return [
        {"title": title, "seconds": seconds, "share": seconds / total}
        for title, seconds in titled(timings, TIMING_TITLES)
    ]


def serving_commands(serving, kind, run_dir) -> dict | None:
    """What to type to serve the model and to ask it; to be run where the run was."""
    if not serving:
        return None
    folder = pathlib.PurePosixPath(run_dir, serving["folder"]).parent
    name, path = shlex.quote(folder.name), shlex.quote(str(folder))
    here = "" if folder.is_absolute() else '"$PWD"/'
    commands = {
        "docker": f"docker run --rm -p 8501:8501 -e MODEL_NAME={name} \\\n"
        f"  -v {here}{path}:/models/{name} tensorflow/serving:{serving['target']}.0"
    }
    if kind in FILES:
        folder_of_new, file = FILES[kind]
        commands["predict"] = f"graft predict {shlex.quote(str(run_dir))} {folder_of_new} --out predictions.csv"
        # Through a pipe, because an encoded photograph is too long for a command line.
        commands["curl"] = (
            f"""(printf '{{"instances": [{{"b64": "'; base64 < {file} | tr -d '\\n'; printf '"}}]}}') |\n"""
            f"  curl -d @- http://localhost:8501/v1/models/{name}:predict"
        )
    if kind == "text":
        commands["predict"] = f"graft predict {shlex.quote(str(run_dir))} new-texts.csv --out predictions.csv"
        texts = '["a text"]' if not serving.get("pairs") else '[{"text_a": "a text", "text_b": "its second"}]'
        commands["curl"] = f"curl -d '{{\"instances\": {texts}}}' http://localhost:8501/v1/models/{name}:predict"
    return commands


def missing(value) -> bool:
    """Whether there is no figure to show: None, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def percent(value, digits=1) -> str:
    """0.912 -> "91.2%"."""
    return "–" if missing(value) else f"{100 * value:.{digits}f}%"


def probability(value) -> str:
    """A share of one hundred, never rounded to certainty: 0.984 -> "98%", 0.001 -> "<1%", 0.999 -> ">99%"."""
    text = percent(value, 0)
    return {"0%": "<1%", "100%": ">99%"}.get(text, text)


def decimal(value) -> str:
    """0.9123 -> "0.912"."""
    return "–" if missing(value) else f"{value:.3f}"


def count(value) -> str:
    """717232 -> "717,232"."""
    return "–" if missing(value) else f"{value:,}"


def rate(value) -> str:
    """A learning rate: 8e-5 -> "8.0e-5"."""
    if missing(value) or not value:
        return "–"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds) -> str:
    """Seconds in words: "0.4 s", "48 s", "3 min 20 s", "2 h 05 min"."""
    if missing(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def sound_uri(sound) -> str:
    """The bytes of a WAV file -> a data: address."""
    return f"data:audio/wav;base64,{base64.b64encode(sound).decode()}"


def data_uri(picture) -> str:
    """Encoded picture -> a data: address, which a page shows without loading anything."""
    kind = next((name for magic, name in PICTURE_TYPES.items() if picture.startswith(magic)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
