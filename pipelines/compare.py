"""`graft compare`: which answers change from one version of a model to the next, before it takes over."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib

import rich.table
import tyro
from rich.markup import escape

from models import GraftError
from pipelines import runs
from pipelines.ask import AskConfig, inputs_of, names_of
from pipelines.batch import answers_of, read_details, short, what_to_ask
from pipelines.batch_texts import shortened
from pipelines.console import console
from pipelines.rescore import find_labelled, name_of, reader_of
from serving.client import Client, is_url

OVER = 3  # exit code: a limit is exceeded
LISTED_CHANGES = 20
UNREADABLE = "(no answer)"  # what stands for the label of an example that a model could not read


@dataclasses.dataclass
class CompareConfig:
    """Which answers change from OLD to NEW: graft compare runs/photos runs/photos-2 --data photos/test"""

    old: tyro.conf.Positional[str]
    """Run folder, folder of an exported version, or the address of a served model (http://HOST:8501/v1/models/NAME
    or grpc://HOST:8500/NAME)."""
    new: tyro.conf.Positional[str]
    """The same, for what is to take over."""
    data: str
    """What both are asked: as `graft evaluate --data` takes it, or with --no-labels as `graft predict` does."""
    labels: bool = True
    """--no-labels: the data has no labels. It is a folder of images, or a CSV file with a column `path` or `text`."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    text_column: str = "text"
    """Column of a table with the texts."""
    second_column: str = ""
    """Column of a table with the second texts (empty: text_b, for a model that takes pairs)."""
    label_column: str = "label"
    """Column of a manifest with the class of each file, or several as a|b."""
    group_column: str = "group"
    """Column of a manifest with the patient, customer or the like; no figure depends on it."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""
    most_changes: float = 0.05
    """Largest share of answers that may change, 0 to 1."""
    most_losses: float = 0.02
    """Largest share of answers that may turn from right to wrong, 0 to 1; needs labels."""
    out: str = ""
    """CSV file to write: every answer that changes."""


def compare(argv: list[str]) -> int:
    """`graft compare`: the changes by class, the examples, and a verdict; exit code 3 where a limit is exceeded."""
    config = tyro.cli(CompareConfig, args=argv, prog="graft compare")
    check_limits(config)
    with open_model(config.old) as (old, old_details), open_model(config.new) as (new, new_details):
        if old_details and new_details and set(old_details) != set(new_details):
            console.print(
                f"[yellow]Note: the classes differ: {len(set(old_details) - set(new_details)):,} of OLD's are gone, "
                f"{len(set(new_details) - set(old_details)):,} are new."
            )
        details = inputs_of(old, config.old)
        if details.get("kind") == "speech":
            raise GraftError(
                f"{config.old}: this model writes transcripts, which are not compared by class. Give `graft evaluate` "
                f"the same manifest for both, and compare their error rates."
            )
        if details != inputs_of(new, config.new):
            raise GraftError(f"{config.old} and {config.new} take different inputs: they cannot be compared.")
        asked, read = examples_of(config, details)
        old_labels = labels_of(answers_of(old, len(asked), read), old_details)
        new_labels = labels_of(answers_of(new, len(asked), read), new_details)
    rows = [
        {**example, "old": before[0], "old_score": before[1], "new": after[0], "new_score": after[1]}
        for example, before, after in zip(asked, old_labels, new_labels)
        if before[0] != UNREADABLE or after[0] != UNREADABLE
    ]
    if not rows:
        raise GraftError(f"--data {config.data}: none of the {len(asked)} examples could be read.")
    if config.labels and not any(row["true"] in (row["old"], row["new"]) for row in rows):
        seen = sorted({row[side] for row in rows for side in ("old", "new")})
        raise GraftError(
            f"--data {config.data}: neither model is right about a single example. Its labels are like "
            f"{rows[0]['true']}, the answers {', '.join(seen[:5])}: are these the same classes?"
        )
    for row in rows:
        row["change"] = change_of(row)
    changed = [row for row in rows if row["change"] != "same"]
    if len(rows) < len(asked):
        console.print(f"[yellow]{len(asked) - len(rows):,} of {len(asked):,} could be read by neither model; left out.")
    if changed:
        print_changes(rows, changed)
    if config.out:
        columns = ["example", *(["true"] if config.labels else []), "old", "old_score", "new", "new_score", "change"]
        runs.write_csv(pathlib.Path(config.out), changed, columns)
        console.print(f"{len(changed):,} changes in {config.out}")
    return verdict(config, rows)


def check_limits(config: CompareConfig) -> None:
    """Raise GraftError for limits that are no shares, and an --out that is a folder."""
    for flag, limit in (("--most-changes", config.most_changes), ("--most-losses", config.most_losses)):
        if not 0 <= limit <= 1:
            raise GraftError(f"{flag} is {limit:g}, expected a share from 0 to 1, such as 0.05.")
    if config.out and pathlib.Path(config.out).is_dir():
        raise GraftError(f"--out {config.out} is a folder; give the name of a CSV file.")


@contextlib.contextmanager
def open_model(where: str):
    """A Session of a folder or a Client of an address, and the class names where they are known (else None)."""
    if is_url(where):
        # Pinned, or a version that goes live meanwhile would be compared with itself, in part.
        with Client(where, pinned=True) as client:
            yield client, None
    else:
        from serving.session import Session

        version = runs.find_version(where)
        class_names = read_details(version).get("class_names")
        with Session(version) as session:
            yield session, class_names


def examples_of(config: CompareConfig, details: dict) -> tuple[list[dict], object]:
    """What both models are asked: a row per example, with its truth where there are labels, and a reader of them."""
    if not config.labels:
        columns = {"text_column": config.text_column, "second_column": config.second_column or "text_b"}
        rows, read, column = what_to_ask(AskConfig("", (config.data,), **columns), details)
        return [{"example": row[column]} for row in rows], read
    found = find_labelled(config, details)
    return [{"example": name_of(e), "true": "|".join(sorted(e.labels))} for e in found], reader_of(found, details)


def labels_of(answers: list[dict], class_names: list[str] | None) -> list[tuple[str, str]]:
    """Label and score of each answer; several labels in the order of their names, so that they can be compared."""
    class_names = class_names or names_of(answers)
    return [
        (UNREADABLE, "")
        if answer["error"]
        else ("|".join(sorted(chosen_names(answer, class_names))), f"{answer['scores'][0]:.6f}")
        for answer in answers
    ]


def chosen_names(answer: dict, class_names: list[str]) -> list[str]:
    """The labels that an answer amounts to: one, or of a multi-label model any number."""
    if answer["chosen"] is None:
        return answer["labels"][:1]
    return [name for name, is_chosen in zip(class_names, answer["chosen"]) if is_chosen]


def change_of(row: dict) -> str:
    """same; or lost (right before), gained (right now); or changed (wrong before and now, or no labels)."""
    if row["old"] == row["new"]:
        return "same"
    return {row["old"]: "lost", row["new"]: "gained"}.get(row.get("true"), "changed")


def print_changes(rows: list[dict], changed: list[dict]) -> None:
    """How many answers change of each class (without labels: of each answer that OLD gave), and the first examples."""
    labelled = "true" in rows[0]
    key = "true" if labelled else "old"
    examples = collections.Counter(row[key] for row in rows)
    changes = collections.Counter((row[key], row["change"]) for row in changed)
    kinds = ("lost", "gained", "changed") if labelled else ("changed",)
    table = rich.table.Table(box=None)
    table.add_column("class" if labelled else "OLD's answer")
    for title in ("examples", *("wrong as before" if labelled and kind == "changed" else kind for kind in kinds)):
        table.add_column(title, justify="right")
    order = sorted(examples, key=lambda name: (-sum(changes[name, kind] for kind in kinds), name))
    for name in order[:LISTED_CHANGES]:
        counts = [f"{changes[name, kind]:,}" if changes[name, kind] else "[dim]0" for kind in kinds]
        table.add_row(escape(name) or "[dim]none", f"{examples[name]:,}", *counts)
    console.print(table)
    table = rich.table.Table(box=None)
    for title in ("example", *(["true"] if labelled else []), "old", "new", ""):
        table.add_column(title)
    first = sorted(changed, key=lambda row: ("lost", "gained", "changed").index(row["change"]))[:LISTED_CHANGES]
    for row in first:
        # Texts are cut at their end, paths and places at their beginning.
        named = short(row["example"]) if "/" in row["example"] else shortened(row["example"])
        answers = [f"{escape(row[side]) or '[dim]none[/]'} {row[f'{side}_score'][:5]}" for side in ("old", "new")]
        table.add_row(escape(named), *([escape(row["true"])] if labelled else []), *answers, row["change"])
    console.print(table)
    if len(changed) > len(first):
        console.print(f"... and {len(changed) - len(first):,} more; --out changes.csv writes them all.")


def verdict(config: CompareConfig, rows: list[dict]) -> int:
    """Print what changed against what may; 0, or OVER where a limit is exceeded."""
    counts = collections.Counter(row["change"] for row in rows)
    limits = [("answers change", len(rows) - counts["same"], config.most_changes)]
    if config.labels:
        limits.append(("turn from right to wrong", counts["lost"], config.most_losses))
        before, now = (sum(row[side] == row["true"] for row in rows) / len(rows) for side in ("old", "new"))
        console.print(
            f"Right: {before:.3f} before, {now:.3f} now; {counts['lost']:,} lost, {counts['gained']:,} gained."
        )
    code = 0
    for what, count, limit in limits:
        share, over = count / len(rows), count > limit * len(rows) + 1e-9
        said = f"{count:,} of {len(rows):,} {what} ({share:.1%}), {limit:.1%} may"
        console.print(f"[red]Over: {said}[/]" if over else f"Within: {said}")
        code = OVER if over else code
    return code
