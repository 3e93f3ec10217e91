"""Full-size checks of the image pipeline, about 40 minutes on two cores; writes images.md beside this file.

Each function measures one line of the list and returns rows (what, measured, wanted, holds).
"""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from tests.acceptance import tools
from tests.acceptance.tools import PYTHON, ROOT, graft


def train(out, *words):
    common = ("--data", "textures", "--image-size", 160, "--depth", 2)
    done, seconds = graft("image", *common, "--out", out, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((pathlib.Path(out) / "metrics.json").read_text()), seconds


# ---------------------------------------------------------------- 1 and 7: accuracy, time, repeatability


def demo_accuracy(folder):
    runs = [train(folder / f"seed{seed}", "--seed", seed) for seed in range(3)]
    head = [metrics["phases"][0]["test"]["accuracy"] for metrics, _ in runs]
    both = [metrics["test"]["accuracy"] for metrics, _ in runs]
    training = [sum(phase["seconds"] for phase in metrics["phases"]) for metrics, _ in runs]
    listed = lambda values, form=".3f": ", ".join(f"{value:{form}}" for value in values)  # noqa: E731
    return [
        (
            "1. textures at 160 px, head only, test accuracy, seeds 0 to 2",
            f"{np.mean(head):.3f} ({listed(head)})",
            "printed",
            True,
        ),
        ("1. the same after both phases", f"{np.mean(both):.3f} ({listed(both)})", ">= 0.90", np.mean(both) >= 0.90),
        ("1. seconds of training, both phases", listed(training, ".0f"), "< 480 each", max(training) < 480),
        ("1. seconds of the whole command", listed([seconds for _, seconds in runs], ".0f"), "printed", True),
        (
            "1. images: train, val, test",
            str([runs[0][0]["examples"][n] for n in ("train", "val", "test")]),
            "printed",
            True,
        ),
    ]


def repeatability(folder):
    """Seed 0 once more, against the run that `demo_accuracy` left."""
    again, _ = train(folder / "again", "--seed", 0)
    first = json.loads((folder / "seed0" / "metrics.json").read_text())
    same = without_times(first) == without_times(again)
    return [
        (
            "7. metrics.json of the same command twice, but for seconds and created",
            "equal" if same else "differ",
            "equal",
            same,
        )
    ]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "created")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- 2: the reference


def reference_weights(folder):
    from models.efficientnet_lite import load_efficientnet_lite0

    fixture = np.load(ROOT / "tests/fixtures/efficientnet_lite0/reference.npz")
    backbone = load_efficientnet_lite0()
    images = (np.random.RandomState(0).randint(0, 256, (2, 224, 224, 3)).astype("float32") - 127) / 128
    features = np.asarray(backbone.pooled(backbone.encoder(images, training=False)))
    kernel, bias = backbone.source_head
    logits = features @ kernel + bias
    classes, best = logits.argmax(axis=1).tolist(), logits.max(axis=1)
    rows = [
        (
            "2. classes and logits of the issue's input",
            f"{classes}, {best[0]:.4f}, {best[1]:.4f}",
            "[21, 21], 7.1327, 6.1825",
            classes == [21, 21] and np.allclose(best, [7.1327, 6.1825], atol=1e-3),
        )
    ]
    for what, ours, name in (("logits", logits, "native_logits"), ("pooled features", features, "native_pooled")):
        difference = np.abs(ours - fixture[name]).max()
        rows.append((f"2. largest difference to PyTorch, {what}", f"{difference:.1e}", "<= 1e-3", difference <= 1e-3))
    return rows


# ---------------------------------------------------------------- 3: frozen, moved, multiplied


def frozen_and_moved(folder):
    weights = json.loads((folder / "seed0" / "metrics.json").read_text())["phases"][1]["weights"]
    rows = [
        (
            "3. depth 2, phase 2: weights frozen (every BatchNorm among them) and unchanged",
            str(weights["frozen"]),
            "238",
            weights["frozen"] == 238,
        ),
        (
            "3. weights trainable; of these not changed",
            f"{weights['trainable']}; {weights['still']}",
            "9; 0",
            weights["trainable"] == 9 and weights["still"] == 0,
        ),
    ]
    for name in ("adamw", "sgd"):
        worst = update_difference(name)
        rows.append(
            (
                f"3. {name}: update of each weight against a stock optimizer at base rate x multiplier, "
                "largest relative difference",
                f"{worst:.1e}",
                "<= 1e-5 (float32)",
                worst <= 1e-5,
            )
        )
    return rows


def update_difference(name):
    """Lite0, depth 2, one step: our update against Keras' own optimizer per weight at the multiplied rate."""
    import keras
    import tensorflow as tf

    from models import freezing
    from models.classifier import Classifier
    from models.efficientnet_lite import load_efficientnet_lite0
    from models.optimizer import make_optimizer, weight_rules

    model = Classifier(load_efficientnet_lite0(), 15)
    freezing.unfreeze_top(model, 2)
    rules, start = weight_rules(model), [w.numpy() for w in model.trainable_weights]
    random = np.random.default_rng(0)
    gradients = [tf.constant(random.normal(size=w.shape).astype("float32")) for w in model.trainable_weights]
    # Zeroed weights make the update itself the value, free of the rounding of a sum.
    for weight in model.trainable_weights:
        weight.assign(tf.zeros(weight.shape))
    make_optimizer(name, model, 1e-3, weight_decay=0.01).apply(gradients, model.trainable_weights)
    worst = 0.0
    for weight, gradient in zip(model.trainable_weights, gradients):
        multiplier, decays = rules[id(weight)]
        options = {"learning_rate": 1e-3 * multiplier, "weight_decay": 0.01 if decays else 0.0}
        plain = (
            keras.optimizers.AdamW(**options)
            if name == "adamw"
            else keras.optimizers.SGD(**options, momentum=0.9, nesterov=True)
        )
        reference = keras.Variable(np.zeros(weight.shape, "float32"))
        plain.apply([gradient], [reference])
        worst = max(worst, float(np.abs(weight.numpy() / reference.numpy() - 1).max()))
    assert len(start) == 9
    return worst


# ---------------------------------------------------------------- 4: replicas


def replicas(folder):
    """In a process of its own: logical devices must be set before TensorFlow starts."""
    small = small_textures(folder / "small", per_class=12)
    command = [PYTHON, "-m", "tests.acceptance.images", "--replica-differences", str(small)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    what = "losses of two mirrored devices x 2 accumulation steps against one device, both phases, largest difference"
    return [
        (f"4. Lite0 at 96 px, {name}, clipping on: {what}", f"{value:.1e}", "< 1e-5", value < 1e-5)
        for name, value in json.loads(done.stdout.splitlines()[-1]).items()
    ]


def replica_differences(data):
    """{optimizer: largest difference of any loss of either phase} between one device and two."""
    import tensorflow as tf

    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
    from pipelines import training
    from pipelines.config import ImageConfig
    from pipelines.data import image_loader, load_images
    from pipelines.distribute import make_strategy
    from pipelines.image import build_model
    from pipelines.sources import find_images

    splits = load_images(find_images(data))
    mirrored = make_strategy("mirrored", ("CPU:0", "CPU:1"))
    result = {}
    for name, rate in (("sgd", 1e-2), ("adamw", 1e-3)):
        losses = []
        for strategy, parts in ((tf.distribute.get_strategy(), 1), (mirrored, 2)):
            config = ImageConfig()
            config.model.image_size, config.model.dropout, config.fine_tune.augmentation = 96, 0.0, "none"
            config.head.head_epochs, config.fine_tune.fine_tune_epochs = 3, 2
            config.head.head_learning_rate = config.fine_tune.fine_tune_learning_rate = rate
            config.training.optimizer, config.training.accumulation_steps = name, parts
            config.training.batch_size, config.training.clip_norm = 16, 0.5
            with strategy.scope():
                model = build_model(config, splits.class_names)
            preprocess = model.backbone.preprocess

            def loader(augmentation, preprocess=preprocess):
                return image_loader(preprocess, 255, augmentation)

            phases, _ = training.fit_two_phase(model, splits, loader, config, strategy)
            losses.append([(row["loss"], row["val_loss"]) for phase in phases for row in phase["history"]])
        result[name] = float(np.abs(np.subtract(*losses)).max())
    return result


def small_textures(folder, per_class):
    from models import offline

    for label in sorted((offline.image_data_folder("textures") / "train").iterdir()):
        (folder / label.name).mkdir(parents=True)
        for path in sorted(label.iterdir())[:per_class]:
            shutil.copy(path, folder / label.name)
    return folder


# ---------------------------------------------------------------- 5: served answers


def served_answers(folder):
    """200 held-out tiles of the first demo run, written in every supported format."""
    import tensorflow as tf

    from models import inputs
    from pipelines import image, runs
    from pipelines.config import read_config
    from serving.session import Session
    from serving.verify import verify

    run_dir = folder / "seed0"
    config = read_config(run_dir / "config.yaml")
    state = json.loads((run_dir / "checkpoints" / "state.json").read_text())
    model = image.build_model(config, state["class_names"])
    model.load_weights(runs.find_checkpoint(run_dir))
    paths = runs.read_split(run_dir, "test", 600)["path"].to_pylist()[::3]
    files = [in_format(path, index) for index, path in enumerate(paths)]
    preprocess = model.backbone.preprocess

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def training_side(data):
        image = inputs.scale_image(inputs.read_image(data, preprocess, state["white_level"]), preprocess)
        return tf.nn.softmax(model(image[None], training=False))[0]

    expected = np.stack([training_side(data).numpy() for data in files])
    version = runs.find_version(str(run_dir))
    checked = verify(version, files, expected)
    with Session(version) as session:

        def ask(items):
            return session.run("serving_default", {"image_bytes": items})["probabilities"]

        singles = np.concatenate([ask([data]) for data in files[:51]])
        differences = {
            n: max(np.abs(ask(files[i : i + n]) - singles[i : i + n]).max() for i in range(0, 51 - n + 1, n))
            for n in (1, 3, 17)
        }
        bad = [*files[:2], files[2][: len(files[2]) // 2], *files[3:5], b"no image"]
        answers = session.run("serving_default", {"image_bytes": bad})
        good = [0, 1, 3, 4]
        neighbours = float(np.abs(answers["probabilities"][good] - singles[good]).max())
        errors = [text.decode() for text in answers["error"]]
    return [
        (
            "5. served against training on 200 held-out files, " + ", ".join(FORMATS),
            f"{checked['largest_difference']:.1e}",
            "<= 1e-5",
            checked["files"] == 200 and checked["largest_difference"] <= 1e-5,
        ),
        (
            "5. a batch of n against n batches of one, n = 1, 3, 17",
            ", ".join(f"{value:.1e}" for value in differences.values()),
            "<= 1e-5",
            max(differences.values()) <= 1e-5,
        ),
        (
            "5. a damaged PNG and a text file in a batch of six: their errors",
            f"{errors[2]!r}, {errors[5][:15]!r}",
            "each its own",
            bool(errors[2]) and bool(errors[5]) and not any(errors[i] for i in good),
        ),
        ("5. the four neighbours' answers, largest change", f"{neighbours:.1e}", "<= 1e-5", neighbours <= 1e-5),
    ]


FORMATS = (
    "PNG",
    "JPEG",
    "PNG palette",
    "PNG alpha",
    "PNG 16 bit",
    "GIF",
    "BMP",
    "WebP",
    "WebP lossless",
    "JPEG colour",
)


def in_format(path, index):
    """A grey tile re-encoded by Pillow in the index-th format."""
    from PIL import Image

    tile, buffer, name = Image.open(path).convert("L"), io.BytesIO(), FORMATS[index % len(FORMATS)]
    if name == "PNG palette":
        tile.convert("P").save(buffer, "PNG")
    elif name == "PNG alpha":
        tile.convert("LA").save(buffer, "PNG")
    elif name == "PNG 16 bit":
        Image.fromarray(np.asarray(tile).astype(np.uint16)).save(buffer, "PNG")
    elif name == "JPEG colour":
        tile.convert("RGB").save(buffer, "JPEG", quality=95)
    elif name == "WebP lossless":
        tile.convert("RGB").save(buffer, "WEBP", lossless=True)
    elif name == "BMP":
        tile.convert("RGB").save(buffer, "BMP")
    else:
        tile.save(buffer, name)
    return buffer.getvalue()


# ---------------------------------------------------------------- 6 and 8: the command line


def mistakes(folder):
    from tests.conftest import write_png_folder

    place = folder / "mistakes"
    good = write_png_folder(place / "good", classes=2, per_class=8)
    (place / "empty").mkdir()
    one_class = write_png_folder(place / "one_class", classes=1)
    lonely = write_png_folder(place / "lonely", classes=2)
    for path in sorted((lonely / "class1").iterdir())[1:]:
        path.unlink()
    corrupt = write_png_folder(place / "corrupt", classes=2, per_class=25)
    for index in range(5):
        (corrupt / "class0" / f"{index:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (place / "file").write_text("")
    full = place / "full"
    full.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", full], capture_output=True).returncode == 0
    )
    cases = {
        "no such folder": ("--data", place / "nowhere"),
        "no images": ("--data", place / "empty"),
        "one class": ("--data", one_class),
        "a class with one example": ("--data", lonely),
        "5 corrupt of 50": ("--data", corrupt),
        "unknown backbone": ("--data", good, "--backbone", "resnet51"),
        "output below a file": ("--data", good, "--out", place / "file" / "run"),
        "--depth 99": ("--data", good, "--depth", 99),
        "--depth banana": ("--data", good, "--depth", "banana"),
    }
    if mounted:
        cases["full disk"] = ("--data", good, "--out", full / "run")
    rows = tools.mistakes("6", place, cases)
    if mounted:
        subprocess.run(["umount", full], check=True)
    return rows


def help_times(folder):
    rows = []
    for words in (["--help"], ["image", "--help"]):
        seconds = min(graft(*words)[1] for _ in range(3))
        rows.append((f"8. graft {' '.join(words)}", f"{seconds:.2f} s", "< 1 s", seconds < 1))
    return rows


def tests_of_readme(folder):
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-m", "", "tests/test_readme.py"], cwd=ROOT, capture_output=True, text=True
    )
    return [("9. README's fences run", done.stdout.strip().splitlines()[-1], "passed", done.returncode == 0)]


CHECKS = (
    demo_accuracy,
    repeatability,
    reference_weights,
    frozen_and_moved,
    replicas,
    served_answers,
    mistakes,
    help_times,
    tests_of_readme,
)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replica-differences"]:
        print(json.dumps(replica_differences(sys.argv[2])))
    else:
        sys.exit(tools.run_checks(CHECKS, __file__, "Images"))
