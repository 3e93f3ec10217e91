"""Full-size checks of `graft rank`, about 20 minutes on two cores; writes rank.md beside this file.

Six backbones on each of two data sets: does the order that rank foretells agree with the order after light fine-tuning,
and what share of its time did that take? Both start with an empty cache. Few pretrained networks can be had offline,
so the six are the one pretrained network at several input sizes, its copy with random weights, and small networks of
other architectures with random weights. `--size 20` takes so many examples of each class only, and writes no table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pathlib
import shutil
import sys
import tempfile

from tests.acceptance import tools
from tests.acceptance.tools import graft, own_cache

EXAMPLES = 500  # that rank looks at
PRESETS = {"image": ("resnet", "vit"), "text": ("bert", "gpt2")}
BACKBONES = {
    "image": ("efficientnet_lite0", "efficientnet_lite0@96", "efficientnet_lite0@48", "random:efficientnet_lite0@96"),
    "text": ("minilm_l6", "minilm_l6@16", "minilm_l6@6", "random:minilm_l6"),
}
SIZE = {"image": "--image-size", "text": "--sequence-length"}
per_class = None  # --size


def images(folder):
    from models.offline import image_data_folder

    data = folder / "textures"
    if not data.exists():
        for place in sorted(image_data_folder("textures").glob("*/*/")):  # split / class
            copy = data / place.parent.name / place.name
            copy.mkdir(parents=True)
            for file in sorted(place.iterdir())[:per_class]:
                shutil.copy(file, copy)
    return check(folder, "image", data)


def texts(folder):
    from models.offline_texts import text_data_file

    with open(text_data_file("topics"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    taken, kept = {}, []
    for row in rows:
        taken[row["label"]] = taken.get(row["label"], 0) + 1
        if per_class is None or taken[row["label"]] <= per_class:
            kept.append(row)
    data = folder / "topics.csv"
    with open(data, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(kept)
    return check(folder, "text", data)


def check(folder: pathlib.Path, kind: str, data: pathlib.Path) -> list[tuple]:
    """Rank six backbones, fine-tune each, and compare."""
    from scipy.stats import spearmanr

    longest = "@64" if kind == "text" else ""  # tokens that the small ones take
    names = [*BACKBONES[kind], *(f"{path}{longest}" for path in write_presets(folder, kind))]
    words = ["--examples", EXAMPLES, "--min-per-class", 3, "--out", folder / f"rank-{kind}"]
    done, seconds = graft("rank", "--data", data, "--backbones", ",".join(names), *words, **cold(folder, "rank", kind))
    assert done.returncode == 0, done.stderr
    print(done.stdout, flush=True)
    found = json.loads((folder / f"rank-{kind}" / "rank.json").read_text())
    ranked = {row["name"]: row["probe"]["accuracy"] for row in found["backbones"]}
    tuned, tuned_seconds = {}, 0.0
    for number, name in enumerate(names):
        base, _, size = name.partition("@")
        sized = [SIZE[kind], size] if size else []
        out = folder / f"{kind}-{number}"
        run = ["--data", data, "--backbone", base, *sized, "--depth", 2, "--min-per-class", 3, "--out", out]
        done, more = graft(kind, *run, **cold(folder, out.name, kind))
        assert done.returncode == 0, done.stderr
        metrics = json.loads((out / "metrics.json").read_text())
        tuned[name] = metrics["test"]["accuracy"]
        tuned_seconds += more - metrics["seconds"]["export and verification"]
    correlation = spearmanr([ranked[name] for name in names], [tuned[name] for name in names]).statistic
    rows = [
        (
            f"3. {kind}: {pathlib.Path(name).name}: linear probe, then test accuracy after light fine-tuning",
            f"{ranked[name]:.3f}, {tuned[name]:.3f}",
            "",
            True,
        )
        for name in sorted(names, key=lambda name: -ranked[name])
    ]
    share = seconds / tuned_seconds
    return [
        *rows,
        (f"3. {kind}: Spearman correlation over six backbones", f"{correlation:.2f}", ">= 0.8", correlation >= 0.8),
        (
            f"3. {kind}: seconds of rank, of six light fine-tunings without their export",
            f"{seconds:.0f}, {tuned_seconds:.0f} ({share:.1%})",
            "at most a tenth",
            share <= 0.1,
        ),
    ]


def write_presets(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Folders of small networks with random weights."""
    from tests import tiny_presets, tiny_text_presets

    def write(family):
        place = folder / f"tiny_{family}"
        return tiny_presets.WRITERS[family](place) if kind == "image" else tiny_text_presets.write(family, place)

    return [write(family) for family in PRESETS[kind]]


def cold(folder: pathlib.Path, name: str, kind: str) -> dict[str, str]:
    """The environment of a run that finds no features."""
    cache = folder / f"cache-{kind}-{name}"
    cache.mkdir()
    return {"GRAFT_CACHE": own_cache(cache)["GRAFT_CACHE"]}


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, help="examples of each class (and split)")
    options, rest = parser.parse_known_args()
    per_class, sys.argv[1:] = options.size, rest
    # What is smaller than full size is printed and leaves the committed table as it is.
    place = pathlib.Path(tempfile.gettempdir() if per_class else __file__.rpartition("/")[0], "rank.py")
    sys.exit(tools.run_checks((images, texts), place, "Ranking backbones"))
