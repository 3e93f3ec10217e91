"""Blocks of any functional encoder: by names where they fit the graph, otherwise by the graph alone."""

import keras
import keras_hub
import pytest
from keras import layers

from models import GraftError
from models.backbone import check_blocks
from models.blocks import BLOCK_PATTERNS, blocks_by_graph, blocks_by_name, find_blocks, graph_segments
from tests.tiny_presets import resnet_backbone

KERAS_HUB = keras_hub.models


def tiny_cspnet(stage_type):
    return KERAS_HUB.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[16, 32],
        block_type="dark_block",
        stage_type=stage_type,
        bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5),
        expand_ratio=(2.0, 1.0),
        down_growth=True,
        image_shape=(64, 64, 3),
    )


# Families that have no pattern: encoder, and its blocks bottom to top.
FAMILIES = {
    "densenet": (
        lambda: KERAS_HUB.DenseNetBackbone([2, 1], growth_rate=4, image_shape=(32, 32, 3)),
        ["stem", "stack1_block1_1_conv", "stack1_block2_1_conv", "transition1_conv", "stack2_block1_1_conv"],
    ),
    "vgg": (
        lambda: KERAS_HUB.VGGBackbone([1, 2, 1], [4, 8, 8], image_shape=(32, 32, 3)),
        ["stem", "block2_conv1", "block2_conv2", "block3_conv1"],
    ),
    "cspnet": (
        lambda: tiny_cspnet("csp"),
        [
            "stem",
            "stage_0_csp_conv_down_1",
            "stage_0_csp_conv_exp",
            "stage_0_block_0_dark_block_conv_1",
            "stage_0_csp_conv_transition",
            "stage_1_csp_conv_down_1",
            "stage_1_csp_conv_exp",
            "stage_1_block_0_dark_block_conv_1",  # both units: the cross-stage half passes them by
            "stage_1_csp_conv_transition",
        ],
    ),
    "xception": (
        lambda: KERAS_HUB.XceptionBackbone(
            [[32, 64], [64, 128], [128, 128]], [True, True, False], image_shape=(64, 64, 3)
        ),
        ["stem", "block1_conv2", "block2_sepconv1", "block3_sepconv1", "block3_sepconv2"],
    ),
    "mit": (
        lambda: KERAS_HUB.MiTBackbone(
            [1, 2], 2, [1, 2], [2, 1], 0.1, [7, 3], [4, 2], image_shape=(32, 32, 3), hidden_dims=[8, 16]
        ),
        [
            "stem",
            "hierarchical_encoder_0_0",
            "patch_and_embed_1",
            "hierarchical_encoder_1_0",
            "hierarchical_encoder_1_1",
        ],
    ),
    "swin_transformer": (
        lambda: KERAS_HUB.SwinTransformerBackbone((32, 32, 3), 8, (1, 1, 1), (2, 2, 2), 2, patch_size=4),
        ["stem", "stage_0", "stage_1", "stage_2"],  # the units of a stage are one layer there
    ),
}


@pytest.mark.filterwarnings("ignore:Layer 'attn'")
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_families_without_a_pattern(family):
    make, names = FAMILIES[family]
    encoder = make()
    blocks = find_blocks(encoder)
    assert [block.name for block in blocks] == names
    assert [layer for block in blocks for layer in block.layers] == encoder.layers
    check_blocks(family, encoder, blocks)


@pytest.mark.parametrize("block_type", ["basic_block", "bottleneck_block", "bottleneck_block_vd"])
@pytest.mark.parametrize("pre_activation", [False, True])
def test_the_graph_finds_the_units_that_the_names_tell(block_type, pre_activation):
    encoder = resnet_backbone(block_type, pre_activation)
    named = blocks_by_name(encoder, BLOCK_PATTERNS["ResNetBackbone"])
    assert [block.name for block in find_blocks(encoder, BLOCK_PATTERNS["ResNetBackbone"])] == [b.name for b in named]
    weights = [[weight.path for weight in block.weights] for block in blocks_by_graph(encoder)]
    if pre_activation:  # a norm before its unit is no unit: it joins the one below
        assert len(weights) == len(named)
    else:
        assert weights == [[weight.path for weight in block.weights] for block in named]


def test_a_pattern_that_does_not_fit_the_graph_is_not_used():
    inputs = x = keras.Input((8, 8, 3))
    for unit in (0, 1, 0, 1):  # names that come back: unit0, unit1, unit0, unit1
        x = layers.Conv2D(4, 3, padding="same", name=f"unit{unit}_conv{len(keras.Model(inputs, x).layers)}")(x)
    encoder = keras.Model(inputs, x)
    assert [block.name for block in find_blocks(encoder, r" (unit\d)_")] == [
        "stem",
        "unit1_conv2",
        "unit0_conv3",
        "unit1_conv4",
    ]
    inside = keras.Input((8, 8, 3))  # a boundary inside a residual unit, where two tensors pass
    x = layers.Conv2D(4, 1, name="stem_conv")(inside)
    y = layers.Conv2D(4, 1, name="a_conv1")(x)
    y = layers.Conv2D(4, 1, name="b_conv2")(y)
    x = layers.Add(name="b_add")([x, y])
    x = layers.Conv2D(4, 1, name="c_conv")(x)
    encoder = keras.Model(inside, x)
    assert [block.name for block in find_blocks(encoder, r" ([abc])_")] == ["stem", "a_conv1", "c_conv"]


def test_layers_without_a_kernel_join_the_block_below():
    inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Conv2D(4, 3, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(4, 3, name="stem")(x)  # a layer may be called like the first block
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(4, 1, name="third")(x)
    x = layers.LayerNormalization(name="top_norm")(x)
    blocks = blocks_by_graph(keras.Model(inputs, x))
    assert [block.name for block in blocks] == ["stem", "stem_unit", "third"]
    assert [[layer.name for layer in block.layers] for block in blocks][1:] == [["stem", "pool"], ["third", "top_norm"]]
    assert [layer.name for layer in blocks[0].layers][-3:] == ["first", "norm", "relu"]


def test_a_layer_that_is_used_twice_keeps_its_uses_in_one_block():
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    relu = layers.ReLU(name="relu")  # without weights: may be used anywhere
    inputs = keras.Input((8, 8, 3))
    x = relu(layers.Conv2D(4, 3, padding="same", name="first")(inputs))
    x = relu(shared(x))
    x = relu(layers.Conv2D(4, 3, padding="same", name="between")(x))
    x = relu(shared(x))
    x = relu(layers.Conv2D(4, 3, padding="same", name="last")(x))
    encoder = keras.Model(inputs, x)
    blocks = blocks_by_graph(encoder)
    assert [block.name for block in blocks] == ["stem", "shared", "last"]
    assert {layer.name for layer in blocks[1].layers} == {"shared", "between"}
    check_blocks("shared", encoder, blocks)


def test_operations_that_are_no_layers_count_as_uses():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="first")(inputs)
    y = layers.Conv2D(4, 1, name="second")(x)
    y = layers.Conv2D(4, 1, name="third")(y)
    x = keras.ops.add(x, y)
    x = layers.Conv2D(4, 1, name="fourth")(keras.ops.relu(x))
    segments = [[layer.name for layer in segment] for segment in graph_segments(keras.Model(inputs, x))]
    assert segments[1:] == [["first"], ["second", "third"], ["fourth"]]


def test_hidden_units_are_refused_with_the_layer_that_hides_them():
    deit = KERAS_HUB.DeiTBackbone((32, 32, 3), 16, 2, 2, 16, 32)
    with pytest.raises(GraftError, match=r"hidden inside one layer \(DeiTEncoder deit_encoder, 34 of 39 weights\)"):
        find_blocks(deit)
    nested = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Conv2D(4, 3)], name="nested")
    inputs = keras.Input((8, 8, 3))
    with pytest.raises(GraftError, match="only into 1.*Sequential nested.*Use a backbone whose units are layers"):
        blocks_by_graph(keras.Model(inputs, nested(inputs)))
