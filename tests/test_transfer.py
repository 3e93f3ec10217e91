"""Whether transfer helps: the verdict on data where the answer is known, what is said of it, and --strict."""

import json

import numpy as np
import pytest

from models import GraftError
from pipelines import facts, transfer
from pipelines.__main__ import guarded
from pipelines.image import main
from pipelines.probes import linear_probe
from pipelines.results import check_strict
from tests.test_image import flags
from tests.test_report import make_facts, page_of


def probe(accuracy):
    return {"accuracy": accuracy, "interval": [accuracy - 0.03, accuracy + 0.03], "l2": 0.1}


def result(verdict="hurts", **more):
    points = {"hurts": -6.2, "helps": 55.3, "no_difference": 0.6}[verdict]
    found = {
        "verdict": verdict, "points": points, "interval": [points - 2, points + 2], "against": "raw",
        "probes": {"pretrained": probe(0.88), "random_weights": probe(0.8), "raw": probe(0.942)},
        "examples": 500, "seconds": 1.0, **more,
    }  # fmt: skip
    return {**found, "sentence": transfer.sentence(found, "image")}


RAW_TEST = {"accuracy": 0.965, "model_accuracy": 0.985, "points": 2.0, "interval": [0.4, 3.6]}


def test_what_is_said():
    assert result("helps")["sentence"] == "Transfer helps: +55.3 points (+53.3 to +57.3) over raw pixels."
    same = result("no_difference")["sentence"]
    assert same == "Transfer makes no measurable difference: +0.6 points, -1.4 to +2.6, against raw pixels."
    said = result(raw_test=RAW_TEST)["sentence"]
    assert said.startswith("Transfer hurts feature extraction: pretrained features get 88.0% right, raw pixels 94.2%, ")
    assert said.endswith("makes up for it: 98.5% on the test set, raw pixels 96.5% (+2.0 points, +0.4 to +3.6).")
    worse = {**RAW_TEST, "points": -2.0, "interval": None}
    assert "does not make up for it" in result(raw_test=worse)["sentence"]


def test_the_report_says_it_first_where_transfer_hurts(tmp_path):
    hurts, helps = result(raw_test=RAW_TEST), result("helps")
    page = page_of(tmp_path, make_facts(transfer=hurts, verdicts=[hurts["sentence"], "Two blocks were worth it."]))
    assert page.text.index("Transfer hurts") < page.text.index("95% interval")
    assert "Two blocks were worth it." in page.text and "88.0% 85.0% to 91.0%" in page.text
    fine = make_facts(transfer=helps, verdicts=["Two blocks were worth it.", helps["sentence"]])
    page = page_of(tmp_path, fine)
    assert page.text.index("Two blocks") < page.text.index("Transfer helps") and not any(
        attributes.get("role") == "alert" for _, attributes in page.elements
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_fewer_columns_say_the_same(sparse):
    import scipy.sparse

    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    inputs = (random.random((60, 400)) < 0.1) * (1.0 + labels[:, None] * (np.arange(400) < 40))
    small = transfer.compact(scipy.sparse.csr_matrix(inputs) if sparse else inputs)
    assert small.shape == (60, 60)
    np.testing.assert_allclose(small @ small.T, inputs @ inputs.T, atol=1e-8)
    few = inputs[:, :20]
    np.testing.assert_array_equal(transfer.compact(scipy.sparse.csr_matrix(few) if sparse else few), few)
    probes = [linear_probe(values, labels, standardise=False) for values in (inputs, small)]
    assert probes[1]["accuracy"] == pytest.approx(probes[0]["accuracy"], abs=0.02)


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    """Pictures whose one dark quarter tells the class: bare pixels say it at once, means over the picture never."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("quarters"), np.random.default_rng(0)
    for label in range(4):
        (folder / f"quarter{label}").mkdir()
        for number in range(60):
            pixels = random.integers(90, 256, (16, 16, 3))
            pixels[8 * (label // 2) :, 8 * (label % 2) :][:8, :8] //= 2
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"quarter{label}" / f"{number:03}.png")
    return folder


@pytest.mark.slow
def test_a_run_whose_features_lose_to_pixels_says_so_first_and_exits_with_3(quarters, tiny_preset, tmp_path, capsys):
    out = tmp_path / "run"
    words = flags(quarters, tiny_preset, out, "--depth", "head", "--strict", "--baseline", "scratch")
    assert guarded(main, words) == 3
    printed = capsys.readouterr()
    assert "--strict: Transfer hurts feature extraction" in printed.err
    metrics = json.loads((out / "metrics.json").read_text())
    found = metrics["transfer"]
    assert found["verdict"] == "hurts" and found["points"] < 0 and found["interval"][1] < 0
    assert set(found["probes"]) == {"pretrained", "random_weights", "raw"} and found["against"] == "raw"
    assert found["probes"]["raw"]["accuracy"] > 0.9 and found["raw_test"]["accuracy"] > 0.9
    assert found["raw_test"]["model_accuracy"] == metrics["test"]["accuracy"]
    assert metrics["verdicts"][0] == found["sentence"] and "does not make up for it" in found["sentence"]
    closing = " ".join(printed.out.split())
    assert closing.index("Transfer hurts") < closing.index("test images.")
    assert found["scratch"]["epochs"] == 4 and found["scratch"]["points"] == pytest.approx(
        100 * (metrics["test"]["accuracy"] - found["scratch"]["accuracy"])
    )


def test_strict_lets_everything_else_pass(tmp_path):
    from pipelines.options import ImageConfig

    config = ImageConfig()
    check_strict(config, {"transfer": result("hurts")}, tmp_path)
    config.guards.strict = True
    check_strict(config, {"transfer": result("no_difference")}, tmp_path)
    check_strict(config, {"transfer": {"verdict": None}}, tmp_path)
    with pytest.raises(GraftError, match="--strict: Transfer hurts") as raised:
        check_strict(config, {"transfer": result("hurts")}, tmp_path)
    assert raised.value.exit_code == 3


def test_metrics_json_holds_it():
    kept = facts.machine_metrics(make_facts(transfer=result("helps")))["transfer"]
    assert kept["verdict"] == "helps" and kept["points"] == 55.3 and len(kept["interval"]) == 2
