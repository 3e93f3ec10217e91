"""What suits each kind of device. GPUs and TPUs are told by what TensorFlow says of them; none is here."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pipelines.config import parse_config
from pipelines.devices import best_precision, settle

ROOT = pathlib.Path(__file__).resolve().parents[1]
CPU = {"kind": "CPU", "name": "CPU:0"}


def gpu(*capability):
    return {"kind": "GPU", "name": "GPU:0", "compute_capability": capability or None, "model": ""}


@pytest.mark.parametrize(
    "devices, precision",
    [
        ([CPU], "float32"),
        ([CPU, gpu(9, 0)], "bfloat16"),
        ([CPU, gpu(8, 0), gpu(7, 5)], "float16"),
        ([CPU, gpu(6, 1)], "float32"),
        ([CPU, gpu()], "float32"),
        ([CPU, {"kind": "TPU", "name": "TPU:0"}], "bfloat16"),
    ],
)
def test_precision_of_the_least_accelerator(devices, precision):
    assert best_precision(devices) == precision


def test_auto_is_settled_before_the_run_is_noted():
    training = parse_config(["--precision", "auto"]).training
    settle(training)
    assert training.precision == "float32"  # on CPUs
    training = parse_config(["--precision", "bfloat16"]).training
    settle(training)
    assert training.precision == "bfloat16"


def in_a_process(code: str, **environment) -> str:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_of_gpus_grows_and_xla_is_asked_for():
    """The calls that TensorFlow gets, in a process of its own: settings of devices are its own too."""
    code = """
import tensorflow as tf
grown, real = [], tf.config.list_physical_devices
tf.config.list_physical_devices = lambda kind=None: ["gpu 0", "gpu 1"] if kind == "GPU" else real(kind)
tf.config.experimental.set_memory_growth = lambda device, grows: grown.append((device, grows))
from pipelines.console import start_tensorflow
start_tensorflow(0)
assert grown == [("gpu 0", True), ("gpu 1", True)], grown
from pipelines.config import parse_config
from pipelines.devices import settle
settle(parse_config([]).training)
assert tf.config.optimizer.get_jit() == ""
settle(parse_config(["--xla"]).training)
assert tf.config.optimizer.get_jit() == "autoclustering"
"""
    in_a_process(code)


@pytest.mark.slow
def test_with_xla_the_run_learns_the_same_and_exports_without_it(png_folder, tiny_preset, tmp_path):
    """On CPUs clusters are compiled only where a variable asks for it; verification refuses what XLA left behind."""
    code = """
import json, sys
from pipelines import image
from pipelines.config import parse_config
run = image.run(parse_config(sys.argv[1:] + ["--head-epochs", "1", "--fine-tune-epochs", "1", "--depth", "1"]))
metrics = json.loads((run / "metrics.json").read_text())
print([entry["val_loss"] for phase in metrics["phases"] for entry in phase["history"]])
"""
    losses = {}
    for name, flags in (("plain", []), ("xla", ["--xla"])):
        words = ["--data", str(png_folder), "--backbone", str(tiny_preset), "--out", str(tmp_path / name), *flags]
        shown = in_a_process(f"import sys; sys.argv[1:] = {words!r}\n{code}", TF_XLA_FLAGS="--tf_xla_cpu_global_jit")
        losses[name] = json.loads(shown.strip().splitlines()[-1])
    assert losses["plain"] == pytest.approx(losses["xla"], abs=1e-4) and losses["plain"]
