"""`graft doctor`: what it finds, what it says to change, and how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time

import pytest

from pipelines import doctor, installed
from pipelines.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[1]


def advice_of(findings) -> str:
    return " ".join(finding.advice for finding in findings)


def test_doctor_on_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["can_run"] is True
    found = {check["what"]: check for check in said["checks"]}
    assert {
        "Python",
        "packages",
        "TensorFlow",
        "CPU",
        "memory",
        "disk, here",
        "cache",
        "huggingface.co",
        "containers",
    } <= set(found)
    assert found["TensorFlow"]["found"].startswith(importlib.metadata.version("tensorflow"))
    assert all(check["state"] in ("ok", "note") for check in said["checks"])


def test_the_table_and_the_sentences(capsys):
    findings = [
        doctor.Finding("memory", "note", "1.0 GB free [of 8]", "Close other programs."),
        doctor.Finding("packages", "stop", "keras is missing", "Install it."),
    ]
    doctor.print_findings(findings, can_run=False)
    lines = capsys.readouterr().out.splitlines()
    assert any("1.0 GB free [of 8]" in line for line in lines)
    assert lines[-3:] == ["- Install it.", "- Close other programs.", "Graft cannot run here."]


def test_where_tensorflow_does_not_start_the_code_is_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "DEVICES_SCRIPT", "import os; os.kill(os.getpid(), 4)")  # an instruction it lacks
    assert main(["doctor", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    (stopped,) = [check for check in said["checks"] if check["state"] == "stop"]
    assert not said["can_run"] and stopped["what"] == "TensorFlow" and "want a CPU with AVX" in stopped["advice"]


def test_another_backend_is_found(monkeypatch):
    script = 'print(\'found {"tensorflow": "2", "keras": "3", "backend": "jax", "cuda": false, "devices": []}\')'
    monkeypatch.setattr(doctor, "DEVICES_SCRIPT", script)
    first = next(iter(doctor.check_tensorflow()))
    assert first.state == "stop" and "set KERAS_BACKEND=tensorflow" in first.advice


def test_packages_against_setup_cfg():
    wrong, whole, count = installed.check_packages()
    assert wrong == [] and "test" in whole and count > 30
    assert installed.problem_of("numpy <1") == f"numpy is {importlib.metadata.version('numpy')}, expected <1"
    assert installed.problem_of("no-such-thing >=1") == "no-such-thing is missing, expected >=1"


def test_advice_for_devices():
    hopper = {"kind": "GPU", "name": "GPU:0", "compute_capability": [9, 0], "model": "H100"}
    said = list(doctor.check_devices([hopper, {**hopper, "name": "GPU:1"}], cuda=True))
    assert "--precision bfloat16" in advice_of(said) and "--distribute mirrored" in advice_of(said)
    assert "GPU:1: H100, compute capability 9.0" in [finding.found for finding in said]
    said = list(doctor.check_devices([{"kind": "TPU", "name": "TPU:0"}] * 8, cuda=False))
    assert "--distribute tpu --precision bfloat16" in advice_of(said)


def test_little_room(small_disk, tmp_path, monkeypatch):  # in this order: the disk is left before it goes
    monkeypatch.chdir(small_disk)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    here, cache = doctor.check_disk()
    assert here.state == "stop" and "free some space there, or go to another folder" in here.advice
    assert cache.what == "disk, cache" and cache.state in ("ok", "note")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: type("M", (), {"available": 1e9, "total": 8e9})())
    (memory,) = doctor.check_memory()
    assert memory.state == "note" and "--cache none" in memory.advice


def test_cache_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "LARGE_CACHE", 1000)
    (tmp_path / "features" / "a").mkdir(parents=True)
    (tmp_path / "features" / "a" / "rows.npy").write_bytes(b"x" * 2000)
    (found,) = doctor.check_cache()
    assert found.state == "note" and "offline weights: none" in found.found
    assert "python -m models.offline fetch efficientnet_lite0" in found.advice
    assert f"{tmp_path / 'features'} can be removed" in found.advice


def test_hosts_that_do_not_answer_take_two_seconds(monkeypatch):
    monkeypatch.setattr(doctor, "HUBS", dict.fromkeys([f"hub{n}.invalid" for n in range(4)], "models"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "package_index", lambda: ("pypi.org", False))
    started = time.perf_counter()
    findings = list(doctor.check_network())
    assert time.perf_counter() - started < 4
    assert [finding.state for finding in findings] == ["note"] * 6
    assert "Offline backbones: efficientnet_lite0" in findings[-1].advice


@pytest.mark.parametrize(
    "lines, name",
    [
        ("", "pypi.org"),
        ("global.index-url='http://127.0.0.1:9/simple'", "pip's mirror"),
        ("global.find-links='file:///'", "pip's folder"),
    ],
)
def test_of_a_mirror_no_address_is_told(monkeypatch, lines, name):
    done = subprocess.CompletedProcess([], 0, stdout=f"global.timeout='5'\n{lines}\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *words, **more: done)
    monkeypatch.setattr(doctor, "reachable", lambda url: False)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert doctor.package_index() == (name, name == "pip's folder")


def test_help_needs_no_tensorflow():
    code = "import sys, pipelines.doctor; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
