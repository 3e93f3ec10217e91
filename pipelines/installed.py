"""Installed packages against what setup.cfg asks for."""

from __future__ import annotations

import configparser
import importlib.metadata
import pathlib

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAND_INS = {"tensorflow": ("tensorflow-tpu", "tensorflow-cpu")}  # other packages with the same folder


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What Graft needs, and what each extra does: from setup.cfg, or where there is none, from what was installed."""
    if (ROOT / "setup.cfg").is_file():
        parser = configparser.ConfigParser()
        parser.read(ROOT / "setup.cfg")
        sections = dict(parser["options.extras_require"])
        return lines(parser["options"]["install_requires"]), {name: lines(text) for name, text in sections.items()}
    needed, extras = [], {}
    for line in importlib.metadata.requires("graft-transfer") or ():
        text, _, marker = line.partition("; extra ==")
        (extras.setdefault(marker.strip(" \"'"), []) if marker else needed).append(text)
    return needed, extras


def lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def installed_version(name: str) -> str | None:
    """The version of a package, or of one that stands in for it; None where there is none."""
    for known in (name, *STAND_INS.get(name, ())):
        try:
            return importlib.metadata.version(known)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def problem_of(line: str) -> str:
    """What is wrong with an installed requirement; "" where nothing is."""
    requirement = Requirement(line)
    version = installed_version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing, expected {requirement.specifier or 'any version'}"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, expected {requirement.specifier}"


def check_packages() -> tuple[list[str], list[str], int]:
    """What is wrong with the packages that Graft needs, the extras that are whole, and how many packages it needs."""
    needed, extras = requirements()
    wrong = [problem for problem in map(problem_of, needed) if problem]
    # tensorflow[and-cuda] is installed where tensorflow is: its own packages tell.
    whole = [name for name, own in extras.items() if name != "gpu" and not any(map(problem_of, own))]
    if not problem_of("nvidia-cudnn-cu12"):
        whole.append("gpu")
    return wrong, whole, len(needed)
