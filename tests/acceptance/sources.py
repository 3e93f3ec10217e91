"""Full-size checks of backbones and data sources, about half an hour on two cores; writes sources.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import collections
import itertools
import json
import shutil
import sys

import numpy as np

from tests.acceptance import multi_label, tools
from tests.acceptance.tools import graft

# ---------------------------------------------------------------- 1 to 3: backbones


def families(folder):
    return [
        tools.tests(
            "1. KerasHub folders of EfficientNet, ResNet, ViT, MobileNet: blocks, features, phases, export, verify",
            "tests/test_kerashub.py",
            "tests/test_blocks.py",
            "tests/test_image.py",
        ),
        tools.tests(
            "1. Hugging Face and timm folders of ResNet and ViT, safetensors, sharded, .bin: PyTorch's features, "
            "both phases, export, verify",
            "tests/test_huggingface.py",
        ),
        *feature_differences(folder),
    ]


def checkpoints(folder):
    return [
        tools.tests("2. .bin files: arrays equal PyTorch's; code and truncation refused", "tests/test_checkpoints.py")
    ]


def hub_modules(folder):
    return [
        tools.tests("3. TF-Hub: image, string and tf_keras modules, replicas, .keras, export", "tests/test_tfhub.py")
    ]


# ---------------------------------------------------------------- 4: preprocessing


def preprocessing(folder):
    """Our inputs against KerasHub's converter and PIL, on photographs at each preset's own settings."""
    import keras_hub
    from PIL import Image

    from models import offline
    from models.backbone import load_backbone
    from models.inputs import resize_image

    paths = sorted((offline.image_data_folder("textures") / "test").rglob("*.png"))[::97]
    tiles = [np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths]
    images = [np.concatenate([a, b, a], axis=1)[:, : 48 + 7 * i] for i, (a, b) in enumerate(itertools.pairwise(tiles))]
    rows = []
    for name, preset in presets(folder).items():
        preprocess = load_backbone(str(preset)).preprocess
        converter = keras_hub.layers.ImageConverter.from_preset(str(preset))
        converter.scale, converter.offset = None, None
        ours = [np.asarray(resize_image(image, preprocess)) for image in images]
        theirs = [np.asarray(converter(image[None]))[0] for image in images]
        worst = max(np.abs(one - other).max() for one, other in zip(ours, theirs))
        with_pil = np.mean([np.abs(one - pil(image, preprocess)).mean() for one, image in zip(ours, images)])
        rows.append(
            (
                f"4. {name}: largest difference to KerasHub's converter, levels of 255; mean difference to PIL",
                f"{worst:.2g}; {with_pil:.2g}",
                "<= 1; printed",
                worst <= 1,
            )
        )
    return rows


def pil(image, preprocess):
    """The same crop and size by PIL, which always antialiases."""
    from PIL import Image

    height, width = preprocess.image_size
    full_height, full_width = image.shape[:2]
    crop_height = min(full_height, full_width * height // width)
    crop_width = min(full_width, full_height * width // height)
    top, left = (full_height - crop_height) // 2, (full_width - crop_width) // 2
    box = (left, top, left + crop_width, top + crop_height)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[preprocess.interpolation]
    picture = Image.fromarray(image.astype(np.uint8)).resize((width, height), method, box=box)
    return np.asarray(picture, np.float32)


def presets(folder):
    """KerasHub folders as the tests make them, one per family."""
    from tests import tiny_presets

    return {name: write(folder / "presets" / name) for name, write in tiny_presets.WRITERS.items()}


# ---------------------------------------------------------------- 5 to 8: data, precision


def several_labels(folder):
    return multi_label.multi_label_case(folder / "multi_label")


def group_splits(folder):
    from pipelines import splits
    from tests.test_manifests import random_rows

    straddling, moved_shares = 0, []
    for seed in range(50):
        rows = random_rows(seed)
        fewer = rows[: int(len(rows) / 1.05)]
        before, after = ({r["path"]: r for r in split_rows(part, splits)} for part in (fewer, rows))
        groups = collections.defaultdict(set)
        for row in after.values():
            groups[row["group"]].add(row["split"])
        straddling += sum(len(names) > 1 for names in groups.values())
        moved_shares.append(np.mean([before[path]["split"] != after[path]["split"] for path in before]))
    return [
        ("6. groups in two splits, 50 random manifests of 40 to 199 groups", straddling, "0", straddling == 0),
        (
            "6. old rows that 5% more rows move to another split: mean of the 50; manifests above 2%, and the largest",
            f"{np.mean(moved_shares):.2%}; {np.sum(np.array(moved_shares) >= 0.02)}, {np.max(moved_shares):.2%}",
            "< 2%, 0",
            np.max(moved_shares) < 0.02,
        ),
    ]


def split_rows(rows, splits):
    rows = [dict(row) for row in rows]
    splits.make_splits(rows, ["a", "b", "c"], [])
    return rows


def tfds(folder):
    """Tiles of `textures` written as a TFDS set, and as a folder: the same metrics."""
    from models import offline
    from tests.test_sources import store_as_tfds

    source, chosen = offline.image_data_folder("textures"), folder / "tiles"
    for split in ("train", "test"):
        for label in sorted((source / split).iterdir()):
            (chosen / split / label.name).mkdir(parents=True)
            for path in sorted(label.iterdir())[:20]:
                shutil.copy(path, chosen / split / label.name)
    store_as_tfds(chosen, folder / "tfds", "tiles")
    words = ["--image-size", 96, "--head-epochs", 2, "--fine-tune-epochs", 1, "--depth", 2]
    figures = []
    for name, data in {
        "folder": ["--data", chosen],
        "tfds": ["--data", "tfds:tiles", "--data-dir", folder / "tfds"],
    }.items():
        done, _ = graft("image", *data, *words, "--out", folder / f"run_{name}")
        assert done.returncode == 0, done.stdout + done.stderr
        figures.append(json.loads((folder / f"run_{name}" / "metrics.json").read_text())["test"])
    return [
        (
            "7. test accuracy and loss of the same files, as a folder and as tfds:tiles",
            ", ".join(f"{figure['accuracy']:.4f} {figure['loss']:.6f}" for figure in figures),
            "equal",
            figures[0] == figures[1],
        )
    ]


def precision(folder):
    """The demo in bfloat16 against float32, three seeds."""
    accuracies = collections.defaultdict(list)
    for seed in range(3):
        for name in ("float32", "bfloat16"):
            words = ["--data", "textures", "--image-size", 160, "--depth", 2, "--seed", seed, "--precision", name]
            done, _ = graft("image", *words, "--out", folder / f"{name}-{seed}")
            assert done.returncode == 0, done.stdout + done.stderr
            metrics = json.loads((folder / f"{name}-{seed}" / "metrics.json").read_text())
            accuracies[name].append(metrics["test"]["accuracy"])
    means = {name: np.mean(values) for name, values in accuracies.items()}
    dtypes = served_dtypes(folder / "bfloat16-0")
    return [
        (
            "8. demo test accuracy, float32 and bfloat16, mean of three seeds",
            ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()),
            "within 0.01",
            abs(means["float32"] - means["bfloat16"]) <= 0.01,
        ),
        (
            "8. dtypes of the bfloat16 run's served outputs",
            ", ".join(dtypes),
            "string, float32",
            set(dtypes) <= {"string", "float32"},
        ),
    ]


def served_dtypes(run_dir):
    from pipelines import runs
    from serving.session import Session

    with Session(runs.find_version(str(run_dir))) as session:
        return sorted({dtype for s in session.signatures.values() for dtype, _ in s["outputs"].values()})


# ---------------------------------------------------------------- 9: mistakes


def mistakes(folder):
    from tests.conftest import write_png_folder

    place = folder / "mistakes"
    good = write_png_folder(place / "good", classes=2, per_class=8)
    (place / "empty").mkdir()
    (place / "no_config").mkdir()
    (place / "no_config" / "model.safetensors").write_bytes(b"")
    (place / "foreign").mkdir()
    (place / "foreign" / "config.json").write_text(json.dumps({"model_type": "swinv9", "architectures": ["SwinV9"]}))
    (place / "foreign" / "model.safetensors").write_bytes(b"")
    (place / "no_label.csv").write_text("path,kind\ngood/class0/000.png,a\n")
    (place / "missing.csv").write_text("path,label\ngood/class0/000.png,a\ngood/class0/none.png,b\n")
    cases = {
        "unknown preset": ("--data", good, "--backbone", "resnet_51_imagenet"),
        "no network, KerasHub name": ("--data", good, "--backbone", "resnet_50_imagenet"),
        "no network, hf://": ("--data", good, "--backbone", "hf://google/vit-base-patch16-224"),
        "no network, kaggle://": ("--data", good, "--backbone", "kaggle://keras/resnetv1/keras/resnet_50_imagenet"),
        "no network, tfhub:https": ("--data", good, "--backbone", "tfhub:https://tfhub.dev/google/imagenet/x/1"),
        "no network, applications": ("--data", good, "--backbone", "applications:ResNet50V2"),
        "no network, tfds": ("--data", "tfds:beans", "--data-dir", place / "empty"),
        "wrong folder": ("--data", good, "--backbone", place / "empty"),
        "missing config": ("--data", good, "--backbone", place / "no_config"),
        "unknown architecture": ("--data", good, "--backbone", place / "foreign"),
        "manifest without a label column": ("--data", place / "no_label.csv"),
        "missing file": ("--data", place / "missing.csv"),
        "no such weights file": ("--data", good, "--backbone", f"applications:ResNet50V2:{place}/none.h5"),
        "no such TF-Hub folder": ("--data", good, "--backbone", f"tfhub:{place}/empty"),
    }
    return tools.mistakes("9", place, cases)


def feature_differences(folder):
    """Largest difference to PyTorch's features and logits, of every committed folder in every form."""
    from models.huggingface import load_huggingface_folder
    from tests import test_huggingface as fixture

    expected, rows = np.load(fixture.FIXTURES / "expected.npz"), []
    for name in fixture.INPUT_SIZES:
        worst = {"features": 0.0, "logits": 0.0}
        for form in fixture.FORMS:
            backbone = load_huggingface_folder(fixture.folder_as(form, name, folder / f"{name}-{form}"))
            features = fixture.features_of(backbone, name)
            found = {"features": features, "logits": features @ backbone.source_head[0] + backbone.source_head[1]}
            for what, values in found.items():
                worst[what] = max(worst[what], float(np.abs(values - expected[f"{name}_{what}"]).max()))
        rows.append(
            (
                f"1. {name} as {', '.join(fixture.FORMS)}: largest difference to PyTorch, features and logits",
                f"{worst['features']:.1e}, {worst['logits']:.1e}",
                "<= 1e-3",
                max(worst.values()) <= 1e-3,
            )
        )
    return rows


CHECKS = (
    families,
    checkpoints,
    hub_modules,
    preprocessing,
    several_labels,
    group_splits,
    tfds,
    precision,
    mistakes,
)

if __name__ == "__main__":
    sys.exit(tools.run_checks(CHECKS, __file__, "Backbones and sources"))
