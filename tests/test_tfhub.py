"""TF-Hub modules as backbones: blocks by name, both phases, one `training` flag, replicas, files, exports."""

import functools
import http.server
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
import types

import keras
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from models import GraftError, freezing
from models.classifier import Classifier
from models.inputs import decode_images, scale_image
from models.tfhub import HubLayer, load_hub_module
from models.tfhub_blocks import cut_into_blocks, group_by_scope, in_order_of_numbers, unit_of
from pipelines import training
from pipelines.config import ImageConfig
from pipelines.data import image_loader, load_images
from pipelines.sources import find_images
from serving.export import export_image_classifier
from serving.verify import verify


class ImageModule(tf.train.Checkpoint):
    """Images [n, 16, 16, 3] -> [n, 8]: a stem and two units with BatchNorm, one `training` flag, one loss."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(0)
        self.variables, self.trainable_variables = [], []
        channels = 3
        for name in ("stem", "net/block1", "net/block2"):
            self.add(f"{name}/conv/kernel", random.normal(0, 0.3, (3, 3, channels, 8)))
            self.add(f"{name}/conv/bias", np.zeros(8))
            channels = 8
            if name != "stem":
                for last, value in (("gamma", 1.0), ("beta", 0.0)):
                    self.add(f"{name}/norm/{last}", np.full(8, value))
                for last, value in (("moving_mean", 0.1), ("moving_variance", 0.9)):
                    self.add(f"{name}/norm/{last}", np.full(8, value), trainable=False)
        kernel = self.trainable_variables[2]
        self.regularization_losses = [tf.function(lambda: 0.01 * tf.nn.l2_loss(kernel), input_signature=[])]

    def add(self, name, value, trainable=True):
        # Statistics are declared as Keras declares them: each replica writes its own, reading takes the mean.
        options = {"synchronization": tf.VariableSynchronization.ON_READ} if not trainable else {}
        options["aggregation"] = tf.VariableAggregation.MEAN
        variable = tf.Variable(value, name=name, dtype=tf.float32, trainable=trainable, **options)
        self.variables.append(variable)
        if trainable:
            self.trainable_variables.append(variable)

    @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3]), tf.TensorSpec([], tf.bool)])
    def __call__(self, images, training=False):
        kernel, bias, *rest = self.variables
        x = tf.nn.conv2d(images, kernel, 2, "SAME") + bias
        for index in (0, 6):
            kernel, bias, gamma, beta, mean, variance = rest[index : index + 6]
            y = tf.nn.conv2d(x, kernel, 1, "SAME") + bias
            if training:
                batch_mean, batch_variance = tf.nn.moments(y, [0, 1, 2])
                mean.assign(0.9 * mean + 0.1 * batch_mean)
                variance.assign(0.9 * variance + 0.1 * batch_variance)
            else:
                batch_mean, batch_variance = tf.identity(mean), tf.identity(variance)
            x = tf.tanh(x + tf.nn.batch_normalization(y, batch_mean, batch_variance, beta, gamma, 1e-3))
        return tf.reduce_mean(x, [1, 2])


class TextModule(tf.train.Checkpoint):
    """Text [n] -> {"default": [n, 8], "tokens": [n, None, 8]}: a table of words, an embedding, two units, dropout."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(0)
        words = tf.lookup.KeyValueTensorInitializer(["red", "green", "blue", "the"], tf.range(1, 5, dtype=tf.int64))
        self.table = tf.lookup.StaticHashTable(words, 0)
        self.embedding = tf.Variable(random.normal(0, 1, (5, 8)), dtype=tf.float32, name="words/embeddings")
        self.units = [
            tf.Variable(random.normal(0, 0.5, (8, 8)), dtype=tf.float32, name=f"encoder/layer_{index}/kernel")
            for index in range(2)
        ]
        self.variables = self.trainable_variables = [*self.units[::-1], self.embedding]  # as listed by alphabet
        self.regularization_losses = []

    def features(self, text, training):
        tokens = tf.nn.embedding_lookup(self.embedding, self.table.lookup(tf.strings.split(text)).to_tensor())
        for kernel in self.units:
            tokens = tf.tanh(tokens @ kernel)
            tokens = tf.nn.dropout(tokens, 0.1) if training else tokens
        return {"default": tf.reduce_mean(tokens, 1), "tokens": tokens}

    @tf.function
    def __call__(self, text, training=False):
        return self.features(text, training)


@pytest.fixture(scope="module")
def image_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules") / "tiny_image"
    module = ImageModule()
    tf.saved_model.save(module, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def text_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules") / "tiny_text"
    module = TextModule()
    for flag in (False, True):
        module.__call__.get_concrete_function(tf.TensorSpec([None], tf.string), training=flag)
    tf.saved_model.save(module, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def tf_keras_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules") / "tiny_tf_keras"
    script = pathlib.Path(__file__).parent / "fixtures" / "make_tf_keras_module.py"
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    assert "TF_USE_LEGACY_KERAS" not in os.environ
    return str(folder)


@pytest.fixture(scope="module")
def pictures(png_folder):
    return load_images(find_images(str(png_folder)))


@pytest.fixture(scope="module")
def sentences():
    def table(count):
        labels = np.arange(count) % 3
        text = [
            f"the {('red', 'green', 'blue')[label]} {'the ' * (row % 2)}".strip() for row, label in enumerate(labels)
        ]
        columns = {"id": text, "path": text, "label": labels.astype(np.int32), "weight": np.ones(count, np.float32)}
        return pa.table(columns)

    names = ["red", "green", "blue"]
    tables = {"train": table(24), "val": table(9), "test": table(9)}
    return types.SimpleNamespace(**tables, class_names=names, white_level=255, fingerprint="texts")


def train(handle, splits, strategy=None, **options):
    """Both phases; (model, {variable name: value} before, phases)."""
    strategy = strategy or tf.distribute.get_strategy()
    config = ImageConfig()
    config.cache.cache = "none"
    config.model.depth, config.training.batch_size = options.pop("depth", "1"), 8
    config.model.train_batch_norm = options.pop("train_batch_norm", False)
    config.training.optimizer = options.pop("optimizer", "sgd")
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = options.pop("epochs", (1, 1))
    config.head.head_learning_rate = config.fine_tune.fine_tune_learning_rate = 0.1
    config.fine_tune.augmentation, config.training.schedule = "none", "constant"
    with strategy.scope():
        backbone = load_hub_module(handle)
        model = Classifier(backbone, 3, dropout=0.0, seed=1)
    before = {name: variable.numpy() for name, variable in hub_layer(model).named_variables()}

    def loader(augmentation):
        if backbone.preprocess is None:
            return lambda text, seed: text
        return image_loader(backbone.preprocess, splits.white_level, augmentation)

    return model, before, training.fit_two_phase(model, splits, loader, config, strategy)[0]


def hub_layer(model) -> HubLayer:
    return next(layer for layer in model.encoder.layers if isinstance(layer, HubLayer))


def moved(model, before) -> set[str]:
    return {name for name, variable in hub_layer(model).named_variables() if (variable.numpy() != before[name]).any()}


def losses(phases):
    return [(row["loss"], row["val_loss"]) for phase in phases for row in phase["history"]]


MODULES = {  # name: blocks, bottom to top, as they are written; weights that train per depth; module's own name of each
    "image_module": (["stem", "net/block1", "net/block2"], ["stem/conv", "net/block1/conv", "net/block2/conv"]),
    "text_module": (["stem", "encoder/layer_0", "encoder/layer_1"], ["words", "encoder/layer_0", "encoder/layer_1"]),
    "tf_keras_module": (["stem", "block1", "block2"], ["stem_conv", "block1_conv", "block2_conv"]),
}


@pytest.mark.parametrize(
    "name, depth",
    [
        ("image_module", "1"),
        ("text_module", "full"),
        *(
            pytest.param(name, depth, marks=pytest.mark.slow)
            for name in MODULES
            for depth in ("head", "1", "full")
            if (name, depth) not in {("image_module", "1"), ("text_module", "full")}
        ),
    ],
)
def test_both_phases_move_exactly_the_named_variables(request, name, depth):
    splits = request.getfixturevalue("sentences" if name == "text_module" else "pictures")
    blocks, scopes = MODULES[name]
    model, before, phases = train(request.getfixturevalue(name), splits, depth=depth)
    assert [block.name for block in model.blocks] == blocks
    assert phases[0]["weights"] == {"frozen": len(before), "trainable": 2, "still": 0}
    thawed = {"head": [], "1": scopes[-1:], "full": scopes}[depth]
    expected = {variable for variable in before if variable.rsplit("/", 1)[0] in thawed}  # no BatchNorm among them
    if depth != "head":
        assert phases[1]["kept"] and phases[1]["weights"]["still"] == 0
        assert phases[1]["weights"]["trainable"] == len(expected) + 2
    assert moved(model, before) == expected


def test_backbone_of_an_image_module(image_module):
    backbone = load_hub_module(f"tfhub:{image_module}")
    assert (backbone.name, backbone.pooling, backbone.feature_size) == ("tiny_image", "none", 8)
    assert backbone.preprocess.image_size == (16, 16)
    images = tf.constant(np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)), tf.float32)
    scaled = scale_image(images, backbone.preprocess)
    np.testing.assert_allclose(scaled, images / 255, atol=1e-6)  # what TF-Hub promises image modules
    expected = tf.saved_model.load(image_module)(scaled, training=False)
    np.testing.assert_array_equal(backbone.pooled(backbone.encoder(scaled)), expected)
    assert backbone.source["handle"] == image_module and len(backbone.source["sha256"]) == 64
    assert "notice" not in backbone.source


def test_names_tell_which_layers_thaw(image_module):
    model = Classifier(load_hub_module(image_module), 3)
    freezing.unfreeze_matching(model, [r"block1\.conv"])
    assert [w.path for w in model.trainable_weights][:2] == ["net.block1.conv/kernel", "net.block1.conv/bias"]
    assert len(model.trainable_weights) == 4
    with pytest.raises(GraftError, match="matches no layer of tiny_image.*net.block2.norm"):
        freezing.unfreeze_matching(model, ["block7"])
    freezing.unfreeze_top(model, 1)
    assert [row["batch_norm"] for row in freezing.trainable_table(model)] == ["none", "frozen", "frozen", "none"]


def test_the_one_training_flag_waits_for_every_batch_norm(image_module):
    """It would move the statistics of frozen ones, too; the loss of the module is added where it trains."""
    model = Classifier(load_hub_module(image_module), 3)
    images = tf.constant(np.random.default_rng(0).uniform(0, 1, (4, 16, 16, 3)), tf.float32)

    def statistics_move(training=True):
        before = {name: variable.numpy() for name, variable in hub_layer(model).named_variables()}
        model(images, training=training)
        return moved(model, before)

    freezing.freeze(model)
    assert not statistics_move() and not model.losses
    freezing.unfreeze_all(model)
    assert not statistics_move()
    kernel = dict(hub_layer(model).named_variables())["net/block1/conv/kernel"].numpy()
    np.testing.assert_allclose(model.losses, [0.005 * (kernel**2).sum()], rtol=1e-5)
    freezing.unfreeze_top(model, 1, train_batch_norm=True)  # gamma and beta of block 2 train; block 1 must not move
    assert not statistics_move()
    freezing.unfreeze_all(model, train_batch_norm=True)
    assert not statistics_move(training=False) and not model.losses
    assert statistics_move() == {f"net/block{n}/norm/moving_{what}" for n in (1, 2) for what in ("mean", "variance")}


def test_dropout_of_a_module_without_batch_norm_works_when_something_trains(text_module):
    model = Classifier(load_hub_module(text_module), 3, dropout=0.0)
    text = tf.constant(["the red", "blue"] * 8)
    still = model(text, training=False).numpy()
    freezing.freeze(model)
    np.testing.assert_array_equal(model(text, training=True), still)
    freezing.unfreeze_top(model, 1)
    assert np.abs(model(text, training=True) - still).max() > 1e-3


@pytest.mark.parametrize(
    "optimizer, depth", [("sgd", "full"), *(pytest.param("adamw", d, marks=pytest.mark.slow) for d in ("1", "full"))]
)
def test_two_replicas_give_the_losses_of_one(image_module, pictures, mirrored, optimizer, depth):
    one_model, _, one = train(image_module, pictures, optimizer=optimizer, depth=depth, epochs=(1, 2))
    two_model, _, two = train(image_module, pictures, mirrored, optimizer=optimizer, depth=depth, epochs=(1, 2))
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5, rtol=0)
    for (name, a), (_, b) in zip(hub_layer(one_model).named_variables(), hub_layer(two_model).named_variables()):
        np.testing.assert_allclose(b.numpy(), a.numpy(), atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_text_module_under_two_replicas(text_module, sentences, mirrored):
    """The embedding's sparse gradients too; no equality: the module's own dropout is not seeded by us."""
    model, before, phases = train(text_module, sentences, mirrored, depth="full", epochs=(1, 3))
    assert moved(model, before) == set(before) and phases[1]["val_loss"] < phases[0]["val_loss"]


@pytest.mark.slow
def test_thawed_batch_norm_under_two_replicas(image_module, pictures, mirrored):
    _, before, phases = train(image_module, pictures, mirrored, depth="full", train_batch_norm=True)
    assert phases[1]["weights"] == {"frozen": 0, "trainable": len(before) + 2, "still": 0}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["image_module", pytest.param("text_module", marks=pytest.mark.slow)])
def test_keras_file_reloads_equal_with_what_trains_and_the_optimizer(request, tmp_path, kind):
    """Flags that freezing set by layer come back as patterns, or the optimizer's state would not fit."""
    backbone = load_hub_module(request.getfixturevalue(kind))
    model = Classifier(backbone, 3)
    freezing.unfreeze_top(model, 1)
    random = np.random.default_rng(0)
    inputs = tf.constant(random.uniform(0, 1, (8, 16, 16, 3)), tf.float32) if kind == "image_module" else None
    inputs = tf.constant(["the red", "blue"] * 4) if inputs is None else inputs
    saved = keras.Model(backbone.encoder.input, model.head(backbone.encoder.output))
    saved.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    saved.fit(inputs, np.arange(8) % 3, batch_size=4, epochs=2, verbose=0)
    saved.save(tmp_path / "model.keras")
    with pytest.raises(GraftError, match="give safe_mode=False"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    np.testing.assert_array_equal(loaded(inputs), saved(inputs))
    assert [w.path for w in loaded.trainable_weights] == [w.path for w in saved.trainable_weights]
    assert len(loaded.optimizer.variables) == len(saved.optimizer.variables) > 4
    for a, b in zip(loaded.optimizer.variables, saved.optimizer.variables):
        np.testing.assert_array_equal(a, b)


def test_weights_of_a_classifier_reload_under_other_flags(image_module, tmp_path):
    model = Classifier(load_hub_module(image_module), 3)
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(weight + 0.5)
    model.save_weights(tmp_path / "best.weights.h5")
    other = Classifier(load_hub_module(image_module), 3)
    freezing.freeze(other)
    other.load_weights(tmp_path / "best.weights.h5")
    for a, b in zip(other.weights, model.weights):
        np.testing.assert_array_equal(a, b)


def test_image_export_answers_as_training_does_in_a_fresh_process(image_module, pictures, tmp_path):
    backbone = load_hub_module(image_module)
    model = Classifier(backbone, 3)
    model.head.kernel.assign(model.head.kernel * 3)
    export_image_classifier(model, backbone.preprocess, pictures.class_names, tmp_path / "1")
    samples = [pathlib.Path(path).read_bytes() for path in pictures.test["path"].to_pylist()]
    images, _ = decode_images(tf.constant(samples), backbone.preprocess)
    expected = tf.nn.softmax(model(scale_image(images, backbone.preprocess), training=False)).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    result = verify(tmp_path / "1", samples, expected)
    assert result["files"] == len(samples) and result["largest_difference"] <= 1e-6


def test_text_export_carries_its_table(text_module, tmp_path):
    model = Classifier(load_hub_module(text_module), 3)
    text = tf.constant(["the red", "unknown words", "blue"])
    archive = keras.export.ExportArchive()
    archive.track(model)  # Keras finds variables by itself, but no tables
    archive.add_endpoint(
        "serve", tf.function(lambda text: model(text, training=False), [tf.TensorSpec([None], tf.string)])
    )
    archive.write_out(str(tmp_path / "1"), verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "1"))
    np.testing.assert_array_equal(exported.serve(text), model(text, training=False))


# ---------------------------------------------------------------- the layer by itself


def test_layer_trains_all_none_or_what_the_patterns_name(image_module):
    def trained(**options):
        layer = HubLayer(image_module, **options)
        return {name for name, variable in layer.named_variables() if variable.trainable}, layer

    assert trained()[0] == set()
    names, _ = trained(trainable=True, train_batch_norm=True)
    assert len(names) == 10 and not any("moving" in name for name in names)
    names, layer = trained(trainable=True)
    assert names == {f"{s}/conv/{w}" for s in ("stem", "net/block1", "net/block2") for w in ("kernel", "bias")}
    names, layer = trained(trainable=True, trainable_patterns=["^net/.*kernel$"])
    assert names == {"net/block1/conv/kernel", "net/block2/conv/kernel"}
    model = keras.Sequential([layer, keras.layers.Dense(2)])
    model.trainable = False
    assert not layer.trainable_weights
    model.trainable = True  # the choice outlives a toggle of the model around it
    assert {name for name, variable in layer.named_variables() if variable.trainable} == names
    with pytest.raises(GraftError, match="'blok' matches no variable.*stem/conv/kernel, stem/conv/bias"):
        HubLayer(image_module, trainable=True, trainable_patterns=["blok"])


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "scope, unit",
    [
        ("resnet50/block2/unit_1/bottleneck_v2/conv1", "resnet50/block2/unit_1"),
        ("conv2_block1_1_bn", "conv2_block1"),
        ("block2a_expand_conv", "block2a"),
        ("MobilenetV2/expanded_conv_3/project/BatchNorm", "MobilenetV2/expanded_conv_3"),
        ("expanded_conv_depthwise", "expanded_conv"),
        ("transformer/layer_0/attention/query", "transformer/layer_0"),
        ("encoder/layer_._11/output", "encoder/layer_._11"),
        ("efficientnet-b0/blocks_10/conv2d", "efficientnet-b0/blocks_10"),
        ("InceptionV3/Mixed_5b/Branch_0", "InceptionV3/Mixed_5b"),
        ("stage1/block2_conv/unit_3", "stage1/block2"),
        ("resnet_v2_50/conv1", None),
        ("layer_normalization_1", None),
        ("pooler_transform", None),
    ],
)
def test_units_in_names(scope, unit):
    assert unit_of(scope) == unit


def test_names_listed_by_alphabet_come_in_the_order_of_their_numbers():
    listed = ["net/conv", "net/conv_1", "net/conv_10", "net/conv_2", "block2b", "block10a", "block2a"]
    assert in_order_of_numbers(listed) == [
        *("net/conv", "net/conv_1", "net/conv_2", "net/conv_10"),
        *("block2a", "block2b", "block10a"),
    ]


def variables(*entries):
    """`name:rank` -> what group_by_scope looks at."""
    split = [entry.split(":") for entry in entries]
    return [types.SimpleNamespace(name=f"{name}:0", shape=(2,) * int(rank)) for name, rank in split]


def test_scopes_of_names_that_repeat_or_say_nothing():
    names = ["kernel:4", "bias:1", "gamma:1", "beta:1", "moving_mean:1", "moving_variance:1", "kernel:4", "bias:1"]
    groups = group_by_scope(variables(*names))
    assert [group for group, _ in groups.values()] == [
        ["kernel_0", "bias_0"],
        ["gamma", "beta", "moving_mean", "moving_variance"],
        ["kernel_1", "bias_1"],
    ]
    groups = group_by_scope(variables("a/kernel:2", "a/norm/moving_mean/average:1", "a/norm/gamma:1", "a/bias:1"))
    assert {scope: group for scope, (group, _) in groups.items()} == {
        "a": ["a/kernel", "a/bias"],
        "a/norm": ["a/norm/moving_mean/average", "a/norm/gamma"],
    }


def test_scopes_without_a_unit_join_the_one_before_or_the_top():
    names = ["conv1", "net/block1", "pool", "net/block10", "net/block2", "top", "position_embedding"]
    weight = types.SimpleNamespace(shape=(2, 2))
    scopes = [types.SimpleNamespace(name=n, scope=n, variable_names=[f"{n}/w"], adopted=[weight]) for n in names]
    assert {block.name: [layer.scope for layer in block.layers] for block in cut_into_blocks(scopes)} == {
        "stem": ["conv1", "position_embedding"],
        "net/block1": ["net/block1", "pool"],
        "net/block2": ["net/block2"],
        "net/block10": ["net/block10", "top"],
    }


class PlainModule(tf.train.Checkpoint):
    """Images [n, height, width, 3] of any size -> [n, height, width, 5]; names that tell nothing, no `training`."""

    def __init__(self):
        super().__init__()
        shapes = {"scale": [3], "kernel": [3, 4], "bias": [4], "kernel ": [4, 5], "bias ": [5]}
        self.variables = [tf.Variable(tf.ones(shape), name=name.strip()) for name, shape in shapes.items()]
        self.trainable_variables = self.variables

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def __call__(self, images):
        scale, kernel, bias, kernel_1, bias_1 = self.variables
        return tf.matmul(tf.matmul(images * scale, kernel) + bias, kernel_1) + bias_1


def test_blocks_without_units_are_one_per_kernel(tmp_path):
    tf.saved_model.save(PlainModule(), str(tmp_path / "plain"))
    backbone = load_hub_module(str(tmp_path / "plain"))
    assert [len(block.weights) for block in backbone.blocks] == [3, 2]
    assert (backbone.pooling, backbone.feature_size) == ("average", 5)  # [n, height, width, 5]
    assert backbone.preprocess.image_size == (224, 224)  # the module takes any size
    model = Classifier(backbone, 3)
    freezing.unfreeze_top(model, 1)
    assert [tuple(weight.shape) for weight in model.trainable_weights][:2] == [(4, 5), (5,)]


def test_a_saved_tf_module_lists_no_variables_but_its_function_uses_them(tmp_path, mirrored):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.b_first = tf.Variable(tf.ones([3, 4]), name="first/kernel")
            self.a_second = tf.Variable(tf.ones([4, 5]), name="second/kernel")
            self.a_step = tf.Variable(0.0, trainable=False, name="second/step")

        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
        def __call__(self, images):
            return tf.matmul(tf.matmul(images, self.b_first), self.a_second) + self.a_step

    tf.saved_model.save(Module(), str(tmp_path / "module"))
    with mirrored.scope():
        backbone = load_hub_module(str(tmp_path / "module"))
        model = Classifier(backbone, 3)
    assert [[w.path for w in block.weights] for block in backbone.blocks] == [
        ["first/kernel"],
        ["second/kernel", "second/step"],
    ]
    freezing.unfreeze_top(model, 1)
    before = {name: variable.numpy() for name, variable in hub_layer(model).named_variables()}
    weights = [weight.value for weight in model.trainable_weights]
    assert len(weights) == 3

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([1, 8, 8, 3]), training=True)[:, 0])
        for weight, gradient in zip(weights, tape.gradient(loss, weights)):
            weight.assign_add(tf.distribute.get_replica_context().all_reduce("sum", gradient))

    mirrored.run(tf.function(step))
    assert moved(model, before) == {"second/kernel"}


# ---------------------------------------------------------------- handles


def test_a_url_is_downloaded_and_its_risk_is_stated(image_module, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "tiny.tar.gz", "w:gz") as archive:
        archive.add(image_module, arcname=".")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        backbone = load_hub_module(f"tfhub:{address}/tiny.tar.gz")
        with pytest.raises(GraftError, match="could not be downloaded.*404"):
            load_hub_module(f"{address}/absent.tar.gz")
    finally:
        server.shutdown()
        server.server_close()
    assert "its graph runs on this machine as code does" in backbone.source["notice"]
    assert backbone.name == "tiny.tar.gz" and len(backbone.blocks) == 3
    assert backbone.source["sha256"] == load_hub_module(image_module).source["sha256"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_folders_that_hold_no_reusable_module(tmp_path):
    with pytest.raises(GraftError, match="absent holds no saved_model.pb.*Give the folder in which"):
        load_hub_module(str(tmp_path / "absent"))
    for name, files, message in (
        ("tf1", ["saved_model.pb", "tfhub_module.pb"], "TF1 Hub format.*Use a version of it that is a TF2 SavedModel"),
        ("damaged", ["saved_model.pb"], "could not be loaded.*The folder is damaged"),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"nothing")
        with pytest.raises(GraftError, match=message):
            load_hub_module(str(tmp_path / name))


def test_an_export_of_keras_3_is_not_reusable(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.export(str(tmp_path / "exported"), verbose=False)
    with pytest.raises(GraftError, match=r"signatures only, such as `model.export\(\)` of Keras 3.*__call__"):
        load_hub_module(str(tmp_path / "exported"))


@pytest.mark.parametrize(
    "spec, answer, message",
    [
        (tf.TensorSpec([None, 3]), lambda x: x, r"takes TensorSpec\(shape=\(None, 3\).*a backbone takes images"),
        ({"ids": tf.TensorSpec([None, 4], tf.int32)}, lambda x: x, "takes .*ids.*Use models.tfhub.HubLayer"),
        (tf.TensorSpec([None], tf.string), lambda x: {"a": x, "b": x}, "a dict of a, b; expected one tensor"),
        (tf.TensorSpec([None], tf.string), lambda x: (x, x), "answers with a (list|tuple); expected one tensor"),
        (tf.TensorSpec([None], tf.string), tf.strings.length, r"answers with shape \[None\]"),
    ],
)
def test_inputs_and_outputs_that_a_backbone_cannot_have(tmp_path, spec, answer, message):
    class Module(tf.train.Checkpoint):
        @tf.function(input_signature=[spec])
        def __call__(self, inputs):
            return answer(inputs)

    tf.saved_model.save(Module(), str(tmp_path / "module"))
    with pytest.raises(GraftError, match=message):
        load_hub_module(str(tmp_path / "module"))
