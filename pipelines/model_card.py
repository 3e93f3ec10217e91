"""The model card: what a model is, what it was made from and how good it is, for whoever meets it later.

Sections after Mitchell et al. 2019, "Model Cards for Model Reporting"; the YAML on top is what model hubs read.
"""

from __future__ import annotations

import pathlib

import yaml

from pipelines.facts import headline
from pipelines.plots import phase_title

LISTED_CLASSES = 20  # most classes whose figures are listed
ABOUT = {  # how the examples of each kind of data are spoken of
    "image": {
        "class": "an image shows",
        "other": "images from another source, camera or time need",
        "skipped": "could not be read",
    },
    "text": {
        "class": "a text belongs to",
        "other": "texts from another source, of another style or time need",
        "skipped": "were empty and left out",
    },
    "audio": {
        "class": "is heard in a clip",
        "other": "clips from another source, microphone, room or speaker need",
        "skipped": "could not be read",
    },
}


def write_model_card(run_dir: pathlib.Path, facts: dict) -> pathlib.Path:
    """Write RUN/model_card.md from the facts that the report is made of; returns its path."""
    path = run_dir / "model_card.md"
    path.write_text(model_card(facts), encoding="utf-8")
    return path


def model_card(facts: dict) -> str:
    """The card as Markdown. `facts` is what `pipelines.report.write_report` takes after training."""
    test, backbone, settings = facts["metrics"]["test"], facts["backbone"], facts["settings"]
    source = {name: value for name, value in backbone["source"].items() if value}
    about = ABOUT[facts["kind"]]
    licence = source.get("licence", "unknown")
    front = {
        "license": licence.lower(),
        "base_model": backbone["name"],
        "pipeline_tag": f"{facts['kind']}-classification",
        "library_name": "graft",
        "tags": ["tensorflow", "keras", "transfer-learning"],
    }
    sizes = facts["examples"]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            f"# {facts['title']}",
            "",
            f"{headline(test)} on {test['examples']:,} test examples. {' '.join(facts['verdicts'])}",
            "",
            "## Intended use",
            "",
            f"Tells which of {len(facts['class_names'])} classes {about['class']}: {_names(facts['class_names'])}.",
            "It answers with one of these whatever it is shown. It was measured on the data below and on nothing else:",
            f"{about['other']} a test of their own (`graft evaluate RUN --data NEW`).",
            "",
            "## Data",
            "",
            f"- {settings['data']}: {sizes['train']:,} examples to train, {sizes['val']:,} to validate, "
            f"{sizes['test']:,} to test; {sizes['skipped']:,} {about['skipped']}.",
            f"- Fingerprint (SHA-256 of contents, labels and splits): `{facts['data']['fingerprint']}`",
            *[f"- {warning}" for warning in facts["warnings"]],
            "",
            "## Backbone",
            "",
            f"- {backbone['name']}: {backbone['parameters']:,} parameters{_input_size(backbone)}",
            *[f"- {name}: {value}" for name, value in source.items()],
            "",
            "The licence is that of the weights and carries over to what is made from them; the data may add its own.",
            "",
            "## Training",
            "",
            *[_phase_line(phase) for phase in facts["phases"]],
            f"- Command: `{facts['command']}`",
            f"- {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; {facts['machine']}; "
            f"{facts['created']}",
            "",
            "## Figures on the test set",
            "",
            *_class_table(test["per_class"]),
            "",
        ]
    )


def _input_size(backbone: dict) -> str:
    """What the backbone sees at most of an example, in words."""
    if "image_size" in backbone:
        return f", {backbone['image_size'][0]} x {backbone['image_size'][1]} pixels"
    if "window_seconds" in backbone["preprocess"]:
        heard = backbone["preprocess"]
        return f", {heard['window_seconds']:g} s at {heard['sample_rate_hz']:,} Hz at once"
    tokens = backbone["preprocess"].get("sequence_length")
    return f", {tokens} tokens" if tokens else ""


def _names(class_names: list[str]) -> str:
    shown = ", ".join(class_names[:LISTED_CLASSES])
    return shown + (f" and {len(class_names) - LISTED_CLASSES:,} more" if len(class_names) > LISTED_CLASSES else "")


def _phase_line(phase: dict) -> str:
    what = phase_title(phase["name"])
    kept = f"best epoch {phase['best_epoch']} of {phase['epochs']}" if phase["kept"] else "not kept: no gain"
    if "solver" in phase:
        kept = f"L-BFGS with an L2 penalty of {phase['history'][phase['best_epoch'] - 1]['l2']:.2g}"
    return f"- {what}: {phase['trainable_parameters']:,} trainable parameters, {kept}"


def _class_table(per_class: list[dict]) -> list[str]:
    """A Markdown table; where there are many classes, of those with the lowest F1."""
    rows = sorted(per_class, key=lambda row: -1.0 if row["f1"] is None else row["f1"])[:LISTED_CLASSES]
    if len(per_class) <= LISTED_CLASSES:
        rows = per_class
    columns = ("examples", "precision", "recall", "f1")
    lines = [f"| class | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [_cell(row[column]) for column in columns]
        lines.append(f"| {row['name'].replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    return lines


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
