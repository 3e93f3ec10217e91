"""Several labels per image at full size: pairs of texture tiles, trained, served, and compared with training."""

from __future__ import annotations

import csv
import json
import pathlib

import numpy as np

from tests.acceptance.tools import graft

PICTURES = {"train": 800, "val": 160, "test": 300}
VAL_TILES = 7  # every seventh training tile is kept for validation pictures
FLAGS = ("--backbone", "efficientnet_lite0", "--image-size", 160, "--depth", 2, "--augmentation", "none")


def multi_label_case(folder) -> list[tuple]:
    """Rows (what, measured, wanted, holds) of one run below `folder`, about three minutes on two cores."""
    folder = pathlib.Path(folder)
    data, run_dir = write_pairs(folder / "pairs"), folder / "run"
    done, seconds = graft("image", "--data", data, "--out", run_dir, *FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((run_dir / "metrics.json").read_text())
    test = figures["test"]
    low, high = test["headline"]["interval"]
    head = figures["phases"][0]["test"]["mean_average_precision"]
    details, served, expected, thresholds = served_and_trained(run_dir)
    chosen = expected >= thresholds
    different = int((served["chosen"] != chosen).sum())
    return [
        (
            "5. two tiles side by side, 15 classes, mean average precision on test pictures (95% interval; head only)",
            f"{test['mean_average_precision']:.3f} ({low:.3f} to {high:.3f}; {head:.3f})",
            f"printed; guessing has {test['headline']['chance_value']:.3f}",
            test["mean_average_precision"] > test["headline"]["chance_value"],
        ),
        (
            "5. micro F1, macro F1, wholly right, at thresholds chosen on validation",
            f"{test['micro_f1']:.3f}, {test['macro_f1']:.3f}, {test['subset_accuracy']:.3f}",
            "printed",
            True,
        ),
        ("5. seconds of the whole command", f"{seconds:.0f}", "printed", True),
        (
            "5. thresholds: in graft.json, in metrics.json, and chosen again by the rebuilt model (largest difference)",
            f"{np.abs(np.array(details['thresholds']) - figures['thresholds']).max():.0e}, "
            f"{np.abs(np.array(details['thresholds']) - thresholds).max():.0e}",
            "0, <= 1e-6",
            details["thresholds"] == figures["thresholds"]
            and np.allclose(details["thresholds"], thresholds, atol=1e-6, rtol=0),
        ),
        (
            f"5. served `chosen` on all {len(chosen)} test pictures: decisions that differ from training's",
            f"{different} of {chosen.size} ({chosen.sum()} chosen)",
            "0",
            different == 0 and len(chosen) == PICTURES["test"],
        ),
    ]


def write_pairs(folder: pathlib.Path) -> pathlib.Path:
    """Pictures of two tiles of different classes, 48 x 96, and their manifest; no tile is in two splits."""
    from PIL import Image

    from models import offline

    source = offline.image_data_folder("textures")
    tiles = {"train": {}, "val": {}, "test": {}}
    for name in ("train", "test"):
        for place in sorted((source / name).iterdir()):
            files = sorted(place.glob("*.png"))
            if name == "test":
                tiles["test"][place.name] = files
            else:
                tiles["val"][place.name] = files[::VAL_TILES]
                tiles["train"][place.name] = [file for i, file in enumerate(files) if i % VAL_TILES]
    generator = np.random.default_rng(0)
    rows = []
    for split, count in PICTURES.items():
        (folder / split).mkdir(parents=True)
        for index in range(count):
            classes = generator.choice(sorted(tiles[split]), size=2, replace=False)
            pair = [np.asarray(Image.open(generator.choice(tiles[split][name]))) for name in classes]
            path = f"{split}/{index:04}.png"
            Image.fromarray(np.concatenate(pair, axis=1)).save(folder / path)
            rows.append({"path": path, "label": "|".join(classes), "split": split})
    manifest = folder / "pairs.csv"
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def served_and_trained(run_dir: pathlib.Path):
    """graft.json and the served answers; probabilities and thresholds of the model rebuilt from the run's weights."""
    import tensorflow as tf

    from pipelines import image, runs
    from pipelines.config import read_config
    from pipelines.data import image_loader
    from pipelines.evaluate_multi_label import sigmoid
    from pipelines.prediction import predictor
    from pipelines.results import thresholds_for
    from serving.session import Session

    config = read_config(run_dir / "config.yaml")
    state = json.loads((run_dir / "checkpoints" / "state.json").read_text())
    model = image.build_model(config, state["class_names"], state["multi_label"])
    model.load_weights(runs.find_checkpoint(run_dir))
    load = image_loader(model.backbone.preprocess, state["white_level"])
    logits_of = predictor(model, tf.distribute.get_strategy(), load, config.training.batch_size)
    val, test = (runs.read_split(run_dir, name, multi_label=True) for name in ("val", "test"))
    thresholds = thresholds_for(val, logits_of(val))
    version = runs.find_version(str(run_dir))
    data = [pathlib.Path(path).read_bytes() for path in test["path"].to_pylist()]
    with Session(version) as session:
        parts = [session.run("serving_default", {"image_bytes": data[i : i + 32]}) for i in range(0, len(data), 32)]
    served = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    details = json.loads((version / "assets.extra" / "graft.json").read_text())
    return details, served, sigmoid(logits_of(test)), thresholds
