"""TFDS sets and folders of Hugging Face's `datasets`, against the same images as plain files."""

import collections
import json
import pathlib
import shutil
import time

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow import csv, parquet

from models import GraftError
from pipelines.huggingface import huggingface_examples
from pipelines.records import Record, graft_splits, write_once
from pipelines.sounds import find_sounds
from pipelines.tfds import tfds_examples
from pipelines.transcripts import find_transcripts
from tests.conftest import write_png_folder

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "hf_datasets"  # made by the real `datasets`: see make*.py there
# What tables note of their columns, as `datasets` writes it.
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAFT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def split_folder(tmp_path_factory):
    """{train,validation,test}/class/ of PNG files, and one JPEG."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("split_folder")
    for seed, split in enumerate(("train", "validation", "test")):
        write_png_folder(folder / split, classes=2, per_class=3, side=8, seed=seed)
    with Image.open(folder / "train" / "class0" / "000.png") as image:
        image.save(folder / "train" / "class0" / "extra.jpg")
    return folder


@pytest.fixture(scope="session")
def tfds_folder(split_folder, tmp_path_factory):
    """A TFDS data folder with the images of `split_folder`, bytes as they are, and sets that cannot be used."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")

    def store(name, splits, **features):
        config = features.pop("config", None)
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version=features.pop("version", "1.0.0"),
            config=config,
            features=tfds.features.FeaturesDict(features),
            split_datasets={split: list(enumerate(rows)) for split, rows in splits.items()},
            data_dir=data_dir,
        )

    image, label = tfds.features.Image(), tfds.features.ClassLabel(names=["class0", "class1"])
    rows = {
        split.name: [{"image": str(file), "label": file.parent.name} for file in sorted(split.rglob("*.*"))]
        for split in split_folder.iterdir()
    }
    first = rows["train"][:2]
    store("colours", rows, image=image, label=label)
    store("colours_alone", {"train": first, "unsupervised": [{**first[0], "label": -1}]}, image=image, label=label)
    store("colours_unlabelled", {"train": first, "test": [{**first[0], "label": -1}]}, image=image, label=label)
    for version, count in (("1.2.0", 1), ("1.10.0", 2)):
        store("colours_sizes", {"train": first[:count]}, config="small", version=version, image=image, label=label)
    tags = tfds.features.Sequence(label)
    several = [{"image": row["image"], "tags": tags} for row, tags in zip(first, (["class1", "class0"], []))]
    store("colours_tags", {"train": several}, image=image, tags=tags)
    store("pictures", {"train": [{"image": first[0]["image"]}]}, image=image)
    floats = tfds.features.Image(shape=(2, 2, 1), dtype=np.float32)
    zeros = np.zeros((2, 2, 1), np.float32)
    store("floats", {"train": [{"image": zeros, "label": 0, "words": "x"}]}, image=floats, label=label, words=np.str_)
    coarse = tfds.features.ClassLabel(names=["upper"])
    both = {"image": first[0]["image"], "fine": first[0]["label"], "coarse": "upper"}
    store("two_labels", {"train": [both]}, image=image, fine=label, coarse=coarse)
    return data_dir


def contents(examples):
    """What a model sees of examples: split, labels and bytes, in any order."""
    return sorted((example.split, example.labels, pathlib.Path(example.path).read_bytes()) for example in examples)


def folder_contents(folder, splits):
    """The same of plain files, {split}/class/file; `splits` gives the folder's name for each split."""
    return sorted(
        (split, (file.parent.name,), file.read_bytes())
        for split, name in splits.items()
        for file in (folder / name).rglob("*.*")
    )


SPLITS = {"train": "train", "val": "validation", "test": "test"}


# ---------------------------------------------------------------- TFDS


def store_as_tfds(folder, data_dir, name):
    """Write FOLDER/{train,test}/CLASS/FILE as a prepared TFDS set, bytes as they are."""
    import tensorflow_datasets as tfds

    classes = sorted(path.name for path in (folder / "train").iterdir())
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=classes)}
        ),
        split_datasets={
            split.name: [
                (str(file), {"image": str(file), "label": file.parent.name}) for file in sorted(split.rglob("*.png"))
            ]
            for split in sorted(folder.iterdir())
        },
        data_dir=data_dir,
    )


def test_tfds_gives_the_files_it_was_made_of(tfds_folder, split_folder, cache):
    found = tfds_examples("tfds:colours", str(tfds_folder))
    assert contents(found) == folder_contents(split_folder, SPLITS)
    assert {pathlib.Path(example.path).suffix for example in found} == {".png", ".jpg"}
    assert all(pathlib.Path(example.path).is_relative_to(cache) for example in found)
    assert [example.path for example in found] == sorted(example.path for example in found)


def test_tfds_set_is_unpacked_once_and_again_when_it_changes(tfds_folder, tmp_path, cache):
    data_dir = tmp_path / "copy"
    shutil.copytree(tfds_folder / "colours", data_dir / "colours")
    first = tfds_examples("tfds:colours", str(data_dir))
    written = pathlib.Path(first[0].path).stat().st_mtime_ns
    assert tfds_examples("tfds:colours:1.0.0", str(data_dir)) == first
    assert pathlib.Path(first[0].path).stat().st_mtime_ns == written
    records = next((data_dir / "colours" / "1.0.0").glob("*train*"))
    records.touch()
    again = tfds_examples("tfds:colours", str(data_dir))
    assert contents(again) == contents(first)
    assert {example.path for example in again}.isdisjoint(example.path for example in first)
    assert len(list((cache / "data").iterdir())) == 2


def test_tfds_splits(tfds_folder):
    alone = tfds_examples("tfds:colours_alone", str(tfds_folder))
    assert [example.split for example in alone] == ["", ""]  # "unsupervised" is left out
    assert graft_splits(["train", "validation", "extra"]) == {"train": "train", "validation": "val"}
    assert graft_splits(["test", "extra"]) == {"test": ""}
    assert graft_splits(["all"]) == {"all": ""}


def test_tfds_unlabelled_images_are_left_out(tfds_folder, capsys):
    found = tfds_examples("tfds:colours_unlabelled", str(tfds_folder))
    assert [example.split for example in found] == ["train", "train"]
    assert "1 images without a label are left out" in capsys.readouterr().out


def test_tfds_newest_version_and_only_configuration(tfds_folder):
    assert len(tfds_examples("tfds:colours_sizes", str(tfds_folder))) == 2
    assert len(tfds_examples("tfds:colours_sizes/small:1.2.0", str(tfds_folder))) == 1


def test_tfds_default_configuration(tfds_folder, tmp_path):
    for name in ("large", "small"):
        shutil.copytree(tfds_folder / "colours_sizes" / "small", tmp_path / "colours_sizes" / name)
    shutil.rmtree(tmp_path / "colours_sizes" / "large" / "1.10.0")
    with pytest.raises(GraftError, match="several configurations of it: large, small. Name one"):
        tfds_examples("tfds:colours_sizes", str(tmp_path))
    noted = tmp_path / "colours_sizes" / ".config" / "metadata.json"
    noted.parent.mkdir()
    noted.write_text('{"default_config_name": "large"}')
    assert len(tfds_examples("tfds:colours_sizes", str(tmp_path))) == 1


def test_tfds_several_labels(tfds_folder):
    found = tfds_examples("tfds:colours_tags", str(tfds_folder))
    assert sorted(example.labels for example in found) == [(), ("class1", "class0")]


def test_tfds_label_by_name(tfds_folder):
    with pytest.raises(GraftError, match="found coarse, fine. .* Name the label with --label-column"):
        tfds_examples("tfds:two_labels", str(tfds_folder))
    assert tfds_examples("tfds:two_labels", str(tfds_folder), "coarse")[0].labels == ("upper",)
    assert tfds_examples("tfds:two_labels", str(tfds_folder), "fine")[0].labels == ("class0",)


def test_tfds_prepares_a_set_that_it_knows(split_folder, tmp_path):
    """One that is generated from local files stands for one that is downloaded."""
    import tensorflow_datasets as tfds

    class GraftColours(tfds.core.GeneratorBasedBuilder):  # known to TFDS as graft_colours from here on
        """Colours."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "label": tfds.features.ClassLabel(num_classes=2),
                "other": tfds.features.ClassLabel(num_classes=3),
            }
            features |= {"image": tfds.features.Image()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "other")
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for file in sorted((split_folder / "train").rglob("*.png")):
                yield str(file), {"image": str(file), "label": 0, "other": 2}

    found = tfds_examples("tfds:graft_colours", str(tmp_path))
    assert [example.labels for example in found] == [("2",)] * 6  # what the set is made for, not what is called label
    assert (tmp_path / "graft_colours" / "1.0.0" / "dataset_info.json").is_file()


def test_tfds_errors_name_what_is_wrong(tfds_folder):
    for data, label_column, message in (
        ("tfds:colour", "label", "knows no set of this name.*Did you mean tfds:colours.*Prepared in .* colours:1.0.0"),
        ("tfds:minst", "label", "Did you mean tfds:"),
        ("tfds:", "label", "is no name of a TFDS set. Expected tfds:NAME"),
        ("tfds:pictures", "label", "expected one label feature .* found none. The features of this set: image .Image"),
        ("tfds:floats", "label", "expected one image feature of 8 or 16 bits, found none.*image .Image, .*float32"),
        ("tfds:colours", "kind", "a label feature named 'kind'.*label .ClassLabel"),
        ("tfds:coco", "label", "expected one label feature"),  # before it is downloaded
        ("tfds:cifar10/none", "label", "cifar10 has no configuration 'none'; it has none"),
        ("tfds:voc/2070", "label", "voc has no configuration '2070'; of its .*, the nearest: 20"),
        ("tfds:cifar10:9.9.9", "label", "TFDS could not prepare cifar10:9.9.9 .* only: "),
    ):
        with pytest.raises(GraftError, match=f"(?s)--data {data}: .*{message}"):
            tfds_examples(data, str(tfds_folder), label_column)


def test_tfds_without_a_network_answers_in_five_seconds(tfds_folder, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nothing listens, on any machine
    start = time.monotonic()
    with pytest.raises(GraftError) as caught:
        tfds_examples("tfds:beans", str(tfds_folder))
    assert time.monotonic() - start < 5
    for part in (
        "beans/0.1.0 is not prepared",
        str(tfds_folder),
        "storage.googleapis.com",
        "colours:1.0.0",
        "tfds build",
    ):
        assert part in str(caught.value)


def test_tfds_damaged_records(tfds_folder, tmp_path, cache):
    shutil.copytree(tfds_folder / "colours", tmp_path / "tfds" / "colours")
    records = next((tmp_path / "tfds" / "colours" / "1.0.0").glob("*train*"))
    records.write_bytes(records.read_bytes()[:-50])
    with pytest.raises(GraftError, match="the split train in .* could not be read.*prepare the set again"):
        tfds_examples("tfds:colours", str(tmp_path / "tfds"))
    assert not list((cache / "data").iterdir())
    (records.parent / "features.json").write_text("{")
    with pytest.raises(GraftError, match="what TFDS prepared in .* could not be read"):
        tfds_examples("tfds:colours", str(tmp_path / "tfds"))


# ---------------------------------------------------------------- Hugging Face datasets


@pytest.mark.parametrize("layout", ["saved", "hub", "hub/data"])
def test_real_files_of_datasets(layout):
    found = huggingface_examples(FIXTURE / layout)
    assert contents(found) == folder_contents(FIXTURE / "files", SPLITS)
    assert huggingface_examples(FIXTURE / layout) == found


def test_real_files_of_datasets_of_sounds():
    found = find_sounds(str(FIXTURE / "sounds" / "saved"))
    assert collections.Counter((example.split, *example.labels) for example in found) == {
        ("train", "high"): 3, ("train", "low"): 3, ("test", "high"): 1, ("test", "low"): 1,
    }  # fmt: skip
    assert all(soundfile.info(example.path).frames == 400 for example in found)
    spoken = find_transcripts(str(FIXTURE / "sounds" / "hub"), text_column="sentence")
    assert [example.labels[0] for example in spoken if example.split == "test"] == [
        f"It is {name}, number 0!" for name in ("high", "low")
    ]
    with pytest.raises(GraftError, match=r"expected a label column called 'text'.*audio \(Audio\).*--text-column"):
        find_transcripts(str(FIXTURE / "sounds" / "hub"))
    with pytest.raises(GraftError, match=r"expected one image column, found none.*audio \(Audio\)"):
        huggingface_examples(FIXTURE / "sounds" / "saved")


def test_sounds_in_tables_without_notes(tmp_path):
    sounds = images(b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb", b"RIFF....WAVE", b"?")
    write_parquet(tmp_path / "train.parquet", None, sound=sounds, label=list("aaabbb"))
    endings = [pathlib.Path(example.path).suffix for example in huggingface_examples(tmp_path, kind="Audio")]
    assert sorted(endings) == [".bin", ".flac", ".mp3", ".mp3", ".ogg", ".wav"]


def test_one_saved_table_is_left_to_split():
    found = huggingface_examples(FIXTURE / "saved" / "train")
    assert contents(found) == folder_contents(FIXTURE / "files", {"": "train"})


def test_class_folders_are_not_of_this_kind(tmp_path, split_folder):
    assert huggingface_examples(FIXTURE / "files") is None
    assert huggingface_examples(split_folder) is None
    assert huggingface_examples(tmp_path / "missing") is None
    # metadata that say nothing of labels, beside class folders that do
    shutil.copytree(FIXTURE / "files", tmp_path / "files")
    (tmp_path / "files" / "train" / "metadata.csv").write_text("file_name,caption\ncat/0.png,a cat\n")
    assert huggingface_examples(tmp_path / "files") is None
    (tmp_path / "manifests").mkdir()
    parquet.write_table(pa.table({"path": ["a.png"], "label": ["x"]}), tmp_path / "manifests" / "train.parquet")
    assert huggingface_examples(tmp_path / "manifests") is None


def write_parquet(file, features=FEATURES, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file)
    return file


def images(*contents):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": None} if isinstance(content, bytes) else content for content in contents]
    return pa.array(rows, kind)


def test_lists_of_labels_and_groups(tmp_path):
    """`datasets` wrote lists as Sequence, as a JSON list and as List, over the years."""
    named = FEATURES["label"]
    for index, tags in enumerate(
        ({"feature": named, "_type": "Sequence"}, [named], {"feature": named, "_type": "List"})
    ):
        file = tmp_path / str(index) / "train.parquet"
        features = {"image": {"_type": "Image"}, "tags": tags, "group": {"_type": "Value", "dtype": "int64"}}
        write_parquet(file, features, image=images(PNG, PNG + b"2"), tags=[[1, 0], []], group=[7, 8])
        found = huggingface_examples(file.parent)
        assert [(example.labels, example.group) for example in found] == [(("dog", "cat"), "7"), ((), "8")]


def test_tables_without_notes_go_by_their_types(tmp_path, cache):
    write_parquet(
        tmp_path / "train.parquet", None, picture=images(PNG, PNG + b"2"), label=["yes", "x/../../../../../no"]
    )
    found = huggingface_examples(tmp_path)
    assert {example.labels for example in found} == {("yes",), ("x/../../../../../no",)}
    for example in found:  # and no label leads out of the cache
        assert pathlib.Path(example.path).resolve().is_relative_to(cache / "data")


def test_unlabelled_rows_are_left_out(tmp_path, capsys):
    write_parquet(tmp_path / "train.parquet", image=images(PNG, PNG, PNG), label=[0, -1, None])
    assert [example.labels for example in huggingface_examples(tmp_path)] == [("cat",)]
    assert "2 images without a label" in capsys.readouterr().out


def test_images_that_a_table_names_stay_where_they_are(tmp_path, png_folder):
    file = png_folder / "class0" / "000.png"
    shutil.copy(file, tmp_path / "near.png")
    rows = images({"bytes": None, "path": str(file)}, {"bytes": None, "path": "near.png"})
    write_parquet(tmp_path / "train.parquet", image=rows, label=[0, 1])
    assert {example.path for example in huggingface_examples(tmp_path)} == {str(file), str(tmp_path / "near.png")}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_image_folder_with_metadata(tmp_path, suffix):
    """One metadata file per split folder, and one for all of them: the same examples."""
    for where in ("each", "whole"):
        folder = tmp_path / where
        rows = []
        for file in sorted((FIXTURE / "files").rglob("*.*")):
            split, label, _ = file.relative_to(FIXTURE / "files").parts
            name = f"{label}-{file.name}"
            (folder / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / split / name)
            rows.append({"file_name": f"{split}/{name}", "label": label, "site": split[0]})
        if where == "whole":
            write_table(folder / f"metadata.{suffix}", rows)
        else:
            for split in SPLITS.values():
                chosen = [row for row in rows if row["file_name"].startswith(split)]
                chosen = [row | {"file_name": row["file_name"].split("/")[1]} for row in chosen]
                write_table(folder / split / f"metadata.{suffix}", chosen)
        found = huggingface_examples(folder, group_column="site")
        assert contents(found) == folder_contents(FIXTURE / "files", SPLITS)
        assert {example.group for example in found} == {"t", "v"}


def write_table(file, rows):
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".parquet":
        parquet.write_table(table, file)
    elif file.suffix == ".csv":
        csv.write_csv(table, file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metadata_errors(tmp_path):
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,label\nmissing.png,cat\n")
    with pytest.raises(GraftError, match="metadata.csv: 1 of 1 files do not exist(?s:.*)missing.png"):
        huggingface_examples(tmp_path)
    shutil.copy(FIXTURE / "files" / "train" / "cat" / "0.png", tmp_path / "there.png")
    metadata.write_text("file_name,kind\nthere.png,cat\n")
    with pytest.raises(GraftError, match="no column 'label'; its columns: file_name, kind(?s:.*)--label-column"):
        huggingface_examples(tmp_path)
    assert huggingface_examples(tmp_path, "kind")[0].labels == ("cat",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "there.png", "kind": "cat"}\n')
    with pytest.raises(GraftError, match="metadata.csv and metadata.jsonl both name its files"):
        huggingface_examples(tmp_path)


def test_damaged_and_incomplete_tables(tmp_path, cache):
    saved = tmp_path / "saved"
    shutil.copytree(FIXTURE / "saved", saved)
    arrow = saved / "train" / "data-00000-of-00001.arrow"
    whole = arrow.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"x" * 1000):
        arrow.write_bytes(damaged)
        with pytest.raises(GraftError, match="data-00000-of-00001.arrow could not be read: .*It is damaged"):
            huggingface_examples(saved)
    arrow.unlink()
    with pytest.raises(GraftError, match="data-00000-of-00001.arrow is missing"):
        huggingface_examples(saved)
    (saved / "train" / "state.json").write_text("{")
    with pytest.raises(GraftError, match="state.json could not be read"):
        huggingface_examples(saved)
    shutil.copytree(FIXTURE / "hub", tmp_path / "hub")
    (tmp_path / "hub" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(GraftError, match="1 of 2 files of the split train are there"):
        huggingface_examples(tmp_path / "hub")
    assert not (cache / "data").exists()


def test_table_errors(tmp_path):
    def refused(message, features=FEATURES, name="train-00000-of-00001", **columns):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_parquet(folder / f"{name}.parquet", features, **columns)
        with pytest.raises(GraftError, match=message):
            huggingface_examples(folder)

    text = {"_type": "Value", "dtype": "string"}
    refused("one image column, found none. Its columns: label .Value", {"label": text}, label=["a"])
    features = {"image": {"_type": "Image"}, "caption": text}
    refused("a label column called 'label', .* image .Image., caption", features, image=images(PNG), caption=["a"])
    refused("row 2: label 5, but the set names only 2 classes", image=images(PNG, PNG), label=[0, 5])
    refused("row 1: it holds no image, neither bytes nor a path", image=images(None), label=[0])
    absent = images({"bytes": None, "path": "absent.png"})
    refused("row 1: there is no file absent.png, which the table names", image=absent, label=[0])
    refused("none of its 1 images is labelled", image=images(PNG), label=[-1])


def test_label_by_name_in_tables(tmp_path):
    named = {"names": ["a"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "fine": named, "coarse": named | {"names": ["b"]}}
    write_parquet(tmp_path / "train.parquet", features, image=images(PNG), fine=[0], coarse=[0])
    with pytest.raises(GraftError, match="found fine, coarse. .*--label-column"):
        huggingface_examples(tmp_path)
    assert huggingface_examples(tmp_path, "coarse")[0].labels == ("b",)
    with pytest.raises(GraftError, match="no column 'patient'.*Correct --group-column"):
        huggingface_examples(tmp_path, "coarse", "patient")


def test_several_configurations(tmp_path):
    for name in ("fine", "coarse"):
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", image=images(PNG), label=[0])
    with pytest.raises(GraftError, match="several configurations: coarse, fine. Give one of them"):
        huggingface_examples(tmp_path)
    shutil.rmtree(tmp_path / "fine")
    assert len(huggingface_examples(tmp_path)) == 1


def test_set_is_whole_or_absent(cache):
    """A set that breaks off leaves nothing that the next run could take for the whole."""

    def records():
        yield Record("", ("a",), PNG)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_once("broken", 2, records)
    assert not list((cache / "data").iterdir())
