"""Imports go one way, models <- serving <- pipelines, and slow libraries stay out of what must start fast."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "serving": {"models", "serving"},
    "pipelines": {"models", "serving", "pipelines"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_go_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ours = {name.split(".")[0] for name in imported_modules(path)} & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[folder]}"


def test_config_objects_stop_at_pipelines():
    for folder in ("models", "serving"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "pipelines" not in path.read_text().replace("`pipelines`", ""), path


@pytest.mark.parametrize(
    "module",
    [
        "models.offline",
        "models.names",
        "models.hubs",
        "serving.session",
        "serving.client",
        "serving.publish",
        "serving.warmup",
        "serving.server",
        "pipelines.batch",
        "pipelines.batch_job",
        "pipelines.embed",
        "pipelines.doctor",
        "pipelines.ask",
        "pipelines.compare",
        "pipelines.publish",
        "pipelines.rescore",
        "pipelines.image",
        "pipelines.text",
        "pipelines.audio",
        "models.offline_sounds",
    ],
)
def test_what_must_start_fast_imports_no_tensorflow(module):
    code = f"import sys, {module}; assert not {{'tensorflow', 'keras', 'sklearn', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
