"""Weights and data from PyPI wheels: checked, whole or absent, and said clearly when they cannot be had."""

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from models import GraftError, offline

REPOSITORY = pathlib.Path(__file__).parent.parent
FETCH = [sys.executable, "-m", "models.offline", "fetch"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The smallest wheel of the table."""
    folder, item = tmp_path_factory.mktemp("wheel"), offline.DATA["topics"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, f"{item['package']}=={item['version']}"], check=True)
    return folder / item["wheel"]


def left_behind(cache):
    return list(cache.rglob(".tmp-*"))


def test_fetch_unpacks_once_and_then_needs_no_network(cache, monkeypatch):
    folder = offline.fetch("topics")
    assert folder.is_relative_to(cache)
    assert "conversations:" in (folder / "sports.yml").read_text()
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert offline.fetch("topics") == folder
    assert not left_behind(cache)
    assert not list(cache.rglob("*.whl"))


def test_two_processes_at_once_both_succeed(cache):
    running = [subprocess.Popen([*FETCH, "topics"], cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1]
    assert "topics" in said[0]
    assert "BSD-3-Clause" in said[0]
    assert not left_behind(cache)


def test_killed_while_pip_runs_leaves_nothing_that_looks_whole(cache, wheel, tmp_path, monkeypatch):
    slow = tmp_path / "slow" / "pip"  # stands for a pip that waits for a slow network
    slow.mkdir(parents=True)
    (slow / "__init__.py").touch()
    (slow / "__main__.py").write_text("import time; time.sleep(4)")
    environment = os.environ | {"PYTHONPATH": str(slow.parent)}
    process = subprocess.Popen([*FETCH, "topics"], cwd=REPOSITORY, env=environment)
    for _ in range(200):
        time.sleep(0.05)
        if left_behind(cache):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name[:5] for path in (cache / "unpacked").iterdir()] == [".tmp-"]
    (cache / "wheels").mkdir()
    shutil.copy(wheel, cache / "wheels")
    assert (offline.fetch("topics") / "sports.yml").is_file()


def test_a_wheel_put_there_by_hand_is_enough(cache, wheel, no_network):
    with pytest.raises(GraftError, match="topics: pip could not get chatterbot_corpus") as error:
        offline.fetch("topics")
    assert not left_behind(cache)
    wheels = cache / "wheels"
    assert f"put that file into {wheels} by hand" in str(error.value)
    assert "pip download --no-deps chatterbot-corpus==1.3.3" in str(error.value)
    wheels.mkdir()
    shutil.copy(wheel, wheels)
    assert (offline.fetch("topics") / "sports.yml").is_file()


def test_a_wrong_hash_is_an_error_and_the_file_is_removed(cache, wheel):
    (cache / "wheels").mkdir(parents=True)
    wrong = cache / "wheels" / wheel.name
    wrong.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(GraftError, match="was removed") as error:
        offline.fetch("topics")
    assert hashlib.sha256(wheel.read_bytes() + b"\0").hexdigest() in str(error.value)
    assert offline.DATA["topics"]["sha256"] in str(error.value)
    assert not wrong.exists()
    assert not list((cache / "unpacked").iterdir())


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(GraftError, match=r"cannot be made: .*GRAFT_CACHE can name another place"):
        offline.fetch("topics")


def test_unknown_names_list_the_known_ones(cache):
    with pytest.raises(GraftError, match="resnet: nothing to fetch by this name; there are efficientnet_lite0"):
        offline.fetch("resnet")
    with pytest.raises(GraftError, match="cats: no image data set by this name; there are textures, digits"):
        offline.image_data_folder("cats")
    result = subprocess.run([*FETCH, "resnet"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("resnet: nothing to fetch")
    assert "Traceback" not in result.stderr


def test_textures(cache):
    folder = offline.image_data_folder("textures")
    assert offline.image_data_folder("textures") == folder
    tiles = {split: list((folder / split).glob("*/*.png")) for split in ("train", "test")}
    assert {split: len(paths) for split, paths in tiles.items()} == {"train": 1401, "test": 676}
    assert {path.parent.name for path in tiles["train"]} == {path.parent.name for path in tiles["test"]}
    assert len(list((folder / "train").iterdir())) == 15
    contents = {}
    for split, paths in tiles.items():
        pixels = [np.asarray(Image.open(path)) for path in paths]
        assert {(tile.shape, tile.dtype.name) for tile in pixels} == {((48, 48), "uint8")}
        assert min(tile.std() for tile in pixels) >= 1
        contents[split] = {tile.tobytes() for tile in pixels}
    assert not contents["train"] & contents["test"]
    right_edge_of_train = max(int(path.stem.split("x")[1]) for path in (folder / "train" / "brick").iterdir()) + 48
    left_edge_of_test = min(int(path.stem.split("x")[1]) for path in (folder / "test" / "brick").iterdir())
    assert right_edge_of_train <= 0.60 * 512
    assert left_edge_of_test >= 0.65 * 512
    assert not left_behind(cache)


def test_overlapping_tiles_for_benchmarks(cache):
    tiles = list(offline.image_data_folder("textures", stride=32).glob("*/*/*.png"))
    assert len(tiles) > 4000
    assert len(list(offline.image_data_folder("textures").glob("*/*/*.png"))) == 1401 + 676


def test_a_missing_library_says_how_to_install_it(cache):
    bare = [sys.executable, "-S", *FETCH[1:], "textures"]  # -S: without installed packages
    result = subprocess.run(bare, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "textures: its images lie in scikit-image; pip install 'graft[offline]'\n"
    assert not cache.exists()


def test_digits(cache):
    folder = offline.image_data_folder("digits")
    assert sorted(path.name for path in (folder / "train").iterdir()) == list("0123456789")
    counts = {split: len(list((folder / split).glob("*/*.png"))) for split in ("train", "test")}
    assert counts == {"train": 1352, "test": 445}
    images = np.stack([np.asarray(Image.open(path)) for path in (folder / "test").glob("*/*.png")])
    assert (images.shape, images.dtype) == ((445, 8, 8), np.uint8)
    assert (images.min(), images.max()) == (0, 255)


def test_imports_neither_tensorflow_nor_keras():
    code = "import sys, models.offline; print({'tensorflow', 'keras', 'sklearn', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_table_is_whole():
    for name, item in (offline.WEIGHTS | offline.DATA).items():
        assert all(item[key] for key in ("about", "package", "licence", "source")), name
        if "wheel" in item:
            assert item["wheel"].startswith(f"{item['package'].replace('-', '_')}-{item['version']}-"), name
            assert len(item["sha256"]) == 64, name
            assert item["member"], name
