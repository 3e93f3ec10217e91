"""`graft curve`: what more data would bring, in minutes: the head's accuracy on 10, 25, 50 and 100% of the data.

Reads top to bottom: `curve` is the whole story. Frozen features are computed once, or found in the cache that training
uses; on each share of the training set the head is solved as phase 1 would solve it (`pipelines.head_solver`), its L2
penalty chosen on validation, and scored on the test set. A power law through the errors tells what twice the data would
bring, as long as the curve goes on as it went so far.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Literal

import numpy as np
import rich.box
import rich.table
import tyro

from models import GraftError
from models.hubs import offline_names
from models.names import check_backbone_name
from pipelines import facts, runs
from pipelines.common_options import CacheOptions, flat
from pipelines.console import console, start_tensorflow
from pipelines.rank import find_kind, frozen_part, name_and_size

SHARES = (0.1, 0.25, 0.5, 1.0)  # of the training set
RESAMPLES = 1000
QUANTILES = (0.025, 0.975)


@dataclasses.dataclass
class CurveConfig:
    """Would more data help? graft curve --data photos/

    Trains the head on 10, 25, 50 and 100% of the training set, several draws of each, on features of the frozen
    backbone that are computed once, and scores each on the test set. A power law through the errors foretells what
    twice the data would bring, with its uncertainty. Ends with one sentence; curve.html has the table and the plot.
    """

    data: str = "textures"
    """What `graft image`, `graft text` or `graft audio` would learn from: folder, manifest, or an offline set:
    textures, digits, topics, spoken_words."""
    backbone: str = ""
    """As --backbone of those; NAME@160 is a model at 160 pixels or of 160 tokens, NAME@3 one that hears 3 s (empty: the
    offline one of this kind of data)."""
    kind: Literal["auto", "image", "text", "audio"] = "auto"
    """What the examples are (auto: found from the data)."""
    draws: int = 5
    """Different parts of the training set that are tried of each share below 100%."""
    min_per_class: int = 0
    """Leave out classes with fewer examples than this (0: stop with an error at a class that has only one)."""
    path_column: str = "path"
    """Column of a manifest with the files."""
    text_column: str = "text"
    """Column of a manifest with the texts."""
    second_column: str = ""
    """Column with the second text, where an example is a pair of texts (empty: one text)."""
    label_column: str = "label"
    """Column of a manifest with the class, or several as a|b."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the patient or author (may be missing)."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""
    seed: int = 0
    """Of the draws."""
    cache: flat(CacheOptions) = dataclasses.field(default_factory=CacheOptions)
    out: str = ""
    """Folder for curve.json and curve.html (empty: runs/curve-NAME OF THE DATA, then -2, -3)."""


def curve(argv: list[str]) -> int:
    """`graft curve`: accuracy by share of the data, a plot, and what twice the data would bring."""
    started = time.perf_counter()
    config = tyro.cli(CurveConfig, args=argv, prog="graft curve")
    kind, found = check_request(config)  # needs no TensorFlow: a mistake answers at once
    name = config.backbone or offline_names(kind)[0]
    check_backbone_name(name_and_size(name)[0], kind)
    out = runs.choose_run_folder(config.out, f"curve-{pathlib.Path(config.data.rstrip('/')).stem}".replace(":", "-"))
    console.print(f"Data: {len(found):,} {facts.NOUNS[kind]} in {config.data}")
    start_tensorflow(config.seed)
    from pipelines.curve_page import write_page
    from pipelines.data import load_images, targets_of
    from pipelines.frozen_part import Examples
    from pipelines.sounds import load_sounds
    from pipelines.texts import load_texts

    load = {"image": load_images, "text": load_texts, "audio": load_sounds}[kind]
    splits = load(found, config.min_per_class)
    facts.print_splits(splits, kind)
    frozen = frozen_part(name, kind, splits, config)
    learning = Examples(frozen, "", [splits.train, splits.val], needed=True)
    testing = Examples(frozen, " of the test set", [splits.test], needed=True)
    sides = {
        side: (examples.features(0).arrays[0][examples.places(table)], targets_of(table, len(splits.class_names)))
        for side, examples, table in zip(("train", "val", "test"), (learning, learning, testing), splits)
    }
    points = measure(sides, splits.multi_label, config.draws, config.seed)
    gathered = {
        "kind": kind,
        "data": config.data,
        "backbone": name,
        "created": facts.now(),
        "fingerprint": splits.fingerprint,
        "multi_label": splits.multi_label,
        "test_examples": splits.test.num_rows,
        "draws": config.draws,
        **foretell(points, config.seed),
        "versions": facts.versions(),
    }
    gathered["sentence"] = sentence(gathered)
    gathered["seconds"] = time.perf_counter() - started
    print_table(gathered)
    console.print(f"[bold]{gathered['sentence']}[/]")
    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "curve.json", gathered)
    console.print(f"{gathered['seconds']:.0f} s. Table and plot: {write_page(out, gathered)}")
    return 0


def check_request(config: CurveConfig) -> tuple[str, list]:
    """The kind of the data and its examples; needs no TensorFlow.

    Raises:
        GraftError: values out of range; no such data; data that is of neither kind.
    """
    for flag, least in (("draws", 2), ("min_per_class", 0), ("seed", 0)):
        if getattr(config, flag) < least:
            shown = flag.replace("_", "-")
            raise GraftError(f"--{shown} is {getattr(config, flag)}, expected {least} or more")
    return find_kind(config)


# ---------------------------------------------------------------- measuring


def measure(sides: dict, multi_label: bool, draws: int, seed: int = 0) -> list[dict]:
    """The head's answers to the test set after learning from each share of the training set.

    Args:
        sides: {"train", "val", "test"}, each features [n, d] and targets [n, classes].

    Returns:
        Per share: share, examples (mean over draws), and correct [draws, test] float32, 1 where an answer is right (of
        several labels the share of right yes-or-nos). 100% is drawn once.
    """
    from pipelines.head_solver import solve_head
    from pipelines.steps import share_correct

    (features, targets), (val, val_targets), (test, test_targets) = (sides[name] for name in ("train", "val", "test"))
    generator, points = np.random.default_rng(seed), []
    with console.status("solving the head on parts of the data") as status:
        for share in SHARES:
            correct, sizes = [], []
            for number in range(1 if share == 1 else draws):
                status.update(f"solving the head on {share:.0%} of the data, draw {number + 1}")
                rows = stratified_part(targets, share, generator)
                ones = np.ones(len(rows), np.float32)
                heads, _, best, _ = solve_head(features[rows], targets[rows], ones, val, val_targets, multi_label)
                kernel, bias = heads[best]
                correct.append(share_correct(test_targets, test @ kernel + bias, multi_label).numpy())
                sizes.append(len(rows))
            points.append({"share": share, "examples": float(np.mean(sizes)), "correct": np.stack(correct)})
    return points


def stratified_part(targets: np.ndarray, share: float, generator) -> np.ndarray:
    """Rows of a random part of examples, sorted: of each class its share, at least one.

    targets: [n, classes]; of several labels an example counts for its first, one without any for a class of its own.
    """
    labels = np.where(targets.any(axis=1), targets.argmax(axis=1), -1)
    chosen = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        # Rounded at random, so that many small classes together have their share.
        count = int(share * len(rows) + generator.random()) if share < 1 else len(rows)
        chosen.append(rows[: max(1, count)])
    return np.sort(np.concatenate(chosen))


# ---------------------------------------------------------------- what follows


def power_law(examples, errors) -> tuple[float, float]:
    """(a, b) of error = a * examples^-b, by least squares on logarithms.

    Learning curves are power laws over wide ranges, down to an error that no data removes (Hestness et al. 2017, "Deep
    Learning Scaling is Predictable, Empirically"). Four points cannot tell where that is, so there is none here: what
    is foretold is what more data brings at best.
    """
    slope, intercept = np.polyfit(np.log(examples), np.log(errors), 1)
    return float(np.exp(intercept)), float(-slope)


def foretell(points: list[dict], seed: int = 0) -> dict:
    """Accuracies with intervals, the power law through them, and what it says of twice the data.

    Intervals (95%) are of RESAMPLES bootstraps, of the draws of each share and of the test examples, which are the same
    for all shares; each fits a power law of its own.

    Args:
        points: as `measure` gives them.

    Returns:
        points: per share share, examples, accuracy, interval, lowest and highest of its draws. power_law: a and b.
        twice: examples, accuracy, interval, gain (points, over what the law says of all the data) and gain_interval.
    """
    tested, generator = points[0]["correct"].shape[1], np.random.default_rng(seed)
    examples = np.array([point["examples"] for point in points])
    twice = 2 * examples[-1]

    def law(accuracies):
        # Half a mistake more: no error is 0, whose logarithm there is not.
        return power_law(examples, ((1 - accuracies) * tested + 0.5) / (tested + 1))

    def at(fitted, count):
        return 1 - min(fitted[0] * count ** -fitted[1], 1.0)

    accuracies = np.array([point["correct"].mean() for point in points])
    fitted = law(accuracies)
    resampled, futures, gains = [], [], []
    for _ in range(RESAMPLES):
        weights = generator.multinomial(tested, np.full(tested, 1 / tested)) / tested
        drawn = []
        for point in points:
            count = len(point["correct"])
            drawn.append(float((point["correct"][generator.integers(0, count, count)] @ weights).mean()))
        other = law(np.array(drawn))
        resampled.append(drawn)
        futures.append(at(other, twice))
        gains.append(100 * (at(other, twice) - at(other, examples[-1])))
    low, high = np.quantile(resampled, QUANTILES, axis=0)
    shown = [
        {
            "share": point["share"],
            "examples": point["examples"],
            "accuracy": float(accuracy),
            "interval": [float(low[index]), float(high[index])],
            "lowest": float(point["correct"].mean(axis=1).min()),
            "highest": float(point["correct"].mean(axis=1).max()),
        }
        for index, (point, accuracy) in enumerate(zip(points, accuracies))
    ]
    return {
        "points": shown,
        "power_law": {"a": fitted[0], "b": fitted[1]},
        "twice": {
            "examples": float(twice),
            "accuracy": at(fitted, twice),
            "interval": np.quantile(futures, QUANTILES).tolist(),
            "gain": 100 * (at(fitted, twice) - at(fitted, examples[-1])),
            "gain_interval": np.quantile(gains, QUANTILES).tolist(),
        },
    }


def sentence(gathered: dict) -> str:
    """What one would tell a colleague who asks whether to label more."""
    now, twice, noun = gathered["points"][-1], gathered["twice"], facts.NOUNS[gathered["kind"]]
    low, high = twice["gain_interval"]
    gain = f"{twice['gain']:+.1f} points ({low:+.1f} to {high:+.1f})"
    learned = f"{now['examples']:,.0f} training {noun}"
    start = f"The head gets {now['accuracy']:.1%} of the test {noun} right with all {learned}"
    if low <= 0:
        return f"{start}. The curve is flat, or too noisy to tell: twice as many would bring {gain}."
    worth = "More data is worth its price" if twice["gain"] >= 1 else "More data would bring little"
    return f"{start}. {worth}: twice as many would bring about {gain}, if the curve goes on as it went so far."


def print_table(gathered: dict) -> None:
    """The figures of every share, and of twice the data."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("share", "examples", "accuracy", "95% interval", "draws from", "to"):
        table.add_column(title, justify="right")
    for row in gathered["points"]:
        low, high = row["interval"]
        spread = (f"{row['lowest']:.1%}", f"{row['highest']:.1%}") if row["share"] < 1 else ("", "")
        shown = f"{row['share']:.0%}", f"{row['examples']:,.0f}", f"{row['accuracy']:.1%}"
        table.add_row(*shown, f"{100 * low:.1f}-{100 * high:.1f}", *spread)
    twice = gathered["twice"]
    low, high = twice["interval"]
    shown = "200%", f"{twice['examples']:,.0f}", f"{twice['accuracy']:.1%}", f"{100 * low:.1f}-{100 * high:.1f}"
    table.add_row(*shown, "foretold", "", style="italic")
    console.print(table)
