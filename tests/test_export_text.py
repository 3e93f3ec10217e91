"""serving/export_text.py: strings in, the answers of training out, in a fresh process and in stock servers' ops."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text as tf_text

from models import GraftError
from models.classifier import Classifier
from models.text import load_text_folder
from models.text_inputs import encoder_inputs, tokenize
from serving.answer_checks import check_answers
from serving.export_text import export_text_classifier
from serving.session import Session
from serving.static_checks import CheckFailed, check_layout, check_ops, read_op_list
from serving.verify import verify
from tests import tiny_text_presets

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
ROOT = pathlib.Path(__file__).resolve().parents[1]
CLASSES = ["Frage", "answer", "回答"]
LENGTH = 24  # tokens that are kept
HARD = [b"", b" ", b"a\xff\xfeb", b"\xe6\x97", b"nul\0inside", "🙂👩‍👩‍👧".encode(), "שלום עולם مرحبا".encode()]
HARD += [b"The quick brown fox jumps over the lazy dog.", b"word " * 20_000, b"q" * 100_000, "日本".encode() * 17_000]


def tiny_classifier(folder, multi_label: bool = False):
    """(classifier, its preprocessing) of a folder; the head's kernel tells texts apart."""
    backbone = load_text_folder(pathlib.Path(folder))
    model = Classifier(backbone, len(CLASSES), multi_label=multi_label)
    model.head.kernel.assign(model.head.kernel / np.float32(np.abs(model.head.kernel).max()))
    return model, dataclasses.replace(backbone.preprocess, sequence_length=LENGTH)


def training_answers(model, preprocess, texts, second=None, activation=tf.nn.softmax) -> np.ndarray:
    """Probabilities as training computes them: in batches padded to a bucket."""
    second = None if second is None else tf.constant(second)
    inputs = encoder_inputs(*tokenize(tf.constant(texts), preprocess, second), preprocess, LENGTH)
    return activation(model(inputs, training=False)).numpy()


def random_texts(count: int) -> list[bytes]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz    éüß,.!'日🙂م"
    return ["".join(draw.choices(letters, k=draw.randint(0, 150))).encode() for _ in range(count)]


@pytest.fixture(scope="module")
def bert():
    return tiny_classifier(FIXTURES / "text" / "bert")


@pytest.fixture(scope="module")
def folder(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "1"
    export_text_classifier(*bert, CLASSES, folder, details={"run": "tiny run"})
    return folder


@pytest.fixture(scope="module")
def session(folder):
    with Session(folder) as session:
        yield session


def test_signatures(session):
    text, error = {"text": ("string", (None,))}, ("string", (None,))
    answers = {"labels": ("string", (None, 3)), "scores": ("float32", (None, 3))}
    answers |= {"probabilities": ("float32", (None, 3)), "error": error}
    assert session.signatures == {
        "serving_default": {"inputs": text, "outputs": answers},
        "features": {"inputs": text, "outputs": {"features": ("float32", (None, 16)), "error": error}},
    }


def test_a_fresh_process_answers_as_training(bert, folder):
    texts = HARD + random_texts(40)
    expected = training_answers(*bert, texts)
    assert np.ptp(expected, axis=0).max() > 0.01  # the texts do differ
    facts = verify(folder, texts, expected)
    assert facts["files"] == len(texts)
    assert facts["largest_difference"] <= 1e-5 and facts["largest_row_difference"] <= 1e-5
    assert facts["missing_in_2.19"] == []


def test_byte_pairs_in_a_fresh_process(tmp_path):
    model, preprocess = tiny_classifier(FIXTURES / "text" / "gpt2")
    export_text_classifier(model, preprocess, CLASSES, tmp_path / "1")
    texts = HARD + random_texts(20)
    facts = verify(tmp_path / "1", texts, training_answers(model, preprocess, texts))
    assert facts["largest_difference"] <= 1e-5 and facts["missing_in_2.19"] == []
    graph, _ = check_layout(tmp_path / "1")
    ops, _ = check_ops(graph, "2.19")
    assert "RegexSplitWithOffsets" in ops and not [op for op in ops if "Mutable" in op]


def test_rows_do_not_depend_on_their_neighbours(session):
    alone = [session.run("serving_default", {"text": [text]})["probabilities"][0] for text in HARD]
    together = session.run("serving_default", {"text": HARD})
    np.testing.assert_allclose(together["probabilities"], alone, atol=1e-6)
    assert list(together["error"]) == [b""] * len(HARD)


def test_no_texts(session):
    served = session.run("serving_default", {"text": []})
    shapes = {name: values.shape for name, values in served.items()}
    assert shapes == {"labels": (0, 3), "scores": (0, 3), "probabilities": (0, 3), "error": (0,)}
    assert session.run("features", {"text": []})["features"].shape == (0, 16)


def test_features(bert, session):
    model, preprocess = bert
    served = session.run("features", {"text": HARD})["features"]
    inputs = encoder_inputs(*tokenize(tf.constant(HARD), preprocess), preprocess, LENGTH)
    np.testing.assert_allclose(served, model.features(inputs).numpy(), atol=1e-5)


def test_labels_and_scores_are_aligned_best_first(session):
    served = session.run("serving_default", {"text": HARD})
    for labels, scores, probabilities in zip(served["labels"], served["scores"], served["probabilities"]):
        order = np.argsort(-probabilities)
        assert [label.decode() for label in labels] == [CLASSES[index] for index in order]
        np.testing.assert_array_equal(scores, probabilities[order])


def test_extra_assets(bert, folder):
    assert (folder / "assets.extra/labels.txt").read_text("utf-8").splitlines() == CLASSES
    details = json.loads((folder / "assets.extra/graft.json").read_text("utf-8"))
    assert details["run"] == "tiny run" and details["pairs"] is False and details["multi_label"] is False
    assert details["backbone"] == "bert" and details["class_names"] == CLASSES
    assert details["preprocess"]["sequence_length"] == LENGTH
    assert details["weights"]["kept_as"] == "variables" and "in no convolution" in details["weights"]["why"]
    assert details["preprocess"]["identity"] == bert[1].identity
    assert not [file for file in folder.rglob("*") if file.is_file() and str(ROOT).encode() in file.read_bytes()]


def test_without_importing_tensorflow(folder):
    code = "import sys; from serving.session import Session\n"
    code += f"answer = Session({str(folder)!r}).run('serving_default', {{'text': [b'dog']}})\n"
    code += "print(sorted(answer), 'tensorflow' in sys.modules, 'tensorflow_text' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['error', 'labels', 'probabilities', 'scores'] False False\n", done.stderr


def test_pairs(bert, tmp_path):
    model, preprocess = bert
    export_text_classifier(model, preprocess, CLASSES, tmp_path / "1", pairs=True)
    first, second = HARD, HARD[::-1]
    expected = training_answers(model, preprocess, first, second)
    facts = verify(tmp_path / "1", list(zip(first, second)), expected)
    assert facts["largest_difference"] <= 1e-5
    with Session(tmp_path / "1") as session:
        with pytest.raises(CheckFailed, match=r"inputs \{'text_[ab]'.*expected a single one, of strings"):
            check_answers(session, first, expected, 1e-5, CLASSES)
        assert sorted(session.signatures["features"]["inputs"]) == ["text_a", "text_b"]
        assert session.run("serving_default", {"text_a": [], "text_b": []})["scores"].shape == (0, 3)


def test_several_labels_are_chosen_by_their_thresholds(tmp_path):
    model, preprocess = tiny_classifier(FIXTURES / "text" / "bert", multi_label=True)
    expected = training_answers(model, preprocess, HARD, activation=tf.sigmoid)
    thresholds = np.median(expected, axis=0) + 1e-6  # so that each class is chosen for some
    export_text_classifier(model, preprocess, CLASSES, tmp_path / "1", thresholds=thresholds)
    with Session(tmp_path / "1") as session:
        served = session.run("serving_default", {"text": HARD})
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-5)
    assert served["chosen"].any(axis=0).all() and not served["chosen"].all(axis=0).any()


def test_class_name_that_is_no_line_of_text(bert, tmp_path):
    with pytest.raises(GraftError, match=r"class name 'a\\nb': labels\.txt needs one line of UTF-8 text"):
        export_text_classifier(*bert, ["a\nb", *CLASSES[1:]], tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_an_op_that_the_older_server_lacks_is_named(tmp_path):
    """KerasHub's default way to shorten pairs."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serve(text):
        words = tf.strings.split(text)
        (trimmed,) = tf_text.RoundRobinTrimmer(3).trim([words])
        return {"words": trimmed.row_lengths()}

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": serve})
    graph, _ = check_layout(tmp_path / "1")
    assert check_ops(graph, "2.20")[1] == ["TFText>RoundRobinTrim"]
    with pytest.raises(
        CheckFailed, match=r"ops that TF Serving 2\.19 lacks: TFText>RoundRobinTrim \(function \w+, node"
    ):
        check_ops(graph, "2.19")


def test_ops_of_tf_text():
    for target in ("2.19", "2.20"):
        assert {"RegexSplitWithOffsets", "SentencepieceTokenizeOp", "MatMul"} <= read_op_list(target)
    assert {"TFText>RoundRobinTrim", "TFText>Utf8Binarize"} <= read_op_list("2.20") - read_op_list("2.19")


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_text_presets.MODELS)
def test_every_family(family, tmp_path):
    """A preset of KerasHub, served from strings: 500 of them, in ops of both servers."""
    model, preprocess = tiny_classifier(tiny_text_presets.write(family, tmp_path / "preset"))
    export_text_classifier(model, preprocess, CLASSES, tmp_path / "1")
    texts = HARD + random_texts(500 - len(HARD))
    facts = verify(tmp_path / "1", texts, training_answers(model, preprocess, texts), target="2.19")
    assert facts["largest_difference"] <= 1e-5 and facts["files"] == 500


@pytest.mark.slow
@pytest.mark.parametrize("family", ["biobert", "llama3", "t5", "xlmr", "albert", "deberta"])
def test_folders_of_transformers(family, tmp_path):
    model, preprocess = tiny_classifier(FIXTURES / "text" / family)
    export_text_classifier(model, preprocess, CLASSES, tmp_path / "1")
    texts = HARD + random_texts(89)
    facts = verify(tmp_path / "1", texts, training_answers(model, preprocess, texts), target="2.19")
    assert facts["largest_difference"] <= 1e-5 and facts["files"] == 100


@pytest.mark.slow
def test_unseen_words_take_no_memory(tmp_path):
    """The short form of tests/acceptance/text_memory.py: after the warm-up, a megabyte per 3,000 requests at most."""
    code = "import sys; from tests.acceptance.text_memory import export, measure\n"
    shutil.rmtree(tmp_path / "1", ignore_errors=True)
    subprocess.run([sys.executable, "-c", f"{code}export({str(tmp_path / '1')!r})"], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(*measure({str(tmp_path / '1')!r}, 6000))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    start, _, end = map(float, done.stdout.split())
    assert end - start < 10, done.stdout
