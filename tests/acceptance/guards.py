"""The list of issue 7: does transfer help, how deep to go, and is it still what it was.

    make acceptance OF=guards             or: python -m tests.acceptance.guards [digits depths times rank_images ...]

About three hours on two cores at full size; IMAGE_SIZE=96 in the environment makes pictures smaller and the list
two to three times as quick, RANK_SIZE=40 lets the ranking see so many examples of each class only. SEEDS=0,1,2 are
the seeds of the full search (default: ten), whose rows are kept in GUARDS_ROWS and not run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np

from tests.acceptance import forgetting, ladder, rank
from tests.acceptance.tools import graft, run_checks

IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", 0))  # 0: the backbone's own
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2,3,4,5,6,7,8,9").split(",")]
ROWS = pathlib.Path(os.environ.get("GUARDS_ROWS", "/tmp/guards-ladder.jsonl"))
PLANTED = 20  # copies across splits
FLIPPED = 0.05  # of the labels
SIZED = f", {IMAGE_SIZE} pixels" if IMAGE_SIZE else ""


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------- 1, 2: the verdict, and how deep to go


def digits(folder):
    """1: transfer hurts, `auto` makes up for it; --strict says so with an exit code of its own (4)."""
    done, _ = graft("image", "--data", "digits", "--image-size", IMAGE_SIZE, "--strict", "--out", folder / "digits")
    found = metrics(folder / "digits")
    transfer, probes = found["transfer"], found["transfer"]["probes"]
    named = all(f"{probe['accuracy']:.1%}" in transfer["sentence"] for probe in probes.values())
    hurts = transfer["verdict"] == "hurts" and named
    yield f"1. digits{SIZED}: the verdict", transfer["sentence"], "hurts, three figures", hurts
    rungs = [row["rung"] for row in found["climb"]["rungs"]]
    yield "1. auto climbs", f"{', '.join(rungs)}; kept {found['climb']['best']}", "beyond the head", len(rungs) > 1
    raw = transfer["raw_test"]
    yield (
        "1. what it exports, and raw pixels, on test",
        f"{raw['model_accuracy']:.3f}, {raw['accuracy']:.3f} ({raw['points']:+.1f} points, "
        f"{raw['interval'][0]:+.1f} to {raw['interval'][1]:+.1f})",
        "better than raw pixels",
        raw["points"] > 0,
    )
    first = done.stdout.split("\n")
    said = next(index for index, line in enumerate(first) if line.startswith("Transfer hurts feature"))
    headline = next(index for index, line in enumerate(first) if " accuracy on " in line)
    yield "1. said before the headline", f"line {said}, line {headline}", "first", said < headline
    yield "4. --strict", f"exit {done.returncode}", "exit 3", done.returncode == 3
    keys = ["interval", "points", "verdict"]
    held = [key for key in keys if key in transfer]
    yield "4. metrics.json holds transfer", ", ".join(held), ", ".join(keys), held == keys


def depths(folder):
    """2: what auto exports, and the best rung of a full search by test accuracy."""
    for data in ladder.DATA:
        yield ladder.summary(data, ladder.measured(data, SEEDS, IMAGE_SIZE, ROWS))


def times(folder):
    """2: the verdict where transfer helps, and the time of auto beside that of a full search, as commands."""
    for data in ("textures", "topics"):
        (row,) = ladder.measured(data, SEEDS[:1], IMAGE_SIZE, ROWS, ladder.timed)
        (auto,) = row["timed"]["auto"]
        transfer = auto["transfer"]
        yield f"2. {data}: the verdict", transfer["sentence"], "helps", transfer["verdict"] == "helps"
        size = 0 if data == "topics" else IMAGE_SIZE
        asked = {"data": data, "seed": SEEDS[0], "image_size": size}
        same = [found for found in ladder.rows_of(ROWS) if "accuracy" in found and asked.items() <= found.items()]
        yield ladder.timed_summary(row, same[0] if same else None)


# ---------------------------------------------------------------- 3, 4: in files of their own


def rank_images(folder):
    """3: the order of six image backbones."""
    rank.per_class = int(os.environ.get("RANK_SIZE", 0)) or None
    yield from rank.images(folder)


def rank_texts(folder):
    """3: the order of six text backbones."""
    rank.per_class = int(os.environ.get("RANK_SIZE", 0)) or None
    yield from rank.texts(folder)


def too_high(folder):
    """4: a learning rate 100 times too high."""
    yield from forgetting.too_high(folder)


def averaged(folder):
    """4: WiSE-FT."""
    yield from forgetting.averaged(folder)


# ---------------------------------------------------------------- 5: planted faults


def faults(folder):
    """5: copies across splits, wrong labels, a class that validation lacks; one run finds all."""
    import tensorflow as tf

    from models import offline

    source = offline.image_data_folder("textures")
    data, generator = folder / "planted", np.random.default_rng(0)
    train, test = (sorted((source / split).glob("*/*.png")) for split in ("train", "test"))
    shuffled = [train[index] for index in generator.permutation(len(train))]
    classes = sorted({file.parent.name for file in train})
    flipped, held_out = set(), shuffled[: len(shuffled) // 7]
    for number, file in enumerate(shuffled):
        split, label = "val" if file in set(held_out) else "train", file.parent.name
        if split == "val" and label == "brick":
            split = "train"  # the class that validation lacks
        if generator.random() < FLIPPED:
            wrong = classes[(classes.index(label) + 1 + generator.integers(len(classes) - 1)) % len(classes)]
            if split == "train" or wrong != "brick":
                label = wrong
                flipped.add(file.read_bytes())
        put(file.read_bytes(), data / split / label / f"{number}.png")
    for number, file in enumerate(test):
        put(file.read_bytes(), data / "test" / file.parent.name / f"{number}.png")
    learned = sorted((data / "train").glob("*/*.png"))
    for number, index in enumerate(generator.permutation(len(learned))[: 2 * PLANTED]):
        file = learned[index]
        content = file.read_bytes()
        if number >= PLANTED:  # encoded anew: another content, the same picture
            content = tf.io.encode_jpeg(tf.image.grayscale_to_rgb(tf.io.decode_png(content, 1)), quality=90).numpy()
        put(content, data / "test" / file.parent.name / f"copy{number}.{'png' if number < PLANTED else 'jpg'}")

    words = ["--data", data, "--image-size", IMAGE_SIZE, "--depth", "head", "--check-labels"]
    words += ["--out", folder / "faults"]
    done, _ = graft("image", *words)
    assert done.returncode == 0, done.stderr
    found, page = metrics(folder / "faults"), (folder / "faults" / "report.html").read_text()
    shutil.copy(folder / "faults" / "report.html", pathlib.Path(ROWS).parent / "guards-faults.html")
    copies = found["exact_copies"]["copies"]
    yield f"5. {PLANTED} copies of training pictures in test", f"{copies} found", f"{PLANTED}", copies == PLANTED
    near = found["near_copies"]["count"]
    yield (
        f"5. {PLANTED} more, encoded anew as JPEG: near copies (others that look alike count too)",
        f"{near} found",
        f"at least {0.9 * PLANTED:.0f}",
        near >= 0.9 * PLANTED,
    )
    missing = [said for said in found["warnings"] if "brick" in said and "no validation" in said]
    yield "5. a class that validation lacks", missing[0] if missing else "nothing", "a warning", bool(missing)
    shown = 'id="labels"' in page and 'id="copies"' in page
    yield "5. doubtful labels and near copies are shown in the report", "yes" if shown else "no", "yes", shown
    refused, _ = graft("image", *words[:-1], folder / "strict", "--strict")
    yield "5. copies under --strict", f"exit {refused.returncode}", "exit 3", refused.returncode == 3
    yield from doubts(data, flipped)


def put(content: bytes, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def doubts(data, flipped: set[bytes]):
    """Recall of the planted wrong labels among the 10% most doubtful, by what --check-labels ranks."""
    import pyarrow as pa

    from pipelines.data import load_images
    from pipelines.label_checks import rank_labels
    from pipelines.options import CacheOptions
    from pipelines.rank import frozen_part, sample_features
    from pipelines.sources import find_images

    splits = load_images(find_images(str(data)))
    config = dataclasses.make_dataclass("Config", ["seed", "cache"])(0, CacheOptions(cache="memory"))
    name = f"efficientnet_lite0@{IMAGE_SIZE}" if IMAGE_SIZE else "efficientnet_lite0"
    table = pa.concat_tables([splits.train, splits.val])
    features = sample_features(frozen_part(name, "image", splits, config), splits, table)
    order, suspicious, _ = rank_labels(features, table["label"].to_numpy(), table["group"].to_numpy())
    wrong = np.array([pathlib.Path(path).read_bytes() in flipped for path in table["path"].to_pylist()])
    top = order[: len(order) // 10]
    recall = wrong[top].sum() / wrong.sum()
    yield (
        f"5. {wrong.sum()} flipped labels of {len(wrong):,}: recall in the 10% most doubtful; precision of the "
        f"{suspicious} called suspicious",
        f"{recall:.2f}, {wrong[order[:suspicious]].mean():.2f}",
        "recall at least 0.7",
        recall >= 0.7,
    )


def swapped(folder):
    """5: channels in another order at serving: refused by verification, by the contract and by the answers."""

    import tensorflow as tf

    from pipelines import image
    from pipelines.contract import trained_image_contract
    from pipelines.data import image_loader, load_images
    from pipelines.options import ImageConfig
    from pipelines.prediction import predictor
    from pipelines.sources import find_images
    from serving.export import export_image_classifier
    from serving.verify import VerificationError, verify

    config = ImageConfig()
    config.model.image_size = IMAGE_SIZE
    splits = load_images(find_images("textures"))
    model = image.build_model(config, splits.class_names)
    model.head.kernel.assign(np.random.default_rng(0).normal(size=model.head.kernel.shape).astype(np.float32))
    trained = model.backbone.preprocess
    samples = splits.test.slice(0, 8)
    colours = np.random.default_rng(1).integers(0, 256, [8, 48, 48, 3], dtype=np.uint8)  # textures are grey
    paths = []
    for number, pixels in enumerate(colours):
        put(tf.io.encode_png(pixels).numpy(), folder / "colours" / f"{number}.png")
        paths.append(str(folder / "colours" / f"{number}.png"))
    samples = samples.set_column(samples.schema.get_field_index("path"), "path", [paths])
    logits = predictor(model, tf.distribute.get_strategy(), image_loader(trained, 255), 8)(samples)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    files = [pathlib.Path(path).read_bytes() for path in paths]
    turned = dataclasses.replace(trained, channel_order="bgr")
    for name, preprocess in (("as in training", trained), ("swapped", turned)):
        export_image_classifier(model, preprocess, splits.class_names, folder / name)
        for how, contract in (("", trained_image_contract(trained, 255)), (" without the contract", None)):
            try:
                verify(folder / name, files, expected, contract=contract)
                said = "verified"
            except VerificationError as error:
                said = str(error).partition(": ")[2]
            fine = (said == "verified") == (name == "as in training")
            wanted = "verified" if name == "as in training" else "refused"
            yield f"5. channels {name} at serving{how}", said[:220], wanted, fine


# ---------------------------------------------------------------- 6, 7: calibration and cost


def calibration(folder):
    """6: temperature and the threshold of `unsure`, of the finished models of the full search."""
    for data in ladder.DATA:
        rows = [row for row in ladder.measured(data, SEEDS, IMAGE_SIZE, ROWS) if "calibration" in row]
        if not rows:
            continue
        found = [row["calibration"]["full"] for row in rows]
        change = np.array([one["test_loss_after"] - one["test_loss_before"] for one in found])
        lower, worse = int((change < 0).sum()), int((change > 0).sum())
        temperatures = [one["temperature"] for one in found]
        yield (
            f"6. {data}, {len(found)} seeds: loss on test after the temperature, lower and worse",
            f"lower in {lower}, worse in {worse} (mean change {change.mean():+.4f}; temperatures "
            f"{min(temperatures):.2f} to {max(temperatures):.2f})",
            "worse in none, lower in 8 of 10",
            worse == 0 and 10 * lower >= 8 * len(found),
        )
        tests = [one["abstain"]["test"] for one in found]
        holds = [test["precision"] is None or test["interval"][1] >= ladder.PRECISION for test in tests]
        precision = np.mean([test["precision"] for test in tests if test["precision"] is not None] or [np.nan])
        yield (
            f"6. {data}, {len(found)} seeds: sure answers have a precision of {ladder.PRECISION} within their interval",
            f"{sum(holds)} of {len(holds)}; mean precision {precision:.3f}, coverage "
            f"{np.mean([test['coverage'] for test in tests]):.3f}",
            "all",
            all(holds),
        )


def resplit(folder):
    """6: the same for heads alone, on ten other divisions of train and val; the test set stays."""
    import pyarrow as pa

    from models.hubs import offline_names
    from pipelines.calibration import find_temperature, mean_loss
    from pipelines.curve import stratified_part
    from pipelines.data import load_images, targets_of
    from pipelines.frozen_part import Examples
    from pipelines.head_solver import solve_head
    from pipelines.options import CacheOptions
    from pipelines.rank import frozen_part
    from pipelines.sources import find_images
    from pipelines.texts import find_texts, load_texts

    for data in ladder.DATA:
        kind = "text" if data == "topics" else "image"
        splits = load_images(find_images(data)) if kind == "image" else load_texts(find_texts(data))
        config = dataclasses.make_dataclass("Config", ["seed", "cache", "second_column"])(0, CacheOptions(), "")
        name = offline_names(kind)[0] + (f"@{IMAGE_SIZE}" if IMAGE_SIZE and kind == "image" else "")
        frozen = frozen_part(name, kind, splits, config)
        learned = pa.concat_tables([splits.train, splits.val])
        sides = []
        for table, examples in (
            (learned, Examples(frozen, "", [splits.train, splits.val], needed=True)),
            (splits.test, Examples(frozen, " of the test set", [splits.test], needed=True)),
        ):
            targets = targets_of(table, len(splits.class_names))
            sides.append((examples.features(0).arrays[0][examples.places(table)], targets))
        (features, targets), (test, test_targets) = sides
        changes = []
        for seed in range(10):
            val = stratified_part(targets, 0.15, np.random.default_rng(seed))
            train = np.setdiff1d(np.arange(len(targets)), val)
            ones = np.ones(len(train), np.float32)
            heads, _, best, _ = solve_head(features[train], targets[train], ones, features[val], targets[val])
            kernel, bias = heads[best]
            found = find_temperature(targets[val].argmax(axis=1), features[val] @ kernel + bias)
            before = mean_loss(test_targets.argmax(axis=1), np.float64(test @ kernel + bias))
            after = mean_loss(test_targets.argmax(axis=1), np.float64(test @ kernel + bias) / found["temperature"])
            changes.append((after - before, found["temperature"]))
        change = np.array([value for value, _ in changes])
        kept = [temperature for _, temperature in changes].count(1.0)
        yield (
            f"6. {data}, heads of ten divisions: loss on test after the temperature",
            f"lower in {(change < 0).sum()}, worse in {(change > 0).sum()}, left at 1 in {kept} "
            f"(mean change {change.mean():+.4f})",
            "worse in none",
            (change > 0).sum() == 0,
        )


def cost(folder):
    """7: the guards that are always on."""
    from tests.benchmarks import guards_cost

    size = ["--image-size", str(IMAGE_SIZE)] if IMAGE_SIZE else []
    for words in (["image", "--data", "textures", *size, "--depth", "2"], ["text", "--data", "topics", "--depth", "2"]):
        rows = guards_cost.compare(int(os.environ.get("COST_RUNS", 3)), words)
        cpu, wall = guards_cost.extra(rows, "cpu"), guards_cost.extra(rows, "wall")
        seconds = [np.median([row["wall"] for row in rows[side]]) for side in guards_cost.SIDES]
        yield (
            f"7. graft {' '.join(words)}: guards that are always on, on top of the run without them",
            f"{wall:.0%} ({seconds[0]:.0f} and {seconds[1]:.0f} s; of CPU seconds {cpu:.0%})",
            "< 25%",
            wall < 0.25,
        )


CHECKS = (digits, depths, times, rank_images, rank_texts, too_high, averaged)
CHECKS += (faults, swapped, calibration, resplit, cost)
TITLE = "Guards: does transfer help, how deep to go, is it still what it was"

if __name__ == "__main__":
    raise SystemExit(run_checks(CHECKS, __file__, TITLE))
