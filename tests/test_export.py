"""serving/export.py: the SavedModel of an image classifier, and publishing it under the next number."""

from __future__ import annotations

import collections
import errno
import io
import json
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from models import GraftError
from models.classifier import Classifier
from models.inputs import decode_image, decode_images, scale_image
from serving.export import export_image_classifier
from serving.folding import fold_weights
from serving.new_version import next_version, publish_version
from serving.session import Session
from serving.static_checks import all_nodes, check_layout
from tests.conftest import tiny_backbone

CLASSES = ["cat", "dog", "Katze auf dem Tisch", "鳥", "eel", "fox", "gnu"]


def tiny_classifier(class_count: int) -> Classifier:
    """A head on the tiny backbone, with weights large enough to tell random images apart."""
    model = Classifier(tiny_backbone(), class_count)
    model.head.kernel.assign(model.head.kernel * 20.0)
    return model


def encoded_image(seed: int, format: str = "png", shape=(40, 50, 3)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8) // (seed % 3 + 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def training_answers(model, samples) -> np.ndarray:
    """Probabilities as the training side computes them."""
    images, _ = decode_images(tf.constant(samples), model.backbone.preprocess)
    return tf.nn.softmax(model(scale_image(images, model.backbone.preprocess), training=False)).numpy()


@pytest.fixture(scope="module")
def model():
    model = tiny_classifier(len(CLASSES))
    model.optimizer = keras.optimizers.AdamW()  # as after training; of no use in serving
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "1"
    details = {"run": "tiny run", "metrics": {"accuracy": 0.5}}
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder, details=details)
    return folder


@pytest.fixture(scope="module")
def session(folder):
    with Session(folder) as session:
        yield session


def test_signatures(session):
    answers = {
        "labels": ("string", (None, 5)),
        "scores": ("float32", (None, 5)),
        "probabilities": ("float32", (None, 7)),
        "error": ("string", (None,)),
    }
    image_bytes = {"image_bytes": ("string", (None,))}
    assert session.signatures == {
        "serving_default": {"inputs": image_bytes, "outputs": answers},
        "features": {
            "inputs": image_bytes,
            "outputs": {"features": ("float32", (None, 8)), "error": ("string", (None,))},
        },
        "pixels": {"inputs": {"pixels": ("float32", (None, None, None, 3))}, "outputs": answers},
    }


def test_answers_equal_training(model, session):
    samples = [encoded_image(seed, format) for seed, format in enumerate(["png", "jpeg", "gif", "bmp", "webp"])]
    served = session.run("serving_default", {"image_bytes": samples})
    expected = training_answers(model, samples)
    assert np.ptp(expected, axis=0).max() > 0.01  # the images do differ
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-6)
    assert list(served["error"]) == [b""] * 5


def test_labels_and_scores_are_aligned_best_first(session):
    served = session.run("serving_default", {"image_bytes": [encoded_image(seed) for seed in range(4)]})
    for labels, scores, probabilities in zip(served["labels"], served["scores"], served["probabilities"]):
        order = np.argsort(-probabilities)[:5]
        assert [label.decode() for label in labels] == [CLASSES[index] for index in order]
        np.testing.assert_array_equal(scores, probabilities[order])


def test_several_labels_are_chosen_by_their_thresholds(tmp_path):
    model = Classifier(tiny_backbone(), 3, multi_label=True)
    model.head.kernel.assign(model.head.kernel * 20.0)
    samples = [encoded_image(seed) for seed in range(6)]
    images, _ = decode_images(tf.constant(samples), model.backbone.preprocess)
    expected = tf.sigmoid(model(scale_image(images, model.backbone.preprocess), training=False)).numpy()
    thresholds = np.median(expected, axis=0)  # so that each class is chosen for some
    export_image_classifier(model, model.backbone.preprocess, CLASSES[:3], tmp_path / "1", thresholds=thresholds)
    with Session(tmp_path / "1") as session:
        for signature in ("serving_default", "pixels"):
            assert session.signatures[signature]["outputs"]["chosen"] == ("bool", (None, 3))
        served = session.run("serving_default", {"image_bytes": [*samples, b"no image"]})
    np.testing.assert_allclose(served["probabilities"][:-1], expected, atol=1e-6)
    np.testing.assert_array_equal(served["chosen"][:-1], expected >= thresholds)
    assert served["chosen"][:-1].sum(axis=0).tolist() == [3, 3, 3]
    assert served["error"][-1] and not served["chosen"][-1].any()
    details = json.loads((tmp_path / "1" / "assets.extra" / "graft.json").read_text())
    assert details["multi_label"] is True and details["thresholds"] == thresholds.tolist()


def test_thresholds_go_with_several_labels_only(model, tmp_path):
    for several in (False, True):
        classifier = Classifier(tiny_backbone(), 3, multi_label=several)
        with pytest.raises(ValueError, match="a multi-label model needs one per class, any other model takes none"):
            export_image_classifier(
                classifier,
                classifier.backbone.preprocess,
                CLASSES[:3],
                tmp_path / "1",
                thresholds=None if several else np.full(3, 0.5),
            )


def test_a_bad_item_has_its_error_and_spares_its_neighbours(session):
    good = [encoded_image(0), encoded_image(1)]
    alone = session.run("serving_default", {"image_bytes": good})
    mixed = session.run("serving_default", {"image_bytes": [good[0], b"GIF89a but no more", good[1], b""]})
    for name in alone:
        np.testing.assert_array_equal(mixed[name][[0, 2]], alone[name])
    assert "GIF" in mixed["error"][1].decode()
    assert "empty input" in mixed["error"][3].decode()
    for bad in (1, 3):
        assert not mixed["scores"][bad].any()
        assert not mixed["probabilities"][bad].any()
        assert list(mixed["labels"][bad]) == [b""] * 5


def test_no_items(session):
    served = session.run("serving_default", {"image_bytes": []})
    assert {name: values.shape for name, values in served.items()} == {
        "labels": (0, 5),
        "scores": (0, 5),
        "probabilities": (0, 7),
        "error": (0,),
    }
    assert session.run("features", {"image_bytes": []})["features"].shape == (0, 8)
    empty = session.run("pixels", {"pixels": np.zeros([0, 5, 4, 3], np.float32)})
    assert empty["probabilities"].shape == (0, 7)


def test_features(model, session):
    samples = [encoded_image(0), b"no image", encoded_image(1)]
    served = session.run("features", {"image_bytes": samples})
    preprocess = model.backbone.preprocess
    images, _ = decode_images(tf.constant([samples[0], samples[2]]), preprocess)
    expected = model.features(scale_image(images, preprocess)).numpy()
    np.testing.assert_allclose(served["features"][[0, 2]], expected, atol=1e-5)
    assert not served["features"][1].any()
    assert [bool(error) for error in served["error"]] == [False, True, False]


@pytest.mark.parametrize("shape", [(40, 50, 3), (16, 16, 3), (9, 100, 3)])
def test_pixels_equal_the_same_image_encoded(session, shape):
    samples = [encoded_image(seed, shape=shape) for seed in range(2)]
    pixels = np.stack([decode_image(tf.constant(sample)).numpy() for sample in samples])
    from_pixels = session.run("pixels", {"pixels": pixels})
    from_bytes = session.run("serving_default", {"image_bytes": samples})
    for name in from_bytes:
        if from_bytes[name].dtype == object:
            assert from_pixels[name].tolist() == from_bytes[name].tolist()
        else:
            np.testing.assert_allclose(from_pixels[name], from_bytes[name], atol=1e-6)


def test_extra_assets(folder):
    assert (folder / "assets.extra/labels.txt").read_text("utf-8").splitlines() == CLASSES
    details = json.loads((folder / "assets.extra/graft.json").read_text("utf-8"))
    assert details["run"] == "tiny run"
    assert details["metrics"] == {"accuracy": 0.5}
    assert details["backbone"] == "tiny"
    assert details["class_names"] == CLASSES
    assert details["image_size"] == [16, 16]
    assert details["white_level"] == 255


def test_no_trace_of_this_machine(folder):
    here = str(Path(__file__).resolve().parents[1]).encode()
    for file in folder.rglob("*"):
        if file.is_file():
            assert here not in file.read_bytes(), file


def test_mixed_precision_few_classes_and_white_level(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = tiny_classifier(3)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.encoder.compute_dtype == "bfloat16"
    export_image_classifier(model, model.backbone.preprocess, CLASSES[:3], tmp_path, white_level=1023)
    deep = io.BytesIO()
    Image.fromarray(np.full([30, 30], 1023, np.uint16)).save(deep, "png")
    shallow = io.BytesIO()
    Image.fromarray(np.full([30, 30], 255, np.uint8)).save(shallow, "png")
    with Session(tmp_path) as session:
        assert session.signatures["serving_default"]["outputs"]["scores"] == ("float32", (None, 3))
        assert session.signatures["features"]["outputs"]["features"] == ("float32", (None, 8))
        served = session.run("serving_default", {"image_bytes": [deep.getvalue(), shallow.getvalue()]})
    assert served["probabilities"].dtype == np.float32
    np.testing.assert_array_equal(served["probabilities"][0], served["probabilities"][1])  # both are white
    np.testing.assert_allclose(served["probabilities"].sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("name", ["a\nb", "", b"caf\xe9".decode(errors="surrogateescape")])
def test_class_name_that_is_no_line_of_text(model, tmp_path, name):
    with pytest.raises(GraftError, match=r"class name '.*': labels\.txt needs one line of UTF-8 text"):
        export_image_classifier(model, model.backbone.preprocess, [name, *CLASSES[1:]], tmp_path / "1")
    assert not (tmp_path / "1").exists()


# Weights as constants.


@pytest.fixture(scope="module")
def unfolded(model, tmp_path_factory):
    """An export of the same model whose weights stay variables."""
    folder = tmp_path_factory.mktemp("unfolded") / "1"
    weights = export_image_classifier(model, model.backbone.preprocess, CLASSES, folder, folded_bytes=6000)
    assert weights == {"kept_as": "variables", "bytes": 6204, "why": "0.0 MB of them, the limit is 0 MB"}
    return folder


def weight_count(model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in [*model.encoder.weights, *model.head.weights])


def test_every_weight_is_stored_once(model, folder, unfolded):
    stored = tf.train.list_variables(str(unfolded / "variables" / "variables"))
    assert sum(int(np.prod(shape)) for name, shape in stored if "OBJECT_GRAPH" not in name) == weight_count(model)
    (network,) = [f for f in check_layout(folder)[0].library.function if any(n.op == "Conv2D" for n in f.node_def)]
    constants = [node.attr["value"].tensor for node in network.node_def if node.op == "Const"]
    sizes = [tf.make_ndarray(constant).size for constant in constants]
    # Of a convolution's bias and the four vectors of the norm after it, one vector is left, in three blocks.
    assert sum(size for size in sizes if size > 3) == weight_count(model) - 3 * 4 * 8


def test_one_function_holds_the_network(folder, unfolded):
    def places(exported, operation):
        return {place for place, node in all_nodes(check_layout(exported)[0]) if node.op == operation}

    assert len(places(folder, "Conv2D")) == 1 and not places(folder, "VarHandleOp")
    assert len(places(unfolded, "Conv2D")) >= 3 and places(unfolded, "VarHandleOp")


def test_constants_answer_as_variables(session, folder, unfolded):
    samples = [encoded_image(seed) for seed in range(5)] + [b"no image"]
    pixels = np.random.default_rng(0).uniform(0, 255, [3, 20, 30, 3]).astype(np.float32)
    requests = {"serving_default": {"image_bytes": samples}, "features": {"image_bytes": samples}}
    with Session(unfolded) as other:
        for signature, inputs in {**requests, "pixels": {"pixels": pixels}}.items():
            found, expected = session.run(signature, inputs), other.run(signature, inputs)
            for name in expected:
                if expected[name].dtype == object:
                    assert found[name].tolist() == expected[name].tolist()
                else:
                    np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    details = json.loads((folder / "assets.extra/graft.json").read_text())
    assert details["weights"]["kept_as"] == "constants" and details["weights"]["bytes"] == 6204
    assert details["weights"]["largest_difference"] <= 1e-5


def random_variable(seed, *shape):
    return tf.Variable(tf.random.stateless_uniform(shape, [seed, 0], 0.5, 1.5))


def folded_ops(network, limit=1_000_000):
    """A network of images [n, 8, 8, 4] -> what `fold_weights` says, and how often each op is in its function."""
    image = tf.random.stateless_normal([2, 8, 8, 4], [0, 0])
    run, weights = fold_weights(network, [tf.TensorSpec([None, 8, 8, 4])], [image], limit)
    if weights["kept_as"] == "variables":
        return weights, None
    other = tf.random.stateless_normal([3, 8, 8, 4], [1, 0])
    np.testing.assert_allclose(run(other)[0], network(other)[0], rtol=1e-5, atol=1e-4)
    return weights, collections.Counter(node.op for node in run.graph.as_graph_def().node)


@pytest.mark.parametrize("norm", ["plain", "fused"])
@pytest.mark.parametrize("convolution", ["full", "depthwise"])
def test_what_follows_a_convolution_is_merged_into_it(convolution, norm):
    kernel = random_variable(0, 3, 3, 4, 2 if convolution == "depthwise" else 8)
    bias, gamma, beta, mean, variance = (random_variable(seed, 8) for seed in range(1, 6))

    def network(x):
        strides = [1, 1, 1, 1]
        apply = tf.nn.depthwise_conv2d if convolution == "depthwise" else tf.nn.conv2d
        x = apply(x, kernel, strides, "SAME") + tf.reshape(bias, [1, 1, 1, 8])
        if norm == "fused":
            x = tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, is_training=False)[0]
        else:
            x = tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)
        return [tf.nn.relu6(x - 1.0)]

    weights, ops = folded_ops(network)
    assert weights["kept_as"] == "constants"
    assert ops["Conv2D"] + ops["DepthwiseConv2dNative"] == ops["BiasAdd"] == ops["Relu6"] == 1
    assert not {"Mul", "AddV2", "Sub", "FusedBatchNormV3", "Rsqrt"} & set(ops)


def test_what_is_used_elsewhere_too_stays():
    kernel, scale, rows = random_variable(0, 1, 1, 4, 4), random_variable(1, 4), random_variable(2, 8, 1, 1)

    def network(x):
        twice = tf.nn.conv2d(x, kernel, 1, "SAME")
        by_rows = tf.nn.conv2d(x, kernel, 1, "SAME") * rows  # no single factor per channel
        return [twice * scale + twice + by_rows + x]

    _, ops = folded_ops(network)
    assert ops["Conv2D"] == ops["Mul"] == 2 and ops["AddV2"] == 3 and not ops["BiasAdd"]


def test_why_weights_stay_variables():
    kernel = random_variable(0, 1, 1, 4, 4)
    matrix = random_variable(1, 4, 16)
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([0], [1.0]), 0.0)

    def plain(x):
        return [tf.nn.conv2d(x, kernel, 1, "SAME")]

    def with_table(x):
        return [plain(x)[0] + table.lookup(tf.constant([0]))]

    def no_numbers(x):
        return [tf.math.log(-1.0 - plain(x)[0] ** 2)]

    def mostly_matrix(x):
        return [plain(x)[0] @ matrix]

    assert folded_ops(plain, limit=63)[0]["why"] == "0.0 MB of them, the limit is 0 MB"
    assert folded_ops(plain, limit=64)[0]["kept_as"] == "constants"
    assert folded_ops(with_table)[0]["why"] == "the network holds tables, which cannot be constants"
    assert folded_ops(no_numbers)[0]["why"] == "constants change the answers by nan"
    assert folded_ops(mostly_matrix)[0]["why"].startswith("most of them are in no convolution")


@pytest.mark.slow
def test_a_model_of_two_replicas(mirrored, tmp_path):
    with mirrored.scope():
        model = tiny_classifier(3)
    weights = export_image_classifier(model, model.backbone.preprocess, CLASSES[:3], tmp_path / "1")
    sample = encoded_image(0)
    with Session(tmp_path / "1") as session:
        served = session.run("serving_default", {"image_bytes": [sample]})["probabilities"]
    assert weights["kept_as"] == "constants"
    np.testing.assert_allclose(served, training_answers(model, [sample]), atol=1e-6)


# Publishing.


def write_something(folder):
    (folder / "variables").mkdir()
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "variables.index").write_bytes(b"index")


def accept(folder):
    assert (folder / "saved_model.pb").read_bytes() == b"graph"


def test_versions_are_numbered(tmp_path):
    name_folder = tmp_path / "serving" / "photos"
    assert next_version(name_folder) == 1
    assert publish_version(write_something, name_folder, accept) == name_folder / "1"
    assert publish_version(write_something, name_folder, accept) == name_folder / "2"
    (name_folder / "00000123").mkdir()  # the server reads it as 123
    (name_folder / "notes").mkdir()
    assert publish_version(write_something, name_folder, accept) == name_folder / "124"
    assert (name_folder / "124/variables/variables.index").read_bytes() == b"index"
    assert sorted(path.name for path in name_folder.iterdir()) == ["00000123", "1", "124", "2", "notes"]


def test_written_and_checked_out_of_the_servers_sight(tmp_path):
    name_folder = tmp_path / "photos"
    seen = []

    def check(folder):
        seen.append(folder)
        assert folder.parent == name_folder  # the same file system, or the rename would copy
        assert [path.name for path in name_folder.iterdir()] == [folder.name]
        assert folder.name.startswith(".tmp-")

    assert publish_version(write_something, name_folder, check).name == "1"
    assert len(seen) == 1


@pytest.mark.parametrize("error", [ValueError("broken"), GraftError("differs"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["write", "check"])
def test_failure_leaves_nothing(tmp_path, failing, error):
    def fail(folder):
        raise error

    write, check = (fail, accept) if failing == "write" else (write_something, fail)
    with pytest.raises(type(error)):
        publish_version(write, tmp_path / "serving" / "photos", check)
    assert list(tmp_path.iterdir()) == []
    publish_version(write_something, tmp_path / "photos", accept)
    with pytest.raises(type(error)):
        publish_version(write, tmp_path / "photos", check)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1"]


def test_publishers_at_once_get_different_numbers(tmp_path):
    barrier = threading.Barrier(8)

    def publish(number):
        def write(folder):
            (folder / "saved_model.pb").write_bytes(b"%d" % number)

        def check(folder):
            barrier.wait()

        return publish_version(write, tmp_path / "photos", check)

    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(publish, range(8)))
    assert sorted(int(version.name) for version in versions) == list(range(1, 9))
    for number, version in enumerate(versions):
        assert (version / "saved_model.pb").read_bytes() == b"%d" % number
    assert len(list((tmp_path / "photos").iterdir())) == 8


def test_below_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match=r"file/serving: cannot make this folder \(Not a directory"):
        publish_version(write_something, tmp_path / "file" / "serving", accept)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        tf.errors.ResourceExhaustedError(None, None, "variables.data: No space left on device"),
    ],
)
def test_full_disk_is_explained(tmp_path, error):
    def write(folder):
        raise error

    message = r"photos: the disk is full: a version needs more than the [\d.]+ MB that are free there"
    with pytest.raises(GraftError, match=message):
        publish_version(write, tmp_path / "photos", accept)
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_device_is_no_disk(tmp_path):
    def write(folder):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    with pytest.raises(tf.errors.ResourceExhaustedError):
        publish_version(write, tmp_path / "photos", accept)


def test_small_disk(tmp_path):
    """A real file system of 100 kB, where the user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")

    def write(folder):
        module = tf.Module()
        module.weights = tf.Variable(tf.zeros([1_000_000]))
        tf.saved_model.save(module, str(folder))

    try:
        with pytest.raises(GraftError, match=r"serving: the disk is full: a version needs more than the 0\.1 MB"):
            publish_version(write, tmp_path / "serving", accept)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
