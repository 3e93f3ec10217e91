"""serving/libraries.py: verification with the TensorFlow libraries of a server's release."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import tensorflow as tf

from models import GraftError
from serving import libraries
from serving.verify import main
from tests.test_verify import ROWS_OF_4, TEXT, add_one, save


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test, whose `wheels` are all that pip can get."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    return tmp_path / "cache"


def write_wheel(folder, name, version, files):
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        for file in files:
            wheel.writestr(file, file)


def test_libraries_are_unpacked_once(cache, monkeypatch):
    ops = "tensorflow_text/python/ops"
    files = ["tensorflow_text/__init__.py", f"{ops}/_regex_split_ops.so", f"{ops}/other.py"]
    write_wheel(cache / "wheels", "tensorflow_text", "2.20.0", files)
    wanted = ("tensorflow-text==2.20.0", [libraries.TEXT_OPS, libraries.TEXT_MARK])
    folder = libraries.fetch_libraries(*wanted)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(files[:2])
    assert folder.is_relative_to(cache) and os.listdir(cache / "libraries") == [folder.name]
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert libraries.fetch_libraries(*wanted) == folder


def test_libraries_that_cannot_be_had(cache, tmp_path, capsys):
    folder = save(tmp_path / "1", add_one, ROWS_OF_4)
    assert main([str(folder), "--libraries"]) == 2
    said = capsys.readouterr().out
    assert re.search(
        r"--libraries: pip could not get a wheel of tensorflow\S*==2\.20\.0 for Python 3\.\S+ on .*No matching "
        r"distribution .* put that wheel into .*cache/wheels by hand.*use another Python, or leave out --libraries",
        said,
    )
    assert said.splitlines()[5].startswith("warm-up: ")  # the other steps need no network
    assert os.listdir(cache / "libraries") == []


def test_text_ops_that_no_wheel_has(cache, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"an op: RegexSplitWithOffsets")
    said = r"uses ops of TF-Text, and no wheel .* of TensorFlow 2\.19\.1\. Leave out"
    with pytest.raises(GraftError, match=said), libraries.packages_with("2.19", tmp_path):
        pass
    assert not (cache / "libraries").exists()


def as_probabilities(text):
    length = tf.cast(tf.strings.length(text), tf.float32)
    return {"probabilities": tf.stack([1 / (1 + length), length / (1 + length)], axis=1)}


@pytest.mark.slow
def test_all_steps_with_other_libraries(cache, tmp_path, monkeypatch, capsys):
    """The installed libraries stand for those of a release; without a network there are no others."""
    folder = save(tmp_path / "1", as_probabilities, TEXT)
    own = libraries.library_folder(libraries.tensorflow_wheel("2.20.0")) / "tensorflow"
    own.mkdir(parents=True)
    for library in Path(tf.__file__).parent.glob(libraries.LIBRARY):
        (own / library.name).symlink_to(library)
    assert main([str(folder), "--libraries"]) == 2
    assert f"the process ran TensorFlow {tf.__version__}, expected 2.20.0" in capsys.readouterr().out
    monkeypatch.setitem(libraries.RELEASES, "2.20", (tf.__version__, "2.20.0"))
    own.parent.rename(libraries.library_folder(libraries.tensorflow_wheel(tf.__version__)))
    assert main([str(folder), "--libraries"]) == 0
    passed = f"libraries: TensorFlow {tf.__version__} passes all steps; 3 samples, largest difference 0"
    assert capsys.readouterr().out.splitlines()[-1] == passed


def split_words(text):
    """Words of a text, split by an op of TF-Text, as probabilities."""
    from tensorflow_text import regex_split

    words = tf.cast(regex_split(text, r"\s").row_lengths(), tf.float32)
    return {"probabilities": tf.stack([1 / (1 + words), words / (1 + words)], axis=1)}


@pytest.mark.acceptance
@pytest.mark.parametrize("target, function", [("2.20", split_words), ("2.19", as_probabilities)])
def test_all_steps_with_the_libraries_of_a_release(tmp_path, target, function, capsys):
    """Fetches the wheel of each release, 0.25 GB, and that of TF-Text."""
    folder = save(tmp_path / "1", function, TEXT)
    assert main([str(folder), "--target", target, "--libraries"]) == 0
    passed = f"libraries: TensorFlow {libraries.RELEASES[target][0]} passes all steps; 3 samples, largest difference 0"
    assert capsys.readouterr().out.splitlines()[-1] == passed
