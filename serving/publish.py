"""A repository of versions that TF Serving watches: publish into it, go back in it, list it.

REPOSITORY/NAME/NUMBER holds a version. A server serves the newest number; one that reads REPOSITORY/models.config may
serve more, under labels. A version is never rewritten, and a number never used twice. Beside the model a published
version holds, in assets.extra/run.json, where it comes from and how good it was on which test set: that is what the
next one is compared with.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

from models import GraftError
from serving.config import (
    BATCH_SIZES,
    BATCHING_FILE,
    STABLE,
    batching_parameters,
    check_name,
    find_model,
    labels_of,
    locked,
    read_models,
    write_config,
)
from serving.new_version import next_version, publish_version
from serving.repository import (
    SERVER_FOLDER,
    check_choice_is_open,
    delete_older,
    labels_with,
    move_label,
    remove_leftovers,
    served_version,
    version_folders,
)
from serving.runtime import SessionError
from serving.static_checks import CheckFailed
from serving.verify import VerificationError, verify
from serving.warmup import WARMUP_FILE, replay_warmup, write_warmup

RUN_FILE = "assets.extra/run.json"
FEWEST_KEPT = 2  # the server answers with the version before until it has loaded the newest


def publish(
    source,
    repository,
    name: str,
    about: dict,
    details: dict,
    warmup_samples=(),
    accept_worse: bool = False,
    keep: int = 0,
    label: str = "",
    server_folder: str = SERVER_FOLDER,
    batch_sizes=(),
) -> tuple[Path, dict]:
    """Publish the version folder `source` as the next number of REPOSITORY/NAME.

    A copy gets warm-up requests and batching parameters, is verified and on disk before it has its number. Several
    publishers may do so at once. A new version is worse where both were measured on the same test set by the same
    figure and its figure is lower; what cannot be compared is accepted.

    Args:
        about: what is known of the run, stored as run.json: "backbone" and, where it was measured, "test" with
            "fingerprint", "examples" and "headline" {"metric", "value", "half_width"}.
        details: what the export says of itself (assets.extra/graft.json).
        warmup_samples: real inputs of `serving_default` for the warm-up requests, bytes or tuples of bytes; noise
            where there are none.
        keep: delete all but the latest so many; never what has a label, or what models.config names. 0: keep all.
        label: also give the version this label in models.config.
        batch_sizes: the only batch sizes that a server is to form, for batching_params.pbtxt and the warm-up requests
            (none: any up to 32, and warm-up requests of 1, 2, 4, ... rows).

    Returns:
        The version's folder, and what was checked and done: as `serving.verify.verify` says, and "warmup_requests",
        "deleted", "served" (whether it is the `served_version` now), "before" (which one was, or None), "compared"
        (whether both were measured on the same test set).

    Raises:
        GraftError: a name that no URL holds, a version that is worse, a label that the server would refuse, a full
            disk.
        VerificationError: not fit to serve.
    """
    if keep and keep < FEWEST_KEPT:
        raise GraftError(
            f"keep {keep}: a server answers with the version before until it has loaded the newest. "
            f"Keep {FEWEST_KEPT} or more"
        )
    name_folder = Path(repository) / check_name(name)
    parameters = batching_parameters(batch_sizes)
    checked = {}

    def compare():
        before = served_version(repository, name)
        compared = is_not_worse(about, name_folder, before, accept_worse)
        checked.update(before=before, compared=compared)

    def write(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True)

    def check(folder):
        write_config(folder / BATCHING_FILE, parameters)  # its sizes are verified
        (folder / WARMUP_FILE).unlink(missing_ok=True)  # of where it was published before
        checked.update(verify(folder, [], []))
        checked["warmup_requests"] = add_warmup(folder, details, warmup_samples, batch_sizes or BATCH_SIZES)
        write_about(folder, about)
        compare()  # again: another publisher may have been quicker

    if label:
        labels_with(read_models(repository), repository, name, label, next_version(name_folder))
    compare()  # before the work
    remove_leftovers(name_folder)
    version = publish_version(write, name_folder, check)
    if label:
        move_label(repository, name, label, int(version.name), server_folder)
    served = int(version.name) == served_version(repository, name)
    deleted = []
    if keep:
        with locked(repository):  # no label moves meanwhile
            deleted = delete_older(repository, name, keep)
    return version, {**checked, "deleted": deleted, "served": served}


def rollback(repository, name: str, to: int | None = None) -> tuple[Path, int]:
    """Serve an older version of REPOSITORY/NAME again; returns the folder that is served now and the number asked for.

    Where models.config labels the model's versions, `stable` moves to that one, be it older or newer. Elsewhere the
    old version is published again as the next number: every server that watches the folder takes it, whatever its
    configuration, and it needs no space, its files being links where the file system has them. It is verified once
    more before it gets its number.

    Args:
        to: the version to go back to; None: the one published before the one that is served.

    Raises GraftError where there is no such version; VerificationError where it cannot be served any more.
    """
    folders = version_folders(Path(repository) / check_name(name))
    current = served_version(repository, name)
    if current is None:
        raise GraftError(f"{Path(repository) / name}: nothing is published there, so there is nothing to go back to")
    # What was rolled back to counts as the version it is a copy of: going back twice goes back twice.
    origin = read_about(folders[current]).get("copy_of", current)
    if to is None:
        to = max((number for number in folders if number < origin), default=None)
    if to not in folders:
        wanted = f"version {to}" if to is not None else f"version before {origin}"
        listed = ", ".join(map(str, sorted(folders)))
        others = f"There are {listed}: choose one with --to" if len(folders) > 1 else f"There is only version {listed}"
        raise GraftError(f"{Path(repository) / name}: there is no {wanted}. {others}")
    if to == current:
        raise GraftError(f"{folders[to]}: this version is the one that is served. Choose another with --to")
    check_choice_is_open(repository, name)
    if labels_of(find_model(read_models(repository), name)):
        move_label(repository, name, STABLE, to)
        return folders[to], to
    return copy_as_next(folders[to], to), to


def copy_as_next(folder: Path, number: int) -> Path:
    """Publish a version again, as the next number beside it."""
    about = read_about(folder)

    def write(copy):
        shutil.copytree(folder, copy, dirs_exist_ok=True, copy_function=link_or_copy)
        write_about(copy, {**about, "copy_of": about.get("copy_of", number)})

    return publish_version(write, folder.parent, lambda copy: verify(copy, [], []))


def list_versions(repository, name: str) -> list[dict]:
    """The versions of REPOSITORY/NAME, oldest first: "number", "published" (UTC, ISO 8601), "backbone", "test",
    "copy_of", "labels", "served", "bytes"; None where it is not known.

    Raises GraftError where there are none.
    """
    folders = version_folders(Path(repository) / check_name(name))
    if not folders:
        raise GraftError(f"{Path(repository) / name}: no version is published there. Try `graft publish --help`")
    labels, served = labels_of(find_model(read_models(repository), name)), served_version(repository, name)
    rows = []
    for number, folder in sorted(folders.items()):
        about = read_about(folder)
        rows.append(
            {
                "number": number,
                **{key: about.get(key) for key in ("published", "backbone", "test", "copy_of")},
                "labels": sorted(label for label, version in labels.items() if version == number),
                "served": number == served,
                "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            }
        )
    return rows


def is_not_worse(about: dict, name_folder: Path, current: int | None, accept_worse: bool) -> bool:
    """Whether a new version could be compared with the served one; raises GraftError where it is worse.

    It can where both were measured on the same test set by the same figure.
    """
    new = about.get("test")
    old = read_about(version_folders(name_folder)[current]).get("test") if current is not None else None
    if not new or not old or new["fingerprint"] != old["fingerprint"]:
        return False
    new_figure, old_figure = new["headline"], old["headline"]
    if new_figure["metric"] != old_figure["metric"]:
        return False
    if new_figure["value"] < old_figure["value"] and not accept_worse:
        raise GraftError(
            f"{name_folder}: the new version is worse than version {current}, which is served: "
            f"{new_figure['metric'].replace('_', ' ')} {shown_figure(new)} instead of {shown_figure(old)} on the same "
            f"{old['examples']:,} test examples. Publish it nevertheless with --accept-worse"
        )
    return True


def shown_figure(test: dict) -> str:
    """The headline of a test with half the width of its 95% interval."""
    return f"{test['headline']['value']:.3f} ± {test['headline']['half_width']:.3f}"


def add_warmup(folder: Path, details: dict, samples, batch_sizes) -> int:
    """Write warm-up requests and answer them as the server will; returns how many. Raises VerificationError."""
    try:
        write_warmup(folder, details, samples, batch_sizes)
        return replay_warmup(folder)
    except (CheckFailed, SessionError) as error:
        raise VerificationError(f"{folder}: verification failed at the warm-up: {error}") from error


def link_or_copy(source, target):
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_about(folder: Path, about: dict) -> None:
    """Write run.json, as a new file: the old one may be linked to from another version."""
    file = folder / RUN_FILE
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.write_text(json.dumps({**about, "published": now}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_about(folder: Path) -> dict:
    """What run.json says of a published version; {} for a version that was not published by Graft."""
    try:
        about = json.loads((folder / RUN_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise GraftError(f"{folder / RUN_FILE}: cannot be read ({error}). Remove the file or the version") from error
    return about
