"""How deep to go: the rule on made-up validation sets of every size, the clock, and what is said of a climb."""

import time

import numpy as np
import pytest

from models import GraftError
from pipelines import facts, ladder
from pipelines.config import budget_seconds
from tests.test_report import make_facts, page_of

AUTO = [("head", 0), ("light", 2), ("full", None)]


def answers(count, won, lost):
    """Correctness of two models, 80% each or so: the second wins `won` examples and loses `lost`."""
    best = (np.arange(count) % 5 > 0).astype(np.float32)
    right = best.copy()
    right[np.flatnonzero(best == 0)[:won]] = 1
    right[np.flatnonzero(best == 1)[:lost]] = 0
    return right, best


def phase(name, seconds=10.0, val_loss=0.5, val_accuracy=0.8, kept=True, test=0.8, compared=None, **more):
    thawed = {"head": 0, "light": 2, "fine_tune": 2, "full": 6}[name]
    return {
        "name": name, "kept": kept, "epochs": 3, "trainable_parameters": 100, "val_loss": val_loss,
        "blocks": [{"trainable_parameters": int(block >= 6 - thawed)} for block in range(6)] + [{}],
        "climb": {"seconds": seconds, "val_loss": val_loss, "val_accuracy": val_accuracy, **(compared or {})},
        "test": {"accuracy": test}, **more,
    }  # fmt: skip


def climbs(count, won, lost):
    """Whether full is tried after a light rung that won and lost so many of so many validation examples."""
    light = phase("light", compared=ladder.paired_gain(*answers(count, won, lost)))
    return ladder.decide([phase("head"), light], AUTO, target=0.0, left=np.inf, needed=0.0)[0]


@pytest.mark.parametrize(
    ("count", "goes_on", "stops"),
    [  # examples; (won, lost) after which a gain of half a point is possible; and is not
        (50, [(0, 0), (1, 0), (0, 1), (1, 2), (5, 6)], [(0, 3), (1, 5), (2, 8)]),
        (200, [(0, 0), (1, 0), (2, 2), (8, 8), (6, 8)], [(0, 2), (1, 4), (10, 18)]),
        (2000, [(20, 5), (30, 15), (200, 190)], [(0, 0), (5, 5), (30, 40), (100, 120)]),
    ],
)
def test_few_examples_exclude_little_and_many_exclude_much(count, goes_on, stops):
    assert [climbs(count, *case) for case in goes_on] == [True] * len(goes_on)
    assert [climbs(count, *case) for case in stops] == [False] * len(stops)


def test_the_interval_is_bonett_and_prices():
    found = ladder.paired_gain(*answers(100, won=9, lost=3))
    assert found["gain"] == pytest.approx(0.06)
    won, lost = 10 / 102, 4 / 102  # one more each, of two more
    reach = 0.8416 * np.sqrt((won + lost - (won - lost) ** 2) / 102)
    assert found["interval"] == pytest.approx([won - lost - reach, won - lost + reach])


def test_its_upper_bound_holds_four_times_in_five():
    random, held = np.random.default_rng(0), []
    for count in (50, 200, 2000):
        won, lost = random.multinomial(count, [0.06, 0.04, 0.9], size=400)[:, :2].T
        bounds = [ladder.paired_gain(*answers(count, *pair))["interval"][1] for pair in zip(won, lost)]
        held.append(np.mean([bound >= 0.02 for bound in bounds]))
    assert all(0.74 < share < 0.9 for share in held), held


def test_a_share_of_right_answers_counts_as_such():
    found = ladder.paired_gain(np.full(400, 0.75), np.full(400, 0.5))
    assert found["gain"] == 0.25 and found["interval"][0] > 0.2


def test_rungs_of_every_depth():
    assert ladder.rungs_of("auto", None, 2, 17) == AUTO
    assert ladder.rungs_of("auto", None, 4, 3) == [("head", 0), ("light", 2), ("full", None)]
    assert ladder.rungs_of("auto", None, 2, 1) == [("head", 0), ("full", None)]
    assert ladder.rungs_of("head", 0, 2, 17) == [("head", 0)]
    assert ladder.rungs_of("3", 3, 2, 17) == [("head", 0), ("fine_tune", 3)]
    assert ladder.rungs_of("full", None, 2, 17) == [("head", 0), ("fine_tune", None)]


def test_light_always_follows_and_nothing_follows_what_is_enough():
    head, worse = phase("head"), ladder.paired_gain(*answers(200, 0, 20))
    assert ladder.decide([head], AUTO, 0.9, 100.0, 10.0) == (True, "light is always tried")
    assert ladder.decide([head], AUTO, 0.8, 100.0, 10.0)[1].endswith("0.800 has reached the target of 0.8")
    assert not ladder.decide([head], AUTO, 0.0, left=5.0, needed=10.0)[0]
    assert not ladder.decide([head], AUTO, 0.0, left=-1.0, needed=0.0)[0]
    light = phase("light", val_accuracy=0.99, kept=False, compared=worse)
    assert ladder.decide([head, light], AUTO, 0.9, 100.0, 10.0)[1].startswith("a gain of half a point is excluded")
    assert ladder.decide([head, light, phase("full")], AUTO, 0.0, np.inf, 0.0) == (
        False,
        "there is nothing more to thaw",
    )


def test_no_rung_follows_where_many_validation_examples_are_all_right():
    head = phase("head", val_accuracy=1.0)
    assert ladder.decide([head], AUTO, 0.0, 100.0, 10.0)[0]  # how many is not known
    head["climb"]["val_examples"] = 99
    assert ladder.decide([head], AUTO, 0.0, 100.0, 10.0)[0]
    head["climb"]["val_examples"] = 160
    went_on, because = ladder.decide([head], AUTO, 0.0, 100.0, 10.0)
    assert not went_on and because.startswith("all 160 validation examples are right: no gain could show; ")
    assert because.endswith("try --depth 2")
    asked_for = [("head", 0), ("fine_tune", 2)]
    assert ladder.decide([head], asked_for, 0.0, 100.0, 10.0)[0]
    nearly = phase("head", val_accuracy=0.99)
    nearly["climb"]["val_examples"] = 160
    assert ladder.decide([nearly], AUTO, 0.0, 100.0, 10.0)[0]


def test_a_depth_that_was_asked_for_is_kept_where_validation_cannot_tell():
    head = phase("head", val_accuracy=1.0) | {"kept": True, "val_loss": 0.0002}
    assert ladder.must_beat([head], "2") == {"best_val_loss": 0.0002, "or_all_right": True}
    assert ladder.must_beat([head], "auto") == {"best_val_loss": 0.0002, "or_all_right": False}
    head["climb"]["val_accuracy"] = 0.99
    assert ladder.must_beat([head], "2") == {"best_val_loss": 0.0002, "or_all_right": False}


def test_what_is_said_of_fine_tuning_that_cost_something():
    def said(head_loss, accuracy):
        head, best = phase("head", val_loss=head_loss, test=0.9), phase("fine_tune", val_loss=0.2, test=accuracy)
        return ladder.gain_verdict("Fine-tuning the top block", head, best)

    assert said(0.3, 0.88).startswith("Fine-tuning the top block lowered the validation loss, yet cost 2.0 points")
    assert "had all of validation right, as the head alone has, yet left test accuracy as it was" in said(0.1, 0.9)
    assert "was worth it: +2.0 points" in said(0.1, 0.92)


def test_the_next_rung_is_guessed_from_the_last():
    by_solver, by_steps = phase("head", 10.0, solver="lbfgs"), phase("head", 30.0)
    assert ladder.seconds_needed([by_solver], AUTO, 6, epochs=4) == 40.0
    assert ladder.seconds_needed([by_steps], AUTO, 6, epochs=4) == 40.0
    assert ladder.seconds_needed([by_solver, phase("light", 20.0)], AUTO, 6, epochs=4) == 60.0


def test_the_clock_counts_between_start_and_stop_only():
    clock = ladder.Clock(10.0)
    first = clock.stop()
    time.sleep(0.05)
    clock.start()
    assert clock.left == 10.0 - first and clock.deadline == pytest.approx(time.perf_counter() + 10.0 - first, abs=1)
    time.sleep(0.05)
    assert clock.stop() >= 0.05 and clock.left <= 9.95


def test_durations():
    assert [budget_seconds(text) for text in ("90s", "10m", "1.5h", "")] == [90, 600, 5400, np.inf]
    for wrong in ("10", "0m", "ten", "-5m", "5 m"):
        with pytest.raises(GraftError, match=f"--budget is '{wrong}', expected a time such as 90s, 10m or 2h"):
            budget_seconds(wrong)


def with_reasons(*phases):
    for number, each in enumerate(phases, start=1):
        went_on, because = ladder.decide(list(phases[:number]), AUTO, 0.0, np.inf, 0.0)
        each["climb"] |= {"went_on": went_on, "because": because}
    return list(phases)


def test_the_story_of_a_climb():
    compared = ladder.paired_gain(*answers(200, 12, 2))
    phases = with_reasons(
        phase("head"),
        phase("light", val_loss=0.4, test=0.83, compared=compared),
        phase("full", val_loss=0.45, kept=False, compared=compared),
    )
    story = ladder.story(phases)
    assert story["best"] == "light"
    assert [row["rung"] for row in story["rungs"]] == ["head", "light", "full"]
    assert [row["kept"] for row in story["rungs"]] == [True, True, False]
    assert [row["went_on"] for row in story["rungs"]] == [True, True, False]
    assert story["rungs"][1]["gain"] == pytest.approx(0.05) and "gain" not in story["rungs"][0]
    assert "0.400, is that of the top 2 blocks" in story["sentence"]
    assert facts.verdicts(phases, "auto") == [
        "Fine-tuning the top 2 blocks was worth it: +3.0 points over the head alone (0.800).",
        "Fine-tuning the whole backbone did not improve validation: what was best before was kept.",
    ]


def test_what_is_said_where_nothing_deeper_helped():
    worse = ladder.paired_gain(*answers(200, 0, 9))
    phases = with_reasons(phase("head"), phase("light", val_loss=0.6, kept=False, compared=worse))
    assert phases[1]["climb"]["went_on"] is False
    undone, no_deeper = facts.verdicts(phases, "auto")
    assert undone == "Fine-tuning the top 2 blocks did not improve validation: the head alone was kept."
    assert no_deeper.startswith("No deeper phase was tried: a gain of half a point is excluded (-")
    head_only = with_reasons(phase("head"))
    head_only[0]["climb"]["because"] = "of the budget 0 s are left, and light may take 40 s"
    for depth in ("auto", "2"):
        assert "of the budget 0 s are left" in facts.verdicts(head_only, depth)[0]
    assert facts.verdicts(head_only, "head") == ["Only the head was trained (--depth head)."]


def test_the_report_shows_the_climb_as_a_table(tmp_path):
    compared = ladder.paired_gain(*answers(200, 12, 2))
    phases = with_reasons(
        phase("head"),
        phase("light", val_loss=0.4, compared=compared),
        phase("full", val_loss=0.45, kept=False, compared=compared),
    )
    text = page_of(tmp_path, make_facts(climb=ladder.story(phases))).text
    for words in (
        "How deep it went", "Top blocks", "Whole backbone", "+5.0", "went on: light is always tried",
        "went on: a gain of half a point is not excluded (+6.6 at most)", "stopped: there is nothing more to thaw",
        "is that of the top 2 blocks", "not kept",
    ):  # fmt: skip
        assert words in text, words
    assert "How deep it went" not in page_of(tmp_path, make_facts()).text


def test_where_transfer_hurts_the_whole_backbone_goes_further_unless_a_rate_was_asked_for():
    from pipelines.image_options import FineTuneOptions
    from pipelines.text_options import TextFineTuneOptions

    usual = FineTuneOptions()
    assert ladder.far_options(usual, far=False) is usual
    far = ladder.far_options(usual, far=True)
    assert far.fine_tune_learning_rate == 10 * usual.fine_tune_learning_rate
    assert (far.augmentation, far.fine_tune_epochs) == ("crop", usual.fine_tune_epochs)
    chosen = FineTuneOptions(fine_tune_learning_rate=1e-4)
    assert ladder.far_options(chosen, far=True) is chosen
    assert ladder.far_options(TextFineTuneOptions(), far=True).fine_tune_learning_rate == pytest.approx(5e-3)
