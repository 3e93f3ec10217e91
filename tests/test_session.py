"""serving/session.py: a SavedModel through TensorFlow's C API, with and without TensorFlow imported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from serving.session import Session, SessionError

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ["float16", "float32", "float64", "uint8", "int32", "int64", "bool"]


class Example(tf.Module):
    """A matrix, a vocabulary in an asset file, and a signature for each thing to be tested."""

    def __init__(self, vocabulary_file):
        super().__init__()
        self.matrix = tf.Variable(tf.reshape(tf.range(12.0), [3, 4]))
        vocabulary = tf.lookup.TextFileInitializer(
            vocabulary_file,
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        self.table = tf.lookup.StaticHashTable(vocabulary, default_value=-1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def words(self, text):
        return {"same": text, "upper": tf.strings.upper(text), "number": self.table.lookup(text)}

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def product(self, x):
        return {"y": x @ self.matrix}

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def brain(self, x):
        return {"y": tf.cast(x, tf.bfloat16)}

    @tf.function(
        input_signature=[tf.TensorSpec([None], getattr(tf, name), name=name) for name in DTYPES], autograph=False
    )
    def identities(self, *tensors):
        return {f"{name}_out": tf.identity(tensor) for name, tensor in zip(DTYPES, tensors, strict=True)}

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def compiled(self, x):
        return {"y": x @ self.matrix}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("session")
    vocabulary = scratch / "words.txt"
    vocabulary.write_text("cat\ndog\n")
    example = Example(str(vocabulary))
    names = ["product", "brain", "identities", "compiled"]
    signatures = {"serving_default": example.words} | {name: getattr(example, name) for name in names}
    tf.saved_model.save(example, str(scratch / "1"), signatures=signatures)
    vocabulary.unlink()  # the copy in assets/ counts
    return scratch / "1"


@pytest.fixture(scope="module")
def session(folder):
    with Session(folder) as session:
        yield session


def test_signatures_name_dtypes_and_shapes(session):
    assert set(session.signatures) == {"serving_default", "product", "brain", "identities", "compiled"}
    assert session.signatures["product"] == {
        "inputs": {"x": ("float32", (None, 3))},
        "outputs": {"y": ("float32", (None, 4))},
    }
    assert session.signatures["serving_default"]["inputs"] == {"text": ("string", (None,))}
    assert session.signatures["brain"]["outputs"] == {"y": ("bfloat16", (None, 3))}


def test_variables_are_restored(session):
    answer = session.run("product", {"x": np.eye(3, dtype=np.float32)})
    np.testing.assert_array_equal(answer["y"], np.arange(12.0).reshape(3, 4))


def test_strings_survive_both_ways(session):
    # TF_TString stores up to 22 bytes in place, longer ones elsewhere.
    text = [b"cat", b"", b"\0 zero \0", b"x" * 22, b"y" * 23, bytes(range(256)) * 400, b"dog"]
    answer = session.run("serving_default", {"text": text})
    assert list(answer["same"]) == text
    assert answer["upper"][0] == b"CAT"
    assert answer["number"].tolist() == [0, -1, -1, -1, -1, -1, 1]  # the asset file was found
    again = session.run("serving_default", {"text": np.array(text, dtype=object)})
    assert list(again["same"]) == text


def test_no_rows(session):
    answer = session.run("serving_default", {"text": []})
    assert answer["same"].shape == answer["number"].shape == (0,)
    assert session.run("product", {"x": np.zeros([0, 3], np.float32)})["y"].shape == (0, 4)


@pytest.mark.parametrize("as_list", [False, True])
def test_every_dtype(session, as_list):
    arrays = {name: np.array([0, 1, 1], dtype=name) for name in DTYPES}
    inputs = {name: array.tolist() for name, array in arrays.items()} if as_list else arrays
    answer = session.run("identities", inputs)
    for name, array in arrays.items():
        assert answer[f"{name}_out"].dtype == array.dtype
        np.testing.assert_array_equal(answer[f"{name}_out"], array)


def test_strided_array(session):
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]  # neither order of memory
    np.testing.assert_allclose(session.run("product", {"x": x})["y"], x @ np.arange(12, dtype=np.float32).reshape(3, 4))


@pytest.mark.parametrize(
    "signature, inputs, message",
    [
        ("missing", {}, "no signature 'missing'. Expected one of: brain, compiled, identities"),
        ("product", {"y": [[1.0]]}, r"got the inputs \['y'\], expected \['x'\]"),
        ("product", {"x": np.zeros([1, 3])}, r"input x: got an array of float64, expected float32 \[None, 3\]"),
        ("product", {"x": [[1.0, 2.0]]}, "Matrix size-incompatible"),  # TensorFlow's own words
        ("product", {"x": ["a"]}, "input x: got a list of <U1, expected float32"),
        ("serving_default", {"text": ["cat"]}, "input text: got str 'cat', expected bytes"),
        ("serving_default", {"text": np.array([b"a\0"])}, "fixed-width strings, which lose trailing zero"),
        ("brain", {"x": [[1.0, 2.0, 3.0]]}, "output y: its dtype .* has no numpy equivalent. Cast it"),
    ],
)
def test_wrong_requests(session, signature, inputs, message):
    with pytest.raises(SessionError, match=message):
        session.run(signature, inputs)


def test_numbers_that_do_not_fit(session):
    inputs = {name: [1] for name in DTYPES}
    with pytest.raises(SessionError, match=r"input uint8: .*300"):
        session.run("identities", {**inputs, "uint8": [300]})
    with pytest.raises(SessionError, match="input int32: got a list of float64, expected int32"):
        session.run("identities", {**inputs, "int32": [1.5]})


def test_folders_that_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(GraftError, match=r"no saved_model\.pb in it\. Expected the folder of a version"):
        Session(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"not a protobuf")
    with pytest.raises(SessionError, match="Read less bytes than requested"):
        Session(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes((folder / "saved_model.pb").read_bytes())
    (tmp_path / "variables").mkdir()
    index = folder / "variables" / "variables.index"
    (tmp_path / "variables" / index.name).write_bytes(index.read_bytes())
    with pytest.raises(SessionError, match=r"variables\.data-00000-of-00001"):
        Session(tmp_path)


def test_threads(session):
    def work(number):
        x = np.full([2, 3], number, np.float32)
        words = session.run("serving_default", {"text": [b"word %d" % number] * 3})["upper"]
        return session.run("product", {"x": x})["y"][0, 0], set(words)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, range(200)))
    assert answers == [(12.0 * number, {b"WORD %d" % number}) for number in range(200)]


def test_closing_waits_for_runs_in_progress(folder):
    session = Session(folder)
    started = threading.Event()

    def work():
        while True:
            answer = session.run("serving_default", {"text": [b"z" * 100_000] * 20})
            assert answer["upper"][-1] == b"Z" * 100_000
            started.set()

    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(work)
        started.wait()
        session.close()
        with pytest.raises(SessionError, match="this session is closed"):
            endless.result()
    session.close()


def test_memory_is_given_back(folder, session):
    def resident_megabytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def work(times):
        for _ in range(times):
            session.run("serving_default", {"text": [b"x" * 100_000] * 20})  # 2 MB in, 4 MB out
            session.run("product", {"x": np.zeros([30_000, 3], np.float32)})

    if not Path("/proc/self/statm").exists():
        pytest.skip("memory in use is read from /proc")
    work(30)
    before = resident_megabytes()
    work(100)
    assert resident_megabytes() - before < 30  # any of the buffers would leave 36 to 400
    for _ in range(5):
        Session(folder).close()


def test_xla_stays_as_it_was_where_tensorflow_is_imported(session):
    answer = session.run("compiled", {"x": np.eye(3, dtype=np.float32)})
    np.testing.assert_array_equal(answer["y"], np.arange(12.0).reshape(3, 4))


def test_without_importing_tensorflow(folder):
    """In a fresh process: no TensorFlow, XLA off, nothing printed, and a later import works as ever."""
    script = """
import sys
from serving.session import Session, SessionError
with Session(sys.argv[1]) as session:
    assert session.run("serving_default", {"text": [b"dog"]})["number"] == [1]
    try:
        session.run("compiled", {"x": [[1.0, 2.0, 3.0]]})
    except SessionError as error:
        assert "XLA compilation disabled" in str(error), error
    else:
        raise AssertionError("XLA is on")
    assert not [name for name in sys.modules if name.startswith("tensorflow")]
    print("answered", flush=True)
    import ssl, hashlib
    import tensorflow as tf
    from tensorflow.core.protobuf import meta_graph_pb2
    assert tf.compat.v1.MetaGraphDef is meta_graph_pb2.MetaGraphDef
    loaded = tf.saved_model.load(sys.argv[1])
    assert loaded.signatures["serving_default"](text=tf.constant(["cat"]))["number"].numpy() == [0]
    assert session.run("serving_default", {"text": [b"cat"]})["number"] == [0]
    import keras
    assert keras.ops.convert_to_numpy(keras.layers.Dense(2)(tf.ones([1, 3]))).shape == (1, 2)
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "answered\nimported\n"


def test_loading_prints_nothing(folder):
    script = "import sys; from serving.session import Session; Session(sys.argv[1]).close()"
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", script, folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
