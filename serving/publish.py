"""A repository of versions that TF Serving watches: publish into it, go back in it, list it.

REPOSITORY/NAME/NUMBER holds a version. A server serves the newest number; one that reads REPOSITORY/models.config may
serve more, under labels. A version is never rewritten, and a number never used twice. Beside the model a published
version holds, in assets.extra/run.json, where it comes from and how good it was on which test set: that is what the
next one is compared with.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shutil
import time
from pathlib import Path

from models import GraftError
from serving.config import (
    ALLOWED_BATCH_SIZES,
    BATCHING_FILE,
    MODELS_FILE,
    STABLE,
    batching_parameters,
    check_name,
    chosen_versions,
    find_model,
    labels_of,
    locked,
    read_models,
    set_labels,
    write_config,
)
from serving.runtime import SessionError
from serving.static_checks import CheckFailed
from serving.verify import VerificationError, verify
from serving.warmup import replay_warmup, write_warmup

RUN_FILE = "assets.extra/run.json"
SERVER_FOLDER = "/models"  # where the server's Docker image looks for models
FEWEST_KEPT = 2  # the server answers with the version before until it has loaded the newest
LEFTOVER_SECONDS = 24 * 3600  # a temporary folder this old belongs to a publisher that was killed


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
    batch_sizes=ALLOWED_BATCH_SIZES,
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

    Returns:
        The version's folder, and what was checked and done: as `serving.verify.verify` says, and "warmup_requests",
        "deleted", "served" (whether it is the `served_version` now), "before" (which one was, or None), "compared"
        (whether both were measured on the same test set).

    Raises:
        GraftError: a name that no URL holds, a version that is worse, a full disk.
        VerificationError: not fit to serve.
    """
    from serving.export import publish_version  # imports TensorFlow, which the other commands do without

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
        checked.update(verify(folder, [], []))
        checked["warmup_requests"] = add_warmup(folder, details, warmup_samples, batch_sizes)
        write_config(folder / BATCHING_FILE, parameters)
        write_about(folder, about)
        compare()  # again: another publisher may have been quicker

    if label:
        check_choice_is_open(repository, name)
    compare()  # before the work
    remove_leftovers(name_folder)
    version = publish_version(write, name_folder, check)
    if label:
        move_label(repository, name, label, int(version.name), server_folder)
    served = int(version.name) == served_version(repository, name)
    deleted = delete_older(repository, name, keep) if keep else []
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
        listed = ", ".join(map(str, sorted(folders)))
        wanted = f"version {to}" if to is not None else f"version before {origin}"
        raise GraftError(f"{Path(repository) / name}: there is no {wanted}. There are {listed}: choose one with --to")
    if to == current:
        raise GraftError(f"{folders[to]}: this version is the one that is served. Choose another with --to")
    check_choice_is_open(repository, name)
    if labels_of(find_model(read_models(repository), name)):
        move_label(repository, name, STABLE, to)
        return folders[to], to
    return copy_as_next(folders[to], to), to


def copy_as_next(folder: Path, number: int) -> Path:
    """Publish a version again, as the next number beside it."""
    from serving.export import publish_version  # imports TensorFlow, which the other commands do without

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


def version_folders(name_folder: Path) -> dict[int, Path]:
    """{number: folder} of the versions in REPOSITORY/NAME; empty where there is no such folder."""
    if not name_folder.is_dir():
        return {}
    found = {path.name: path for path in name_folder.iterdir() if path.name.isascii() and path.name.isdecimal()}
    return {int(name): path for name, path in found.items() if path.is_dir()}


def served_version(repository, name: str) -> int | None:
    """The version that answers, as far as the file system tells: the one labelled stable, else the newest that
    models.config lets the server load; None where there is none. A server with a configuration elsewhere may differ."""
    model = find_model(read_models(repository), name)
    loaded = chosen_versions(model, list(version_folders(Path(repository) / name)))
    stable = labels_of(model).get(STABLE)
    return stable if stable in loaded else max(loaded, default=None)


def move_label(repository, name: str, label: str, version: int, server_folder: str = SERVER_FOLDER) -> None:
    """Give a version a label in models.config. The first label of a model makes the version served so far stable."""
    with locked(repository):
        models = read_models(repository)
        labels = labels_of(find_model(models, name))
        others = [number for number in version_folders(Path(repository) / name) if number != version]
        labels.setdefault(STABLE, max(others, default=version))
        labels[label] = version
        set_labels(models, name, f"{server_folder.rstrip('/')}/{name}", labels)
        write_config(Path(repository) / MODELS_FILE, models)


def check_choice_is_open(repository, name: str) -> None:
    """Raise GraftError where models.config names the versions to load: a label or a newer number changes nothing."""
    model = find_model(read_models(repository), name)
    if model is not None and model.model_version_policy.HasField("specific"):
        listed = ", ".join(map(str, model.model_version_policy.specific.versions))
        raise GraftError(
            f"{Path(repository) / MODELS_FILE}: it has the server load versions {listed} of {name} and no others "
            f"(model_version_policy specific). Change that line, or make it: model_version_policy {{ all {{ }} }}"
        )


def named_versions(repository, name: str) -> set[int]:
    """Those versions that must stay: labelled ones, those that models.config names or counts, and the newest."""
    model = find_model(read_models(repository), name)
    numbers = list(version_folders(Path(repository) / name))
    named = set(labels_of(model).values()) | set(sorted(numbers)[-1:])
    if model is None or not model.model_version_policy.HasField("all"):
        named |= chosen_versions(model, numbers)
    return named


def delete_older(repository, name: str, keep: int) -> list[int]:
    """Delete all but the latest `keep` versions and those of `named_versions`; returns the numbers deleted."""
    folders = version_folders(Path(repository) / name)
    kept = set(sorted(folders)[-keep:]) | named_versions(repository, name)
    deleted = []
    for number in sorted(set(folders) - kept):
        # Out of the server's sight in one step: it never finds a version that lacks files.
        hidden = folders[number].with_name(f".tmp-deleted-{number}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # another publisher has deleted it
            folders[number].rename(hidden)
            deleted.append(number)
            shutil.rmtree(hidden, ignore_errors=True)
    return deleted


def remove_leftovers(name_folder: Path, age_seconds: float = LEFTOVER_SECONDS) -> None:
    """Remove the temporary folders of publishers that were killed, once they are a day old."""
    for folder in name_folder.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # another publisher was quicker
            # Not st_mtime: a copied folder has that of its source.
            if time.time() - folder.stat().st_ctime > age_seconds:
                shutil.rmtree(folder, ignore_errors=True)


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
