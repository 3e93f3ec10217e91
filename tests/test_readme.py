"""README: `bash` fences run, in order, in one folder; `console` fences name commands, flags and paths that exist."""

import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from models import offline
from models.offline_texts import text_data_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_bash_fences_run(tmp_path):
    """With a folder photos/ of three classes and a table reviews.csv, as a reader would have them."""
    tiles = offline.image_data_folder("textures") / "train"
    for label in ("brick", "grass", "moon"):
        for path in sorted((tiles / label).iterdir())[:12]:
            target = tmp_path / "photos" / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copytree(tmp_path / "photos", tmp_path / "clinic-b")
    rows = csv.DictReader(text_data_file("topics").open(encoding="utf-8"))
    with open(tmp_path / "reviews.csv", "w", newline="", encoding="utf-8") as file:
        kept = [(row["text"], row["label"]) for row in rows if row["label"] in ("literature", "science")]
        csv.writer(file).writerows([("text", "label"), *kept])
    assert fences("bash")
    script = "set -euo pipefail\n" + "\n".join(fences("bash"))
    environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "predictions.csv").read_text().startswith("path,label,score,error")


def test_console_fences_name_what_exists():
    text = "\n".join(fences("console"))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"make (\w+)", text)) <= targets
    for command in ("image", "text"):
        words = [sys.executable, "-m", "pipelines", command, "--help"]
        shown = subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout
        for line in text.splitlines():
            if f"graft {command}" in line:
                for flag in re.findall(r"--[a-z-]+", line):
                    assert flag in shown, f"{flag} in: {line}"


def test_every_file_that_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
