"""Which example trains, which validates, which tests: by content and group alone, never by the order of rows."""

from __future__ import annotations

import collections
import hashlib

import pyarrow as pa

from models import GraftError

SPLIT_NAMES = ("train", "val", "test")
# What an example is; a table has those of its kind. `source`: the file that was decoded to the WAV file in `path`.
INPUT_COLUMNS = ("path", "text", "text_b", "source")
VAL_SHARE = TEST_SHARE = 0.15


def make_splits(
    rows: list[dict], class_names: list[str], warnings: list[str], noun: str = "image"
) -> dict[str, pa.Table]:
    """Give every row without a split one, and return the three tables.

    Given splits are kept. Rows that have none become 70% train, 15% val and 15% test; where every row has one,
    val and test, if missing, take 15% each of the train rows. Rows of equal content or equal group stay together:
    without groups by `_split_by_content`, with them by `_split_by_group`. The outcome depends on nothing but
    content, labels and groups, not on the order of rows. Adds to `warnings` what the user should know about
    duplicates and groups.

    Args:
        rows: id, path (or text, and text_b of pairs), label (index, or list of indices), group (the id where there
            is none) and split ("" where there is none). Shares hold per class; an example of several classes counts
            for its rarest.
        noun: what an example is called in messages.

    Raises:
        GraftError: a class without training images, nothing to validate or test with.
    """
    _set_strata(rows)
    given = {row["split"] for row in rows} - {""}
    has_groups = any(row["group"] != row["id"] for row in rows)
    movable = [row for row in rows if not row["split"]]
    make_val = make_test = True
    if movable:
        movable = _follow_given(rows)
    else:
        movable = [row for row in rows if row["split"] == "train"]
        make_val, make_test = "val" not in given, "test" not in given
        if has_groups:  # a group that also sits in a given val or test stays where it is
            whole = [c for c in _components(rows) if all(row["split"] == "train" for row in c)]
            movable = [row for component in whole for row in component]
    if make_val or make_test:
        (_split_by_group if has_groups else _split_by_content)(movable, make_val, make_test)
    _warn_of_duplicates(rows, class_names, warnings, noun)
    if has_groups:
        _warn_of_groups(rows, class_names, warnings, noun)
    schema = pa.schema(
        [
            ("id", pa.string()),
            *[(name, pa.string()) for name in INPUT_COLUMNS if name in rows[0]],
            ("label", pa.list_(pa.int64()) if any(isinstance(row["label"], list) for row in rows) else pa.int64()),
            ("group", pa.string()),
            ("weight", pa.float32()),
        ]
    )
    tables = {
        name: pa.Table.from_pylist([{**row, "weight": 1.0} for row in rows if row["split"] == name], schema=schema)
        for name in SPLIT_NAMES
    }
    for name, purpose in (("val", "validate with"), ("test", "test with")):
        if not tables[name].num_rows:
            raise GraftError(
                f"The split leaves no {noun}s to {purpose}. Give at least three {'group' if has_groups else noun}s "
                f"of some class, or say which {noun}s are {name}: a folder {name}/ with its own class folders, "
                f"or the column split of a manifest."
            )
    return tables


def rows_of(examples, inputs: list[dict], multi_label: bool) -> tuple[list[dict], list[str]]:
    """Labelled examples as the rows that `make_splits` takes, and the names of their classes, sorted.

    Args:
        examples: `pipelines.manifests.Example` or its like.
        inputs: for each its id, and what it is by the names of INPUT_COLUMNS.
    """
    class_names = sorted({label for example in examples for label in example.labels})
    index_of, rows = {name: index for index, name in enumerate(class_names)}, []
    for example, given in zip(examples, inputs, strict=True):
        indices = sorted(index_of[label] for label in example.labels)
        label = indices if multi_label else indices[0]
        rows.append({**given, "label": label, "group": example.group or given["id"], "split": example.split})
    return rows, class_names


def labels_of(row: dict) -> list[int]:
    """The labels of a row, one or several."""
    return row["label"] if isinstance(row["label"], list) else [row["label"]]


def _set_strata(rows: list[dict]) -> None:
    """Give every row the class for whose shares it counts: its label, the rarest where it has several."""
    counts = collections.Counter(label for row in rows for label in labels_of(row))
    for row in rows:
        row["stratum"] = min(labels_of(row), key=lambda label: (counts[label], label))


def _follow_given(rows: list[dict]) -> list[dict]:
    """Put rows without a split where given rows of their content or group are; returns those still without one."""
    movable = []
    for component in _components(rows):
        given = {row["split"] for row in component}
        for row in component:
            if not row["split"]:
                # Given rows may straddle; train comes first, so that no more of the test set is trained on.
                row["split"] = next((name for name in SPLIT_NAMES if name in given), "")
            if not row["split"]:
                movable.append(row)
    return movable


def _components(rows: list[dict]) -> list[list[dict]]:
    """Rows that must stay together, in lists.

    Equal content ties groups together: one picture filed under two patients would else be trained on and tested
    on. So what stays whole is a connected component of groups that share content (union-find, path halving).
    """
    parent = {}

    def root(key):
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for row in rows:
        parent[root(("group", row["group"]))] = root(("id", row["id"]))
    components = collections.defaultdict(list)
    for row in rows:
        components[root(("id", row["id"]))].append(row)
    return list(components.values())


def _split_by_content(movable: list[dict], make_val: bool, make_test: bool) -> None:
    """Exact shares per class: the first 15% by order of content hash test, the next 15% validate."""
    by_class = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in movable:
        by_class[row["stratum"]][row["id"]].append(row)
    for same_content in by_class.values():
        names = sorted(same_content)
        share = len(names) * VAL_SHARE
        test_count = max(1, round(share)) if make_test and len(names) > 1 else 0
        # A class of two trains with one and tests with the other: validation can do without it.
        val_count = max(1, round(share)) if make_val and len(names) - test_count > 1 else 0
        for index, name in enumerate(names):
            split = "test" if index < test_count else "val" if index < test_count + val_count else "train"
            for row in same_content[name]:
                row["split"] = split
    # Content that sits in several classes (equal images, different labels) must not straddle splits either.
    first_split = {}
    for row in sorted(movable, key=lambda row: row["stratum"]):
        row["split"] = first_split.setdefault(row["id"], row["split"])


def _split_by_group(movable: list[dict], make_val: bool, make_test: bool) -> None:
    """Whole groups by a uniform number in [0, 1), the hash of the group's name: below 0.15 test, below 0.3 val.

    Thresholds, not ranks: a new group moves no other, so that a growing dataset keeps its test set. As chance
    alone would leave small classes without test groups, the two boundaries in a class's order of hashes are
    nudged, by as few groups as can be, until each share of its rows is between half of 15% and twice that; a
    group that is larger than twice comes last in the order. A group of several classes counts for the class that
    has most of its rows, so the shares of the others are only near.
    """
    by_class = collections.defaultdict(list)
    for component in _components(movable):
        counts = collections.Counter(row["stratum"] for row in component)
        main_class = min(counts, key=lambda label: (-counts[label], label))
        name = min(row["group"] for row in component)
        by_class[main_class].append((_uniform(name), component))
    for components in by_class.values():
        total = sum(len(component) for _, component in components)
        components.sort(key=lambda item: (len(item[1]) > 2 * TEST_SHARE * total, item[0]))
        ends, start, threshold = {}, 0, 0.0
        for split, made, share in (("test", make_test, TEST_SHARE), ("val", make_val, VAL_SHARE)):
            threshold += share if made else 0.0
            ends[split] = start = _boundary(components, start, threshold, share * total) if made else start
        for index, (_, component) in enumerate(components):
            for row in component:
                row["split"] = "test" if index < ends["test"] else "val" if index < ends["val"] else "train"
    # A class that is the main one of no training group still needs training rows: its group of the highest hash.
    for label in sorted({label for row in movable for label in labels_of(row)}):
        if not any(label in labels_of(row) and row["split"] == "train" for row in movable):
            holders = [c for c in _components(movable) if any(label in labels_of(row) for row in c)]
            for row in max(holders, key=lambda c: _uniform(min(row["group"] for row in c))):
                row["split"] = "train"


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the first 8 bytes of its SHA-256 over 2^64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _boundary(components: list[tuple[float, list[dict]]], start: int, threshold: float, rows: float) -> int:
    """The end of a split that starts at `start`: where the hash passes the threshold, nudged towards `rows` rows."""
    largest = 2 * rows

    def size(end):
        return sum(len(component) for _, component in components[start:end])

    end = start + sum(number < threshold and len(component) <= largest for number, component in components[start:])
    while size(end) < rows / 2 and end < len(components):
        end += 1
    while size(end) > largest and end > start + 1:
        end -= 1
    return min(end, max(len(components) - 1, start))  # the last group always trains


def _warn_of_groups(rows: list[dict], class_names: list[str], warnings: list[str], noun: str) -> None:
    splits_of = collections.defaultdict(set)
    for row in rows:
        splits_of[row["group"]].add(row["split"])
    leaked = sum("test" in splits and len(splits) > 1 for splits in splits_of.values())
    if leaked:
        warnings.append(f"{leaked} groups of the given test set are also in train or val: its score is too good.")
    tested = {label for row in rows if row["split"] == "test" for label in labels_of(row)}
    untested = {label for row in rows for label in labels_of(row)} - tested
    if untested:
        names = [class_names[label] for label in sorted(untested)]
        warnings.append(f"Classes {names} have no test {noun}s: too few groups hold them.")


def _warn_of_duplicates(rows: list[dict], class_names: list[str], warnings: list[str], noun: str) -> None:
    by_id = collections.defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    repeated = [same for same in by_id.values() if len(same) > 1]
    if repeated:
        warnings.append(
            f"{sum(map(len, repeated)) - len(repeated)} {noun}s are exact copies of others; "
            f"copies are kept in the same split where Graft makes the splits."
        )
    contradictory = sum(len({tuple(labels_of(row)) for row in same}) > 1 for same in repeated)
    if contradictory:
        warnings.append(f"{contradictory} {noun}s appear several times, with different labels.")
    leaked = sum(
        "test" in splits and len(splits) > 1 for splits in ({row["split"] for row in same} for same in repeated)
    )
    if leaked:
        warnings.append(f"{leaked} {noun}s of the given test set are also trained on: its score is too good.")
    train_labels = {label for row in rows if row["split"] == "train" for label in labels_of(row)}
    untrained = sorted({label for row in rows for label in labels_of(row)} - train_labels)
    if untrained:
        raise GraftError(
            f"Classes {[class_names[label] for label in untrained]} have no training {noun}s. Every class of val "
            f"and test must be in train: add {noun}s there, or remove those classes."
        )


def fingerprint(tables: dict[str, pa.Table]) -> str:
    """SHA-256 over the sorted (split, id, label) of all rows."""
    lines = sorted(
        f"{name} {identity} {label}"
        for name, table in tables.items()
        for identity, label in zip(table["id"].to_pylist(), table["label"].to_pylist())
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
