"""The variables of a TF-Hub module by scope, and its ordered blocks by the names of these scopes."""

from __future__ import annotations

import collections
import re

from models.backbone import Block


def group_by_scope(variables) -> dict[str, tuple[list[str], list]]:
    """A module's variables by scope: {scope: (unique names, variables)}, in order of first appearance.

    The scope of "block1/conv/kernel:0" is "block1/conv". Where names have none, or repeat in it ("kernel:0"
    again and again), the listing alone tells: each matrix or kernel opens a scope, and so does each change
    between norm variables and others; such a scope is named after its first variable.
    """
    names = [re.sub(r":\d+$", "", variable.name) for variable in variables]
    # Statistics may themselves be a scope: "norm/moving_mean/average".
    parts = [
        re.fullmatch(r"(?:(.*?)/)?(moving_(?:mean|variance|var)(?:/.*)?|[^/]+)", name).groups("") for name in names
    ]
    counts = collections.Counter(names)
    unclear = {"", *(scope for name, (scope, _) in zip(names, parts) if counts[name] > 1)}
    taken = set(names) | {scope for scope, _ in parts}
    groups, opened = {}, {}
    for name, (scope, last), variable in zip(names, parts, variables):
        unique = name if counts[name] == 1 else _unused(name, taken)
        if scope in unclear:
            is_norm = last.startswith(("gamma", "beta", "moving_"))
            if scope not in opened or len(variable.shape) >= 2 or is_norm != opened[scope][1]:
                opened[scope] = (unique, is_norm)
            scope = opened[scope][0]
        group = groups.setdefault(scope, ([], []))
        group[0].append(unique)
        group[1].append(variable)
    return groups


def _unused(name: str, taken: set[str]) -> str:
    number = next(number for number in range(len(taken) + 1) if f"{name}_{number}" not in taken)
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


# What looks like a unit at the start of one part of a path: "block2a", "conv2_block1", "expanded_conv_3",
# "layer_0", "unit_1", "Mixed_5b"; not "layer_norm" or "conv1".
UNIT = re.compile(
    r"(?:.*(?:blocks?|layer|unit|stage|stack|cell|mixed)[_.]*\d+[a-z]?|.*expanded_conv(?:_\d+)?)(?![a-z0-9])", re.I
)
BOTTOM = re.compile(r"stem|embed", re.I)


def unit_of(scope: str) -> str | None:
    """The unit in a scope's path: up to the first part that looks like one, and on while the next ones do.

    "resnet50/block2/unit_1/conv1" -> "resnet50/block2/unit_1"; "conv2_block1_1_bn" -> "conv2_block1".
    """
    parts = scope.split("/")
    matches = [UNIT.match(part) for part in parts]
    last = next((index for index, match in enumerate(matches) if match), None)
    if last is None:
        return None
    while matches[last].group() == parts[last] and last + 1 < len(parts) and matches[last + 1]:
        last += 1
    return "/".join([*parts[:last], matches[last].group()])


def cut_into_blocks(scopes: list) -> list[Block]:
    """Ordered blocks of a module by the names of its scopes, each scope in exactly one.

    Args:
        scopes: `models.tfhub.HubVariables`, in the order in which the module lists its variables.

    Units come in the order in which the module lists them; names that differ in numbers only are put in the
    order of these (some modules list theirs by alphabet). Scopes that are no unit's: before the first unit,
    or with stem or embed in their names, they are block 0; between units they join the one before; after the last
    they join the top. Where fewer than two units can be told: a block per scope with a matrix or kernel that
    trains, in the listed order, the others joining the block before.
    """
    units = [unit_of(scope.scope) for scope in scopes]
    listed = list(dict.fromkeys(unit for unit in units if unit))
    blocks = {}
    if len(listed) < 2:
        current = None
        for scope in scopes:
            if current is None or (_has_kernel(scope) and any(map(_has_kernel, blocks[current]))):
                current = scope.name
            blocks.setdefault(current, []).append(scope)
        return [Block(name, tuple(layers)) for name, layers in blocks.items()]
    order = in_order_of_numbers(listed)
    last = max(index for index, unit in enumerate(units) if unit)
    blocks = {"stem": [], **{unit: [] for unit in order}}
    current = "stem"
    for index, (unit, scope) in enumerate(zip(units, scopes)):
        current = unit or (order[-1] if index > last else current)
        is_bottom = not unit and any(map(BOTTOM.search, scope.variable_names))
        blocks["stem" if is_bottom else current].append(scope)
    return [Block(name, tuple(layers)) for name, layers in blocks.items() if layers]


def _has_kernel(scope) -> bool:
    return any(len(v.shape) >= 2 and trains for v, trains in zip(scope.adopted, scope.module_trains))


def in_order_of_numbers(names: list[str]) -> list[str]:
    """Names that differ in numbers only ("2a" is a number, with a letter), sorted among the places that they have."""
    alike = collections.defaultdict(list)
    for name in names:
        alike[re.sub(r"\d+[a-z]?(?![a-z])", "#", name)].append(name)
    for group in alike.values():
        group.sort(key=lambda name: [(int(n), letter) for n, letter in re.findall(r"(\d+)([a-z]?)", name)])
    queues = {name: group for group in alike.values() for name in group}
    return [queues[name].pop(0) for name in names]
