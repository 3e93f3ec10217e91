"""Several labels per image: figures and thresholds against scikit-learn and by hand, and a whole run."""

from __future__ import annotations

import csv
import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn import metrics

from models import GraftError
from pipelines import export, facts, image, runs
from pipelines.__main__ import main
from pipelines.config import parse_config, read_config
from pipelines.data import image_loader, targets_of
from pipelines.evaluate_multi_label import bootstrap_intervals, choose_thresholds, evaluate_multi_label, sigmoid
from pipelines.prediction import predictor
from pipelines.rescore import EvaluateConfig, evaluate_run, labelled_files
from serving.session import Session
from tests.conftest import write_png_folder
from tests.test_report import Page

NAMES = ["blue", "green", "red", "white"]


def logit(probabilities):
    probabilities = np.asarray(probabilities, "float64")
    return np.log(probabilities / (1 - probabilities))


def random_case(examples=300, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    targets = (generator.random((examples, classes)) < np.linspace(0.1, 0.6, classes)).astype("float32")
    logits = generator.normal(size=targets.shape) + 1.5 * targets - 1
    return targets, np.round(logits, 1)  # rounded: many equal scores


# ---------------------------------------------------------------- figures


def test_a_case_worked_by_hand():
    targets = [[1, 0], [1, 1], [0, 1], [0, 0]]
    logits = logit([[0.9, 0.2], [0.4, 0.6], [0.5, 0.7], [0.1, 0.8]])
    thresholds = np.array([0.45, 0.65], "float32")
    figures = evaluate_multi_label(targets, logits, sigmoid(logits) >= thresholds, thresholds, ["cat", "dog"])

    cat, dog = figures["per_class"]
    # Cat is ranked right, wrong, right: precision 1 at the first half of recall, 2/3 at the second.
    assert cat["average_precision"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert dog["average_precision"] == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * 2 / 3)
    assert figures["mean_average_precision"] == pytest.approx((5 / 6 + 7 / 12) / 2)
    assert (cat["precision"], cat["recall"], cat["f1"], cat["auroc"]) == (0.5, 0.5, 0.5, 0.75)
    assert (cat["examples"], cat["threshold"], dog["threshold"]) == (2, pytest.approx(0.45), pytest.approx(0.65))
    assert figures["micro_f1"] == figures["macro_f1"] == 0.5
    assert figures["subset_accuracy"] == 0.25  # only the first
    assert figures["loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.6, 0.5, 0.7, 0.9, 0.2]).mean())
    assert figures["labels_per_example"] == figures["chosen_per_example"] == 1
    headline = figures["headline"]
    assert (headline["metric"], headline["chance_value"]) == ("mean_average_precision", 0.5)
    assert headline["interval"] == figures["intervals"]["mean_average_precision"]
    assert sum(row["count"] for row in figures["reliability"]) == 8


def test_random_cases_equal_scikit_learn():
    for seed in range(3):
        targets, logits = random_case(seed=seed)
        probabilities, thresholds = sigmoid(logits), np.full(5, 0.4, "float32")
        chosen = probabilities >= thresholds
        figures = evaluate_multi_label(targets, logits, chosen, thresholds, list("abcde"))
        expected = {
            "mean_average_precision": metrics.average_precision_score(targets, logits, average="macro"),
            "micro_f1": metrics.f1_score(targets, chosen, average="micro"),
            "macro_f1": metrics.f1_score(targets, chosen, average="macro"),
            "subset_accuracy": metrics.accuracy_score(targets, chosen),
            "auroc": metrics.roc_auc_score(targets, logits, average="macro"),
            "loss": np.mean([metrics.log_loss(t, p) for t, p in zip(targets.T, probabilities.T.astype("float64"))]),
        }
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, rel=1e-6), name
        columns = metrics.precision_recall_fscore_support(targets, chosen)
        for name, column in zip(("precision", "recall", "f1", "examples"), columns):
            assert [row[name] for row in figures["per_class"]] == pytest.approx(list(column)), name
        assert json.dumps(figures, allow_nan=False)


def test_bootstrap_equals_a_plain_loop():
    targets, logits = random_case(60)
    targets[:, 0] = np.arange(60) == 7  # most resamples miss it, or hold it twice
    truth, chosen, losses = targets > 0, logits > 0, np.random.default_rng(1).random(60)
    intervals = bootstrap_intervals(truth, logits, chosen, losses, seed=3, samples=100)

    drawn = {name: [] for name in intervals}
    for rows in np.random.default_rng(3).integers(60, size=(100, 60)):
        t, z, c = truth[rows], logits[rows], chosen[rows]
        present = np.flatnonzero(t.any(axis=0))
        drawn["mean_average_precision"].append(metrics.average_precision_score(t[:, present], z[:, present]))
        drawn["micro_f1"].append(metrics.f1_score(t, c, average="micro"))
        drawn["macro_f1"].append(metrics.f1_score(t, c, labels=present, average="macro", zero_division=0))
        drawn["subset_accuracy"].append((t == c).all(axis=1).mean())
        drawn["loss"].append(losses[rows].mean())
    for name, values in drawn.items():
        assert intervals[name] == pytest.approx(list(np.percentile(values, [2.5, 97.5]))), name


def test_what_is_undefined_is_none_and_leaves_the_means_alone():
    targets, logits = random_case(50)
    targets[:, 1], logits[:, 2] = 0, -9
    chosen = logits > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = evaluate_multi_label(targets, logits, chosen, np.full(5, 0.5), list("abcde"))
    absent, never = figures["per_class"][1:3]
    assert absent["recall"] is absent["f1"] is absent["auroc"] is absent["average_precision"] is None
    assert (never["precision"], never["f1"]) == (None, 0)
    others = [0, 2, 3, 4]
    assert figures["macro_f1"] == pytest.approx(
        metrics.f1_score(targets[:, others], chosen[:, others], average="macro", zero_division=0)
    )
    assert figures["headline"]["chance_value"] == pytest.approx(targets[:, others].mean())


def test_a_model_that_diverged():
    targets, logits = random_case(10)
    logits[4, 1] = np.nan
    with pytest.raises(GraftError, match="1 of 10 examples are not finite"):
        evaluate_multi_label(targets, logits, logits > 0, np.full(5, 0.5), list("abcde"))


# ---------------------------------------------------------------- thresholds


def test_thresholds_by_hand():
    targets = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 1, 0]])
    probabilities = [
        [0.9, 0.9, 0.9, 0.9, 0.3],
        [0.7, 0.8, 0.8, 0.8, 0.2],
        [0.4, 0.3, 0.3, 0.3, 0.1],
        [0.1, 0.1, 0.1, 0.1, 0.0],
    ]
    # Halfway between 0.7 and 0.4; below 0.3, for F1 0.8 instead of 2/3; no example, all examples; below 0.1.
    thresholds = choose_thresholds(targets, np.array(probabilities, "float32"))
    assert thresholds.dtype == np.float32
    np.testing.assert_allclose(thresholds, [0.55, 0.2, 0.5, 0.5, 0.05], rtol=1e-6)


def test_of_equally_good_thresholds_the_nearest_to_a_half():
    # F1 is 2/3 above 0.5 (1 of 1 found of 2) and below 0.2 (2 of 4): the first is nearer.
    targets = np.array([[1], [0], [0], [1]])
    probabilities = np.array([[0.8], [0.4], [0.3], [0.2]], "float32")
    np.testing.assert_allclose(choose_thresholds(targets, probabilities), [0.6])
    np.testing.assert_allclose(choose_thresholds(targets, probabilities / 8), [0.075])


def test_no_threshold_is_better():
    targets, logits = random_case(200)
    probabilities = sigmoid(logits)
    thresholds = choose_thresholds(targets, probabilities)
    for truth, column, threshold in zip(targets.T, probabilities.T, thresholds):
        best = max(metrics.f1_score(truth, column >= value) for value in np.unique(column))
        assert metrics.f1_score(truth, column >= threshold) == best


def test_neighbours_in_float32_are_told_apart():
    upper = np.float32(0.7)
    probabilities = np.array([[upper], [np.nextafter(upper, np.float32(0))]])
    chosen = probabilities >= choose_thresholds([[1], [0]], probabilities)
    assert chosen.ravel().tolist() == [True, False]


# ---------------------------------------------------------------- a whole run


def write_pairs(folder, count: int = 80, seed: int = 0):
    """Pictures of one colour or of two side by side, and manifest.csv with labels such as blue|red."""
    generator = np.random.default_rng(seed)
    colours = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0), "white": (200, 200, 200)}
    (folder / "files").mkdir(parents=True)
    lines = ["file,labels"]
    for index in range(count):
        names = generator.choice(NAMES, size=1 + index % 2, replace=False)
        tiles = [np.full((20, 20, 3), colours[name]) for name in (names[0], names[-1])]
        pixels = np.concatenate(tiles, axis=1) + generator.integers(0, 50, (20, 40, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "files" / f"{index:03}.png")
        lines.append(f"files/{index:03}.png,{'|'.join(names)}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


COLUMNS = ["--path-column", "file", "--label-column", "labels"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def run_dir(manifest, tiny_preset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "colours"
    words = ["--data", manifest, *COLUMNS, "--backbone", tiny_preset, "--out", out]
    words += ["--head-epochs", 6, "--depth", "head", "--head-learning-rate", 0.03, "--batch-size", 8]
    assert main(["image", *map(str, words)]) == 0
    return out


def read_json(path):
    return json.loads(path.read_text())


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_json(run_dir):
    figures = read_json(run_dir / "metrics.json")
    assert figures["class_names"] == NAMES
    assert figures["test"]["headline"]["metric"] == "mean_average_precision"
    assert figures["test"]["mean_average_precision"] > figures["test"]["headline"]["chance_value"] + 0.1
    assert [row["threshold"] for row in figures["test"]["per_class"]] == figures["thresholds"]
    assert figures["thresholds"] == np.float32(figures["thresholds"]).tolist() and len(figures["thresholds"]) == 4
    for phase in figures["phases"]:
        assert set(phase["test"]) == {"accuracy", "loss", "mean_average_precision"}
    assert sum(map(sum, figures["class_counts"].values())) == 120  # 40 with one label, 40 with two


def test_what_is_served_is_what_training_chose(run_dir):
    """The model rebuilt from the run's weights, and its thresholds, against the export, on all test files."""
    config, figures = read_config(run_dir / "config.yaml"), read_json(run_dir / "metrics.json")
    model = image.build_model(config, NAMES, multi_label=True)
    model.load_weights(runs.find_checkpoint(run_dir))
    tables = {name: runs.read_split(run_dir, name, multi_label=True) for name in ("val", "test")}
    logits_of = predictor(model, tf.distribute.get_strategy(), image_loader(model.backbone.preprocess, 255), 8)
    probabilities = {name: sigmoid(logits_of(table)) for name, table in tables.items()}
    thresholds = choose_thresholds(targets_of(tables["val"], 4), probabilities["val"])
    np.testing.assert_allclose(figures["thresholds"], thresholds, atol=1e-6)

    version = runs.find_version(str(run_dir))
    details = read_json(version / "assets.extra" / "graft.json")
    assert details["multi_label"] and details["thresholds"] == figures["thresholds"]
    data = [pathlib.Path(path).read_bytes() for path in tables["test"]["path"].to_pylist()]
    with Session(version) as session:
        served = session.run("serving_default", {"image_bytes": data})
    assert len(data) == figures["examples"]["test"]
    np.testing.assert_allclose(served["probabilities"], probabilities["test"], atol=1e-5)
    np.testing.assert_array_equal(served["chosen"], probabilities["test"] >= thresholds)
    chosen, truth = served["chosen"], targets_of(tables["test"], 4) > 0
    assert figures["test"]["subset_accuracy"] == (chosen == truth).all(axis=1).mean()
    assert figures["test"]["micro_f1"] == pytest.approx(metrics.f1_score(truth, chosen, average="micro"))


def test_predict_joins_the_chosen_labels(run_dir, manifest, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    shutil.copy(manifest.parent / "files" / "001.png", tmp_path / "a.png")
    (tmp_path / "in.csv").write_text("path\na.png\nnotes.txt\n")
    out = tmp_path / "out.csv"
    assert main(["predict", str(run_dir), str(tmp_path / "in.csv"), "--out", str(out), "--probabilities"]) == 0
    good, bad = rows_of(out)
    probabilities = np.array([float(good[f"p({name})"]) for name in NAMES])
    thresholds = read_json(run_dir / "metrics.json")["thresholds"]
    assert good["label"] == "|".join(name for name, chosen in zip(NAMES, probabilities >= thresholds) if chosen)
    assert float(good["score"]) == pytest.approx(probabilities.max())
    assert bad["label"] == "" and bad["error"].startswith("not an image")
    assert main(["predict", str(run_dir), str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "likeliest" in shown and all(name in shown for name in good["label"].split("|"))


def test_evaluate_on_other_labelled_data(run_dir, tmp_path, capsys):
    other, out = write_pairs(tmp_path / "other", count=30, seed=1), tmp_path / "evaluation"
    assert main(["evaluate", str(run_dir), "--data", str(other), *COLUMNS, "--out", str(out)]) == 0
    assert "mean average precision on 30 images" in " ".join(capsys.readouterr().out.split())
    figures, rows = read_json(out / "metrics.json")["test"], rows_of(out / "predictions.csv")
    exact = [set(row["true"].split("|")) == set(row["label"].split("|")) for row in rows]
    assert figures["subset_accuracy"] == pytest.approx(np.mean(exact))
    assert "Mean average precision" in Page((out / "report.html").read_text()).text
    with pytest.raises(GraftError, match="--positive red: this model gives several labels per image"):
        evaluate_run([str(run_dir), "--data", str(other), *COLUMNS, "--positive", "red"])


def test_one_label_per_picture_is_data_too(run_dir, tmp_path):
    folder = write_png_folder(tmp_path / "single", classes=2, per_class=3)
    for old, new in (("class0", "red"), ("class1", "green")):
        (folder / old).rename(folder / new)
    assert main(["evaluate", str(run_dir), "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [row["examples"] for row in read_json(tmp_path / "out" / "metrics.json")["test"]["per_class"]] == [
        0,
        3,
        3,
        0,
    ]


@pytest.mark.slow
def test_export_again_keeps_the_thresholds_and_a_stopped_run_gets_them(run_dir, tmp_path):
    copy = tmp_path / "colours"
    shutil.copytree(run_dir, copy)
    thresholds = read_json(copy / "metrics.json")["thresholds"]
    assert main(["export", str(copy)]) == 0
    (copy / "metrics.json").unlink()  # as after Ctrl-C
    assert main(["export", str(copy)]) == 0
    served = [read_json(copy / "serving/colours" / v / "assets.extra/graft.json")["thresholds"] for v in "23"]
    assert served[0] == thresholds
    np.testing.assert_allclose(served[1], thresholds, atol=1e-6)
    lines = (copy / "splits.csv").read_text().splitlines()
    (copy / "splits.csv").write_text("\n".join(line for line in lines if not line.startswith("val,")) + "\n")
    with pytest.raises(GraftError, match="thresholds are chosen on the validation examples.*Put them back"):
        export.export_run([str(copy)])


def test_the_report_says_what_several_labels_need(run_dir):
    figures = read_json(run_dir / "metrics.json")["test"]
    page = Page((run_dir / "report.html").read_text())
    for words in (
        "several labels per example", "mean average precision on", "Guessing by how common classes are", "Micro F1",
        "Wholly right", "Threshold", "Test mean average precision after it", "right yes-or-nos", "Worst first",
        *(f"{row['average_precision']:.3f}" for row in figures["per_class"]),
        *(f"{row['threshold']:.3f}" for row in figures["per_class"]),
    ):  # fmt: skip
        assert words in page.text, words
    assert "What is taken for what" not in page.text and "None" not in page.text and "nan" not in page.text
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {address[1:] for address in page.loaded if address.startswith("#")} <= identifiers


def test_the_worst_mistakes_come_first_and_are_mistakes(run_dir):
    from pipelines.mistakes import worst_mistakes

    table = runs.read_split(run_dir, "test", multi_label=True)
    truth = targets_of(table, 4) > 0
    probabilities = np.where(truth, 0.9, 0.1).astype("float32")
    assert worst_mistakes(table, probabilities, NAMES, 255, "none", np.full(4, 0.5)) == []
    probabilities[2] = 1 - probabilities[2]
    probabilities[5, 3] = 0.7 - 0.4 * truth[5, 3]  # the other way
    first, second = worst_mistakes(table, probabilities, NAMES, 255, "none", np.full(4, 0.5))
    ids = table["id"].to_pylist()
    assert (first["id"], second["id"]) == (ids[2], ids[5])

    def names(text):
        return set(text.split("|")) - {""}

    assert names(first["true"]) | names(first["predicted"]) == set(NAMES)
    assert second["worst_class"] == "white" and second["path"] is second["picture"] is None
    assert names(second["true"]) ^ names(second["predicted"]) == {"white"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class-weights", "balanced"], "--class-weights balanced: .* several labels per image.* Leave the flag out"),
        (["--positive", "red"], "--positive red: .* several labels per image.* Leave the flag out"),
    ],
)
def test_flags_for_one_label_only(manifest, tmp_path, words, message):
    config = parse_config(["--data", str(manifest), *COLUMNS, "--out", str(tmp_path / "run"), *words])
    with pytest.raises(GraftError, match=message):
        image.check_request(config)


def test_a_model_of_one_label_refuses_data_with_several(manifest):
    config = EvaluateConfig("runs/photos", str(manifest), path_column="file", label_column="labels")
    with pytest.raises(GraftError, match=r"001\.png has the labels \w+\|\w+, but the model was trained to give one"):
        labelled_files(config, {"class_names": NAMES})


def test_the_verdict_is_about_the_headline():
    phases = [
        {"kept": True, "climb": {"val_loss": 0.3}, "test": {"accuracy": 0.9, "mean_average_precision": value}}
        for value in (0.700, 0.724)
    ]
    assert facts.verdicts(phases, "2") == [
        "Fine-tuning the top 2 blocks was worth it: +2.4 points over the head alone (0.700)."
    ]
    assert "cost 2.4 points of test mean average precision" in facts.verdicts(phases[::-1], "2")[0]
