"""The image pipeline end to end, with a small random backbone: run folder, export, answers, after training."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from models import GraftError
from pipelines import image, runs
from pipelines.__main__ import main
from pipelines.config import parse_config
from serving.session import Session


def flags(data, preset, out, *more):
    words = ["--data", data, "--backbone", preset, "--out", out, "--head-epochs", 2, "--fine-tune-epochs", 2, *more]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def run_dir(png_folder, tiny_preset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pictures"
    return image.run(parse_config(flags(png_folder, tiny_preset, out)))


def test_the_run_folder_holds_everything(run_dir):
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    assert {
        "config.yaml",
        "metrics.json",
        "model_card.md",
        "report.html",
        "skipped.csv",
        "splits.csv",
        "tensorboard",
    } <= names
    assert {"checkpoints/head.weights.h5", "serving/pictures/1/saved_model.pb"} <= names
    assert "serving/pictures/1/variables/variables.index" in names
    assert not [name for name in names if "tmp" in name]


def test_metrics_json_has_what_machines_need(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {"accuracy", "loss", "macro_f1"} <= set(metrics["test"]) & set(metrics["val"])
    assert metrics["examples"] == {"train": 24, "val": 6, "test": 6, "skipped": 0}
    assert [phase["name"] for phase in metrics["phases"]] == ["head", "light", "full"]  # the default: --depth auto
    rungs = metrics["climb"]["rungs"]
    assert [row["rung"] for row in rungs] == ["head", "light", "full"] and rungs[-1]["went_on"] is False
    assert metrics["climb"]["best"] == [row["rung"] for row in rungs if row["kept"]][-1]
    for phase in metrics["phases"]:
        assert {"name", "epochs", "seconds", "trainable_parameters"} <= set(phase)
    assert metrics["class_names"] == ["class0", "class1", "class2"]
    assert metrics["backbone"]["name"] == "tiny_efficientnet"


def test_the_model_card_says_what_the_model_is_made_of(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    _, front, text = (run_dir / "model_card.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "tiny_efficientnet"
    for fact in (
        "24 examples to train, 6 to validate, 6 to test",
        metrics["data"]["fingerprint"],
        metrics["backbone"]["source"]["sha256"],
        "licence: unknown",
        f"{metrics['test']['accuracy']:.3f}",
        "class0, class1, class2",
    ):
        assert fact in text, fact


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "created")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_the_same_command_gives_the_same_figures(run_dir, png_folder, tiny_preset, tmp_path):
    again = image.run(parse_config(flags(png_folder, tiny_preset, tmp_path / "again")))
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, again))
    assert without_times(first) == without_times(second)


def test_without_an_export_one_can_be_made_later(png_folder, tiny_preset, tmp_path, capsys):
    words = flags(png_folder, tiny_preset, tmp_path / "run", "--depth", "head", "--no-export")
    assert main(["image", *words]) == 0 and not (tmp_path / "run" / "serving").exists()
    assert f"graft export {tmp_path / 'run'}" in " ".join(capsys.readouterr().out.split())
    assert "How it is served" not in (tmp_path / "run" / "report.html").read_text()
    assert main(["predict", str(tmp_path / "run"), str(png_folder)]) == 2
    assert "graft export" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "serving" / "run" / "1" / "saved_model.pb").is_file()


def test_the_config_file_repeats_the_run(run_dir):
    config = parse_config(["--config", str(run_dir / "config.yaml"), "--head-epochs", "5"])
    assert config.head.head_epochs == 5 and config.fine_tune.fine_tune_epochs == 2
    assert config.run.out == str(run_dir)


def test_served_answers_name_the_labels_best_first(run_dir, png_folder):
    data = [(png_folder / "class0" / f"{index:03}.png").read_bytes() for index in range(5)]
    with Session(runs.find_version(str(run_dir))) as session:
        answers = session.run("serving_default", {"image_bytes": data})
        features = session.run("features", {"image_bytes": data})
    best = answers["probabilities"].argmax(axis=1)
    assert [label[0].decode() for label in answers["labels"]] == [f"class{i}" for i in best]
    np.testing.assert_allclose(answers["scores"][:, 0], answers["probabilities"].max(axis=1))
    assert features["features"].shape == (5, 320)


def test_predict_keeps_the_columns_of_a_csv(run_dir, png_folder, tmp_path, capsys):
    shutil.copy(png_folder / "class1" / "000.png", tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    rows = [("a.png", "first"), ("notes.txt", "second"), ("gone.png", "third")]
    (tmp_path / "in.csv").write_text("path,who\n" + "".join(f"{path},{who}\n" for path, who in rows))
    out = tmp_path / "out.csv"
    assert main(["predict", str(run_dir), str(tmp_path / "in.csv"), "--out", str(out), "--probabilities"]) == 0
    with open(out, newline="") as file:
        answers = list(csv.DictReader(file))
    assert [row["who"] for row in answers] == ["first", "second", "third"]
    assert list(answers[0])[:5] == ["path", "who", "label", "score", "error"]
    assert answers[0]["label"].startswith("class") and answers[0]["error"] == ""
    assert float(answers[0]["p(class0)"]) + float(answers[0]["p(class1)"]) + float(answers[0]["p(class2)"]) == (
        pytest.approx(1, abs=1e-5)
    )
    assert answers[1]["label"] == "" and answers[1]["error"].startswith("not an image")
    assert answers[2]["error"] == "cannot be read: No such file or directory"
    assert "2 of 3 files have no answer" in capsys.readouterr().out


def test_evaluate_matches_classes_by_name(run_dir, png_folder, tmp_path):
    external = tmp_path / "clinic"
    shutil.copytree(png_folder / "class2", external / "class2")
    shutil.copytree(png_folder / "class0", external / "class0")
    out = tmp_path / "evaluation"
    assert main(["evaluate", str(run_dir), "--data", str(external), "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["examples"] for row in metrics["test"]["per_class"]] == [12, 0, 12]
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert metrics["test"]["accuracy"] == pytest.approx(np.mean([row["true"] == row["label"] for row in rows]))
    assert "<html" in (out / "report.html").read_text()
    (external / "class0").rename(external / "zebra")
    with pytest.raises(GraftError, match="does not know the classes zebra. It knows class0, class1, class2"):
        from pipelines.rescore import evaluate_run

        evaluate_run([str(run_dir), "--data", str(external)])


def test_export_makes_the_next_version_with_the_same_answers(run_dir, png_folder, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(run_dir, copy)
    assert main(["export", str(copy)]) == 0
    data = [(png_folder / "class1" / "003.png").read_bytes()]
    answers = []
    for version in ("1", "2"):
        with Session(copy / "serving" / "pictures" / version) as session:
            answers.append(session.run("serving_default", {"image_bytes": data})["probabilities"])
    np.testing.assert_allclose(*answers, atol=1e-6)


def test_export_needs_no_test_files(run_dir, tmp_path, capsys):
    copy = tmp_path / "pictures"
    shutil.copytree(run_dir, copy)
    (copy / "splits.csv").write_text("split,class,label,id,path\ntest,class0,0,0123456789abcdef,gone.png\n")
    assert main(["export", str(copy)]) == 0
    assert "no test files were left" in capsys.readouterr().out


def test_a_name_that_a_url_cannot_hold_is_made_one(tmp_path):
    assert runs.serving_name(tmp_path / "my run: 日本") == "my-run-"
    assert runs.serving_name(tmp_path / "photos-2") == "photos-2"


def test_a_run_folder_is_never_overwritten(run_dir, png_folder, tiny_preset):
    with pytest.raises(GraftError, match="exists already and a run is never overwritten"):
        image.run(parse_config(flags(png_folder, tiny_preset, run_dir)))


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_learned_usable(png_folder, tiny_preset, tmp_path):
    import signal

    out = tmp_path / "stopped"
    command = [sys.executable, "-u", "-m", "pipelines.image", *flags(png_folder, tiny_preset, out)]
    command += ["--fine-tune-epochs", "500", "--patience", "500"]
    # A job in the background of a script ignores Ctrl-C, and so would all that it starts.
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    for line in process.stdout:
        if "/500" in line:  # in the second phase
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in errors
    assert f"`graft export {out}` makes a model of the best weights so far" in errors
    assert not (out / "metrics.json").exists()
    assert main(["export", str(out)]) == 0
    assert (out / "serving" / "stopped" / "1" / "saved_model.pb").is_file()
