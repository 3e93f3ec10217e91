"""The command line: help that teaches, and mistakes that end with one clear message and exit code 2."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from models import GraftError
from pipelines.__main__ import main
from pipelines.config import config_yaml, flat_config, parse_config
from tests.conftest import write_png_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]


def graft(*words, cwd=None):
    """Run the command in a process of its own, as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "pipelines", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd or ROOT, timeout=120)


def refused(capsys, *words):
    """The one message of a command that ends with exit code 2."""
    assert main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("graft: ") and "Traceback" not in message
    return message


# ---- help


def test_help_names_every_command_and_imports_no_tensorflow():
    for words in ((), ("--help",)):
        done = graft(*words)
        assert done.returncode == 0
        assert all(word in done.stdout for word in ("image", "predict", "evaluate", "export"))
    code = (
        "import sys, pipelines.__main__ as m\n"
        "try: m.main(['image', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    for said in ("--head-epochs INT", "Phase 1: the backbone frozen", "(default: 8)", "pixels", "0.1 * 0.8^(d-1)"):
        assert " ".join(said.split()) in " ".join(done.stdout.replace("│", " ").split()), said


@pytest.mark.parametrize("word", ["predict", "evaluate", "export"])
def test_every_command_has_help(word):
    done = graft(word, "--help")
    assert done.returncode == 0 and "Run folder" in done.stdout


def test_unknown_words_and_flags_suggest(capsys):
    assert main(["imagine"]) == 2
    assert "unknown command 'imagine'; there are image, text, audio, speech" in capsys.readouterr().err
    done = graft("image", "--head-epohs", "3")
    assert done.returncode == 2 and "--head-epochs" in done.stdout + done.stderr


# ---- configuration


def test_print_config_is_a_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(["--depth", "3", "--devices", "CPU:0", "CPU:1", "--print-config"])
    assert ended.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    config = parse_config(["--config", str(tmp_path / "c.yaml"), "--dropout", "0.5"])
    assert (config.model.depth, config.training.devices, config.model.dropout) == ("3", ("CPU:0", "CPU:1"), 0.5)
    assert parse_config([f"--config={tmp_path / 'c.yaml'}"]).model.depth == "3"
    (tmp_path / "d.yaml").write_text("depth: 1\nhead-epochs: 2\n")
    config = parse_config(["--config", str(tmp_path / "d.yaml")])
    assert (config.model.depth, config.head.head_epochs) == ("1", 2)
    assert flat_config(config)["head_epochs"] == 2 and "head_epochs: 2" in config_yaml(config)
    (tmp_path / "e.yaml").write_text("mixup: 0.2\ncutmix: 1\nprecision: bfloat16\naugmentation: rand-augment\n")
    config = parse_config(["--config", str(tmp_path / "e.yaml"), "--ema", "0.99", "--optimizer", "lion"])
    assert (config.fine_tune.mixup, config.fine_tune.cutmix, config.fine_tune.augmentation) == (0.2, 1, "rand-augment")
    assert (config.training.precision, config.training.ema, config.training.optimizer) == ("bfloat16", 0.99, "lion")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head_epcs: 2", r"unknown keys: \['head_epcs'\]. Known: data, min_per_class"),
        ("head_epochs: many", r"wrong type: head_epochs: 'many'. Their defaults are head_epochs: 8"),
        ("- a\n- b", "must be a YAML mapping"),
        ("a: [", "could not be read"),
        ("optimizer: adam", "optimizer is 'adam', expected adamw or sgd or lion or adafactor"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(GraftError, match=message):
        parse_config(["--config", str(tmp_path / "c.yaml")])


def test_values_out_of_range_are_told_together():
    with pytest.raises(GraftError) as told:
        wrong = ["--dropout", "1.5", "--batch-size", "0", "--depth", "banana", "--ema", "1", "--mixup", "-1"]
        parse_config([*wrong, "--random-erasing", "1.1"])
    for part in (
        "--dropout is 1.5, expected 0 or more",
        "--batch-size is 0, expected 1 or more",
        "--depth is 'banana'",
        "--ema is 1.0, expected 0 or more and less than 1",
        "--mixup is -1.0, expected 0 or more",
        "--random-erasing is 1.1, expected from 0 to 1",
    ):
        assert part in str(told.value)


# ---- mistakes that need no training


def test_mistakes_end_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_png_folder(tmp_path / "good", classes=2, per_class=4)
    (tmp_path / "empty").mkdir()
    write_png_folder(tmp_path / "one_class", classes=1)
    single = write_png_folder(tmp_path / "single", classes=2, per_class=4)
    write_png_folder(tmp_path / "more", classes=1, per_class=1)
    shutil.move(tmp_path / "more" / "class0", single / "lonely")
    corrupt = write_png_folder(tmp_path / "corrupt", classes=2, per_class=25)
    for index in range(5):
        (corrupt / "class0" / f"{index:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (tmp_path / "file").write_text("a regular file")
    before = sorted(tmp_path.rglob("*"))

    cases = {
        ("--data", "nowhere"): "there is no such folder",
        ("--data", "empty"): "no images in this folder",
        ("--data", "one_class"): "only one class, 'class0'",
        ("--data", "single"): "--min-per-class 2",
        ("--data", "corrupt"): "5 of 50 images cannot be read; up to 3 are skipped",
        ("--data", good, "--backbone", "resnet51"): "Backbone 'resnet51' is not known",
        ("--data", good, "--out", "file/run"): "file is a file, not a folder",
        (
            "--data",
            good,
            "--depth",
            "99",
        ): "efficientnet_lite0 has 17 blocks. Give head, a number from 1 to 17, or full",
        ("--data", good, "--depth", "banana"): "--depth is 'banana'",
        ("--data", good, "--positive", "zebra"): "zebra",
        ("--data", good, "--distribute", "mirrored", "--devices", "GPU:7"): "GPU:7: not on this machine. It has CPU:0",
    }
    for words, message in cases.items():
        assert message in refused(capsys, "image", *words), words
    for words, message in {
        ("predict", "nowhere", "x.png"): "there is no such run folder",
        ("predict", "good", "x.png"): "holds no exported model",
        ("export", "good"): "not a run folder",
        ("evaluate", "nowhere", "--data", "good"): "there is no such run folder",
    }.items():
        assert message in refused(capsys, *words), words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_training(tmp_path, capsys, small_disk):
    good = write_png_folder(tmp_path / "good", classes=2, per_class=4)
    message = refused(capsys, "image", "--data", good, "--out", small_disk / "run")
    assert "is full: " in message and "a run needs about" in message
    assert not list(small_disk.iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_during_training_leaves_nothing_that_looks_whole(
    tmp_path, capsys, small_disk, tiny_preset, monkeypatch
):
    from pipelines import image

    monkeypatch.setattr(image, "RUN_BYTES", 0)  # past the early check, into the failure itself
    good = write_png_folder(tmp_path / "good", classes=2, per_class=8)
    words = ["image", "--data", good, "--backbone", tiny_preset, "--out", small_disk / "run", "--head-epochs", "1"]
    assert "disk" in refused(capsys, *words, "--depth", "head")
    left = {path.name for path in small_disk.rglob("*")}
    assert not any(name.startswith(".tmp") or name in ("metrics.json", "saved_model.pb") for name in left)
