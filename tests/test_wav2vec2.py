"""Wav2Vec2 and HuBERT: PyTorch's states and gradients from transformers' folders, and no clip that knows of padding."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import GraftError, freezing
from models.backbone import load_backbone
from models.checkpoints import read_safetensors
from models.classifier import Classifier, run_encoder
from models.names import check_backbone_name
from models.precision import set_precision
from models.random_weights import random_copy
from models.split import split
from models.wav2vec2 import load_wav2vec2_folder, wav2vec2_backbone
from models.wav2vec2_layers import SpecAugment
from models.wav2vec2_settings import DEFAULTS, encoder_settings, frame_count, receptive_field
from models.wav2vec2_weights import KERNEL, NORMALISED, folded, named_layers, write_wav2vec2_folder
from pipelines.cache import graph_without_names

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "wav2vec2"
FOLDERS = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir() and (folder / "config.json").is_file())
XLS_R = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XLS_R |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURES / "expected.npz")


@pytest.fixture(scope="module")
def loaded():
    """The backbone of each fixture with all frames as output, loaded once, with everything trainable."""
    backbones = {}

    def load(name):
        if name not in backbones:
            backbones[name] = load_backbone(str(FIXTURES / name), "frames")
        freezing.unfreeze_top(Classifier(backbones[name], 2), len(backbones[name].blocks))
        return backbones[name]

    return load


def copy_of(name, folder, file="config.json", **changes):
    """A copy of a fixture with other settings."""
    shutil.copytree(FIXTURES / name, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    return folder


def inputs_of(expected, name):
    return [expected[f"{name}/waveform"], expected[f"{name}/mask"]]


def as_transformers(name, folder, masked: bool):
    """The fixture's encoder with padding as transformers has it, with or without a mask handed to the model."""
    folder = copy_of(name, folder, "preprocessor_config.json", return_attention_mask=masked)
    return load_wav2vec2_folder(folder, "frames", padding="transformers").encoder


def every_layer(encoder):
    """A model of the states that transformers lists: what enters the first unit, what leaves each, and the output."""
    units = [layer for layer in encoder.layers if layer.name.removeprefix("layer").isdecimal()]
    return keras.Model(encoder.inputs, [encoder.get_layer("embeddings_dropout").output, *(u.output for u in units)])


def assert_layers_equal(encoder, inputs, expected, key):
    for number, states in enumerate(every_layer(encoder)(inputs)):
        np.testing.assert_allclose(states, expected[f"{key}/states/{number}"], atol=1e-4)
    np.testing.assert_allclose(encoder(inputs), expected[f"{key}/last"], atol=1e-4)


# ---------------------------------------------------------------- equal to PyTorch's


@pytest.mark.parametrize("name", FOLDERS)
def test_every_layer_equals_pytorchs(name, expected, loaded, tmp_path):
    waveform, mask = inputs_of(expected, name)
    alone = [waveform[:1], mask[:1]]
    assert_layers_equal(loaded(name).encoder, alone, expected, f"{name}/plain")
    encoder = as_transformers(name, tmp_path / "masked", True)
    assert_layers_equal(encoder, [waveform, mask], expected, f"{name}/masked")
    encoder = as_transformers(name, tmp_path / "unmasked", False)
    assert_layers_equal(encoder, [waveform, mask], expected, f"{name}/unmasked")


@pytest.mark.parametrize("name", FOLDERS)
def test_each_clip_of_a_batch_equals_pytorchs_of_that_clip_alone(name, expected, loaded):
    waveform, mask = inputs_of(expected, name)
    backbone = loaded(name)
    states = np.asarray(backbone.encoder([waveform, mask]))
    for row, length in enumerate(mask.sum(1)):
        own = expected[f"{name}/alone/{row}/last"]
        assert own.shape[1] == frame_count(int(length), backbone.encoder.kernels, backbone.encoder.strides)
        np.testing.assert_allclose(states[row, : own.shape[1]], own[0], atol=1e-4)
    # The same in a wider batch, whatever stands in the padding.
    wider = np.pad(waveform, ((0, 0), (0, 99)), constant_values=7.0)
    again = np.asarray(backbone.encoder([wider, np.pad(mask, ((0, 0), (0, 99)))]))
    real = np.asarray(backbone.encoder.get_layer("frame_mask")(mask), bool)
    np.testing.assert_allclose(again[:, : states.shape[1]][real], states[real], atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_gradients_equal_pytorchs(name, expected, tmp_path):
    encoder = as_transformers(name, tmp_path / "masked", True)
    inputs = inputs_of(expected, name)
    real = tf.cast(encoder.get_layer("frame_mask")(inputs[1]), tf.float32)[..., None]
    with tf.GradientTape() as tape:
        states = encoder(inputs)
        loss = tf.reduce_sum(states**2 * real) / (tf.reduce_sum(real) * states.shape[-1])
    variables = [weight.value for weight in encoder.trainable_weights]
    gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
    np.testing.assert_allclose(loss, expected[f"{name}/loss"], rtol=1e-5)
    by_weight = dict(zip(map(id, encoder.trainable_weights), map(np.asarray, gradients)))
    seen = 0
    for layer, start, kind in named_layers(encoder):
        if kind == "vector":  # plays no part in evaluation
            continue
        weights = {"weight": layer.gamma, "bias": layer.beta} if kind == "norm" else {"weight": layer.kernel}
        if kind != "norm" and layer.bias is not None:
            weights["bias"] = layer.bias
        for part, weight in weights.items():
            gradient = by_weight[id(weight)]
            seen += 1
            if kind == "positions" and part == "weight":
                length, direction = (expected[f"{name}/gradient/{KERNEL}.{key}"] for key in NORMALISED[1])
                check_folded(name, gradient.transpose(2, 1, 0), length, direction)
                continue
            theirs = expected[f"{name}/gradient/{start}.{part}"]
            if kind == "dense" and part == "weight":
                theirs = theirs.T
            elif part == "weight" and gradient.ndim == 3 and kind == "convolution":
                theirs = theirs.transpose(2, 1, 0)
            np.testing.assert_allclose(gradient, theirs.reshape(gradient.shape), atol=1e-3)
    assert seen >= len(variables) - 1


def check_folded(name, gradient, length_gradient, direction_gradient):
    """Gradients by length and direction, from that by the folded kernel: Salimans and Kingma 2016, equation 3."""
    state = {}
    for file in (FIXTURES / name).glob("*.safetensors"):
        state |= {key.split(f"{KERNEL}.")[-1]: array for key, array in read_safetensors(file).items()}
    names = next((names for names in NORMALISED if names[0] in state), None)
    if names is None:  # in the .bin: the other folders show it
        return
    length, direction = (state[key] for key in names)
    size = np.sqrt(np.sum(direction**2, (0, 1), keepdims=True))
    by_length = np.sum(gradient * direction, (0, 1), keepdims=True) / size
    np.testing.assert_allclose(by_length, length_gradient, atol=1e-3)
    by_direction = length / size * gradient - length * by_length / size**2 * direction
    np.testing.assert_allclose(by_direction, direction_gradient, atol=1e-3)


def test_weight_normalisation_is_folded():
    generator = np.random.default_rng(0)
    length, direction = generator.normal(size=(1, 1, 5)), generator.normal(size=(4, 2, 5))
    kernel = folded(length, direction)
    np.testing.assert_allclose(np.sqrt((kernel**2).sum((0, 1))), np.abs(length[0, 0]), rtol=1e-5)


# ---------------------------------------------------------------- as a backbone


@pytest.mark.parametrize("name", FOLDERS)
def test_split_is_exact_at_every_block_with_gradients(name, expected, loaded):
    backbone, inputs = loaded(name), inputs_of(expected, name)
    for cut in range(1, len(backbone.blocks)):
        prefix, suffix = split(backbone, cut)
        crossing = prefix(inputs)
        assert len(crossing) == 2 and all(tensor.shape[0] == 3 for tensor in crossing)  # states and the frames' mask
        variables = [weight.value for block in backbone.blocks[cut:] for weight in block.weights]
        results = []
        for run in (lambda: backbone.encoder(inputs), lambda: suffix(crossing)):  # noqa: B023
            with tf.GradientTape() as tape:
                states = run()
                loss = tf.reduce_sum(states**2)
            results.append((states, tape.gradient(loss, variables, unconnected_gradients="zero")))
        (whole, whole_gradients), (part, part_gradients) = results
        assert np.abs(whole - part).max() == 0
        for first, second in zip(whole_gradients, part_gradients, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("name", ["wav2vec2_base", "hubert_large"])
def test_blocks_pooling_and_frozen_front(name, expected):
    backbone = load_backbone(str(FIXTURES / name))
    units = json.loads((FIXTURES / name / "config.json").read_text())["num_hidden_layers"]
    names = ["convolutions", "embeddings", *(f"layer{number}" for number in range(units))]
    assert [block.name for block in backbone.blocks] == names
    assert [tensor.name for tensor in backbone.encoder.inputs] == ["waveform", "attention_mask"]
    waveform, mask = inputs_of(expected, name)
    pooled = np.asarray(backbone.encoder([waveform, mask]))
    assert pooled.shape == (3, backbone.feature_size)
    for row in range(3):
        np.testing.assert_allclose(pooled[row], expected[f"{name}/alone/{row}/last"][0].mean(0), atol=1e-4)
    model = Classifier(backbone, 2)
    freezing.unfreeze_all(model)
    trains = [row["trainable_parameters"] > 0 for row in freezing.trainable_table(model)]
    assert trains == [False] + [True] * (units + 2)
    freezing.unfreeze_top(model, len(backbone.blocks))
    assert all(row["trainable_parameters"] for row in freezing.trainable_table(model))


def test_preprocessing_and_licence_are_the_folders_own(tmp_path):
    assert load_backbone(str(FIXTURES / "wav2vec2_base")).preprocess.normalise
    assert not load_backbone(str(FIXTURES / "hubert_base")).preprocess.normalise
    folder = copy_of("hubert_base", tmp_path / "speech", "preprocessor_config.json", sampling_rate=8_000)
    backbone = load_backbone(str(folder))
    assert backbone.preprocess.sample_rate_hz == 8_000
    assert backbone.source["architecture"] == "transformers hubert"
    (folder / "preprocessor_config.json").unlink()
    assert load_backbone(str(folder)).preprocess == load_backbone(str(FIXTURES / "wav2vec2_base")).preprocess


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis 3")  # of a single frame
@pytest.mark.parametrize("name", FOLDERS)
def test_short_silent_and_empty_clips_are_finite(name, loaded):
    encoder = loaded(name).encoder
    shortest = receptive_field(encoder.kernels, encoder.strides)
    for samples in (1, shortest - 1, shortest, shortest + 1):
        mask = np.ones((2, samples), np.int32)
        mask[1] = 0
        states = np.asarray(encoder([np.zeros((2, samples), np.float32), mask]))
        assert states.shape[1] == frame_count(max(samples, shortest), encoder.kernels, encoder.strides)
        assert np.isfinite(states).all()
        real = np.asarray(encoder.get_layer("frame_mask")(mask))
        assert real[0].sum() == states.shape[1] and real[1].sum() == 0


@pytest.mark.parametrize("name", ["wav2vec2_base", "mms", "hubert_base"])
def test_save_and_load_of_keras_and_transformers_files(name, expected, loaded, tmp_path):
    backbone, inputs = loaded(name), inputs_of(expected, name)
    states = np.asarray(backbone.encoder(inputs))
    backbone.encoder.save(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "encoder.keras")(inputs), states)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    preprocess = json.loads((FIXTURES / name / "preprocessor_config.json").read_text())
    write_wav2vec2_folder(backbone.encoder, tmp_path / "folder", config, preprocess)
    again = load_backbone(str(tmp_path / "folder"), "frames")
    np.testing.assert_allclose(again.encoder(inputs), states, atol=1e-5)
    assert again.preprocess == backbone.preprocess


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wav2vec2_base", "mms"])
def test_xla(name, expected):
    inputs = inputs_of(expected, name)
    model = Classifier(load_backbone(str(FIXTURES / name)), 2)
    full = np.asarray(model.features(inputs))
    compiled = tf.function(lambda *inputs: model.features(list(inputs)), jit_compile=True, autograph=False)
    np.testing.assert_allclose(compiled(*map(tf.constant, inputs)), full, atol=1e-4)
    freezing.unfreeze_all(model)

    @tf.function(jit_compile=True, autograph=False)
    def train(waveform, mask):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model.features([waveform, mask], training=True) ** 2)
        return tape.gradient(loss, [weight.value for weight in model.encoder.trainable_weights])

    assert all(np.isfinite(gradient).all() for gradient in train(*map(tf.constant, inputs)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_near_and_finite(precision, expected):
    model = Classifier(load_backbone(str(FIXTURES / "hubert_base")), 2)
    inputs = inputs_of(expected, "hubert_base")
    full = np.asarray(model.features(inputs))
    set_precision(model, precision)
    half = np.asarray(model.features(inputs))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.15)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(inputs, training=True) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# ---------------------------------------------------------------- training


def test_frozen_layers_are_neutral_and_thawed_ones_drop_and_mask(expected, loaded):
    model = Classifier(loaded("wav2vec2_base"), 2, dropout=0.0)
    inputs = inputs_of(expected, "wav2vec2_base")
    plain = np.asarray(run_encoder(model.encoder, inputs, False))
    freezing.freeze(model)
    assert np.abs(run_encoder(model.encoder, inputs, True) - plain).max() == 0
    freezing.unfreeze_top(model, 1)
    once, again = (np.asarray(run_encoder(model.encoder, inputs, True)) for _ in range(2))
    assert np.abs(once - again).max() > 1e-3


def test_spec_augment_masks_whole_spans_of_real_frames():
    layer = SpecAugment(0.5, 4, 2, 0.25, 3, 0, name="spec_augment")
    states, mask = np.ones((64, 40, 24), np.float32), np.ones((64, 40), np.int32)
    mask[:32, 20:] = 0
    assert np.abs(layer(states, mask, training=False) - states).max() == 0
    layer.masked_spec_embed.assign(np.full(24, 5.0))
    masked = np.asarray(layer(states, mask, training=True))
    assert set(np.unique(masked)) == {0.0, 1.0, 5.0}
    channels = (masked == 0).all(axis=1)  # channels are 0 in all frames
    assert np.array_equal(channels, (masked == 0).any(axis=1))
    spans = (masked == 5).any(axis=2)
    assert not spans[:32, 20:].any()
    assert 0.2 < spans[32:].mean() < 0.5 and 0.1 < channels.mean() < 0.25  # spans overlap
    for row in spans:
        runs = np.diff(np.flatnonzero(np.diff(np.pad(row.astype(int), 1))))[::2]
        assert (runs >= 4).all()
    again = np.asarray(layer(states, mask, training=True))
    assert not np.array_equal(masked, again)
    # Less than one span: nothing to mask, no error.
    assert np.abs(layer(states[:, :3], mask[:, :3], training=True)[..., 0] - 1).max() in (0, 1)


def test_random_weights_keep_the_architecture_alone(expected):
    backbone = load_backbone(str(FIXTURES / "wav2vec2_base"))
    inputs = inputs_of(expected, "wav2vec2_base")
    before = np.asarray(backbone.encoder(inputs))
    after = np.asarray(random_copy(backbone).encoder(inputs))
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0.1


# ---------------------------------------------------------------- names, sizes and errors


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("base", {}, 94_371_712),  # wav2vec2-base and hubert-base-ls960
        pytest.param("xls_r_300m", XLS_R, 315_438_720, marks=pytest.mark.slow),
    ],
)
def test_released_sizes(name, changes, parameters):
    """The parameters that transformers' models of these settings have, less the lengths of the folded kernel."""
    settings = encoder_settings(pathlib.Path(name), DEFAULTS | changes)
    backbone = wav2vec2_backbone(settings, name, "frames")
    count = sum(int(np.prod(weight.shape)) for weight in backbone.encoder.weights if weight.dtype == "float32")
    assert count + settings["num_conv_pos_embeddings"] == parameters
    assert frame_count(16_000, settings["conv_kernel"], settings["conv_stride"]) == 49


def test_names_and_errors(tmp_path):
    for name in FOLDERS:
        check_backbone_name(str(FIXTURES / name), "audio")
    with pytest.raises(GraftError, match="holds a transformers model of the type 'hubert', which is not a text model"):
        check_backbone_name(str(FIXTURES / "hubert_base"), "text")
    for number, (changes, message) in enumerate(
        [
            ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True, with which a hubert computes"),
            ({"hidden_act": "swish"}, "hidden_act is 'swish'"),
            ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 16"),
            ({"conv_stride": [5]}, "conv_dim, conv_stride and conv_kernel are .* lists of equal length"),
            ({"hidden_size": "wide"}, "hidden_size is 'wide'; expected a whole number"),
        ]
    ):
        folder = copy_of("hubert_base", tmp_path / str(number), **changes)
        with pytest.raises(GraftError, match=message):
            check_backbone_name(str(folder), "audio")
    folder = copy_of("hubert_base", tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(GraftError, match=r"the weights lack encoder\.layers\.2"):
        load_backbone(str(folder))
    folder = copy_of("hubert_base", tmp_path / "flat", num_hidden_layers=1)
    with pytest.raises(GraftError, match=r"no place for: encoder\.layers\.1"):
        load_backbone(str(folder))
    with pytest.raises(GraftError, match="Pooling 'cls' does not fit hubert_base, an audio model"):
        load_backbone(str(FIXTURES / "hubert_base"), "cls")
    folder = copy_of("hubert_base", tmp_path / "mel", "preprocessor_config.json", feature_size=80)
    with pytest.raises(GraftError, match="feature_size is 80"):
        load_backbone(str(folder))


def test_the_graph_tells_one_padding_or_pooling_from_another():
    folder = FIXTURES / "wav2vec2_base"
    graphs = [graph_without_names(load_wav2vec2_folder(folder).encoder) for _ in range(2)]
    assert graphs[0] == graphs[1]
    graphs.append(graph_without_names(load_wav2vec2_folder(folder, "frames").encoder))
    graphs.append(graph_without_names(load_wav2vec2_folder(folder, padding="transformers").encoder))
    assert len(set(graphs)) == 3
