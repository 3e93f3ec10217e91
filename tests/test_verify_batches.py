"""serving/verify.py: what must fail has its own message; batches, padding and warm-up requests of a version."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from serving import config
from serving.verify import VerificationError
from serving.warmup import WARMUP_FILE, write_requests
from tests.test_verify import ROWS_OF_4, add_one, edit_saved_model, save, steps, subtract_mean_of_rows


def save_with_variable(folder):
    """A SavedModel that adds a variable."""
    module = tf.Module()
    module.bias = tf.Variable(1.0)
    module.serve = tf.function(lambda x: {"y": x + module.bias}, input_signature=[ROWS_OF_4])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


def only_with_xla(folder):
    save(folder, tf.function(add_one, input_signature=[ROWS_OF_4], jit_compile=True))


def op_from_outside(folder):
    def rename(metagraphs):
        nodes = [node for function in metagraphs[0].graph_def.library.function for node in function.node_def]
        next(node for node in nodes if node.op == "AddV2").op = "Addons>Gelu"

    edit_saved_model(save(folder, add_one, ROWS_OF_4), rename)


def fixed_batch(folder):
    save(folder, add_one, tf.TensorSpec([8, 4], tf.float32, name="x"))


def bfloat16_output(folder):
    save(folder, lambda x: {"y": tf.cast(x, tf.bfloat16)}, ROWS_OF_4)


def index_missing(folder):
    (save_with_variable(folder) / "variables/variables.index").unlink()


def data_missing(folder):
    (save_with_variable(folder) / "variables/variables.data-00000-of-00001").unlink()


def wrong_warmup(folder):
    add_warmup(save(folder, add_one, ROWS_OF_4), {"x": np.zeros([1, 4], np.int32)})


def warmup_of_a_wrong_shape(folder):
    save(folder, lambda x: {"y": x @ tf.ones([4, 2])}, ROWS_OF_4)
    add_warmup(folder, {"x": np.zeros([1, 5], np.float32)})


def dependent_rows(folder):
    save(folder, subtract_mean_of_rows, ROWS_OF_4)


def add_warmup(folder, *requests):
    (folder / WARMUP_FILE).parent.mkdir()
    write_requests(folder / WARMUP_FILE, [("serving_default", inputs) for inputs in requests])


@pytest.mark.parametrize(
    "make, message",
    [
        (only_with_xla, r"step 1 of 6, layout: function .*: must be compiled by XLA \(_XlaMustCompile\), which is off"),
        (op_from_outside, r"step 2 of 6, ops: ops that TF Serving 2\.20 lacks: Addons>Gelu \(function .*, node"),
        (fixed_batch, r"step 1 of 6, layout: .*, input x: shape \[8, 4\], expected the first dimension free"),
        (bfloat16_output, r"step 1 of 6, layout: .*output y: bfloat16, which the server's REST .* cannot carry\. Cast"),
        (index_missing, r"step 1 of 6, layout: .*variables\.index: missing, and the graph has variables"),
        (data_missing, r"step 1 of 6, layout: .*variables\.data-00000-of-00001: missing, and the graph has variables"),
        (wrong_warmup, r"step 6 of 6, warm-up: warm-up request 0 of 1: inputs {'x': 'int32'}, but .* {'x': 'float32'}"),
        (warmup_of_a_wrong_shape, r"step 6 of 6, warm-up: .*signature serving_default: .*Matrix size-incompatible"),
        (dependent_rows, r"step 4 of 6, rows: .*2 rows: output y: row 0 differs from the same item alone"),
    ],
)
def test_each_fault_has_its_own_message(tmp_path, make, message):
    make(tmp_path / "1")
    with pytest.raises(VerificationError, match=message) as caught:
        steps(tmp_path / "1")
    assert str(caught.value).startswith(f"{tmp_path / '1'}: verification failed at step ")


def write_batching(folder, sizes=(), largest=None, pads=False):
    parameters = config.message("BatchingParameters")
    parameters.allowed_batch_sizes.extend(sizes)
    if largest:
        parameters.max_batch_size.value = largest
    parameters.pad_variable_length_inputs = pads
    config.write_config(folder / config.BATCHING_FILE, parameters)
    return folder


def test_batch_sizes_of_the_version(tmp_path):
    def wrong_for_five(x):
        return {"y": x + tf.cast(tf.equal(tf.shape(x)[0], 5), tf.float32)}

    folder = save(tmp_path / "1", wrong_for_five, ROWS_OF_4)
    assert steps(folder)["batch_sizes"] == [1, 2, 3, 4, 8, 16, 32]
    assert steps(write_batching(folder, largest=6))["batch_sizes"] == [1, 2, 3, 4, 6]
    for sizes, largest in (([1, 5], 5), ((), 5)):
        with pytest.raises(
            VerificationError, match=r"rows: signature serving_default, 5 rows: output y: row 0 differs"
        ):
            steps(write_batching(folder, sizes, largest))
    for sizes, largest in (([1, 4], 8), ([4, 2], 2), ([1, 4], None)):
        with pytest.raises(VerificationError, match=r"step 4 of 6, rows: .*pbtxt: allowed_batch_sizes \[.*refuses"):
            steps(write_batching(folder, sizes, largest))
    (folder / config.BATCHING_FILE).write_text("max_batch_size: many")
    with pytest.raises(
        VerificationError, match="step 4 of 6, rows: .*cannot be read as the server's BatchingParameters"
    ):
        steps(folder)


SEVERAL_SIZES = tf.TensorSpec([None, None], tf.float32, name="x")


def test_padding(tmp_path):
    mean = save(tmp_path / "mean", lambda x: {"y": tf.reduce_mean(x, axis=1)}, SEVERAL_SIZES)
    (said,) = steps(mean)["padding"]
    assert said.startswith(
        "serving_default must not be padded (output y: a row padded from 40 to 48 answers otherwise)"
    )
    with pytest.raises(
        VerificationError, match=r"step 5 of 6, padding: .*output y: a row padded .* Remove pad_variable"
    ):
        steps(write_batching(mean, largest=8, pads=True))
    same = save(tmp_path / "same", lambda x: {"y": x}, SEVERAL_SIZES)  # its answer has the padded size
    with pytest.raises(VerificationError, match=r"step 5 of 6, padding: .*output y: a row padded from 40 to 48"):
        steps(write_batching(same, largest=8, pads=True))
    # The padding repeats the first element, which changes no maximum.
    largest = save(tmp_path / "largest", lambda x: {"y": tf.reduce_max(x, axis=1)}, SEVERAL_SIZES)
    assert steps(write_batching(largest, largest=8, pads=True))["padding"] == ["serving_default may be padded"]
    assert steps(save(tmp_path / "1", add_one, ROWS_OF_4))["padding"] == []


def test_warmup_requests_are_replayed(tmp_path):
    folder = save(tmp_path / "1", add_one, ROWS_OF_4)
    add_warmup(folder, {"x": np.zeros([1, 4], np.float32)}, {"x": np.zeros([8, 4], np.float32)})
    assert steps(folder)["warmup_requests"] == 2
    with pytest.raises(
        VerificationError, match=r"warm-up: .*request 1, .*: 8 rows, but batching_params.pbtxt allows 4"
    ):
        steps(write_batching(folder, largest=4))
    content = (folder / WARMUP_FILE).read_bytes()
    (folder / WARMUP_FILE).write_bytes(content[:-3])
    with pytest.raises(VerificationError, match=r"step 6 of 6, warm-up: .*requests: record 1 cannot be read"):
        steps(folder)
