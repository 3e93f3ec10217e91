"""graft rank: which kind the data is, an order that says how sure it is, a page, a cache shared with training."""

import json
import pathlib

import numpy as np
import pytest

from models import GraftError
from pipelines import rank as command
from pipelines.ranking import certainty, order_certainty, pareto_front, pretraining_worth, recommendation
from tests.conftest import write_png_folder


def row(name, right, milliseconds=1.0, count=400):
    """A backbone that answers the first `right` of `count` examples."""
    correct = (np.arange(count) < right).astype(np.float32)
    share = right / count
    probe = {"accuracy": share, "interval": [share - 0.04, share + 0.04], "correct": correct, "l2": 0.1, "folds": 5}
    return {"name": name, "probe": probe, "milliseconds": milliseconds}


# ---------------------------------------------------------------- what is asked for


def test_the_kind_is_found_from_the_data(tmp_path):
    pictures = write_png_folder(tmp_path / "pictures", per_class=3)
    texts = tmp_path / "reviews.csv"
    texts.write_text("text,label\ngood,a\nbad,b\nfine,a\nawful,b\n")

    def kind_of(data):
        return command.check_request(command.RankConfig(data=str(data)))[0]

    assert [kind_of(data) for data in (pictures, texts, "topics", "digits")] == ["image", "text", "text", "image"]


def test_data_of_neither_kind_says_both_reasons(tmp_path):
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(GraftError, match="neither images nor texts.*'path'.*'text'.*--kind"):
        command.check_request(command.RankConfig(data=str(tmp_path / "numbers.csv")))


@pytest.mark.parametrize(("flag", "value"), [("examples", 5), ("folds", 1), ("neighbours", 0)])
def test_values_out_of_range(flag, value):
    with pytest.raises(GraftError, match=f"--{flag} is {value}, expected"):
        command.check_request(command.RankConfig(**{flag: value}))


def test_names_of_backbones():
    assert command.backbone_names("", "image") == ["efficientnet_lite0", "random:efficientnet_lite0"]
    assert command.backbone_names(" efficientnet_lite0@96, efficientnet_lite0", "image")[0] == "efficientnet_lite0@96"
    assert command.name_and_size("random:minilm_l6@32") == ("random:minilm_l6", 32)
    assert command.name_and_size("hf://user/model@123") == ("hf://user/model@123", 0)
    with pytest.raises(GraftError, match="efficientnet_lite0 more than once"):
        command.backbone_names("efficientnet_lite0,efficientnet_lite0", "image")
    with pytest.raises(GraftError, match="not an image model but a text model"):
        command.backbone_names("minilm_l6", "image")


def test_the_sample_has_each_class_by_its_share_and_nothing_of_the_test_set(tmp_path):
    from pipelines.data import load_images
    from pipelines.sources import find_images

    splits = load_images(find_images(str(write_png_folder(tmp_path / "pictures", per_class=40))))
    sample = command.stratified_sample(splits, 30, seed=0)
    assert np.bincount(sample["label"].to_numpy()).tolist() == [10, 10, 10]
    assert not set(sample["id"].to_pylist()) & set(splits.test["id"].to_pylist())
    again = command.stratified_sample(splits, 30, seed=0)
    assert sample.equals(again) and not sample.equals(command.stratified_sample(splits, 30, seed=1))
    whole = command.stratified_sample(splits, 1000, seed=0)
    assert whole.num_rows == splits.train.num_rows + splits.val.num_rows


# ---------------------------------------------------------------- what it says


def test_the_order_is_as_sure_as_the_examples_allow():
    correct = np.stack([row("", right)["probe"]["correct"] for right in (300, 297, 200)])
    near, far = order_certainty(correct)
    assert 0.8 < near < 1 and far == 1  # 3 examples that only the first one answers: lost in 5% of draws
    assert order_certainty(np.stack([correct[0], correct[0]])) == [0.5]


def test_the_front_holds_what_nothing_beats():
    rows = [row("best", 380, 10), row("quick", 360, 2), row("slow", 350, 5), row("equal", 360, 3), row("tiny", 100, 1)]
    assert pareto_front(rows) == {"best", "quick", "tiny"}


def test_the_best_is_recommended_or_a_quicker_one_that_is_not_worse():
    best, close, far = row("best", 360, 10), row("close", 359, 2), row("far", 300, 1)
    assert recommendation([best, far])[0]["name"] == "best"
    chosen, sentence = recommendation([best, close, far])
    assert chosen["name"] == "close" and "5.0 times as quick as best" in sentence
    assert recommendation([best, row("as slow", 359, 9)])[0]["name"] == "best"
    assert "the only one" in recommendation([best])[1]


def test_what_pretraining_is_worth_is_said_where_the_copy_was_measured():
    good = row("net", 300)
    assert "worth +25.0 points" in pretraining_worth([good, row("random:net", 200)], good)
    assert "no better than random" in pretraining_worth([good, row("random:net", 299)], good)
    assert pretraining_worth([good], good) == ""
    assert "a > b" in certainty([row("a", 2), row("b", 1)], [0.9]) and "90%" in certainty([good, good], [0.9])


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A rank over two small networks: rank.json, the page, and what was printed."""
    from tests import tiny_presets

    folder = tmp_path_factory.mktemp("rank")
    pictures = write_png_folder(folder / "pictures", per_class=20)
    names = [str(tiny_presets.WRITERS[family](folder / family)) for family in ("resnet", "mobilenet")]
    words = ["--data", str(pictures), "--backbones", ",".join([*names, f"random:{names[0]}@16"]), "--neighbours", "3"]
    with command.console.capture() as printed:
        code = command.rank([*words, "--out", str(folder / "out"), "--cache-dir", str(folder / "cache")])
    assert code == 0
    found = json.loads((folder / "out" / "rank.json").read_text())
    return found, (folder / "out" / "rank.html").read_text(), printed.get(), folder, names


def test_it_writes_a_table_a_page_and_a_recommendation(ranked):
    found, page, printed, _, names = ranked
    rows = found["backbones"]
    accuracies = [row["probe"]["accuracy"] for row in rows]
    assert len(rows) == 3 and accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.8  # the colour tells the class
    assert all(row["milliseconds"] > 0 and row["parameters"] > 1000 and row["megabytes"] > 0 for row in rows)
    assert any(row["on_front"] for row in rows) and rows[-1]["stays_ahead"] is None
    assert found["recommended"] in names and found["recommendation"] in printed and found["advice"] in printed
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert found["advice"].split(".")[0] in page and page.count("<tr") == 4 and "<svg" in page


@pytest.mark.slow
def test_training_finds_what_rank_has_computed(ranked, tmp_path):
    from pipelines import image
    from pipelines.config import parse_config

    _, _, _, folder, names = ranked
    words = [
        "--data",
        str(folder / "pictures"),
        "--backbone",
        names[0],
        "--depth",
        "head",
        "--out",
        str(tmp_path / "r"),
    ]
    with image.console.capture() as printed:
        more = ["--out", str(tmp_path / "run"), "--cache-dir", str(folder / "cache"), "--no-export"]
        image.run(parse_config([*words, *more]))
    assert "features: found in the cache" in printed.get()
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())["advice"]
    assert "training images in 3 classes" in said and "Advice." in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_texts_are_ranked_and_pretraining_shows(tmp_path):
    words = ["--data", "topics", "--backbones", "minilm_l6@16,random:minilm_l6@16", "--examples", "200"]
    command.rank([*words, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert found["kind"] == "text" and found["recommended"] == "minilm_l6@16"
    first, second = found["backbones"]
    assert first["probe"]["accuracy"] > second["probe"]["accuracy"] + 0.1 and first["stays_ahead"] > 0.99
    assert first["log_me"] > second["log_me"] and "worth" in found["recommendation"]
    page = (tmp_path / "out" / "rank.html").read_text()
    assert "graft text --data topics --backbone minilm_l6 --sequence-length 16" in page


def test_the_command_is_in_the_table():
    from pipelines.__main__ import COMMANDS

    assert COMMANDS["rank"][:2] == ("pipelines.rank", "rank") and pathlib.Path(command.__file__).name == "rank.py"
