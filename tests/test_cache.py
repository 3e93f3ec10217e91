"""The cache: whole entries or none, whatever kills the writer; found again by content; memory or files."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from models.backbone import load_backbone
from models.classifier import Classifier
from models.split import split
from pipelines import cache, steps, training
from pipelines.data import image_loader, load_images, targets_of
from pipelines.sources import find_images
from tests.conftest import tiny_backbone
from tests.test_training import losses, make_config

SHAPES = [(3, 2), (5,)]


def rows_of(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=(count, *shape)).astype("float32") for shape in SHAPES]


class Computing:
    """A `compute` function that counts how often it was asked."""

    def __init__(self, arrays, batch=4):
        self.arrays, self.batch, self.calls = arrays, batch, 0

    def __call__(self):
        self.calls += 1
        return self.batches()

    def batches(self):
        for start in range(0, len(self.arrays[0]), self.batch):
            yield [array[start : start + self.batch] for array in self.arrays]


def test_an_entry_is_computed_once_and_found_again(tmp_path):
    arrays = rows_of(10)
    compute = Computing(arrays)
    for found in (False, True, True):
        result = cache.activations(tmp_path, "key", 10, compute)
        assert result.found == found and result.in_memory and result.where == str(tmp_path / "key")
        for array, expected in zip(result.arrays, arrays):
            np.testing.assert_array_equal(array[np.array([7, 0, 7])], expected[[7, 0, 7]])
    assert compute.calls == 1
    assert result.nbytes == 10 * (6 + 5) * 4


def test_beyond_the_memory_budget_rows_are_read_from_files(tmp_path):
    arrays = rows_of(10)
    result = cache.activations(tmp_path, "key", 10, Computing(arrays), memory_bytes=100)
    assert not result.in_memory
    order = np.random.default_rng(1).permutation(10)
    for array, expected in zip(result.arrays, arrays):
        np.testing.assert_array_equal(array[order], expected[order])
    assert cache.activations(None, "key", 10, Computing(arrays), memory_bytes=100) is None
    kept = cache.activations(None, "key", 10, Computing(arrays))
    assert kept.where == "memory"
    np.testing.assert_array_equal(kept.arrays[1], arrays[1])


@pytest.mark.parametrize("damage", ["cut", "missing", "other shape"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    arrays = rows_of(10)
    cache.activations(tmp_path, "key", 10, Computing(arrays))
    file = tmp_path / "key" / "1.npy"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "missing":
        file.unlink()
    else:
        np.save(file, arrays[1][:9])
    compute = Computing(arrays)
    result = cache.activations(tmp_path, "key", 10, compute)
    assert compute.calls == 1 and not result.found
    np.testing.assert_array_equal(result.arrays[1], arrays[1])


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def compute():
        yield [array[:4] for array in rows_of(10)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.activations(tmp_path, "key", 10, compute)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_entry_and_the_next_one_clears_up(tmp_path):
    script = f"""
        import pathlib, time
        from pipelines import cache
        from tests.test_cache import SHAPES, rows_of
        def compute():
            yield [array[:4] for array in rows_of(10)]
            print("writing", flush=True)
            time.sleep(60)
        cache.activations(pathlib.Path({str(tmp_path)!r}), "key", 10, compute)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [folder.name.startswith(".tmp-") for folder in tmp_path.iterdir()] == [True]
    compute = Computing(rows_of(10))
    cache.activations(tmp_path, "key", 10, compute)
    assert compute.calls == 1 and [folder.name for folder in tmp_path.iterdir()] == ["key"]


def test_a_full_disk_falls_back_to_memory(small_disk):
    arrays = [np.zeros((400, 10, 10), np.float32)]  # 160 KB, and the disk keeps 60 KB free

    (small_disk / "other").write_bytes(b"0" * 600_000)
    taken = []

    def compute():
        if not taken:
            taken.append((small_disk / "more").write_bytes(b"0" * 300_000))
        yield arrays

    result = cache.activations(small_disk, "key", 400, compute)
    assert result.where == "memory" and not (small_disk / "key").exists()


def test_a_place_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="cache cannot be kept in .*--cache-dir"):
        cache.activations(tmp_path / "file" / "x", "key", 10, Computing(rows_of(10)))


def test_the_key_depends_on_all_that_the_numbers_depend_on():
    def key(backbone, white_level=255, ids=("a", "b"), changes=()):
        digest = cache.model_digest(backbone.encoder)
        return cache.entry_key(digest, cut, backbone.preprocess, white_level, ids, *changes)

    cut, backbone = 2, tiny_backbone()
    first = key(backbone)
    assert key(tiny_backbone()) == first
    others = [key(backbone, 4095), key(backbone, ids=("b", "a")), key(backbone, changes=("flip-crop", 0.0, 2, 0))]
    others += [key(backbone, changes=("flip-crop", 0.0, 2, 1))]
    cut = 1
    others.append(key(backbone))
    weight = backbone.encoder.weights[0]
    weight.assign(weight + 1e-6)
    others.append(key(backbone))
    assert len({first, *others}) == 7


def test_the_key_of_a_kerashub_backbone_is_the_same_in_every_load(tiny_vit_preset):
    keys = set()
    for _ in range(2):
        backbone = load_backbone(str(tiny_vit_preset))
        keys.add(cache.model_digest(split(backbone, 2)[0]))
        keys.add(cache.model_digest(backbone.encoder))
    assert len(keys) == 2


def test_opening_an_entry_is_quick(tmp_path):
    arrays = [np.zeros((2000, 1280), np.float32)]
    cache.activations(tmp_path, "key", 2000, Computing(arrays, 64))
    started = time.perf_counter()
    result = cache.activations(tmp_path, "key", 2000, Computing(arrays, 64))
    assert result.found and result.seconds < 1 and time.perf_counter() - started < 1


# ---- in training


def train(splits, strategy=None, dropout=0.2, loader=None, **options):
    strategy = strategy or tf.distribute.get_strategy()
    config = make_config(**options)
    with strategy.scope():
        model = Classifier(tiny_backbone(dropout=dropout), len(splits.class_names), dropout=dropout, seed=1)

    def load_images(augmentation, random_erasing=0.0):
        return image_loader(model.backbone.preprocess, splits.white_level, augmentation, random_erasing, splits.plain)

    phases, logits_of = training.fit_two_phase(model, splits, loader or load_images, config, strategy)
    return phases, logits_of(splits.test)


@pytest.fixture(scope="module")
def splits(png_folder):
    return load_images(find_images(str(png_folder)))


@pytest.mark.parametrize("augmentation", ["none", "flip-crop"])
def test_cached_and_uncached_runs_agree(splits, tmp_path, augmentation):
    common = {"augmentation": augmentation, "head_solver": "sgd", "random_erasing": 0.3 * (augmentation != "none")}
    _, expected = plain = train(splits, cache="none", **common)
    for options in (
        {"cache": "memory"},
        {"cache_dir": str(tmp_path)},
        {"cache_dir": str(tmp_path), "cache_memory": 1e-6},
    ):
        phases, logits = train(splits, **{"cache": "auto", **options}, **common)
        np.testing.assert_allclose(losses(phases), losses(plain[0]), atol=1e-5)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Features of what is learned from, tensors at the cut of it and of the test set; and a view per epoch.
    assert len(list(tmp_path.iterdir())) == (3 if augmentation == "none" else 6)


def test_a_shallower_run_starts_from_what_a_deeper_one_left(splits, tmp_path):
    options = {"augmentation": "none", "cache_dir": str(tmp_path), "cache": "auto"}
    train(splits, depth="2", **options)

    def no_loader(augmentation):
        pytest.fail("the images were read again")

    _, logits = train(splits, depth="1", loader=no_loader, **options)
    _, expected = train(splits, depth="1", **{**options, "cache": "memory"})
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_row_that_all_examples_share_is_kept_once(tmp_path):
    rows, bias = rows_of(10)

    def compute():
        for start in (0, 4, 8):
            yield [rows[start : start + 4], bias[: 0 if start else 1]]

    for root in (tmp_path, tmp_path, None):
        arrays = cache.activations(root, "key", 10, compute).arrays
        np.testing.assert_array_equal(arrays[0][np.arange(10)], rows)
        assert arrays[1].shape == (1, 5)


def test_two_replicas_train_on_the_cache_as_one(splits, mirrored):
    options = {"cache": "memory", "head_solver": "sgd", "optimizer": "sgd", "dropout": 0.0}
    one, two = train(splits, **options)[0], train(splits, mirrored, **options)[0]
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5)


def test_lbfgs_finds_a_better_head_than_epochs_do(splits):
    slow, _ = train(splits, cache="none", depth="head")
    quick, logits = train(splits, cache="memory", depth="head")
    assert quick[0]["solver"] == "lbfgs" and quick[0]["weights"]["still"] == 0
    assert quick[0]["val_loss"] < slow[0]["val_loss"]
    loss, _ = steps.mean_loss_and_accuracy(targets_of(splits.test, 3), logits, multi_label=False)
    assert loss < 1.1  # guessing has log 3


def test_what_fits_nowhere_is_computed_in_every_epoch(splits, capsys):
    phases, _ = train(splits, cache="memory", cache_memory=1e-9, head_epochs=1, fine_tune_epochs=1)
    assert "solver" not in phases[0] and len(phases) == 2
    assert "larger than memory and disk allow" in capsys.readouterr().out
