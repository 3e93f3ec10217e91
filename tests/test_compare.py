"""`graft compare`: folders and live servers, what changes of each class, and the verdict."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from pipelines.__main__ import guarded
from pipelines.compare import change_of, compare
from serving.export_text import export_text_classifier
from serving.session import Session
from tests.conftest import write_png_folder
from tests.stub_servers import grpc_server, rest_server, tiny_version
from tests.test_export_text import FIXTURES, tiny_classifier

pytestmark = pytest.mark.slow  # servers and exports of their own: minutes

CLASSES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_png_folder(tmp_path_factory.mktemp("pictures") / "photos", per_class=20)


@pytest.fixture(scope="module")
def versions(tmp_path_factory, pictures):
    """OLD and NEW, whose answers differ; and the labels that each gives, by path."""
    paths = sorted(pictures.rglob("*.png"))
    folders, labels = [], []
    for number, seed in enumerate((0, 3), 1):
        folder = tmp_path_factory.mktemp("versions") / "photos" / str(number)
        folders.append(tiny_version(folder, seed, class_names=CLASSES))
        with Session(folder) as session:
            answers = session.run("serving_default", {"image_bytes": [path.read_bytes() for path in paths]})
        labels.append({str(path): row[0].decode() for path, row in zip(paths, answers["labels"])})
    assert 0 < sum(labels[0][path] != labels[1][path] for path in labels[0]) < len(paths)
    return folders, labels


def words_of(old, new, data, *more) -> list[str]:
    return [str(old), str(new), "--data", str(data), *map(str, more)]


def counted(labels) -> dict[str, int]:
    """How many answers change, are lost and gained, from the paths alone."""
    old, new = labels
    truth = {path: path.split("/")[-2] for path in old}
    changed = [path for path in old if old[path] != new[path]]
    return {
        "all": len(old),
        "changed": len(changed),
        "lost": sum(old[path] == truth[path] for path in changed),
        "gained": sum(new[path] == truth[path] for path in changed),
    }


def test_equal_versions(versions, pictures, capsys):
    (old, _), _ = versions
    assert compare(words_of(old, old, pictures, "--most-changes", 0, "--most-losses", 0)) == 0
    shown = capsys.readouterr().out
    assert "Within: 0 of 60 answers change (0.0%), 0.0% may" in shown
    assert "Within: 0 of 60 turn from right to wrong (0.0%), 0.0% may" in shown


def test_changes_losses_and_the_verdict(versions, pictures, tmp_path, capsys):
    (old, new), labels = versions
    counts = counted(labels)
    assert counts["lost"] or counts["gained"]
    out = tmp_path / "changes.csv"
    assert compare(words_of(old, new, pictures, "--most-changes", 0.01, "--most-losses", 1, "--out", out)) == 3
    shown = capsys.readouterr().out
    assert f"Over: {counts['changed']} of 60 answers change" in shown
    assert f"Within: {counts['lost']} of 60 turn from right to wrong" in shown
    right = [sum(side[path] == path.split("/")[-2] for path in side) / 60 for side in labels]
    said = f"Right: {right[0]:.3f} before, {right[1]:.3f} now; {counts['lost']} lost, {counts['gained']} gained."
    assert said in shown
    rows = list(csv.DictReader(out.open()))
    assert {row["example"]: (row["old"], row["new"]) for row in rows} == {
        path: (labels[0][path], labels[1][path]) for path in labels[0] if labels[0][path] != labels[1][path]
    }
    for kind in ("lost", "gained"):
        assert sum(row["change"] == kind for row in rows) == counts[kind]
    for name in CLASSES:
        of_class = [row for row in rows if row["true"] == name]
        if of_class:
            cells = [str(sum(row["change"] == kind for row in of_class)) for kind in ("lost", "gained", "changed")]
            assert re.search(rf"^ *{name} +20 +" + " +".join(cells), shown, re.MULTILINE)


def test_only_the_test_part_is_asked(versions, pictures, tmp_path, capsys):
    (old, _), _ = versions
    paths = sorted(pictures.rglob("*.png"))
    lines = [f"{path},{path.parent.name},{('train', 'test')[at % 4 == 0]}" for at, path in enumerate(paths)]
    (tmp_path / "all.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    assert compare(words_of(old, old, tmp_path / "all.csv")) == 0
    assert "Within: 0 of 15 answers change" in capsys.readouterr().out


def test_limits(versions, pictures, capsys):
    (old, new), labels = versions
    if not counted(labels)["lost"]:
        old, new, labels = new, old, labels[::-1]
    counts = counted(labels)
    share, lost = counts["changed"] / 60, counts["lost"] / 60
    assert compare(words_of(old, new, pictures, "--most-changes", share, "--most-losses", lost)) == 0
    assert compare(words_of(old, new, pictures, "--most-changes", share, "--most-losses", lost - 1 / 120)) == 3
    assert compare(words_of(old, new, pictures, "--most-changes", share - 1 / 120, "--most-losses", lost)) == 3
    capsys.readouterr()


def test_live_servers(versions, pictures, tmp_path, capsys):
    """REST against gRPC, without labels: the same changes as between the folders."""
    (old, new), labels = versions
    flat = tmp_path / "unlabelled"
    flat.mkdir()
    for index, path in enumerate(sorted(pictures.rglob("*.png"))):
        (flat / f"{index:03}.png").write_bytes(path.read_bytes())
    (flat / "notes.png").write_text("no image")
    out = tmp_path / "changes.csv"
    with rest_server(old) as first, grpc_server(new) as second:
        urls = f"http://127.0.0.1:{first.port}/v1/models/photos", f"grpc://127.0.0.1:{second.port}/photos"
        assert compare(words_of(*urls, flat, "--no-labels", "--most-changes", 1, "--out", out)) == 0
        assert first.paths[1:] == ["/v1/models/photos/versions/3:predict"] * 2
        assert second.paths[1:] == [(3, "")] * 2
    shown = capsys.readouterr().out
    assert "1 of 61 could be read by neither model; left out." in shown and "turn from right" not in shown
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == counted(labels)["changed"] and "true" not in rows[0]
    assert {row["change"] for row in rows} == {"changed"}


def test_several_labels(tmp_path, capsys):
    """Of multi-label models the sets of chosen classes are compared, whatever the order of the classes."""
    data = write_png_folder(tmp_path / "data", classes=2, per_class=8)
    lines = [f"data/{path.parent.name}/{path.name},class0|class1" for path in sorted(data.rglob("*.png"))]
    manifest = tmp_path / "all.csv"
    manifest.write_text("path,label\n" + "\n".join(lines[:-1] + [lines[-1].replace("|class1", "")]) + "\n")
    low, high = np.full(2, 1e-6), np.array([1e-6, 0.999999])
    old = tiny_version(tmp_path / "a" / "1", 0, thresholds=low, class_names=["class0", "class1"])
    new = tiny_version(tmp_path / "a" / "2", 0, thresholds=high, class_names=["class0", "class1"])
    swapped = tiny_version(tmp_path / "a" / "3", 0, thresholds=low, class_names=["class1", "class0"])
    assert compare(words_of(old, swapped, manifest, "--most-changes", 0)) == 0
    assert "Right: 0.938 before, 0.938 now" in capsys.readouterr().out
    assert compare(words_of(old, new, manifest)) == 3
    shown = capsys.readouterr().out
    assert "Over: 16 of 16 answers change" in shown and "15 lost, 1 gained" in shown


def test_texts(tmp_path, versions, capsys):
    model, preprocess = tiny_classifier(FIXTURES / "text" / "bert")
    export_text_classifier(model, preprocess, ["a", "b", "c"], tmp_path / "m" / "1")
    model.head.kernel.assign(-model.head.kernel)
    export_text_classifier(model, preprocess, ["a", "b", "c"], tmp_path / "m" / "2")
    texts = tmp_path / "texts.csv"
    texts.write_text(
        "text,label\n" + "".join(f"the {word} is here,{'abc'[i % 3]}\n" for i, word in enumerate("abcdef"))
    )
    words = words_of(tmp_path / "m" / "1", tmp_path / "m" / "2", texts)
    assert compare([*words, "--most-changes", "1", "--most-losses", "1"]) == 0
    labelled = capsys.readouterr().out
    assert compare([*words, "--no-labels", "--most-changes", "1"]) == 0
    of_change = r"Within: ([1-6]) of 6 answers change"
    assert re.search(of_change, labelled)[1] == re.search(of_change, capsys.readouterr().out)[1]
    assert guarded(compare, words_of(tmp_path / "m" / "1", versions[0][0], texts)) == 2
    assert "take different inputs: they cannot be compared" in capsys.readouterr().err


def test_other_classes_are_told(versions, pictures, tmp_path, capsys):
    (old, _), _ = versions
    new = tiny_version(tmp_path / "a" / "1", 0, class_names=[*CLASSES[:-1], "another"])
    compare(words_of(old, new, pictures))
    assert "Note: the classes differ: 1 of OLD's are gone, 1 are new." in capsys.readouterr().out


def test_kinds_of_change():
    row = {"old": "cat", "new": "dog"}
    assert [change_of({**row, "true": true}) for true in ("cat", "dog", "eel")] == ["lost", "gained", "changed"]
    assert change_of(row) == "changed" and change_of({**row, "new": "cat", "true": "dog"}) == "same"


def test_mistakes(versions, pictures, tmp_path, capsys):
    (old, new), _ = versions
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    other = write_png_folder(tmp_path / "other", classes=2, per_class=2)
    (other / "class0").rename(other / "Class 0")
    (other / "class1").rename(other / "Class 1")
    for words, message in (
        (words_of("nowhere", new, pictures), "nowhere: there is no such run folder"),
        (words_of(old, "http://localhost:8501", pictures), "not the address of a served model"),
        (words_of(old, new, pictures, "--most-changes", 5), "--most-changes is 5, expected a share from 0 to 1"),
        (words_of(old, new, pictures, "--out", tmp_path), "is a folder; give the name of a CSV file"),
        (words_of(old, new, tmp_path / "bad", "--no-labels"), "none of the 1 examples could be read"),
        (words_of(old, new, other), "neither model is right about a single example. Its labels are like Class 0"),
    ):
        assert guarded(compare, words) == 2, words
        assert message in capsys.readouterr().err
