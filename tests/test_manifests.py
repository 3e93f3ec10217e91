"""Manifests: tables of paths and labels as data, and splits that keep patients and customers whole."""

import collections
import itertools
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from models import GraftError
from pipelines import data, splits
from pipelines.config import parse_config
from pipelines.data import targets_of
from pipelines.image import check_request
from pipelines.manifests import Example
from pipelines.sources import drop_small_classes, find_images, is_multi_label
from tests.conftest import write_png_folder

ROWS = [
    {"path": "photos/a.png", "label": "007", "group": "2020-01-01", "split": "train"},
    {"path": "photos/b, b.png", "label": "NA", "group": "", "split": "test"},
    {"path": "photos/c.png", "label": "007", "group": "2020-01-02", "split": "validation"},
    {"path": "photos/d.png", "label": "naïve", "group": "", "split": ""},
]


def write(path, rows):
    """Rows as the manifest that the file's suffix asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that ROWS name; nothing reads their content."""
    (tmp_path / "photos").mkdir()
    for row in ROWS:
        (tmp_path / row["path"]).write_text("")
    return tmp_path


# ---- reading


def test_every_format_gives_the_same_examples(folder):
    expected = [
        Example(split, (row["label"],), str(folder / row["path"]), row["group"])
        for row, split in zip(ROWS, ("train", "test", "val", ""))
    ]
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        assert find_images(write(folder / f"m.{suffix}", ROWS[::-1])) == expected, suffix
    text = (folder / "m.csv").read_text()
    (folder / "m.csv").write_text("\ufeff" + text.replace("\n", "\r\n") + "\r\n")  # as a spreadsheet saves it
    assert find_images(str(folder / "m.csv")) == expected
    categories = pa.array([row["label"] for row in ROWS]).dictionary_encode()
    parquet.write_table(pa.Table.from_pylist(ROWS).set_column(1, "label", categories), folder / "m.parquet")
    assert find_images(str(folder / "m.parquet")) == expected


def test_paths_are_relative_to_the_manifest_or_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    absolute = [{**row, "path": str(folder / row["path"])} for row in ROWS]
    upwards = [{**row, "path": f"../{row['path']}"} for row in ROWS]
    found = find_images(write(folder / "lists" / "absolute.csv", absolute))
    assert [example.path for example in found] == [str(folder / row["path"]) for row in ROWS]
    relative = find_images(write(folder / "lists" / "relative.csv", upwards))
    assert all(os.path.samefile(one.path, two.path) for one, two in zip(found, relative))


def test_labels_and_groups_become_text(folder):
    paths = [row["path"] for row in ROWS]
    for suffix in ("jsonl", "parquet"):
        for labels, texts in (
            ([1, 2, 1, 2], "1212"),
            ([1.0, 2.5, 1.0, 2.5], ["1", "2.5"] * 2),
            ([True, False] * 2, ["true", "false"] * 2),
        ):
            rows = [{"path": path, "label": label, "group": 3} for path, label in zip(paths, labels)]
            found = find_images(write(folder / f"m.{suffix}", rows))
            assert [(example.labels, example.group) for example in found] == [((text,), "3") for text in texts]
    # What text formats write stays as it is written, though every cell looks like a number or a date.
    for texts in (["007", "010"] * 2, ["2020-01-01", "2020-01-02"] * 2):
        for suffix in ("csv", "tsv", "jsonl"):
            rows = [{"path": path, "label": text} for path, text in zip(paths, texts)]
            found = find_images(write(folder / f"m.{suffix}", rows))
            assert [example.labels for example in found] == [(text,) for text in texts]
    # Missing numbers, as libraries without missing integers write them.
    table = pa.table({"path": paths, "label": ["a", "b"] * 2, "group": [1.0, float("nan"), 2.0, 2.0]})
    parquet.write_table(table, folder / "m.parquet")
    assert [example.group for example in find_images(str(folder / "m.parquet"))] == ["1", "", "2", "2"]


def test_several_labels(folder):
    cells = ["cat | dog|cat", "dog", "bird", "bird|dog|"]
    rows = [{"path": row["path"], "label": cell} for row, cell in zip(ROWS, cells)]
    expected = [("cat", "dog"), ("dog",), ("bird",), ("bird", "dog")]
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        found = find_images(write(folder / f"m.{suffix}", rows))
        assert [example.labels for example in found] == expected
        assert is_multi_label(found)
    for suffix in ("jsonl", "parquet"):  # as lists
        rows = [{"path": row["path"], "label": list(labels)} for row, labels in zip(ROWS, expected)]
        assert find_images(write(folder / f"m.{suffix}", rows)) == found
    # A rare label is left out, and an image with it alone.
    left, dropped = drop_small_classes(found, 2)
    assert [example.labels for example in left] == [("dog",), ("dog",), ("bird",), ("bird", "dog")]
    assert dropped == ["cat"]


def test_renamed_columns(folder):
    names = {"path": "file", "label": "diagnosis", "group": "patient", "split": "split"}
    manifest = write(folder / "m.csv", [{names[name]: cell for name, cell in row.items()} for row in ROWS])
    flags = ["--path-column", "file", "--label-column", "diagnosis", "--group-column", "patient"]
    found, _ = check_request(parse_config(["--data", manifest, *flags, "--min-per-class", "1"]))
    assert found == find_images(write(folder / "n.csv", ROWS))


def test_a_folder_of_split_manifests(folder):
    parts = {"train.csv": ROWS[:2], "validation.jsonl": ROWS[2:3], "test.parquet": ROWS[3:]}
    for name, rows in parts.items():
        write(folder / name, [{"path": row["path"], "label": row["label"]} for row in rows])
    found = find_images(str(folder))
    assert [(example.split, *example.labels) for example in found] == [
        ("train", "007"),
        ("train", "NA"),
        ("val", "007"),
        ("test", "naïve"),
    ]
    write(folder / "test.parquet", [{**ROWS[3], "split": "train"}])
    with pytest.raises(GraftError, match=r"test.parquet, row 1: the split is not test, which the file's name says"):
        find_images(str(folder))
    write(folder / "val.csv", ROWS[2:3])
    with pytest.raises(GraftError, match="val.csv and validation.jsonl are the same split. Remove one"):
        find_images(str(folder))


# ---- mistakes


def changed(row, **cells):
    return [{**ROWS[i], **(cells if i == row - 1 else {})} for i in range(len(ROWS))]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"path": r["path"], "class": r["label"]} for r in ROWS],
            r"no column 'label'; its columns: path, class\. .*--label-column",
        ),
        (
            [{"file": r["path"], "label": r["label"]} for r in ROWS],
            r"no column 'path'; its columns: file, label\. .*--path-column",
        ),
        (changed(2, path=""), "m.*, row 2: no path. Every row needs one"),
        (changed(3, label=""), "m.*, row 3: no label. Every row needs one"),
        (changed(4, split="holdout"), "m.*, row 4: unknown split 'holdout'. Expected train, val"),
        (changed(1, label=" | "), "m.*, row 1: no label. Every row needs one"),
        (changed(3, path="photos/no.png"), "(?s)1 of 4 files do not exist.*row 3: .*photos/no.png"),
        (
            [{**row, "path": f"{i}.png"} for i, row in enumerate(ROWS * 4)],
            "(?s)16 of 16 files.*row 10: .*9.png\n  ...$",
        ),
        (ROWS + [{**ROWS[0], "label": "cat"}], "row 5: .*a.png is labelled 'cat', but '007' in .*row 1. Give each"),
        ([{**row, "label": "cat"} for row in ROWS], "only one class, 'cat'.*at least two: give rows"),
    ],
)
def test_mistakes_in_the_rows(folder, suffix, rows, message):
    manifest = write(folder / f"m.{suffix}", rows)
    with pytest.raises(GraftError, match=message):
        find_images(manifest)


def test_mistakes_in_the_file(folder):
    with pytest.raises(GraftError, match=r"--data nowhere.csv: there is no such manifest"):
        find_images("nowhere.csv")
    (folder / "m.xlsx").write_text("x")
    with pytest.raises(GraftError, match=r"m.xlsx: the format of this file is not known. A manifest is a .csv, .tsv"):
        find_images(str(folder / "m.xlsx"))
    for name, content in {"a.csv": "", "b.csv": "path,label\n", "c.jsonl": "", "d.parquet": ""}.items():
        (folder / name).write_text(content)
        with pytest.raises(GraftError, match=rf"{name} is empty"):
            find_images(str(folder / name))
    parquet.write_table(
        pa.table({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}), folder / "e.parquet"
    )
    with pytest.raises(GraftError, match=r"e.parquet is empty"):
        find_images(str(folder / "e.parquet"))
    damaged = {
        "a.csv": b"path,label\nonly one cell\n",
        "b.csv": b"path,label\n\xff\xfe.png,cat\n",
        "c.jsonl": b'{"path": "a.png", "label": 1}\n{"path"',
        "d.parquet": b"PAR1 and no more",
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
        with pytest.raises(GraftError, match=rf"{name} could not be read as .*Repair it, or save it in another format"):
            find_images(str(folder / name))
    (folder / "m.csv").write_text("path,label,label\na,b,c\n")
    with pytest.raises(GraftError, match="several columns named 'label'"):
        find_images(str(folder / "m.csv"))
    write(folder / "m.jsonl", [{**ROWS[0], "label": {"name": "cat"}}])
    with pytest.raises(GraftError, match=r"'label' holds struct<.*expected text"):
        find_images(str(folder / "m.jsonl"))


def test_a_column_flag_that_cannot_be_obeyed(folder):
    manifest = write(folder / "m.csv", ROWS)
    with pytest.raises(GraftError, match=r"no column 'patient'; its columns: path, .*Correct --group-column"):
        find_images(manifest, group_column="patient")
    with pytest.raises(GraftError, match=r"--group-column patient: only a manifest has such a column"):
        find_images(str(folder / "photos"), group_column="patient")


# ---- splits


def random_rows(seed, groups=None):
    """Rows of patients with 1 to 9 images each; a fifth of the patients have images of two classes."""
    random = np.random.default_rng(seed)
    rows = []
    for group in range(groups or random.integers(40, 200)):
        classes = random.integers(0, 3, 2 if random.random() < 0.2 else 1)
        for _ in range(random.integers(1, 10)):
            rows.append(row(int(random.choice(classes)), f"{seed}-{len(rows)}", f"patient {seed}-{group}"))
    return rows


def row(label, identity, group="", split=""):
    return {"id": identity, "path": identity, "label": label, "group": group or identity, "split": split}


def split(rows, classes=3):
    """{path: split} of copies of the rows, and the warnings."""
    warnings = []
    tables = splits.make_splits([dict(r) for r in rows], [f"class{i}" for i in range(classes)], warnings)
    return {path: name for name, table in tables.items() for path in table["path"].to_pylist()}, warnings


def splits_of(rows, split_of, key):
    found = collections.defaultdict(set)
    for r in rows:
        found[r[key]].add(split_of[r["path"]])
    return found


def test_no_group_straddles_splits_and_shares_are_near():
    shares = collections.defaultdict(list)
    for seed in range(50):
        rows = random_rows(seed)
        split_of, _ = split(rows)
        assert all(len(names) == 1 for names in splits_of(rows, split_of, "group").values())
        for label in range(3):
            mine = [split_of[r["path"]] for r in rows if r["label"] == label]
            for name in splits.SPLIT_NAMES:
                shares[name].append(mine.count(name) / len(mine))
    # A class's boundaries are held between 7.5% and 30% of its groups' rows; images in mixed groups come on top.
    for name, middle, low, high in (("train", 0.7, 0.4, 0.9), ("val", 0.15, 0.03, 0.33), ("test", 0.15, 0.03, 0.33)):
        assert abs(np.mean(shares[name]) - middle) < 0.03, name
        assert low < min(shares[name]) and max(shares[name]) < high, name


def test_shares_hold_for_each_of_several_labels():
    random = np.random.default_rng(0)
    rows = []
    for index in range(2000):
        labels = np.flatnonzero(random.random(4) < [0.5, 0.3, 0.1, 0.03]).tolist() or [0]
        rows.append({**row(0, f"image{index}"), "label": labels})
    tables = splits.make_splits([dict(r) for r in rows], list("abcd"), [])
    targets = {name: targets_of(table, 4).sum(axis=0) for name, table in tables.items()}
    shares = {name: counts / sum(targets.values()) for name, counts in targets.items()}
    np.testing.assert_allclose(shares["test"], 0.15, atol=0.03)
    np.testing.assert_allclose(shares["val"], 0.15, atol=0.03)
    assert {tuple(labels) for labels in tables["test"]["label"].to_pylist()} > {(0,), (0, 1), (2,)}


def test_splits_by_group_do_not_depend_on_the_order_of_rows():
    for seed in range(5):
        rows = random_rows(seed)
        order = np.random.default_rng(seed).permutation(len(rows))
        assert split(rows)[0] == split([rows[i] for i in order])[0]
    # Without groups too, where equal content has two labels.
    rows = [row(label, f"{label * i}-{i}") for label in (0, 1) for i in range(60)]
    rows += [row(1, f"0-{i}") for i in range(0, 60, 3)]
    for index, r in enumerate(rows):
        r["path"] = str(index)
    assert split(rows, 2)[0] == split(rows[::-1], 2)[0]


@pytest.mark.parametrize("new_groups", [True, False])
def test_a_twentieth_more_rows_moves_under_a_fiftieth_of_the_old(new_groups):
    moved = []
    for seed in range(20):
        rows = random_rows(seed, groups=60)
        random = np.random.default_rng(seed)
        count = len(rows) // 20
        names = [f"new {seed}-{i // 4}" for i in range(count)]
        if not new_groups:
            names = [r["group"] for r in random.choice(np.array(rows, dtype=object), count)]
        more = [row(int(random.integers(0, 3)), f"new {seed}-{i}", names[i]) for i in range(count)]
        before, after = split(rows)[0], split(rows + more)[0]
        moved.append(np.mean([after[path] != name for path, name in before.items()]))
    assert np.mean(moved) < 0.02


def test_equal_content_ties_groups_together():
    rows = random_rows(1)
    # A chain: each patient shares a picture with the next, ten at a time.
    names = list(dict.fromkeys(r["group"] for r in rows))
    for index, (one, two) in enumerate(itertools.pairwise(names)):
        if index % 10 != 9:
            rows += [row(0, f"shared{index}", one), row(0, f"shared{index}", two)]
    for index, r in enumerate(rows):
        r["path"] = str(index)
    split_of, warnings = split(rows)
    for key in ("id", "group"):
        assert all(len(names) == 1 for names in splits_of(rows, split_of, key).values())
    assert any("images are exact copies of others" in w for w in warnings)


def test_few_groups_are_enough():
    rows = [row(label, f"{label}{g}{i}", f"{label}{g}") for label in (0, 1) for g in range(3) for i in range(5)]
    split_of, warnings = split(rows, 2)
    assert collections.Counter(split_of.values()) == {"train": 10, "val": 10, "test": 10} and not warnings
    rows += [row(2, f"rare{i}", "one patient") for i in range(5)]
    split_of, warnings = split(rows)
    assert {split_of[f"rare{i}"] for i in range(5)} == {"train"}
    assert warnings == ["Classes ['class2'] have no test images: too few groups hold them."]
    with pytest.raises(GraftError, match="no images to validate with. Give at least three groups of some class"):
        split([row(label, f"{label}{i}", f"g{label}") for label in (0, 1) for i in range(9)], 2)


def test_a_group_that_is_most_of_a_class_trains():
    rows = [row(label, f"{label}-{i}", f"g{label}-{max(0, i - 50)}") for label in (0, 1) for i in range(100)]
    split_of, _ = split(rows, 2)
    assert {split_of[f"{label}-{i}"] for label in (0, 1) for i in range(50)} == {"train"}
    assert set(split_of.values()) == {"train", "val", "test"}


def test_a_class_of_mixed_groups_only_still_trains():
    for seed in range(20):
        rows = [row(0, f"{seed}{g}{i}", f"{seed}p{g}") for g in range(12) for i in range(4)]
        rows += [row(1, f"{seed}{g}x", f"{seed}p{g}") for g in range(2)]  # never most of a patient's images
        split_of, _ = split(rows, 2)
        assert "train" in {split_of[f"{seed}{g}x"] for g in range(2)}
        assert all(len(names) == 1 for names in splits_of(rows, split_of, "group").values())


def test_given_splits_are_kept_and_the_rest_follows_them():
    rows = random_rows(2)
    given = [
        row(label, f"given {name} {label}", f"clinic {name}", name) for name in splits.SPLIT_NAMES for label in range(3)
    ]
    tied = [row(0, f"tied {name}", f"clinic {name}") for name in splits.SPLIT_NAMES]
    split_of, warnings = split(rows + given + tied)
    assert all(split_of[r["path"]] == r["split"] for r in given)
    assert all(split_of[f"tied {name}"] == name for name in splits.SPLIT_NAMES)
    assert {split_of[r["path"]] for r in rows} == set(splits.SPLIT_NAMES) and not warnings
    leaky = [*given, row(0, "leak", "clinic test", "train")]
    split_of, warnings = split(leaky)
    assert split_of["leak"] == "train"
    assert any("1 groups of the given test set are also in train or val" in w for w in warnings)


def test_missing_val_is_made_of_train_groups():
    rows = [{**r, "split": "train"} for r in random_rows(3)]
    rows += [row(label, f"t{label}", "clinic", "test") for label in range(3)] + [row(0, "same", "clinic", "train")]
    split_of, _ = split(rows)
    names = splits_of([r for r in rows if r["group"] != "clinic"], split_of, "group").values()
    assert all(len(found) == 1 for found in names) and set.union(*names) == {"train", "val"}
    assert split_of["same"] == "train"  # its group is tested on: it moves nowhere


# ---- end to end


def test_a_manifest_and_its_folders_are_the_same_data(tmp_path):
    folder = write_png_folder(tmp_path / "photos", classes=2, per_class=10)
    shutil.copy(folder / "class0" / "000.png", folder / "class1" / "copy.png")  # equal content, two classes
    files = sorted(folder.rglob("*.png"), reverse=True)
    rows = [{"path": f"photos/{file.relative_to(folder)}", "label": file.parent.name} for file in files]
    one = data.load_images(find_images(str(folder)))
    two = data.load_images(find_images(write(tmp_path / "m.csv", rows)))
    assert one.fingerprint == two.fingerprint and one.class_names == two.class_names
    assert all(a.equals(b) for a, b in zip(one, two)) and one.warnings == two.warnings
    for index, r in enumerate(rows):
        r["patient"] = index // 3
    grouped = data.load_images(find_images(write(tmp_path / "g.jsonl", rows), group_column="patient"))
    groups = [set(table["group"].to_pylist()) for table in grouped]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 7
