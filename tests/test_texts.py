"""Texts from every kind of source -> splits; mistakes of the user answered in one message."""

import collections
import csv
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from models import GraftError, offline_texts
from pipelines import runs
from pipelines.config import ImageConfig
from pipelines.texts import find_texts, load_texts, text_id

TOPICS = {"cats": "purr", "dogs": "bark", "cows": "moo"}


def made_rows(count=10, start=0):
    """`count` rows per class, every text another; with a comma, a quote, a line break and signs of other languages."""
    return [
        {"text": f'Hear "it" {sound}, {number}\nüñ 猫 🐈', "label": label}
        for label, sound in TOPICS.items()
        for number in range(start, start + count)
    ]


def write(path, rows):
    """Rows as CSV, TSV, JSONL or Parquet, by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def labelled(found):
    return [(example.split, example.labels, example.text) for example in found]


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_texts_as_they_are(tmp_path, suffix):
    rows = made_rows()
    found = find_texts(write(tmp_path / f"m.{suffix}", rows))
    assert labelled(found) == [("", (row["label"],), row["text"]) for row in rows]
    assert found[2].where == f"{tmp_path / f'm.{suffix}'}, row 3"
    assert {example.text_b for example in found} == {None}


def test_a_folder_of_train_val_test_keeps_its_splits(tmp_path):
    for place, name in enumerate(("train", "val", "test")):
        write(tmp_path / f"{name}.csv", made_rows(4, 4 * place))
    splits = load_texts(find_texts(str(tmp_path)))
    assert [table.num_rows for table in splits] == [12, 12, 12]
    assert splits.test["text"].to_pylist() and {"id", "label", "group", "weight"} < set(splits.test.column_names)
    assert all(" 8\n" in text or " 9\n" in text or " 1" in text for text in splits.test["text"].to_pylist())


def test_other_column_names(tmp_path):
    rows = [{"utterance": row["text"], "topic": row["label"], "customer": "x"} for row in made_rows()]
    manifest = write(tmp_path / "m.tsv", rows)
    found = find_texts(manifest, text_column="utterance", label_column="topic", group_column="customer")
    assert labelled(found) == [("", (row["topic"],), row["utterance"]) for row in rows]
    assert {example.group for example in found} == {"x"}


def test_pairs_of_texts(tmp_path):
    rows = [{"question": row["text"], "answer": f"No {i}.", "label": row["label"]} for i, row in enumerate(made_rows())]
    rows += [
        {"question": "Same", "answer": "One", "label": "cats"},
        {"question": "Same", "answer": "Two", "label": "cats"},
    ]
    manifest = write(tmp_path / "m.jsonl", rows)
    splits = load_texts(find_texts(manifest, "question", "answer"))
    pairs = {pair for table in splits for pair in zip(table["text"].to_pylist(), table["text_b"].to_pylist())}
    assert pairs == {(row["question"], row["answer"]) for row in rows}
    assert len({identity for table in splits for identity in table["id"].to_pylist()}) == len(rows)
    assert text_id("ab", "c") != text_id("a", "bc") != text_id("abc")


def test_folders_of_text_files(tmp_path):
    for split in ("train", "validation", "test"):
        for row, number in zip(made_rows(), range(30)):
            file = tmp_path / split / row["label"] / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{split} {row['text']}\n", "utf-8")
    (tmp_path / "train" / "cats" / "notes.md").write_text("no text of the set")
    found = find_texts(str(tmp_path))
    assert collections.Counter(example.split for example in found) == {"train": 30, "val": 30, "test": 30}
    assert all(example.text.endswith("🐈") and example.labels[0] in TOPICS for example in found)
    assert {len(find_texts(str(tmp_path / "train"))), len({e.split for e in find_texts(str(tmp_path / "test"))})} == {
        30,
        1,
    }


def test_several_labels(tmp_path):
    rows = made_rows()
    rows[0]["label"] = "cats|dogs"
    splits = load_texts(find_texts(write(tmp_path / "m.csv", rows)))
    assert splits.multi_label
    assert [0, 2] in [labels for table in splits for labels in table["label"].to_pylist()]


def test_hugging_face_tables(tmp_path):
    features = {
        "sentence": {"dtype": "string", "_type": "Value"},
        "label": {"names": list(TOPICS), "_type": "ClassLabel"},
        "idx": {"dtype": "int64", "_type": "Value"},
    }
    rows = made_rows(4)
    for name in ("train", "validation"):
        table = pa.table(
            {
                "sentence": [f"{name} {row['text']}" for row in rows],
                "label": [list(TOPICS).index(row["label"]) for row in rows[:-1]] + [-1],
                "idx": range(len(rows)),
            }
        )
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
        (tmp_path / "named").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "named" / f"{name}.parquet")
    for folder in ("hub", "named"):
        found = find_texts(str(tmp_path / folder), "sentence")
        expected = [
            (split, (row["label"],), f"{name} {row['text']}")
            for name, split in (("train", "train"), ("validation", "val"))
            for row in rows[:-1]
        ]
        assert labelled(found) == expected
        with pytest.raises(GraftError, match=r"column of texts called 'text'.*sentence .Value.*--text-column"):
            find_texts(str(tmp_path / folder))
        with pytest.raises(GraftError, match=r"column of texts called 'idx'.*--second-column"):
            find_texts(str(tmp_path / folder), "sentence", "idx")


def test_tfds_sets(tmp_path):
    import tensorflow_datasets as tfds

    rows, names = made_rows(3), list(TOPICS)
    label, text = tfds.features.ClassLabel(names=names), tfds.features.Text()
    for name, features in (
        ("sounds", {"sentence": text, "label": label}),
        ("sound_pairs", {"premise": text, "hypothesis": text, "label": label}),
    ):
        inputs = [feature for feature in features if feature != "label"]
        examples = [{**dict.fromkeys(inputs, row["text"]), "label": row["label"]} for row in rows]
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={"train": list(enumerate(examples))},
            data_dir=tmp_path,
        )
    found = find_texts("tfds:sounds", data_dir=str(tmp_path))
    assert sorted(labelled(found)) == sorted(("", (row["label"],), row["text"]) for row in rows)
    assert find_texts("tfds:sounds", data_dir=str(tmp_path)) == found
    pairs = find_texts("tfds:sound_pairs", "premise", "hypothesis", data_dir=str(tmp_path))
    assert {(example.text, example.text_b) for example in pairs} == {(row["text"], row["text"]) for row in rows}
    with pytest.raises(GraftError, match=r"expected one text feature, found hypothesis, premise.*--second-column"):
        find_texts("tfds:sound_pairs", data_dir=str(tmp_path))
    with pytest.raises(GraftError, match=r"text features named premise and reason.*hypothesis .Text"):
        find_texts("tfds:sound_pairs", "premise", "reason", data_dir=str(tmp_path))


# ---------------------------------------------------------------- the offline set


def test_topics():
    file = offline_texts.text_data_file("topics")
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    counts = collections.Counter(row["label"] for row in rows)
    assert len(counts) == 11 and "conversations" not in counts
    assert min(counts.values()) >= 40 and max(counts.values()) == 200
    assert len({row["text"] for row in rows}) == len(rows) == 1180
    assert offline_texts.text_data_file("topics") == file
    with pytest.raises(GraftError, match="news: no text data set by this name; there are topics"):
        offline_texts.text_data_file("news")


def test_topics_splits_keep_conversations_whole_where_asked():
    found = find_texts("topics", group_column="conversation")
    splits, conversation_of = load_texts(found), {example.text: example.group for example in found}
    assert sum(table.num_rows for table in splits) == 1180
    groups = [{conversation_of[text] for text in table["text"].to_pylist()} for table in splits]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert all(set(table["label"].to_pylist()) == set(range(11)) for table in splits)
    assert splits.warnings == []


def test_finding_and_splitting_need_no_tensorflow():
    code = "import sys; from pipelines.texts import find_texts, load_texts; load_texts(find_texts('topics')); "
    done = subprocess.run([sys.executable, "-c", code + "assert not {'tensorflow', 'keras'} & set(sys.modules)"])
    assert done.returncode == 0


# ---------------------------------------------------------------- mistakes


def test_a_missing_column_lists_those_that_there_are(tmp_path):
    manifest = write(tmp_path / "m.csv", [{"sentence": "a", "class": "b"}])
    with pytest.raises(GraftError, match=r"no column 'text'; its columns: sentence, class\. .*--text-column"):
        find_texts(manifest)
    with pytest.raises(GraftError, match=r"no column 'label'; its columns: sentence, class\. .*--label-column"):
        find_texts(manifest, "sentence")
    with pytest.raises(GraftError, match=r"no column 'reply'; its columns: .*--second-column"):
        find_texts(manifest, "sentence", "reply", "class")
    with pytest.raises(GraftError, match="--second-column sentence: this is the first text too"):
        find_texts(manifest, "sentence", "sentence", "class")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_text_column_of_numbers(tmp_path, suffix):
    numbers = [3.5, 12, -7e5] if suffix in ("csv", "tsv") else [3.5, 12.0, -7e5]
    rows = [{"text": number, "label": label} for number, label in zip(numbers, TOPICS)]
    with pytest.raises(GraftError, match=r"column 'text' holds (numbers|double).*expected text.*--text-column"):
        find_texts(write(tmp_path / f"m.{suffix}", rows))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_of_megabytes(tmp_path, suffix):
    rows = [{"text": f"{'long ' * 500_000}{number}", "label": "ab"[number % 2]} for number in range(4)]
    assert [len(e.text) for e in find_texts(write(tmp_path / f"m.{suffix}", rows))] == [2_500_001] * 4


def test_some_texts_may_be_numbers(tmp_path):
    rows = [*made_rows(3), {"text": "42", "label": "cats"}]
    assert len(find_texts(write(tmp_path / "m.csv", rows))) == 10


def test_empty_files_and_folders(tmp_path):
    for name, content in {"a.csv": "", "b.csv": "text,label\n", "c.jsonl": "", "d.tsv": "text\tlabel\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(GraftError, match=rf"{name} is empty"):
            find_texts(str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    with pytest.raises(GraftError, match=r"no texts in this folder.*\.txt files, such as .*cat/1\.txt"):
        find_texts(str(tmp_path / "folder"))
    with pytest.raises(GraftError, match="no such folder.*one folder of texts per class.*topics"):
        find_texts(str(tmp_path / "nowhere"))
    with pytest.raises(GraftError, match="--text-column words: only a manifest has such a column"):
        find_texts("topics", "words")


def test_broken_encoding_says_the_line(tmp_path):
    for name, separator in (("m.csv", b","), ("m.tsv", b"\t")):
        (tmp_path / name).write_bytes(b"text,label\ngood,a\ncaf\xe9,b\n".replace(b",", separator))
        with pytest.raises(
            GraftError, match=r"could not be read as .*line 3 is not UTF-8 \(byte 0xe9 at its place 4\)"
        ):
            find_texts(str(tmp_path / name))
    (tmp_path / "m.jsonl").write_bytes(b'{"text": "good", "label": "a"}\n{"text": "caf\xe9", "label": "b"}\n')
    with pytest.raises(GraftError, match=r"m.jsonl could not be read as JSONL: line 2 is not UTF-8"):
        find_texts(str(tmp_path / "m.jsonl"))
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "1.txt").write_bytes(b"one\ntwo caf\xe9")
    with pytest.raises(GraftError, match=r"1.txt: line 2 is not UTF-8.*Save it as UTF-8"):
        find_texts(str(tmp_path / "folder"))


def test_empty_texts_are_skipped_up_to_a_limit(tmp_path):
    rows = made_rows(40)
    for row in rows[:3]:
        row["text"] = " \n"
    splits = load_texts(find_texts(write(tmp_path / "m.csv", rows)))
    assert sum(table.num_rows for table in splits) == 117
    assert splits.skipped[1] == {"path": f"{tmp_path / 'm.csv'}, row 2", "reason": "the text is empty"}
    assert "3 texts are empty and were skipped" in splits.warnings[0]
    rows[3]["text"] = ""
    with pytest.raises(GraftError, match=r"(?s)4 of 120 texts are empty; up to 3 are skipped.*m.csv, row 4"):
        load_texts(find_texts(write(tmp_path / "m.csv", rows)))


def test_labels_that_cannot_be_learned(tmp_path):
    rows = made_rows(5)
    with pytest.raises(GraftError, match="row 15: no label. Every row needs one"):
        find_texts(write(tmp_path / "m.csv", [*rows[:14], {**rows[14], "label": ""}]))
    with pytest.raises(GraftError, match="only one class, 'cats'. A classifier needs at least two"):
        find_texts(write(tmp_path / "m.csv", rows[:5]))
    found = find_texts(write(tmp_path / "m.csv", rows[:11]))
    with pytest.raises(GraftError, match="Class cows has one text; .*Add texts, .*--min-per-class 2"):
        load_texts(found)
    splits = load_texts(found, min_per_class=2)
    assert splits.class_names == ["cats", "dogs"]
    assert "1 classes with fewer than 2 texts were left out" in splits.warnings[0]


def test_warnings_speak_of_texts(tmp_path):
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}.csv", made_rows(4))
    warnings = " ".join(load_texts(find_texts(str(tmp_path))).warnings)
    assert "24 texts are exact copies" in warnings
    assert "12 texts of the given test set are also trained on" in warnings


# ---------------------------------------------------------------- run folders


@pytest.mark.parametrize("pairs", [False, True])
def test_the_run_folder_gives_the_texts_back(tmp_path, pairs):
    rows = [{**row, "reply": row["text"][::-1]} for row in made_rows()]
    rows[0]["text"] = "long " * 40_000  # more than Python's csv reads by itself
    splits = load_texts(find_texts(write(tmp_path / "m.parquet", rows), second_column="reply" if pairs else ""))
    runs.start_run_folder(tmp_path / "run", ImageConfig(), splits)
    for name, table in zip(("train", "val", "test"), splits):
        read = runs.read_split(tmp_path / "run", name)
        assert read.to_pydict() == table.drop_columns(["group"]).to_pydict()
    state = json.loads((tmp_path / "run" / "checkpoints" / "state.json").read_text())
    assert state["inputs"] == (["text", "text_b"] if pairs else ["text"])


def test_a_run_that_must_not_show_inputs_holds_no_texts(tmp_path):
    splits, config = load_texts(find_texts(write(tmp_path / "m.csv", made_rows()))), ImageConfig()
    config.report.report_inputs = "none"
    runs.start_run_folder(tmp_path / "run", config, splits)
    assert "purr" not in "".join(path.read_text() for path in (tmp_path / "run").rglob("*.*") if path.is_file())
    assert runs.read_split(tmp_path / "run", "test").num_rows == 0
    assert len((tmp_path / "run" / "splits.csv").read_text().splitlines()) == 31


def test_changed_texts_are_not_given_back(tmp_path):
    splits = load_texts(find_texts(write(tmp_path / "m.csv", made_rows())))
    runs.start_run_folder(tmp_path / "run", ImageConfig(), splits)
    text = (tmp_path / "run" / "splits.csv").read_text()
    (tmp_path / "run" / "splits.csv").write_text(text.replace("purr", "growl"))
    left = [
        row for name in ("train", "val", "test") for row in runs.read_split(tmp_path / "run", name)["text"].to_pylist()
    ]
    assert len(left) == 20 and not any("growl" in text for text in left)
