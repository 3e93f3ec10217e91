"""What `--depth auto` exports against a full search, in which every rung is trained and the best one by test is known.

    python -m tests.acceptance.ladder --data textures topics digits --seeds 10

A full search is what someone without `auto` would do: `--depth head`, `--depth 2` and `--depth full`, one after the
other. Rungs do not depend on each other: each starts from the pretrained backbone and the simplest head, and sees its
examples in the order that it would see alone. So each rung is trained once per seed, and what `auto` exports follows
from its own rule (`pipelines.ladder.decide`) on their validation figures. That this is so, and what time each side
takes, is shown on one seed by the commands as users type them (`timed`), each side with an empty cache.

Rows go to a file as they come, and what is in it is not run again, so that a list that was stopped goes on. On two
quiet cores with --image-size 96 a seed takes about two minutes for each image set, one for topics.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import tempfile

from tests.acceptance.tools import graft, own_cache

DEPTHS = {"head": "head", "light": "2", "full": "full"}  # a rung of auto, and the same as a depth of its own
DATA = ("textures", "topics", "digits")
WITHIN = 0.01  # of test accuracy
PRECISION = 0.95  # that sure answers shall have


# ---------------------------------------------------------------- accuracies: each rung once


def searched(data: str, seed: int, image_size: int) -> dict:
    """One seed: test accuracy and validation loss of every rung, and what `--depth auto` exports by them."""
    from pipelines import ladder

    runs = {rung: phases_of(data, DEPTHS[rung], seed, image_size) for rung in ("light", "full")}
    light, full = (phases for phases, _ in runs.values())
    rungs = [light[0], light[1] | {"name": "light"}, full[1] | {"name": "full"}]
    went_on, because = ladder.decide(rungs[:2], [("head", 0), ("light", 2), ("full", None)], 0.0, 1e9, 0.0)
    tried = rungs if went_on else rungs[:2]
    kept = min(tried, key=lambda phase: phase["climb"]["val_loss"])
    return {
        "data": data,
        "seed": seed,
        "image_size": image_size,
        # Of a rung that was worse than the head on validation, a run of it alone exports the head.
        "accuracy": {phase["name"]: phase["test"]["accuracy"] for phase in rungs},
        "val_loss": {phase["name"]: phase["climb"]["val_loss"] for phase in rungs},
        "auto": kept["test"]["accuracy"],
        "kept": kept["name"],
        "tried": [phase["name"] for phase in tried],
        "because": because,
        "calibration": {rung: calibration for rung, (_, calibration) in runs.items()},
    }


def phases_of(data: str, depth: str, seed: int, image_size: int) -> tuple[list[dict], dict]:
    """The phases of a run, each with the test figures of what was best by then, and the calibration of its end.

    Nothing is exported.
    """
    import keras
    import tensorflow as tf

    from pipelines import facts, image, text
    from pipelines.calibration import calibrate
    from pipelines.data import image_loader, load_images
    from pipelines.options import ImageConfig, TextConfig
    from pipelines.sources import find_images
    from pipelines.texts import find_texts, load_texts
    from pipelines.tokens import token_parts
    from pipelines.training import fit_two_phase
    from pipelines.transfer import probe_verdict

    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    kind = image if data != "topics" else text
    config = ImageConfig() if kind is image else TextConfig()
    config.input.data, config.model.depth, config.training.seed = data, depth, seed
    if kind is image:
        config.model.image_size = image_size
    splits = load_images(find_images(data)) if kind is image else load_texts(find_texts(data))
    model = kind.build_model(config, splits.class_names, splits.multi_label)
    preprocess = model.backbone.preprocess

    def loader(augmentation, random_erasing=0.0):
        return image_loader(preprocess, splits.white_level, augmentation, random_erasing, splits.plain)

    def read_inputs(table):
        return token_parts(table, preprocess)

    feeding = {"read_inputs": None if kind is image else read_inputs}

    def is_far(features):
        return probe_verdict(model, splits, loader, config, feeding["read_inputs"])["verdict"] == "hurts"

    phases, logits_of = fit_two_phase(
        model,
        splits,
        loader if kind is image else None,
        config,
        tf.distribute.get_strategy(),
        on_features=is_far,
        on_end=lambda phase, logits_of: facts.add_test_figures(phase, splits, logits_of(splits.test)),
        **feeding,
    )
    config.guards.abstain_below_precision = PRECISION
    calibration, _ = calibrate(splits, {"val": logits_of(splits.val), "test": logits_of(splits.test)}, config.guards)
    return phases, calibration


# ---------------------------------------------------------------- times: the commands


def timed(data: str, seed: int, image_size: int) -> dict:
    """One seed of both sides as users type them: test accuracy, wall-clock and CPU seconds of each run."""
    sides = {}
    for side, depths in (("auto", ["auto"]), ("search", list(DEPTHS.values()))):
        with tempfile.TemporaryDirectory(prefix="graft-ladder-") as folder:
            own_cache(pathlib.Path(folder))
            sides[side] = [trained(pathlib.Path(folder), data, depth, seed, image_size) for depth in depths]
    return {"data": data, "seed": seed, "image_size": image_size, "timed": sides}


def trained(folder: pathlib.Path, data: str, depth: str, seed: int, image_size: int) -> dict:
    """What a run exports has this test accuracy, took these seconds, and came from that rung; its cache is `folder`."""
    words = [] if data == "topics" else ["--image-size", image_size]
    words += ["--data", data, "--depth", depth, "--seed", seed, "--out", folder / f"{data}-{depth}-{seed}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done, seconds = graft("text" if data == "topics" else "image", *words, GRAFT_CACHE=str(folder))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((words[-1] / "metrics.json").read_text())
    return {
        "depth": depth,
        "accuracy": figures["test"]["accuracy"],
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "training_seconds": figures["seconds"]["training"],
        "transfer": figures["transfer"],
        "rungs": [row["rung"] for row in figures.get("climb", {}).get("rungs", [])],
    }


# ---------------------------------------------------------------- the list


def rows_of(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def measured(data: str, seeds: list[int], image_size: int, file: pathlib.Path, what=searched) -> list[dict]:
    """The rows of a data set, those that the file lacks run now and put into it."""
    size = 0 if data == "topics" else image_size
    rows = []
    for seed in seeds:
        asked = {"data": data, "seed": seed, "image_size": size}
        known = [row for row in rows_of(file) if ("timed" in row) == (what is timed) and asked.items() <= row.items()]
        if not known:
            known = [what(data, seed, size)]
            with open(file, "a") as lines:
                lines.write(json.dumps(known[0]) + "\n")
            print(json.dumps(known[0]), flush=True)
        rows.append(known[0])
    return rows


def is_within(row: dict) -> bool:
    return row["auto"] >= max(row["accuracy"].values()) - WITHIN - 1e-9


def summary(data: str, rows: list[dict]):
    """A row of a table of acceptance: means over seeds, and in how many of them auto is within a point of the best."""
    count = len(rows)
    auto = sum(row["auto"] for row in rows) / count
    alone = ", ".join(f"{rung} {sum(row['accuracy'][rung] for row in rows) / count:.3f}" for rung in DEPTHS)
    kept = [row["kept"] for row in rows]
    kept = ", ".join(f"{rung} {kept.count(rung)}" for rung in DEPTHS if rung in kept)
    near = sum(map(is_within, rows))
    size = f" at {rows[0]['image_size']} pixels" if rows[0]["image_size"] else ""
    return (
        f"2. {data}{size}, {count} seeds: auto within 1 point of the best rung of a full search, on test",
        f"{near} of {count}; means: auto {auto:.3f}, {alone}; kept: {kept}",
        "9 of 10",
        10 * near >= 9 * count,
    )


def timed_summary(row: dict, same: dict | None):
    """A row of a table: what auto took beside the search, and whether both ways of measuring give one accuracy."""
    (auto,), search = row["timed"]["auto"], row["timed"]["search"]
    wall, cpu, training = (
        sum(run[key] for run in search) / auto[key] for key in ("seconds", "cpu_seconds", "training_seconds")
    )
    agree = ""
    if same:
        pairs = [(auto["accuracy"], same["auto"])]
        pairs += [(run["accuracy"], same["accuracy"][rung]) for run, rung in zip(search, DEPTHS)]
        most = max(abs(a - b) for a, b in pairs)
        agree = f"; accuracies of the four commands and of the rungs above differ by {most:.4f} at most"
    return (
        f"2. {row['data']}, seed {row['seed']}: the three depths one after the other took as many times auto's time",
        f"{wall:.2f} (CPU seconds {cpu:.2f}, training alone {training:.2f}), auto tried "
        f"{', '.join(auto['rungs'])}{agree}",
        "above 1" if row["data"] != "digits" else "",
        row["data"] == "digits" or cpu > 1,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--image-size", type=int, default=0, help="0: the backbone's own")
    parser.add_argument("--timed", action="store_true", help="the commands, for their time")
    parser.add_argument("--rows", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "guards-ladder.jsonl"))
    options = parser.parse_args()
    for seed in options.seeds:  # seed by seed, so that what is there is balanced wherever it is stopped
        for data in options.data:
            measured(data, [seed], options.image_size, options.rows, timed if options.timed else searched)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
