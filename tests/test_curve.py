"""graft curve: parts that keep every class, a power law that is found again, and words that follow the figures."""

import json

import numpy as np
import pytest

from models import GraftError
from pipelines.curve import CurveConfig, check_request, curve, foretell, measure, power_law, sentence, stratified_part


def made_points(law, tested=4000, draws=5, seed=0):
    """Right answers that follow accuracy = 1 - law(examples), for 1,000 examples in all."""
    generator = np.random.default_rng(seed)
    points = []
    for share in (0.1, 0.25, 0.5, 1.0):
        count = 1 if share == 1 else draws
        right = generator.random([count, tested]) >= law(1000 * share)
        points.append({"share": share, "examples": 1000 * share, "correct": right.astype(np.float32)})
    return points


def test_the_power_law_is_exact_where_there_is_no_noise():
    examples = np.array([100, 250, 500, 1000.0])
    a, b = power_law(examples, 2 * examples**-0.5)
    assert a == pytest.approx(2) and b == pytest.approx(0.5)


def test_twice_the_data_lies_within_the_interval_of_what_is_foretold():
    found = foretell(made_points(lambda n: 3 * n**-0.5))
    truth = 1 - 3 * 2000**-0.5
    low, high = found["twice"]["interval"]
    assert low <= truth <= high and high - low < 0.06
    assert found["twice"]["gain"] == pytest.approx(100 * 3 * (1000**-0.5 - 2000**-0.5), abs=0.7)
    for point in found["points"]:
        assert point["interval"][0] <= point["accuracy"] <= point["interval"][1]
    said = sentence({**found, "kind": "image"})
    assert "More data is worth its price" in said and "1,000 training images" in said


def test_a_flat_curve_is_called_flat():
    found = foretell(made_points(lambda n: 0.2, tested=300))
    assert "flat, or too noisy to tell" in sentence({**found, "kind": "text"})


def test_without_a_mistake_there_is_still_a_law():
    found = foretell(made_points(lambda n: 0.0, tested=50))
    assert found["twice"]["accuracy"] == pytest.approx(0.99, abs=0.011)


def test_a_part_keeps_every_class_and_its_share():
    targets = np.eye(3)[np.repeat([0, 1, 2], [100, 50, 2])]
    rows = stratified_part(targets, 0.1, np.random.default_rng(0))
    counts = targets[rows].sum(axis=0)
    assert counts[0] == 10 and counts[1] == 5 and counts[2] == 1 and len(set(rows)) == len(rows)
    assert len(stratified_part(targets, 1.0, np.random.default_rng(0))) == 152


def test_more_data_helps_a_head_that_it_is_measured_on():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=[4, 30])
    sides = {}
    for name, count in (("train", 400), ("val", 100), ("test", 300)):
        labels = generator.integers(4, size=count)
        values = 0.35 * centres[labels] + generator.normal(size=[count, 30])
        sides[name] = values.astype(np.float32), np.eye(4, dtype=np.float32)[labels]
    points = measure(sides, False, draws=2)
    assert [point["correct"].shape for point in points] == [(2, 300)] * 3 + [(1, 300)]
    accuracies = [point["correct"].mean() for point in points]
    assert accuracies[0] < accuracies[-1]


def test_mistakes_are_answered_at_once(tmp_path):
    with pytest.raises(GraftError, match="--draws is 1, expected 2 or more"):
        check_request(CurveConfig(draws=1))
    with pytest.raises(GraftError, match="is neither images nor texts"):
        check_request(CurveConfig(data=str(tmp_path / "nothing")))


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_plot(tmp_path, capsys):
    assert curve(["--data", "topics", "--draws", "2", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [point["share"] for point in found["points"]] == [0.1, 0.25, 0.5, 1.0]
    assert found["points"][0]["accuracy"] < found["points"][-1]["accuracy"]
    page = (tmp_path / "out" / "curve.html").read_text()
    assert "<svg" in page and "foretold" in page and found["sentence"] in page
    printed = capsys.readouterr().out
    assert "200%" in printed and f"{found['seconds']:.0f} s. Table and plot" in printed
