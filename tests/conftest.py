"""Shared by all tests: a tiny backbone with every kind of layer that freezing must handle, and tiny images."""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest


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


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random EfficientNet with its image converter, 32-pixel input."""
    import keras
    import keras_hub

    folder = tmp_path_factory.mktemp("presets") / "tiny_efficientnet"
    keras.utils.set_random_seed(0)
    encoder = keras_hub.models.EfficientNetBackbone(
        stackwise_width_coefficients=[0.25] * 2,
        stackwise_depth_coefficients=[1.0] * 2,
        stackwise_squeeze_and_excite_ratios=[0.25] * 2,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[32, 16],
        stackwise_output_filters=[16, 24],
        stackwise_expansion_ratios=[1, 6],
        stackwise_strides=[1, 2],
        stackwise_block_types=["v1", "v1"],
        dropout=0.2,
        min_depth=None,
        include_stem_padding=True,
        use_depth_divisor_as_min_depth=True,
        cap_round_filter_decrease=True,
        stem_conv_padding="valid",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-5,
        image_shape=(None, None, 3),
    )
    converter = keras_hub.layers.EfficientNetImageConverter(
        image_size=(32, 32),
        scale=[1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225],
        offset=[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
        interpolation="bilinear",
        antialias=True,
    )
    encoder.save_to_preset(str(folder))
    converter.save_to_preset(str(folder))
    return folder


def save_preset(folder: pathlib.Path, encoder, converter_class: str, side: int = 32) -> pathlib.Path:
    """Save a KerasHub preset folder of an encoder, with an image converter of `side` x `side` pixels."""
    import keras_hub

    converter = getattr(keras_hub.layers, converter_class)(
        image_size=(side, side), scale=1 / 127.5, offset=-1.0, interpolation="bilinear", antialias=True
    )
    encoder.save_to_preset(str(folder))
    converter.save_to_preset(str(folder))
    return folder


def tiny_resnet(block_type: str, pre_activation: bool):
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 8],  # KerasHub insists on 64 first, and basic blocks on as many before
        stackwise_num_blocks=[1, 2],
        stackwise_num_strides=[1, 2],
        block_type=block_type,
        use_pre_activation=pre_activation,
    )


@pytest.fixture(scope="session")
def tiny_resnet_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ResNet with basic blocks, 32-pixel input."""
    folder = tmp_path_factory.mktemp("presets") / "tiny_resnet"
    return save_preset(folder, tiny_resnet("basic_block", False), "ResNetImageConverter")


@pytest.fixture(scope="session")
def tiny_resnet_v2_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ResNet v2 with bottleneck blocks, 32-pixel input."""
    folder = tmp_path_factory.mktemp("presets") / "tiny_resnet_v2"
    return save_preset(folder, tiny_resnet("bottleneck_block", True), "ResNetImageConverter")


@pytest.fixture(scope="session")
def tiny_mobilenet_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random MobileNet, 32-pixel input."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    encoder = keras_hub.models.MobileNetBackbone(
        stackwise_expansion=[[16], [24, 24]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[16], [16, 16]],
        stackwise_kernel_size=[[3], [5, 5]],
        stackwise_num_strides=[[2], [1, 1]],
        stackwise_se_ratio=[[None], [0.25, 0.25]],
        stackwise_activation=[["relu"], ["hard_swish", "hard_swish"]],
        stackwise_padding=[[1], [2, 2]],
        input_num_filters=8,
        output_num_filters=32,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=True,
        squeeze_and_excite=0.5,
        last_layer_filter=32,
    )
    return save_preset(tmp_path_factory.mktemp("presets") / "tiny_mobilenet", encoder, "MobileNetImageConverter")


@pytest.fixture(scope="session")
def tiny_vit_preset(tmp_path_factory):
    """A KerasHub preset folder of a small random ViT with dropout, built for 32-pixel input."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    encoder = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=16,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout_rate=0.3,
    )
    return save_preset(tmp_path_factory.mktemp("presets") / "tiny_vit", encoder, "ViTImageConverter")


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
