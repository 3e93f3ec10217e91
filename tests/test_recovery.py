"""A run that was stopped, or went wrong, goes on: same figures, nothing lost, and what cannot be helped is said."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import GraftError
from models.classifier import Classifier
from pipelines import recovery, resume, runs, stopping, training
from pipelines.__main__ import main
from pipelines.data import image_loader, load_images
from pipelines.progress import Progress, put_back
from pipelines.recovery import Recovery
from pipelines.results import published_before
from pipelines.sources import find_images
from tests.conftest import tiny_backbone, write_png_folder
from tests.test_training import ALL_CHANGES, make_config

OPTIONS = {"dropout": 0.3, "ema": 0.9, "head_epochs": 2, "fine_tune_epochs": 3, "batch_size": 8, "depth": "1"}
OPTIONS |= {"head_solver": "sgd", "fine_tune_learning_rate": 0.01, **ALL_CHANGES}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_png_folder(tmp_path_factory.mktemp("recovery"), per_class=16)


@pytest.fixture(scope="module")
def splits(pictures):
    return load_images(find_images(str(pictures)))


class At(keras.callbacks.Callback):
    """Does something once, after a step of the phase that thaws part of the backbone; steps counted from 1."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action, self.steps = step, action, 0

    def on_train_batch_end(self, batch, logs=None):
        if self.model.blocks[-1].layers[0].trainable:
            self.steps += 1
            if self.steps == self.step:
                self.action(self.model)


def train(splits, keeping=None, callbacks=(), **options):
    config = make_config(**OPTIONS | options)
    backbone = tiny_backbone(dropout=0.2)
    model = Classifier(backbone, 3, dropout=config.model.dropout, seed=1)

    def loader(augmentation, random_erasing=0.0):
        return image_loader(backbone.preprocess, splits.white_level, augmentation, random_erasing)

    more = {"recovery": keeping, "callbacks": callbacks}
    phases, logits_of = training.fit_two_phase(model, splits, loader, config, tf.distribute.get_strategy(), **more)
    return without_seconds(phases), logits_of(splits.test)


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(splits):
    return train(splits)


def stop(model):
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_run(splits, run_dir, step=7):
    """A run that SIGTERM has stopped after a step of phase 2: five steps make an epoch."""
    with stopping.stop_signals(), pytest.raises(KeyboardInterrupt):
        train(splits, Recovery(run_dir), [At(step, stop)])


def files(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints" / "resume").iterdir())


def assert_same(found, expected):
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_run_that_was_stopped_within_an_epoch_ends_as_if_it_had_not_been(splits, undisturbed, tmp_path, capsys):
    stopped_run(splits, tmp_path)
    assert files(tmp_path) == [
        "1-head.ended.npz",
        "2-fine_tune.000001.npz",  # at the end of epoch 1
        "2-fine_tune.000002.npz",
        "run.json",
    ]
    keeping = Recovery(tmp_path)
    assert_same(train(splits, keeping), undisturbed)
    assert "fine_tune: going on in epoch 2, after 2 steps" in capsys.readouterr().out
    assert files(tmp_path) == ["1-head.ended.npz", "2-fine_tune.ended.npz", "run.json"]
    half_done = tmp_path / "serving" / "name" / ".tmp-1-abc"
    half_done.mkdir(parents=True)
    keeping.remove()
    assert list((tmp_path / "checkpoints").iterdir()) == [] and not half_done.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(splits, undisturbed, tmp_path, capsys, damaged):
    stopped_run(splits, tmp_path)
    for serial in (2, 1)[:damaged]:
        path = tmp_path / "checkpoints" / "resume" / f"2-fine_tune.{serial:06}.npz"
        path.write_bytes(path.read_bytes()[: 1000 * serial])
    assert_same(train(splits, Recovery(tmp_path)), undisturbed)
    told = capsys.readouterr().out
    assert told.count("is damaged") == damaged
    assert ("going on in epoch 2, after 0 steps" in told) == (damaged == 1)


@pytest.mark.slow
def test_a_file_that_vanishes_stops_training_after_a_save(splits, undisturbed, tmp_path):
    gone = pathlib.Path(splits.train["path"][3].as_py())
    data = gone.read_bytes()
    said = f"{gone} is gone.*Put it back, then `graft resume {tmp_path}` goes on"
    with pytest.raises(GraftError, match=said), runs.explained(tmp_path):
        train(splits, Recovery(tmp_path), [At(4, lambda model: gone.unlink())])
    gone.write_bytes(data)
    assert files(tmp_path)[1].startswith("2-fine_tune")
    assert_same(train(splits, Recovery(tmp_path)), undisturbed)


@pytest.mark.parametrize("value", [np.nan, pytest.param(1e6, marks=pytest.mark.slow)])
def test_a_loss_that_explodes_takes_training_back_to_a_lower_rate(splits, tmp_path, value):
    def spoil(model):
        model.head.kernel.assign(model.head.kernel * value)

    options = {"ema": 0.0, "schedule": "constant", "optimizer": "sgd", "mixup": 0.0, "cutmix": 0.0, "head_epochs": 1}
    (head, fine_tune), logits = train(splits, callbacks=[At(7, spoil)], **options)
    assert "rollbacks" not in head
    (rollback,) = fine_tune["rollbacks"]
    assert (rollback["epoch"], rollback["step"], rollback["learning_rate"]) == (2, 3, 0.0025)
    assert rollback["loss"] is None if np.isnan(value) else rollback["loss"] > 1e3
    rates = [row["learning_rate"] for row in fine_tune["history"]]
    np.testing.assert_allclose(rates, [0.01, 0.0025, 0.0025])
    assert np.isfinite(logits).all() and fine_tune["kept"]
    (said,) = recovery.verdicts([head, fine_tune])
    words = "was no longer a number" if np.isnan(value) else "exploded to"
    assert said.startswith(f"Fine-tuning: The loss {words}") and "rate of 0.0025." in said


# ---- files


def small_state(run_dir, values=3):
    keeping = Recovery(run_dir)
    keeping.begin("head")
    keeping.folder.mkdir(parents=True, exist_ok=True)
    keeping.watch(Progress(best_weights=[np.ones(values, np.float32)]), [tf.Variable(np.arange(values, dtype="f4"))])
    return keeping


def test_a_state_is_read_as_it_was_written(tmp_path):
    keeping = small_state(tmp_path)
    keeping.progress.history.append({"loss": 0.1 + 0.2, "val_loss": np.float32(0.1)})
    keeping.progress.sums, keeping.progress.step = [1.5, 2.0, 1.0, 2.0], 5
    keeping.save()
    again = Recovery(tmp_path)
    again.begin("head")
    variable = tf.Variable(np.zeros(3, "f4"))
    progress = put_back(again.newest_state(), [variable])
    assert progress.history == [{"loss": 0.1 + 0.2, "val_loss": float(np.float32(0.1))}]
    assert (progress.step, progress.mean_loss, progress.best_val_loss) == (5, 0.75, np.inf)
    np.testing.assert_array_equal(variable.numpy(), [0, 1, 2])
    np.testing.assert_array_equal(progress.best_weights, [[1, 1, 1]])


@pytest.mark.parametrize("harm", ["cut", "empty", "changed", "not ours"])
def test_of_damaged_states_the_one_before_is_taken(tmp_path, harm, capsys):
    keeping = small_state(tmp_path)
    for step in (3, 4, 5):
        keeping.progress.step = step
        keeping.save()
    older, newest = sorted(keeping.folder.iterdir())  # two are kept
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 255
    newest.write_bytes({"cut": data[:200], "empty": b"", "changed": bytes(data), "not ours": b"hello"}[harm])
    again = Recovery(tmp_path)
    again.begin("head")
    assert again.newest_state()[0]["step"] == 4
    assert f"{newest} is damaged" in capsys.readouterr().out
    older.write_bytes(b"")
    assert again.newest_state() is None


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    keeping = small_state(tmp_path)
    keeping.variables[0].assign([1, np.nan, 2])
    keeping.save()
    assert list(keeping.folder.iterdir()) == []


def test_a_full_disk_loses_nothing(small_disk):
    keeping = small_state(small_disk / "run", values=50_000)  # 400 KB a state
    keeping.save()
    (small_disk / "other").write_bytes(b"0" * 400_000)
    before = list(keeping.folder.iterdir())
    keeping.progress.step = 9
    said = "disk of .* is full.*free some space, then `graft resume"
    with pytest.raises(GraftError, match=said), runs.explained(small_disk / "run"):
        keeping.save()
    assert list(keeping.folder.iterdir()) == before
    (small_disk / "other").unlink()
    keeping.save()
    assert len(list(keeping.folder.iterdir())) == 2


def test_other_data_than_the_run_began_with_are_refused(tmp_path):
    Recovery(tmp_path).start_run({"the data": "a", "the backbone": "b"})
    Recovery(tmp_path).start_run({"the data": "a", "the backbone": "b"})
    with pytest.raises(GraftError, match="cannot go on: the data changed since it began. Put back what was there"):
        Recovery(tmp_path).start_run({"the data": "c", "the backbone": "b"})


def test_a_version_that_was_published_before_the_end_is_found_again(tmp_path):
    note, folder = tmp_path / "published.json", tmp_path / "serving"
    (folder / "1").mkdir(parents=True)
    assert published_before(folder, note) is None
    note.write_text(json.dumps({"before": ["1"], "checked": {"files": 3}}))
    assert published_before(folder, note) is None  # killed before it got its number
    (folder / "2").mkdir()
    assert published_before(folder, note) == (folder / "2", {"files": 3})


# ---- signals and commands


def test_signals_wait_for_the_end_of_what_must_not_be_torn():
    done = []
    with stopping.stop_signals():
        with pytest.raises(KeyboardInterrupt), stopping.held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.stop_asked()
            done.append("all of it")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert done == ["all of it"] and not stopping.stop_asked()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    threading.Thread(target=lambda: stopping.stop_signals().__enter__()).start()  # has no effect there


def test_a_process_that_cannot_be_reached_ends_all_the_same():
    script = """
import os, signal, sys, time
from pipelines import stopping
stopping.GRACE_S = 0.5
def deaf(*_): time.sleep(60)
with stopping.stop_signals():
    stopping._on_signal = deaf
    signal.signal(signal.SIGTERM, deaf)
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    started = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (
        process.returncode == 75 and time.perf_counter() - started < 10 and "what was saved before is whole" in errors
    )


def test_what_cannot_be_resumed_is_said(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("data: textures\n")
    (tmp_path / "metrics.json").write_text("{}")
    assert main(["resume", str(tmp_path)]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main(["image", "--out", str(tmp_path), "--resume"]) == 0
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text(json.dumps({"working_directory": str(tmp_path / "x")}))
    assert main(["resume", str(tmp_path)]) == 2
    assert main(["image", "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err
    assert resume.begun(make_config(out=str(tmp_path / "new"), resume=True).run) is None


@pytest.mark.slow
def test_sigterm_saves_and_resume_ends_the_run(pictures, tiny_preset, tmp_path):
    out = tmp_path / "run"
    words = ["image", "--data", pictures, "--backbone", tiny_preset, "--out", out, "--depth", "1", "--batch-size", "8"]
    words += ["--fine-tune-epochs", "200", "--patience", "200", "--resume"]
    command = [sys.executable, "-u", "-m", "pipelines", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch  3/200" in line:
            process.send_signal(signal.SIGTERM)
            break
    started = time.perf_counter()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and time.perf_counter() - started < 10
    assert f"`graft resume {out}` goes on from there" in errors and "Traceback" not in errors
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("fine_tune_epochs: 200", "fine_tune_epochs: 6"))  # soon at its end
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on in epoch" in done.stdout and "head: had ended" in done.stdout
    (_, fine_tune) = json.loads((out / "metrics.json").read_text())["phases"]
    assert fine_tune["epochs"] == 6 and not (out / "checkpoints" / "resume").exists()
    shutil.rmtree(out)
