"""serving/verify.py: a good export passes in a fresh process; each kind of bad SavedModel fails by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from models.classifier import Classifier
from models.inputs import decode_images, scale_image
from serving.answer_checks import check_answers
from serving.export import export_image_classifier
from serving.session import Session
from serving.static_checks import CheckFailed, read_op_list
from serving.steps import STEPS
from serving.verify import VerificationError, run_steps, verify
from tests.conftest import tiny_backbone
from tests.test_export import CLASSES, encoded_image, tiny_classifier, training_answers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def samples():
    formats = ["png", "jpeg", "gif", "bmp", "webp"]
    return [encoded_image(seed, formats[seed % 5]) for seed in range(18)] + [b"no image at all"]


@pytest.fixture(scope="module")
def exported(samples, tmp_path_factory):
    """(version folder, the training side's probabilities); read only."""
    model = tiny_classifier(len(CLASSES))
    folder = tmp_path_factory.mktemp("verify") / "1"
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder, folded_bytes=0)  # tests break variables
    return folder, np.concatenate([training_answers(model, samples[:-1]), np.zeros([1, len(CLASSES)])])


@pytest.fixture
def copied(exported, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(exported[0], tmp_path / "1"))


def steps(folder, samples=(), expected=None, target="2.20"):
    return run_steps(folder, list(samples), expected, target, 1e-5, lambda line: None)


def test_a_good_export_passes(exported, samples):
    folder, expected = exported
    facts = verify(folder, samples, expected)
    assert facts["files"] == 19
    assert facts["largest_difference"] <= 1e-6
    assert facts["largest_row_difference"] <= 1e-6
    assert facts["signatures"] == ["features", "pixels", "serving_default"]
    assert facts["target"] == "2.20"
    assert facts["ops"] > 20
    assert facts["missing_in_2.19"] == ["DecodeWebP"]
    assert facts["batch_sizes"] == [1, 2, 3, 4, 8, 16, 32]
    assert [line.split(" (")[0] for line in facts["padding"]] == ["pixels must not be padded"]
    assert facts["warmup_requests"] == 0
    assert facts["tensorflow"] == tf.__version__
    assert 0 < facts["load_seconds"] < facts["seconds"]


def test_answers_that_differ(exported, samples):
    folder, expected = exported
    wrong = expected.copy()
    wrong[3, 4] += 2e-5
    wrong[7, 2] -= 2e-4
    message = r"step 3 of 6, answers: item 7 of 19: .* class 2 .*difference 0\.0002, allowed 0\.0001"
    with pytest.raises(VerificationError, match=message) as caught:
        verify(folder, samples, wrong, tolerance=1e-4)
    assert caught.value.exit_code == 4


@pytest.fixture(scope="module")
def session(exported):
    with Session(exported[0]) as session:
        yield session


def test_the_served_error_is_in_the_message(session, exported, samples):
    wrong = exported[1].copy()
    wrong[-1] = 1 / len(CLASSES)
    with pytest.raises(CheckFailed, match=r"item 18 of 19: .*; served error: not an image"):
        check_answers(session, samples, wrong, 1e-5, CLASSES)


def test_nan_differs(session, exported, samples):
    wrong = exported[1].copy()
    wrong[3, 4] = np.nan
    with pytest.raises(CheckFailed, match=r"item 3 of 19: .* class 4 .* expected nan"):
        check_answers(session, samples, wrong, 1e-5, CLASSES)


def test_labels_of_another_model(session, exported, samples):
    with pytest.raises(CheckFailed, match=r"row 0: labels \[.*do not fit its probabilities"):
        check_answers(session, samples, exported[1], 1e-5, CLASSES[::-1])
    with pytest.raises(CheckFailed, match=r"probabilities of 7 classes, but assets\.extra/labels\.txt names 1"):
        check_answers(session, samples, exported[1], 1e-5, ["cat"])


def test_answers_of_other_classes(session, exported, samples):
    with pytest.raises(CheckFailed, match=r"probabilities \[19, 7\], expected \[19, 6\]"):
        check_answers(session, samples, exported[1][:, :6], 1e-5, CLASSES)


@pytest.fixture(scope="module")
def several_labels(samples, tmp_path_factory):
    """(version folder of a multi-label model, the training side's probabilities, thresholds); read only."""
    model = Classifier(tiny_backbone(), len(CLASSES), multi_label=True)
    model.head.kernel.assign(model.head.kernel * 20.0)
    images, _ = decode_images(tf.constant(samples[:-1]), model.backbone.preprocess)
    expected = tf.sigmoid(model(scale_image(images, model.backbone.preprocess), training=False)).numpy()
    thresholds = np.quantile(expected, 0.7, axis=0).astype("float32")
    folder = tmp_path_factory.mktemp("several") / "1"
    export_image_classifier(model, model.backbone.preprocess, CLASSES, folder, thresholds=thresholds)
    return folder, np.concatenate([expected, np.zeros([1, len(CLASSES)])]), thresholds


def test_a_good_export_of_several_labels_passes(several_labels, samples):
    folder, expected, _ = several_labels
    assert verify(folder, samples, expected)["largest_difference"] <= 1e-6


def test_choices_that_do_not_fit(several_labels, samples, tmp_path):
    folder = Path(shutil.copytree(several_labels[0], tmp_path / "1"))
    details = folder / "assets.extra" / "graft.json"
    known = json.loads(details.read_text())
    for thresholds, message in (
        (
            [*known["thresholds"][:-1], 1.1],
            r"row \d+: chosen .* does not fit its probabilities .* of assets\.extra/graft",
        ),
        (known["thresholds"][:-1], "probabilities of 7 classes, but assets.extra/graft.json has 6 thresholds"),
        (None, "serving_default: output chosen, but no thresholds in assets.extra/graft.json"),
        ("high", "graft.json: cannot be read"),
    ):
        details.write_text(json.dumps({**known, "thresholds": thresholds}))
        with pytest.raises(VerificationError, match=f"step 3 of 6, answers: .*{message}"):
            steps(folder, samples, several_labels[1])


def test_thresholds_without_choices(session, exported, samples):
    with pytest.raises(CheckFailed, match="serving_default: no output chosen, but thresholds in"):
        check_answers(session, samples, exported[1], 1e-5, CLASSES, np.full(7, 0.5, "float32"))


def test_unknown_target(exported, samples):
    with pytest.raises(GraftError, match=r"target '1\.15': no list of its ops\. Known: 2\.20, 2\.19") as caught:
        verify(exported[0], samples[:1], exported[1][:1], target="1.15")
    assert caught.value.exit_code == 2


def test_older_target(exported):
    with pytest.raises(VerificationError, match=r"step 2 of 6, ops: .* TF Serving 2\.19 lacks: DecodeWebP \(function"):
        steps(exported[0], target="2.19")


def test_no_such_folder(tmp_path):
    with pytest.raises(VerificationError, match=r"step 1 of 6, layout: .*saved_model\.pb: missing"):
        verify(tmp_path, [], None)


def test_truncated_variables(tmp_path):
    module = tf.Module()
    module.bias = tf.Variable(tf.ones([100, 4]))
    module.serve = tf.function(lambda x: {"y": x + module.bias[0]}, input_signature=[ROWS_OF_4])
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.serve})
    data = tmp_path / "1/variables/variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(VerificationError, match=r"step 3 of 6, answers: .*1: "):
        steps(tmp_path / "1")


def edit_saved_model(folder, change):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    file = folder / "saved_model.pb"
    saved_model = SavedModel.FromString(file.read_bytes())
    change(saved_model.meta_graphs)
    file.write_bytes(saved_model.SerializeToString())


def tag_as_training(metagraphs):
    metagraphs[0].meta_info_def.tags[:] = ["train"]


def add_a_metagraph(metagraphs):
    metagraphs.add().meta_info_def.tags.extend(["serve", "gpu"])


def rename_the_default(metagraphs):
    signatures = metagraphs[0].signature_def
    signatures["main"].CopyFrom(signatures.pop("serving_default"))


def lose_a_tensor(metagraphs):
    metagraphs[0].signature_def["features"].outputs["error"].name = "Gone:0"


def lose_an_output(metagraphs):
    metagraphs[0].signature_def["features"].outputs["error"].name += "9"  # no such output of that operation


@pytest.mark.parametrize(
    "change, message",
    [
        (tag_as_training, r"layout: .*metagraphs tagged \[\['train'\]\], expected one, tagged \['serve'\]"),
        (add_a_metagraph, r"layout: .*metagraphs tagged \[\['serve'\], \['gpu', 'serve'\]\], expected one"),
        (rename_the_default, r"layout: .*expected one named serving_default"),
        (lose_a_tensor, r"layout: signature features, output error: the graph has no tensor Gone:0"),
        (lose_an_output, r"answers: .* signature features: error: the graph has no tensor"),
    ],
)
def test_spoilt_protos(copied, change, message):
    edit_saved_model(copied, change)
    with pytest.raises(VerificationError, match=message):
        steps(copied)


def test_broken_proto(copied):
    (copied / "saved_model.pb").write_bytes(b"\xff" * 100)
    with pytest.raises(VerificationError, match=r"layout: .*saved_model\.pb: cannot be parsed"):
        steps(copied)


def save(folder, function, *specs, **outputs):
    """A SavedModel of one signature."""
    module = tf.Module()
    module.serve = function if specs == () else tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


ROWS_OF_4 = tf.TensorSpec([None, 4], tf.float32, name="x")
TEXT = tf.TensorSpec([None], tf.string, name="text")
IMAGE = tf.TensorSpec([None], tf.string, name="image_bytes")


def add_one(x):
    return {"y": x + 1.0}


def call_python(x):
    return {"y": tf.ensure_shape(tf.py_function(lambda x: x, [x], tf.float32), [None, 4])}


def subtract_mean_of_rows(x):
    return {"y": x - tf.reduce_mean(x, axis=0)}


def sum_of_rows(x):
    return {"y": tf.boolean_mask(tf.reshape(tf.reduce_sum(x), [1]), [True])}  # [None], statically


def drop_a_row(x):
    return {"y": tf.ensure_shape(x[:1], [None, 4])}


def divide_by_zero(x):
    return {"y": x / 0.0}


def hash_as_bytes(text):
    number = tf.strings.to_hash_bucket_fast(text, 1 << 40)
    return {"hash": tf.map_fn(lambda n: tf.io.serialize_tensor(n), number, fn_output_signature=tf.string)}


def mean_letter(text):
    """Of texts padded to the longest one in the batch; what is padded counts."""
    letters = tf.cast(tf.strings.unicode_decode(text, "UTF-8").to_tensor(), tf.float32)
    return {"mean": tf.reduce_mean(letters, axis=1)}


def count_bad_items(text):
    bad = tf.reduce_sum(tf.cast(tf.strings.substr(text, 0, 1) == b"\xff", tf.int32))
    return {"length": tf.strings.length(text) + bad}


def accept_everything(image_bytes):
    return {"length": tf.strings.length(image_bytes), "error": tf.fill(tf.shape(image_bytes), "")}


@pytest.mark.parametrize(
    "function, spec, message",
    [
        (lambda x: {"y": x[0]}, ROWS_OF_4, r"output y: shape \[4\], expected the first dimension free"),
        (lambda x: {"y": tf.reduce_sum(x)}, ROWS_OF_4, r"output y: shape \[\], expected the first dimension free"),
        (lambda x: {"y": tf.cast(x, tf.float16)}, ROWS_OF_4, "output y: float16, which the server's REST"),
        (call_python, ROWS_OF_4, r"layout: function .*: EagerPyFunc calls Python, which the server does not have"),
        (sum_of_rows, ROWS_OF_4, r"rows: .*output y: shape \[1\] for 0 rows, expected 0 first"),
        (drop_a_row, ROWS_OF_4, r"rows: .*output y: shape \[1, 4\] for 2 rows, expected 2 first"),
        (divide_by_zero, ROWS_OF_4, "rows: .*output y: holds NaN or infinity, expected finite numbers"),
        (hash_as_bytes, TEXT, "rows: .*output hash: .* is not text. Name such an output NAME_bytes"),
        (mean_letter, TEXT, "rows: .*2 rows: output mean: row 0 differs from the same item alone"),
        (count_bad_items, TEXT, "rows: .*a bad item between two good ones: output length: row 0 differs"),
        (accept_everything, IMAGE, "rows: .*a bad item .*: the output error is empty for it"),
    ],
)
def test_bad_models(tmp_path, function, spec, message):
    folder = save(tmp_path / "1", function, spec)
    with pytest.raises(VerificationError, match=message):
        steps(folder)


def test_compiled_functions(tmp_path):
    compiled = tf.function(add_one, input_signature=[ROWS_OF_4], jit_compile=True)

    def calls_compiled(x):
        return compiled(x)

    for number, function in enumerate([compiled, tf.function(calls_compiled, input_signature=[ROWS_OF_4])]):
        folder = save(tmp_path / str(number), function)
        with pytest.raises(VerificationError, match=r"layout: .*must be compiled by XLA \(_XlaMustCompile\)"):
            steps(folder)


def test_ops_of_no_server(tmp_path):
    def read_jpeg_xl(text):
        decoded = tf.map_fn(lambda item: tf.size(tf.raw_ops.DecodeJxl(contents=item)), text, tf.int32)
        return {"size": decoded}

    if not hasattr(tf.raw_ops, "DecodeJxl"):
        pytest.skip("this TensorFlow has no op that is newer than the lists")
    with pytest.raises(VerificationError, match=r"ops: ops that TF Serving 2\.20 lacks: DecodeJxl \(function .*node"):
        steps(save(tmp_path / "1", read_jpeg_xl, TEXT))


def test_other_kinds_of_models_pass(tmp_path):
    """Signatures of text, of several inputs, and of whole numbers are run on made-up rows."""

    def text_lengths(text):
        return {"length": tf.strings.length(text), "error": tf.fill(tf.shape(text), "")}

    module = tf.Module()
    tokens = [tf.TensorSpec([None, None], tf.int32, name="ids"), tf.TensorSpec([None, 3], tf.float32, name="x")]
    module.default = tf.function(text_lengths, input_signature=[TEXT])
    pair = tf.TensorSpec([None, 2], tf.string, name="pair")
    module.pairs = tf.function(lambda pair: {"length": tf.strings.length(pair)[:, 0]}, input_signature=[pair])
    module.tokens = tf.function(
        lambda ids, x: {"y": tf.cast(ids[:, :1], tf.float32) + x, "even": ids % 2 == 0}, input_signature=tokens
    )
    signatures = {"serving_default": module.default, "pairs": module.pairs, "tokens": module.tokens}
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=signatures)
    assert steps(tmp_path / "1")["signatures"] == ["pairs", "serving_default", "tokens"]


def test_the_command(exported, copied):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}

    def command(*arguments):
        line = [sys.executable, "-m", "serving.verify", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = command(exported[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(STEPS)
    (copied / "saved_model.pb").unlink()
    done = command(copied)
    assert done.returncode == 4
    assert done.stdout.startswith(f"{copied}: verification failed at step 1 of 6, layout: ")
    assert json.loads(command(copied, "--json").stdout)["error"] == done.stdout.strip()


def test_op_lists_hold_what_every_model_needs():
    for target in ("2.19", "2.20"):
        assert {"StatefulPartitionedCall", "VarHandleOp", "RestoreV2", "DecodePng"} <= read_op_list(target)
    assert "DecodeWebP" in read_op_list("2.20") - read_op_list("2.19")


FRESH_STEPS = """
import os, signal
from serving.static_checks import CheckFailed
from serving.steps import in_fresh_process
pids = {os.getpid(), *(in_fresh_process(lambda task: (os.getpid(), {}), {})[0] for _ in range(2))}
try:
    in_fresh_process(lambda task: os.kill(os.getpid(), task["signal"]), {"signal": signal.SIGSEGV})
except CheckFailed as error:
    print(len(pids), error)
"""  # in a process without TensorFlow, whose threads do not survive a fork


def test_each_step_has_a_process_and_one_that_takes_it_down_is_told():
    done = subprocess.run([sys.executable, "-c", FRESH_STEPS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "3 SIGSEGV ended the process, as it would end the server\n"
