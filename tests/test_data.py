"""Finding, splitting and feeding data: what a user's folder becomes."""

import collections
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models import GraftError
from pipelines import data, manifests, sources, splits
from tests.conftest import write_png_folder


def row(label, identity, split=""):
    return {"id": identity, "path": f"{identity}.png", "label": label, "group": identity, "split": split}


def split_of(tables):
    return {r["id"]: name for name, table in tables.items() for r in table.to_pylist()}


# ---- finding files


def test_class_folders_and_split_folders(tmp_path):
    write_png_folder(tmp_path / "plain", classes=2, per_class=2)
    found = sources.find_images(str(tmp_path / "plain"))
    assert [(example.split, example.labels) for example in found] == [("", ("class0",))] * 2 + [("", ("class1",))] * 2
    for name in ("train", "valid", "test"):
        write_png_folder(tmp_path / "split" / name, classes=2, per_class=1)
    found = sources.find_images(str(tmp_path / "split"))
    assert {(example.split, example.labels) for example in found} == {
        (split, (label,)) for split in ("train", "val", "test") for label in ("class0", "class1")
    }


def test_hidden_and_foreign_files_are_no_images(tmp_path):
    write_png_folder(tmp_path / "x", classes=2, per_class=1)
    (tmp_path / "x" / "class0" / "notes.txt").write_text("no image")
    shutil.copytree(tmp_path / "x" / "class0", tmp_path / "x" / ".thumbnails")
    assert len(sources.find_images(str(tmp_path / "x"))) == 2


def test_mistakes_in_a_folder_say_what_to_do(tmp_path):
    with pytest.raises(GraftError, match=r"--data nowhere: there is no such folder.*offline set: textures, digits"):
        sources.find_images("nowhere")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(GraftError, match="no images in this folder. Expected one folder per class"):
        sources.find_images(str(tmp_path / "empty"))
    write_png_folder(tmp_path / "one", classes=1)
    with pytest.raises(GraftError, match="only one class, 'class0'"):
        sources.find_images(str(tmp_path / "one"))
    write_png_folder(tmp_path / "loose", classes=2)
    shutil.copy(tmp_path / "loose" / "class0" / "000.png", tmp_path / "loose" / "stray.png")
    with pytest.raises(GraftError, match=r"stray.png is in no class folder"):
        sources.find_images(str(tmp_path / "loose"))


def test_a_class_with_one_image():
    found = [manifests.Example("", (label,), str(index)) for index, label in enumerate("aabbc")]
    with pytest.raises(GraftError, match="Class c has one image.*--min-per-class 2"):
        sources.drop_small_classes(found, 0)
    assert sources.drop_small_classes(found, 2) == (found[:4], ["c"])
    with pytest.raises(GraftError, match="--min-per-class 3 leaves 0 of 3 classes"):
        sources.drop_small_classes(found, 3)


# ---- splits


def test_made_splits_are_70_15_15_per_class_and_depend_on_content_only():
    rows = [row(label, f"{label}{index:03}") for label in (0, 1) for index in range(100)]
    shuffled = list(np.random.default_rng(0).permutation(np.array(rows, dtype=object)))
    tables = splits.make_splits([dict(r) for r in rows], ["a", "b"], [])
    assert split_of(tables) == split_of(splits.make_splits([dict(r) for r in shuffled], ["a", "b"], []))
    for name, count in {"train": 70, "val": 15, "test": 15}.items():
        assert collections.Counter(tables[name]["label"].to_pylist()) == {0: count, 1: count}


def test_equal_content_never_straddles_made_splits_whatever_its_label():
    rows = [row(0, f"a{i}") for i in range(20)] + [row(1, f"b{i}") for i in range(20)]
    rows += [row(1, f"a{i}") for i in range(20)]  # the same pictures, labelled differently
    warnings = []
    tables = splits.make_splits(rows, ["a", "b"], warnings)
    names = collections.defaultdict(set)
    for name, table in tables.items():
        for r in table.to_pylist():
            names[r["id"]].add(name)
    assert all(len(splits) == 1 for splits in names.values())
    assert any("20 images are exact copies" in w for w in warnings)
    assert any("20 images appear several times, with different labels" in w for w in warnings)


def test_given_splits_are_kept_and_a_leak_is_told():
    rows = [row(0, f"a{i}", "train") for i in range(20)] + [row(1, f"b{i}", "train") for i in range(20)]
    rows += [row(0, "a0", "test"), row(0, "x", "test"), row(1, "y", "test")]
    warnings = []
    tables = splits.make_splits(rows, ["a", "b"], warnings)
    assert sorted(tables["test"]["id"].to_pylist()) == ["a0", "x", "y"]
    assert tables["val"].num_rows == 6 and tables["train"].num_rows == 34
    assert any("1 images of the given test set are also trained on" in w for w in warnings)


def test_a_class_without_training_images_is_an_error():
    rows = [row(0, "a", "train"), row(0, "b", "train"), row(0, "c", "train"), row(1, "d", "test"), row(0, "e", "test")]
    with pytest.raises(GraftError, match=r"Classes \['dog'\] have no training images"):
        splits.make_splits(rows, ["cat", "dog"], [])


def test_the_smallest_classes_that_work():
    tables = splits.make_splits([row(label, f"{label}{i}") for label in (0, 1) for i in range(3)], ["a", "b"], [])
    assert [tables[name].num_rows for name in splits.SPLIT_NAMES] == [2, 2, 2]
    with pytest.raises(GraftError, match="leaves no images to validate with"):
        splits.make_splits([row(label, f"{label}{i}") for label in (0, 1) for i in range(2)], ["a", "b"], [])


def test_unreadable_files_are_skipped_up_to_a_limit(tmp_path):
    folder = write_png_folder(tmp_path / "x", classes=2, per_class=25)
    for index in range(3):
        (folder / "class0" / f"{index:03}.png").write_bytes(b"no image at all")
    splits = data.load_images(sources.find_images(str(folder)))
    assert sum(table.num_rows for table in splits) == 47
    assert [r["reason"][:12] for r in splits.skipped] == ["not an image"] * 3
    assert any("3 files could not be read" in w for w in splits.warnings)
    for index in range(3, 5):
        (folder / "class0" / f"{index:03}.png").write_bytes(b"no image at all")
    with pytest.raises(
        GraftError, match=r"(?s)5 of 50 images cannot be read; up to 3 are skipped.*000.png: not an image"
    ):
        data.load_images(sources.find_images(str(folder)))


def test_rotated_and_16_bit_images_are_noticed(tmp_path):
    folder = write_png_folder(tmp_path / "x", classes=2, per_class=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 9), "red").save(folder / "class0" / "turned.jpg", exif=exif)
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(folder / "class1" / "deep.png")
    splits = data.load_images(sources.find_images(str(folder)))
    assert splits.white_level == 1023
    assert any("1 images carry an EXIF rotation" in w for w in splits.warnings)


# ---- tf.data


def test_order_and_augmentation_are_functions_of_seed_and_epoch(png_folder):
    from models.backbone import ImagePreprocess

    splits = data.load_images(sources.find_images(str(png_folder)))
    load = data.image_loader(ImagePreprocess((16, 16)), 255, "flip-crop")

    def epoch(number, seed=0):
        batches = data.dataset(splits.train, load, class_count=3, batch_size=8, epoch=number, training=True, seed=seed)
        return [np.concatenate(part) for part in zip(*batches.as_numpy_iterator())]

    images, _, _, rows = epoch(3)
    again_images, _, _, again_rows = epoch(3)
    np.testing.assert_array_equal(rows, again_rows)
    np.testing.assert_array_equal(images, again_images)
    other_images, _, _, other_rows = epoch(4)
    assert (rows != other_rows).any() and (epoch(3, seed=1)[3] != rows).any()
    first = {r: image for r, image in zip(rows, images) if r >= 0}
    second = {r: image for r, image in zip(other_rows, other_images) if r >= 0}
    assert all(np.abs(first[r] - second[r]).max() > 1 for r in first)  # another crop in another epoch


def test_batches_of_several_parts_hold_one_part_each():
    """Texts of different lengths: every row once, each batch of one shape, and a row that all share."""
    lengths, sizes = (4, 8, 16), (10, 7, 1)
    part_of = np.repeat([0, 1, 2], sizes)[np.random.default_rng(0).permutation(18)]
    places = np.array([(part_of[:row] == part_of[row]).sum() for row in range(18)])
    parts = []
    for part, (length, size) in enumerate(zip(lengths, sizes)):
        tokens = np.full((size, length), part, np.int32)
        tokens[:, 0] = np.arange(size)
        parts.append([tokens, np.full((1, length), part, np.float32)])
    table = pa.table({"label": np.arange(18) % 3, "weight": np.ones(18, np.float32)})
    orders = []
    for epoch in (0, 1):
        seen, found = [], []
        batches = data.cached_dataset(
            table, parts, part_of, places, class_count=3, batch_size=4, epoch=epoch, training=True, seed=5
        )
        assert batches.element_spec[0][0].shape.as_list() == [4, None]
        for (tokens, shared), targets, weights, rows in batches.as_numpy_iterator():
            (part,) = set(tokens[:, 1])
            assert tokens.shape[1] == shared.shape[1] == lengths[part] and (shared == part).all()
            real = rows >= 0
            assert (part_of[rows[real]] == part).all() and (places[rows[real]] == tokens[real, 0]).all()
            assert (targets[real].argmax(1) == rows[real] % 3).all() and (weights == real).all()
            seen += rows[real].tolist()
            found.append(part)
        assert sorted(seen) == list(range(18)) and len(found) == 3 + 2 + 1
        orders.append((seen, found))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_batches_of_workers_and_of_a_resumed_epoch_are_parts_of_the_whole(mixup):
    import tensorflow as tf

    table = pa.table({"path": [str(number) for number in range(22)], "label": [0, 1] * 11, "weight": np.ones(22, "f4")})

    def load(path, seed):
        return tf.fill([2, 2, 3], tf.strings.to_number(path))

    def epoch(**more):
        common = {"class_count": 2, "batch_size": 6, "epoch": 3, "training": True, "seed": 1, "mixup": mixup}
        return [[x.numpy() for x in batch] for batch in data.dataset(table, load, **common, **more)]

    def same(found, expected):
        assert len(found) == len(expected)
        for batch, other in zip(found, expected):
            for x, y in zip(batch, other, strict=True):
                np.testing.assert_array_equal(x, y)

    whole = epoch()
    assert len(whole) == 4
    shares = [epoch(shard=(number, 3)) for number in range(3)]
    same([[np.concatenate(parts) for parts in zip(*batches)] for batches in zip(*shares)], whole)
    same(epoch(first_batch=3), whole[3:])
    same(epoch(first_batch=4), [])
    same(epoch(first_batch=2, shard=(1, 2)), [[x[3:] for x in batch] for batch in whole[2:]])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cached_batches_of_workers_are_parts_of_the_whole(count):
    table = pa.table({"label": [0, 1] * 11, "weight": np.ones(22, "f4")})
    parts = [[np.arange(10.0)[:, None]], [np.arange(10.0, 22.0)[:, None]]]
    part_of, places = np.repeat([0, 1], (10, 12)), np.concatenate([np.arange(10), np.arange(12)])

    def epoch(**more):
        common = {"class_count": 2, "batch_size": 6, "training": True, "seed": 1}
        batches = data.cached_dataset(table, parts, part_of, places, **common, **more)
        return [[inputs[0].numpy(), *(x.numpy() for x in rest)] for inputs, *rest in batches]

    shares = [epoch(shard=(number, count), first_batch=1) for number in range(count)]
    found = [[np.concatenate(parts) for parts in zip(*batches)] for batches in zip(*shares)]
    for batch, other in zip(found, epoch()[1:], strict=True):
        for x, y in zip(batch, other, strict=True):
            np.testing.assert_array_equal(x, y)
