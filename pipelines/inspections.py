"""What is known of image files that have not changed since they were last decoded: a second run need not look again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import sqlite3

from models import offline
from pipelines.console import progress_bar
from pipelines.sources import check_skipped

FORMAT = 2  # raise it when `models.inputs.inspect_images` says other things of the same file
AT_ONCE = 500  # paths per query: SQLite takes 999 parameters everywhere


def inspect_files(paths: list[str], progress=lambda done: None, inspect=None, number=FORMAT) -> list[dict]:
    """As `models.inputs.inspect_images` says of each file, in order, and `id`: its content hash, "" where unreadable.

    For other files than images, `inspect` does what that function does, and `number` is its own FORMAT. It may give
    the id itself, and `file`, one in the cache that it has made: what is known counts for as long as that is there.

    What was found is kept in Graft's cache under the file's absolute path, size and time of change (nanoseconds); a
    file for which these are the same is not read again. TensorFlow starts only where something is new.
    """
    stamps = [_stamp(path) for path in paths]
    with contextlib.closing(_open()) as known:
        found = _known(known, stamps, number)
        new = [index for index, stamp in enumerate(stamps) if stamp not in found]
        progress(len(paths) - len(new))
        if new:
            if inspect is None:
                from models.inputs import inspect_images as inspect  # TensorFlow

            done_before = len(paths) - len(new)
            facts = inspect([paths[i] for i in new], lambda done: progress(done_before + done))
            with concurrent.futures.ThreadPoolExecutor() as pool:
                ids = list(pool.map(content_id, [paths[i] for i in new]))
            fresh = {i: {"id": identity, **fact} for i, fact, identity in zip(new, facts, ids)}
            rows = [(*stamps[i], number, json.dumps(fact)) for i, fact in fresh.items() if stamps[i] and fact["id"]]
            with contextlib.suppress(sqlite3.Error), known:  # a cache that cannot be written is no reason to stop
                known.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)
        else:
            fresh = {}
    return [fresh[index] if index in fresh else found[stamp] for index, stamp in enumerate(stamps)]


def read_files(paths: list[str], noun: str, inspect=None, number=FORMAT) -> tuple[list[dict], list[dict]]:
    """As `inspect_files`, with a progress bar; and of files that cannot be used path and reason, for skipped.csv.

    noun: what the files are, "images".

    Raises:
        GraftError: more of these than max(1%, 3).
    """
    with progress_bar() as bar:
        task = bar.add_task(f"reading {noun}", total=len(paths), note="")
        facts = inspect_files(paths, lambda done: bar.update(task, completed=done), inspect, number)
    skipped = [{"path": path, "reason": fact["error"]} for path, fact in zip(paths, facts) if fact["error"]]
    check_skipped(skipped, len(paths), noun, "cannot be read")
    return facts, skipped


def content_id(path: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's bytes; "" where it cannot be read."""
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _stamp(path: str) -> tuple[str, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _open() -> sqlite3.Connection:
    """The table of what is known; one in memory where the cache cannot be used."""
    file = offline.cache_folder() / "inspected.sqlite"
    table = (
        "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, format INTEGER, "
        "facts TEXT)"
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(file, timeout=5)
        connection.execute(table)
    except (OSError, sqlite3.Error):
        connection = sqlite3.connect(":memory:")
        connection.execute(table)
    return connection


def _known(connection, stamps, number: int) -> dict[tuple, dict]:
    """{stamp: facts} of those files that are known as they are now."""
    found, paths = {}, [stamp[0] for stamp in stamps if stamp]
    with contextlib.suppress(sqlite3.Error):  # a damaged file knows nothing
        for start in range(0, len(paths), AT_ONCE):
            part = paths[start : start + AT_ONCE]
            places = ",".join("?" * len(part))
            query = f"SELECT path, size, changed, facts FROM files WHERE format = ? AND path IN ({places})"
            for path, size, changed, facts in connection.execute(query, (number, *part)):
                facts = json.loads(facts)
                if not facts.get("file") or os.path.isfile(facts["file"]):
                    found[path, size, changed] = facts
    return found
