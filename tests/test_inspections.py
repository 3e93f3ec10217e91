"""What is known of unchanged files is not looked up again, and what changed is."""

import os
import pathlib
import shutil

import pytest

from models import inputs
from pipelines.inspections import content_id, inspect_files
from tests.conftest import write_png_folder


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    folder = write_png_folder(tmp_path / "pictures", classes=2, per_class=3)
    (folder / "class0" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    return [str(path) for path in sorted(folder.rglob("*.png"))] + [str(folder / "missing.png")]


@pytest.fixture
def looked_at(monkeypatch):
    """The files that were really decoded, in order of the calls."""
    calls, inspect = [], inputs.inspect_images

    def counting(items, progress=None):
        calls.append(list(items))
        return inspect(items, progress)

    monkeypatch.setattr(inputs, "inspect_images", counting)
    return calls


def test_it_says_what_the_decoder_says_and_asks_it_once(paths, looked_at):
    first = inspect_files(paths)
    assert [{key: fact[key] for key in fact if key != "id"} for fact in first] == inputs.inspect_images(paths)
    assert [fact["id"] for fact in first] == [content_id(path) for path in paths]
    looked_at.clear()
    assert inspect_files(paths) == first
    assert looked_at == [[paths[-1]]]  # only the one that is not there


def test_a_file_that_changed_is_looked_at_again(paths, looked_at):
    before = inspect_files(paths)
    shutil.copy(paths[1], paths[0])
    os.utime(paths[2], ns=(1, 1))
    looked_at.clear()
    after = inspect_files(paths)
    assert looked_at == [[paths[0], paths[2], paths[-1]]]
    assert after[0]["id"] == before[1]["id"] and after[2:] == before[2:]


@pytest.mark.parametrize("trouble", ["damaged", "a folder", "read-only"])
def test_a_cache_that_cannot_be_used_is_no_reason_to_stop(paths, trouble):
    file = pathlib.Path(os.environ["GRAFT_CACHE"]) / "inspected.sqlite"
    expected = inspect_files(paths)
    if trouble == "damaged":
        file.write_bytes(b"no database " * 1000)
    elif trouble == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.chmod(0o444)
    assert inspect_files(paths) == expected == inspect_files(paths)
