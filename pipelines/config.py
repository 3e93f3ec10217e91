"""The command line and the YAML file that fill the dataclasses of `pipelines/options.py`.

tyro turns the dataclasses into the command line: dashes, groups, suggestions for mistyped flags, 0.15 s for --help.
No TensorFlow here, so that --help and bad flags answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import sys
import typing
from typing import Literal

import tyro
import yaml

from models import GraftError
from pipelines.options import ImageConfig


def parse_config(argv: list[str], config_class=ImageConfig, prog: str = "graft image"):
    """Command line (and the YAML file it names) -> a checked configuration.

    Exits with 2 on an unknown flag or a value of the wrong type, with 0 after --help and --print-config.

    Raises:
        GraftError: values out of range, all of them in one message; an unreadable YAML file.
    """
    default = config_class()
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            default = read_config(pathlib.Path(argv[position + 1]), config_class)
        elif word.startswith("--config="):
            default = read_config(pathlib.Path(word.partition("=")[2]), config_class)
    config = tyro.cli(config_class, args=argv, prog=prog, default=default)
    check_config(config)
    if config.run.print_config:
        print(config_yaml(config), end="")
        sys.exit(0)
    return config


def flat_config(config) -> dict:
    """The configuration as one flat dict: flag name with underscores -> value."""
    flat_dict = {}
    for group in dataclasses.fields(config):
        flat_dict.update(dataclasses.asdict(getattr(config, group.name)))
    for about_this_command in ("config", "print_config", "resume"):
        flat_dict.pop(about_this_command)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat_dict.items()}


def config_yaml(config) -> str:
    """The configuration as YAML that --config reads back."""
    return yaml.safe_dump(flat_config(config), sort_keys=False, allow_unicode=True)


def read_config(path: pathlib.Path, config_class=ImageConfig):
    """A configuration from a YAML file of flags; what it does not name keeps its default.

    Raises:
        GraftError: no such file, not a YAML mapping, or keys that are no flags; lists the known ones.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise GraftError(f"Configuration {path} could not be read: {error}. Give a YAML file of flags.") from error
    if not isinstance(values, dict):
        raise GraftError(f"Configuration {path} must be a YAML mapping such as `head_epochs: 8`, not {values!r}.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if isinstance(values.get("depth"), int):
        values["depth"] = str(values["depth"])  # YAML reads `depth: 2` as a number
    config = config_class()
    known = flat_config(config)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise GraftError(f"Configuration {path} holds unknown keys: {unknown}. Known: {', '.join(known)}.")
    wrong = [f"{name}: {value!r}" for name, value in values.items() if not _same_type(value, known[name])]
    if wrong:
        raise GraftError(
            f"Configuration {path} holds values of the wrong type: {', '.join(wrong)}. "
            f"Their defaults are {', '.join(f'{name}: {known[name]!r}' for name in values if name in known)}."
        )
    for group in dataclasses.fields(config):
        options = getattr(config, group.name)
        types = typing.get_type_hints(type(options))
        for field in dataclasses.fields(options):
            if field.name not in values:
                continue
            value = values[field.name]
            if typing.get_origin(types[field.name]) is Literal and value not in typing.get_args(types[field.name]):
                raise GraftError(
                    f"Configuration {path}: {field.name} is {value!r}, "
                    f"expected {' or '.join(typing.get_args(types[field.name]))}."
                )
            setattr(options, field.name, tuple(value) if isinstance(value, list) else value)
    return config


def _same_type(value, default) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def check_config(config) -> None:
    """Raise GraftError that lists every value out of range."""
    values = flat_config(config)
    problems = [
        f"--{name.replace('_', '-')} is {values[name]!r}, expected {expected}"
        for names, holds, expected in RANGES
        for name in names
        if name in values and not holds(values[name])
    ]
    for check, value in ((depth_blocks, config.model.depth), (budget_seconds, config.training.budget)):
        try:
            check(value)
        except GraftError as error:
            problems.append(str(error))
    if problems:
        raise GraftError("; ".join(problems))


RANGES = (  # flags, what must hold, how to say it
    (("head_epochs", "batch_size", "accumulation_steps", "patience", "views"), lambda v: v >= 1, "1 or more"),
    (("light_blocks", "steps_per_call"), lambda v: v >= 1, "1 or more"),
    (("checkpoint_seconds",), lambda v: v > 0, "more than 0"),
    (("fine_tune_epochs", "image_size", "min_per_class", "seed"), lambda v: v >= 0, "0 or more"),
    (("weight_decay", "clip_norm", "mixup", "cutmix", "cache_memory"), lambda v: v >= 0, "0 or more"),
    (("window_seconds",), lambda v: 0.05 <= v <= 60, "from 0.05 to 60"),
    (("head_learning_rate", "fine_tune_learning_rate", "longest_seconds"), lambda v: v > 0, "more than 0"),
    (("dropout", "label_smoothing", "warmup", "ema"), lambda v: 0 <= v < 1, "0 or more and less than 1"),
    (("abstain_below_precision",), lambda v: 0 <= v < 1, "0 or more and less than 1"),
    (("sequence_length",), lambda v: v >= 4, "4 or more"),
    (("random_erasing", "target", "forgetting_limit", "gap_limit"), lambda v: 0 <= v <= 1, "from 0 to 1"),
    (("specificity",), lambda v: 0 < v < 1, "between 0 and 1"),
)


def depth_blocks(depth: str) -> int | None:
    """--depth as a number of blocks: head -> 0, the number itself, full and auto (as many as pay) -> None.

    Raises:
        GraftError: any other word.
    """
    if depth in ("head", "full", "auto"):
        return 0 if depth == "head" else None
    if str(depth).isdecimal() and int(depth) >= 1:
        return int(depth)
    raise GraftError(f"--depth is {depth!r}, expected auto, head, a number of blocks counted from the top, or full")


def budget_seconds(budget: str) -> float:
    """--budget in seconds: 90s, 10m, 1.5h; infinite where it is empty.

    Raises:
        GraftError: anything else.
    """
    if not budget:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not match or not float(match[1]):
        raise GraftError(f"--budget is {budget!r}, expected a time such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check_multi_label_flags(config, noun: str) -> None:
    """Raise GraftError for what makes sense with one label per example only; noun: what an example is called."""
    if config.training.class_weights != "none":
        raise GraftError(
            f"--class-weights {config.training.class_weights}: --data {config.input.data} has several labels per "
            f"{noun}, and an example weighs for all its classes at once. Leave the flag out: each class gets its own "
            f"threshold, so that rare classes are found too."
        )
    if config.report.positive:
        raise GraftError(
            f"--positive {config.report.positive}: --data {config.input.data} has several labels per {noun}; "
            f"sensitivity at a specificity needs exactly one of two. Leave the flag out: the per-class table of the "
            f"report has precision, recall and threshold of every class."
        )
    if config.guards.check_labels:
        raise GraftError(
            f"--check-labels: --data {config.input.data} has several labels per {noun}; doubts are told of one label "
            f"each. Leave the flag out: the worst mistakes of the report show what to look at."
        )
    if config.guards.abstain_below_precision:
        raise GraftError(
            f"--abstain-below-precision {config.guards.abstain_below_precision:g}: --data {config.input.data} has "
            f"several labels per {noun}, and each class has a threshold of its own. Leave the flag out."
        )
