"""KerasHub preset folders of small random image backbones: one function per family, folder -> folder."""

from __future__ import annotations

import pathlib


def efficientnet(folder: pathlib.Path) -> pathlib.Path:
    """Three MBConv units, dropout, any input size; its converter gives 32 pixels."""
    import keras
    import keras_hub

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
    deviation = (0.229, 0.224, 0.225)
    return save(
        folder,
        encoder,
        "EfficientNetImageConverter",
        scale=[1 / 255 / d for d in deviation],
        offset=[-m / d for m, d in zip((0.485, 0.456, 0.406), deviation)],
    )


def resnet(folder: pathlib.Path) -> pathlib.Path:
    """ResNet with basic blocks."""
    return save(folder, resnet_backbone("basic_block", False), "ResNetImageConverter")


def resnet_v2(folder: pathlib.Path) -> pathlib.Path:
    """ResNet v2 with bottleneck blocks."""
    return save(folder, resnet_backbone("bottleneck_block", True), "ResNetImageConverter")


def resnet_backbone(block_type: str, pre_activation: bool):
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


def mobilenet(folder: pathlib.Path) -> pathlib.Path:
    """Depthwise, inverted residual and squeeze-and-excitation units."""
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
    return save(folder, encoder, "MobileNetImageConverter")


def vit(folder: pathlib.Path) -> pathlib.Path:
    """ViT with three units and dropout, built for 32 pixels."""
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
    return save(folder, encoder, "ViTImageConverter")


def save(folder: pathlib.Path, encoder, converter_class: str, scale=1 / 127.5, offset=-1.0) -> pathlib.Path:
    """Write the encoder and an image converter of 32 x 32 pixels into `folder`."""
    import keras_hub

    converter = getattr(keras_hub.layers, converter_class)(
        image_size=(32, 32), scale=scale, offset=offset, interpolation="bilinear", antialias=True
    )
    encoder.save_to_preset(str(folder))
    converter.save_to_preset(str(folder))
    return folder


WRITERS = {"efficientnet": efficientnet, "resnet": resnet, "resnet_v2": resnet_v2, "mobilenet": mobilenet, "vit": vit}
