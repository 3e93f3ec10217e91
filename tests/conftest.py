"""Shared by all tests: a tiny backbone with every kind of layer that freezing must handle, and tiny images."""

from __future__ import annotations

import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

from tests import tiny_presets


def tiny_backbone(seed: int = 0, dropout: float = 0.0, batch_norm: bool = True):
    """A backbone of three convolutional blocks on [n, 16, 16, 3]; features [n, 4, 4, 8]."""
    import keras

    from models.backbone import Backbone, Block, ImagePreprocess

    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((16, 16, 3))
    blocks = []
    for index, stride in enumerate((2, 2, 1)):
        name = f"block{index}"
        layers = [keras.layers.Conv2D(8, 3, stride, "same", name=f"{name}_conv")]
        if batch_norm:
            layers.append(keras.layers.BatchNormalization(name=f"{name}_bn"))
        layers.append(keras.layers.Activation("tanh", name=f"{name}_tanh"))
        if dropout:
            layers.append(keras.layers.Dropout(dropout, name=f"{name}_dropout"))
        for layer in layers:
            x = layer(x)
        blocks.append(Block(name, tuple(layers)))
    return Backbone(
        name="tiny",
        encoder=keras.Model(inputs, x, name="tiny"),
        preprocess=ImagePreprocess((16, 16), mean=(127.0,) * 3, deviation=(128.0,) * 3),
        blocks=blocks,
        feature_size=8,
    )


def write_png_folder(folder: pathlib.Path, classes: int = 3, per_class: int = 12, side: int = 20, seed: int = 0):
    """A folder of class folders with noisy PNG images whose colour tells the class."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            pixels = random.integers(0, 120, (side, side, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{index:03}.png")
    return folder


@pytest.fixture(scope="session")
def png_folder(tmp_path_factory):
    return write_png_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of this session: the fetched weights and data of the real one, no activations of earlier sessions."""
    from models import offline

    real, own = offline.cache_folder(), tmp_path_factory.mktemp("cache")
    for name in ("wheels", "unpacked", "data"):
        (real / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(real / name)
    os.environ["GRAFT_CACHE"] = str(own)


@pytest.fixture(scope="session", autouse=True)
def two_logical_devices():
    """Two logical CPUs, so that `mirrored` can be tested anywhere; must come before TensorFlow starts."""
    import tensorflow as tf

    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def mirrored(two_logical_devices):
    """The one MirroredStrategy of the process: several block each other."""
    from pipelines.distribute import make_strategy

    return make_strategy("mirrored", ("CPU:0", "CPU:1"))


def two_phase_run(data, backbone, out: pathlib.Path) -> tuple[dict, pathlib.Path]:
    """Train the head and the top block on images, export and verify; metrics.json and the version's folder."""
    from pipelines import image
    from pipelines.config import parse_config

    words = ["--data", data, "--backbone", backbone, "--out", out, "--head-epochs", 2, "--fine-tune-epochs", 2]
    run_dir = image.run(parse_config([*map(str, words), "--depth", "1"]))
    return json.loads((run_dir / "metrics.json").read_text()), run_dir / "serving" / out.name / "1"


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random EfficientNet, 32-pixel input."""
    return tiny_presets.efficientnet(tmp_path_factory.mktemp("presets") / "tiny_efficientnet")


@pytest.fixture(scope="session")
def tiny_resnet_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ResNet with basic blocks, 32-pixel input."""
    return tiny_presets.resnet(tmp_path_factory.mktemp("presets") / "tiny_resnet")


@pytest.fixture(scope="session")
def tiny_resnet_v2_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ResNet v2 with bottleneck blocks, 32-pixel input."""
    return tiny_presets.resnet_v2(tmp_path_factory.mktemp("presets") / "tiny_resnet_v2")


@pytest.fixture(scope="session")
def tiny_mobilenet_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random MobileNet, 32-pixel input."""
    return tiny_presets.mobilenet(tmp_path_factory.mktemp("presets") / "tiny_mobilenet")


@pytest.fixture(scope="session")
def tiny_vit_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ViT, 32-pixel input."""
    return tiny_presets.vit(tmp_path_factory.mktemp("presets") / "tiny_vit")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB; skips where mounting is not allowed."""
    import subprocess

    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)
