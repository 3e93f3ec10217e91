"""Temperature and `unsure`: found on validation, served from the graph, the labels as they were."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from pipelines import calibration, facts
from pipelines.__main__ import main
from pipelines.common_options import GuardOptions
from serving.session import Session
from serving.verify import VerificationError, verify
from tests.conftest import tiny_backbone


def honest(count: int, classes: int = 5, seed: int = 0):
    """Labels drawn from the probabilities of logits: [count] int and [count, classes] float32."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (count, classes)).astype(np.float32)
    drawn = (facts.softmax(logits).cumsum(axis=1) < random.random((count, 1))).sum(axis=1)
    return np.minimum(drawn, classes - 1), logits


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_logits_that_are_too_sure_or_too_cautious_become_honest(factor):
    labels, logits = honest(1000)
    found = calibration.find_temperature(labels, logits * factor)
    assert found["temperature"] == pytest.approx(factor, rel=0.1)
    assert found["val_loss_after"] < found["val_loss_before"]
    assert found["val_loss_after"] == pytest.approx(calibration.mean_loss(labels, logits), rel=0.01)


def test_the_loss_on_other_examples_is_hardly_ever_worse():
    differences = []
    for seed in range(20):
        labels, logits = honest(2200, seed=seed)
        temperature = calibration.find_temperature(labels[:200], 1.2 * logits[:200], seed)["temperature"]
        losses = [calibration.mean_loss(labels[200:], 1.2 * logits[200:].astype(float) / t) for t in (1, temperature)]
        differences.append(losses[1] - losses[0])
    assert np.mean(np.array(differences) <= 0) >= 0.9 and np.mean(differences) < 0


def test_the_temperature_stays_1_where_validation_cannot_tell():
    labels, logits = honest(400)
    assert calibration.find_temperature(labels[:19], 5 * logits[:19])["temperature"] == 1
    answers = logits.argmax(axis=1)  # without a mistake surer is always better
    assert calibration.find_temperature(answers, logits)["temperature"] == 1
    exact = calibration.find_temperature(labels, logits)
    assert exact["temperature"] == pytest.approx(1, abs=0.1)
    options = GuardOptions(calibrate=False)
    assert calibration.fitted(labels, 5 * logits, options)["temperature"] == 1


def test_45_right_answers_are_enough_for_a_precision_of_095_and_44_are_not():
    top, right = np.linspace(0.5, 0.99, 45).astype(np.float32), np.ones(45, bool)
    assert calibration.unsure_threshold(top, right, 0.95) == top[0]
    assert calibration.unsure_threshold(top[1:], right[1:], 0.95) == calibration.NEVER_SURE
    figures = calibration.sure_figures(top, right, calibration.NEVER_SURE)
    assert (figures["coverage"], figures["precision"]) == (0, None)


def test_sure_answers_have_the_precision_asked_for():
    precisions, coverages = [], []
    for seed in range(20):
        labels, logits = honest(5400, seed=seed)
        top, right = calibration.top_and_right(labels, 1.5 * logits)
        threshold = calibration.unsure_threshold(top[:400], right[:400], 0.8)
        figures = calibration.sure_figures(top[400:], right[400:], threshold)
        coverages.append(figures["coverage"])
        if figures["sure"]:  # where nothing can be called sure on validation, nothing is promised
            precisions.append(figures["interval"][1])
    assert len(precisions) >= 15 and np.mean(np.array(precisions) >= 0.8) >= 0.85
    assert np.mean(coverages) > 0.3


def test_equal_probabilities_are_sure_together():
    top, right = np.full(100, 0.7, np.float32), np.arange(100) > 50
    assert calibration.unsure_threshold(top, right, 0.9) == calibration.NEVER_SURE


# ---------------------------------------------------------------- in the graph

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export with a temperature and a threshold: its folder, 60 pictures, the uncalibrated logits of them."""
    import io

    from PIL import Image

    from models.classifier import Classifier
    from models.inputs import decode_images, scale_image
    from serving.export import export_image_classifier

    model = Classifier(tiny_backbone(), len(CLASSES))
    model.head.kernel.assign(6 * model.head.kernel.numpy())
    random, files = np.random.default_rng(0), []
    for _ in range(60):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((16, 16)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    preprocess = model.backbone.preprocess
    images, _ = decode_images(np.array(files, object), preprocess)
    logits = np.array(model(scale_image(images, preprocess)))
    top = facts.softmax(logits / np.float32(2.5)).max(axis=1)
    folder = tmp_path_factory.mktemp("exported") / "1"
    threshold = float(np.median(top))
    export_image_classifier(model, preprocess, CLASSES, folder, temperature=2.5, unsure_below=threshold)
    return folder, files, logits, threshold


def test_the_graph_divides_by_the_temperature_and_marks_what_is_unsure(exported):
    folder, files, logits, threshold = exported
    expected = facts.softmax(logits / np.float32(2.5))
    assert verify(folder, files, expected)["files"] == 60  # checks unsure in every answer
    with Session(folder) as session:
        answers = session.run("serving_default", {"image_bytes": [*files, b"no picture"]})
    np.testing.assert_array_equal(answers["unsure"], answers["scores"][:, 0] < np.float32(threshold))
    assert 20 < answers["unsure"][:-1].sum() < 40 and answers["unsure"][-1]
    best = [CLASSES[index].encode() for index in logits.argmax(axis=1)]
    assert answers["labels"][:-1, 0].tolist() == best  # of unsure ones too


@pytest.mark.parametrize("threshold, said", [(None, "no unsure_below"), (0.999, "does not fit its best score")])
def test_verification_fails_where_unsure_does_not_fit_what_the_export_says(exported, threshold, said):
    folder, files, logits, _ = exported
    file = folder / "assets.extra" / "graft.json"
    before = file.read_text()
    details = json.loads(before)
    details.pop("unsure_below")
    file.write_text(json.dumps(details if threshold is None else {**details, "unsure_below": threshold}))
    try:
        with pytest.raises(VerificationError, match=said):
            verify(folder, files, facts.softmax(logits / np.float32(2.5)))
    finally:
        file.write_text(before)


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_serves_what_it_reports(tiny_preset, tmp_path):
    from tests.conftest import write_png_folder

    data, out = write_png_folder(tmp_path / "data", per_class=60), tmp_path / "run"
    words = ["image", "--data", data, "--backbone", tiny_preset, "--out", out, "--depth", "head"]
    words += ["--abstain-below-precision", "0.5"]
    assert main([str(word) for word in words]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    found = metrics["calibration"]
    assert found["test_loss_after"] == pytest.approx(metrics["test"]["loss"], abs=1e-6)
    sure = found["abstain"]["test"]
    assert main(["predict", str(out), str(data), "--out", str(tmp_path / "all.csv")]) == 0
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    threshold = found["abstain"]["threshold"]
    unsure = [row["unsure"] == "True" for row in rows]
    assert unsure == [float(row["score"]) < threshold for row in rows]
    with open(out / "splits.csv") as file:
        tested = {row["path"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert sum(not mark for mark, row in zip(unsure, rows) if row["path"] in tested) == sure["sure"]
    assert "unsure" in (out / "report.html").read_text()

    def details(version: int) -> dict:
        path = out / "serving" / "run" / str(version) / "assets.extra" / "graft.json"
        return json.loads(path.read_text())

    assert main(["export", str(out)]) == 0
    for name in ("temperature", "unsure_below"):
        assert details(1)[name] == details(2)[name]
    assert details(1)["temperature"] == found["temperature"]
    # A run of an earlier version knows no temperature.
    metrics.pop("calibration")
    (out / "metrics.json").write_text(json.dumps(metrics))
    assert main(["export", str(out)]) == 0
    assert details(3)["temperature"] == 1 and "unsure_below" not in details(3)


def test_a_precision_that_cannot_be_asked_for_answers_at_once(capsys):
    assert main(["image", "--abstain-below-precision", "1.5"]) == 2
    assert "--abstain-below-precision is 1.5" in capsys.readouterr().err
