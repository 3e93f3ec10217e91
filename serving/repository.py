"""Which versions a repository holds, which of them are served, what their labels are, and which may go.

REPOSITORY/NAME/NUMBER holds a version; REPOSITORY/models.config, where there is one, says which the server loads.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from pathlib import Path

from models import GraftError
from serving.config import (
    MODELS_FILE,
    MONITORING_FILE,
    STABLE,
    chosen_versions,
    find_model,
    labels_of,
    locked,
    monitoring_config,
    read_models,
    set_labels,
    write_config,
)

SERVER_FOLDER = "/models"  # where the server's Docker image looks for models
LEFTOVER_SECONDS = 24 * 3600  # a temporary folder this old belongs to a publisher that was killed


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
    """Give a version a label in models.config, and make monitoring.config beside it where there is none.

    Raises GraftError for labels that the server would refuse.
    """
    with locked(repository):
        models = read_models(repository)
        labels = labels_with(models, repository, name, label, version)
        set_labels(models, name, f"{server_folder.rstrip('/')}/{name}", labels)
        write_config(Path(repository) / MODELS_FILE, models)
        if not (Path(repository) / MONITORING_FILE).exists():
            write_config(Path(repository) / MONITORING_FILE, monitoring_config())


def labels_with(models, repository, name: str, label: str, version: int) -> dict[str, int]:
    """The labels of a model once `version` has `label`; its first label makes the version served so far stable.

    Raises GraftError where the server would not load one of them: it refuses such a models.config as a whole.
    """
    model = find_model(models, name)
    numbers = {*version_folders(Path(repository) / name), version}
    labels = labels_of(model)
    labels.setdefault(STABLE, max(numbers - {version}, default=version))
    labels[label] = version
    loaded = numbers if model is None else chosen_versions(model, list(numbers))
    for named, number in labels.items():
        if number not in loaded:
            raise policy_error(repository, name, loaded, f"{named} is to be version {number}")
    return labels


def check_choice_is_open(repository, name: str) -> None:
    """Raise GraftError where models.config names the versions to load, so that a newer number changes nothing."""
    model = find_model(read_models(repository), name)
    if model is not None and model.model_version_policy.HasField("specific"):
        raise policy_error(repository, name, model.model_version_policy.specific.versions, "another is to be served")


def policy_error(repository, name: str, loaded, wanted: str) -> GraftError:
    listed = ", ".join(map(str, sorted(loaded))) or "none"
    return GraftError(
        f"{Path(repository) / MODELS_FILE}: {wanted}, but of the versions of {name} it has the server load "
        f"{listed} and no others. Make that line: model_version_policy {{ all {{ }} }}"
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
