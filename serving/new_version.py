"""A version folder that is complete, verified and on disk before it has a number.

TF Serving polls for folders whose names are numbers, and checks nothing: a version must appear in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from models import GraftError
from models.offline import free_bytes


def publish_version(write: Callable, name_folder, check: Callable) -> Path:
    """Make the next version folder of `name_folder`, such as serving/photos/3, and return its path.

    `write(folder)` fills a temporary folder on the same file system, `check(folder)` raises where it is
    not fit to serve; then all of it is synced to disk and renamed. Several publishers may do so at once:
    each gets its own number. Whatever is raised on the way, Ctrl-C included, nothing is left behind.
    Raises GraftError where the folder cannot be written or the disk is full.
    """
    name_folder = Path(name_folder)
    # A leading dot and no number: the server ignores it.
    temporary = name_folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    made = [folder for folder in (temporary, *temporary.parents) if not folder.exists()]
    try:
        with explain_refusal(name_folder):
            temporary.mkdir(parents=True)
        write(temporary)
        check(temporary)
        sync_to_disk(temporary)
        return rename_to_next(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = free_bytes(name_folder)
        for folder in made[1:]:  # innermost first; one that another publisher has filled stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if is_disk_full(error):
            raise GraftError(
                f"{name_folder}: the disk is full: a version needs more than the {free / 1e6:.1f} MB that "
                f"are free there. Free some space or choose another folder"
            ) from error
        raise


def next_version(name_folder) -> int:
    """One more than the largest version number in a folder; 1 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(name_folder)
        return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0) + 1
    return 1


def rename_to_next(temporary: Path) -> Path:
    """Give a finished folder the next free number beside it."""
    while True:
        version = temporary.parent / str(next_version(temporary.parent))
        try:
            # rename(2) replaces an empty folder, but a version is never empty: another's is never lost.
            temporary.rename(version)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                continue  # another publisher was quicker
            raise
        sync(version.parent)
        return version


def sync_to_disk(folder) -> None:
    """Flush every file and folder below `folder`: a power cut then leaves no half-written version."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def sync(path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_refusal(folder):
    """Say which folder could not be made, rather than a bare OSError; a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise GraftError(
            f"{folder}: cannot make this folder ({error.strerror}: {error.filename}). Choose another"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says so: Python has an errno for it, TensorFlow (several classes) only the text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)
