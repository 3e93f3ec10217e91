"""Batch jobs on Apache Beam's FnApiRunner; skipped where the extra `beam` is not installed."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.test_batch_job import answers_of, failed_of, pictures, refused, run, version

beam = pytest.importorskip("apache_beam", reason="the extra beam is not installed (see constraints-beam.txt)")

__all__ = ["pictures", "version"]  # fixtures
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_same_shards_as_without_beam(version, pictures, tmp_path, capsys):
    words = ("predict", version, "--input", pictures, "--shard-size", 10, "--output")
    assert run(*words, tmp_path / "plain") == 0
    assert run(*words, tmp_path / "beam", "--runner", "FnApiRunner") == 0
    assert answers_of(tmp_path / "plain") == answers_of(tmp_path / "beam")
    assert failed_of(tmp_path / "plain") == failed_of(tmp_path / "beam")
    # Another way of running may go on from where this one was.
    (tmp_path / "beam" / "done" / "part-00001.json").unlink()
    capsys.readouterr()
    assert run(*words, tmp_path / "beam") == 0
    assert "3 of 4 shards are done already" in capsys.readouterr().out


@pytest.mark.slow
def test_worker_processes(version, pictures, tmp_path):
    command = [sys.executable, "-m", "pipelines", "embed", version, "--input", pictures, "--output", tmp_path / "job"]
    command += ["--shard-size", "10", "--runner=FnApiRunner", "--direct_num_workers", "2"]
    command += ["--direct_running_mode", "multi_processing"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(answers_of(tmp_path / "job")) == 33 and len(failed_of(tmp_path / "job")) == 4


def test_flags_of_nobody(version, pictures, tmp_path, capsys):
    words = ("predict", version, "--input", pictures, "--output", tmp_path / "job", "--runner")
    message = refused(capsys, *words, "FnApiRunner", "--direct_num_wrokers", "2")
    assert "--direct_num_wrokers: neither a flag of Graft's nor of Beam's" in message
    assert "--runner NoSuchRunner" in refused(capsys, *words, "NoSuchRunner")
