"""`graft rank`: which backbone suits the data, in minutes and without training any of them.

Reads top to bottom: `rank` is the whole story. Frozen features of a sample of the training and validation examples
go through the probes of `pipelines/probes.py`; the test set is not touched. The features lie in the same cache as
those of training, so `graft image` and `graft text` find what was computed here, and the other way round.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time
from typing import Literal

import numpy as np
import tyro

from models import GraftError, offline
from models.hubs import offline_names
from models.names import RANDOM, check_backbone_name
from pipelines import facts, runs
from pipelines.advice import advice
from pipelines.common_options import CacheOptions, flat
from pipelines.console import console, start_tensorflow
from pipelines.options import AudioConfig, ImageConfig, TextConfig
from pipelines.sounds import find_sounds, load_sounds, sound_parts
from pipelines.sources import find_images
from pipelines.texts import find_texts

KINDS = ("image", "text", "audio")
SIZED = re.compile(r"(?!hf://)(.+)@(\d+)")
TIMED_EXAMPLES = 32  # one batch, whose time per example is what a backbone costs
TIMES = 3  # the batch runs so often; the quickest counts


@dataclasses.dataclass
class RankConfig:
    """Which backbone suits your data: graft rank --data photos/ --backbones efficientnet_lite0,hf://USER/MODEL

    Each backbone answers with frozen features of the same sample. A linear probe on them (5-fold cross-validation)
    is what a new head would reach; its order foretells that of fine-tuning. Nearest neighbours and LogME are second
    opinions. Milliseconds, parameters and size are what the accuracy costs. Ends with a recommendation, and
    rank.html with the table and the plot.
    """

    data: str = "textures"
    """What `graft image`, `graft text` or `graft audio` would learn from: folder, manifest, or an offline set:
    textures, digits, topics, spoken_words."""
    backbones: str = ""
    """Names with commas between, as --backbone takes them. NAME@160 is a model at 160 pixels, or of 160 tokens (NAME@3:
    of 3 seconds of sound); random:NAME has random weights, so that one sees what pretraining is worth. (empty: the
    offline ones of this kind of data, each beside its random copy)"""
    kind: Literal["auto", "image", "text", "audio"] = "auto"
    """What the examples are (auto: found from the data)."""
    examples: int = 2000
    """Most training and validation examples that are looked at, as many of each class as its share."""
    folds: int = 5
    """Folds of the linear probe: each example is answered by a probe that learned from the other folds."""
    neighbours: int = 10
    """Neighbours that vote."""
    min_per_class: int = 0
    """Leave out classes with fewer examples than this (0: stop with an error at a class that has only one)."""
    path_column: str = "path"
    """Column of a manifest with the files."""
    text_column: str = "text"
    """Column of a manifest with the texts."""
    second_column: str = ""
    """Column with the second text, where an example is a pair of texts (empty: one text)."""
    label_column: str = "label"
    """Column of a manifest with the class, or several as a|b."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one fold, such as the patient or author (may be missing)."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""
    seed: int = 0
    """Of the sample and of the folds."""
    cache: flat(CacheOptions) = dataclasses.field(default_factory=CacheOptions)
    out: str = ""
    """Folder for rank.json and rank.html (empty: runs/rank-NAME OF THE DATA, then -2, -3)."""


def rank(argv: list[str]) -> int:
    """`graft rank`: a table, a plot of accuracy against cost, a recommendation, advice."""
    clock = facts.Clock()
    config = tyro.cli(RankConfig, args=argv, prog="graft rank")
    kind, found = check_request(config)  # needs no TensorFlow: a mistake answers at once
    names = backbone_names(config.backbones, kind)
    out = runs.choose_run_folder(config.out, f"rank-{pathlib.Path(config.data.rstrip('/')).stem}".replace(":", "-"))
    console.print(f"Data: {len(found):,} {facts.NOUNS[kind]} in {config.data}")
    start_tensorflow(config.seed)
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of several models in one process, which is what this is about
    from pipelines.data import load_images
    from pipelines.rank_page import write_page
    from pipelines.ranking import print_table
    from pipelines.texts import load_texts

    load = {"image": load_images, "text": load_texts, "audio": load_sounds}[kind]
    splits = load(found, config.min_per_class)
    sample = stratified_sample(splits, config.examples, config.seed)
    console.print(f"      a sample of {sample.num_rows:,}, none of the test set; {len(splits.class_names)} classes")
    clock.lap("data")

    rows = []
    for name in names:
        console.print(f"[bold]{name}[/]")
        rows.append(measure(name, kind, splits, sample, config))
        clock.lap(name)
    gathered = summary(rows, kind, splits, sample, config)
    gathered["seconds"] = clock.laps
    print_table(gathered)
    console.print(f"[bold]{gathered['recommendation']}[/]\n{gathered['certainty']}\n{gathered['advice']}")
    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "rank.json", gathered)
    page = write_page(out, gathered)
    console.print(f"{sum(clock.laps.values()):.0f} s. Table and plot: {page}")
    return 0


# ---------------------------------------------------------------- what is asked for


def check_request(config: RankConfig) -> tuple[str, list]:
    """The kind of the data and its examples; needs no TensorFlow.

    Raises:
        GraftError: values out of range; no such data; data that is of neither kind.
    """
    for flag, least in (("examples", 20), ("folds", 2), ("neighbours", 1), ("min_per_class", 0), ("seed", 0)):
        if getattr(config, flag) < least:
            shown = flag.replace("_", "-")
            raise GraftError(f"--{shown} is {getattr(config, flag)}, expected {least} or more")
    return find_kind(config)


def find_kind(config) -> tuple[str, list]:
    """The kind of the data and its examples, as --data, --kind and the columns say.

    config: `RankConfig` or its like. Raises GraftError for data that is of neither kind.
    """
    kind = config.kind
    if kind == "auto" and config.data in offline.DATA and not pathlib.Path(config.data).exists():
        kind = offline.DATA[config.data]["kind"]
    if kind != "auto":
        return kind, find_examples(config, kind)
    problems = {}
    for kind in KINDS:
        try:
            return kind, find_examples(config, kind)
        except GraftError as error:
            problems[kind] = error
    raise GraftError(
        f"--data {config.data} is neither images nor texts nor clips to learn from. As images: {problems['image']} "
        f"As texts: {problems['text']} As clips: {problems['audio']} Say which it is with --kind."
    )


def find_examples(config, kind: str) -> list:
    """What `graft image` or `graft text` would find."""
    if kind in ("image", "audio"):
        find = find_images if kind == "image" else find_sounds
        return find(config.data, config.path_column, config.label_column, config.group_column, config.data_dir)
    columns = config.text_column, config.second_column, config.label_column, config.group_column
    return find_texts(config.data, *columns, config.data_dir)


def backbone_names(given: str, kind: str) -> list[str]:
    """The names that --backbones lists, checked; without any the offline ones and their random copies."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        names = [prefix + name for name in offline_names(kind) for prefix in ("", RANDOM)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise GraftError(f"--backbones names {', '.join(repeated)} more than once.")
    for name in names:
        check_backbone_name(name_and_size(name)[0], kind)
    return names


def name_and_size(name: str) -> tuple[str, int]:
    """NAME@160 -> (NAME, 160); (NAME, 0) without a size. The @ of hf://USER/MODEL@REVISION is no size."""
    match = SIZED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def stratified_sample(splits, most: int, seed: int):
    """Up to `most` rows of the training and validation tables, in their order; of each class its share, at least two.

    Of several labels an example counts for its first.
    """
    import pyarrow as pa

    table = pa.concat_tables([splits.train, splits.val])
    if table.num_rows <= most:
        return table
    labels = np.array([labels[0] if isinstance(labels, list) else labels for labels in table["label"].to_pylist()])
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen.append(rows[: max(2, most * len(rows) // len(labels))])
    return table.take(np.sort(np.concatenate(chosen)))


# ---------------------------------------------------------------- measuring


def measure(name: str, kind: str, splits, sample, config: RankConfig) -> dict:
    """Everything about one backbone: probes on its features, and what it costs."""
    from pipelines.data import targets_of
    from pipelines.probes import linear_probe, log_me, nearest_neighbours

    started = time.perf_counter()
    frozen = frozen_part(name, kind, splits, config)
    features = sample_features(frozen, splits, sample)
    milliseconds = milliseconds_per_example(frozen, sample, config.seed)
    measured = time.perf_counter()
    labels = targets_of(sample, len(splits.class_names)) if splits.multi_label else sample["label"].to_numpy()
    groups = sample["group"].to_numpy()
    encoder = frozen.model.encoder
    return {
        "name": name,
        "probe": linear_probe(features, labels, config.folds, config.seed, groups),
        "neighbours": nearest_neighbours(features, labels, config.neighbours, groups),
        "log_me": log_me(features, labels),
        "milliseconds": milliseconds,
        "parameters": int(encoder.count_params()),
        "megabytes": sum(np.prod(w.shape) * np.dtype(w.dtype).itemsize for w in encoder.weights) / 1e6,
        "feature_size": int(features.shape[1]),
        "seconds": {"features": measured - started, "probes": time.perf_counter() - measured},
    }


def frozen_part(name: str, kind: str, splits, config):
    """The backbone `name` with what feeds and caches it, as training would have it."""
    import tensorflow as tf

    from pipelines import audio, image, text
    from pipelines.data import image_loader
    from pipelines.frozen_part import FrozenPart
    from pipelines.tokens import token_parts

    base, size = name_and_size(name)
    options = {"image": ImageConfig, "text": TextConfig, "audio": AudioConfig}[kind]()
    options.model.backbone, options.model.depth, options.training.seed = base, "head", config.seed
    if kind == "image":
        options.model.image_size = size
        model = image.build_model(options, splits.class_names, splits.multi_label)
    elif kind == "audio":
        options.model.window_seconds = size or options.model.window_seconds
        model = audio.build_model(options, splits.class_names, splits.multi_label)
    else:
        options.model.sequence_length = size or options.model.sequence_length
        options.input.second_column = config.second_column
        model = text.build_model(options, splits.class_names, splits.multi_label)
    preprocess = model.backbone.preprocess

    def loader(augmentation):
        return image_loader(preprocess, splits.white_level, augmentation, 0.0, splits.plain)

    def read_inputs(table):
        return (sound_parts if kind == "audio" else token_parts)(table, preprocess)

    feeding = (loader, None) if kind == "image" else (None, read_inputs)
    batch = {"class_count": len(splits.class_names), "batch_size": options.training.batch_size}
    strategy = tf.distribute.get_strategy()
    return FrozenPart(model, splits.white_level, *feeding, config.cache, batch, config.seed, strategy)


def sample_features(frozen, splits, sample) -> np.ndarray:
    """Pooled features of the sample, [n, d] float32, in its order.

    Where the sample is all there is, or an earlier run has left the features of all, these are the very entries of
    training; else the sample has an entry of its own.
    """
    from pipelines.frozen_part import Examples

    everything = Examples(frozen, "", [splits.train, splits.val], needed=True)
    if everything.table.num_rows > sample.num_rows and not frozen.is_kept(everything.features_key()):
        everything = Examples(frozen, " of the sample", [sample], needed=True)
    return everything.features(0).arrays[0][everything.places(sample)]


def milliseconds_per_example(frozen, sample, seed: int) -> float:
    """What the backbone costs on this machine: the quickest of a few runs of a batch that is read already."""
    from pipelines.frozen_part import Examples

    chosen = np.sort(np.random.default_rng(seed).permutation(sample.num_rows)[:TIMED_EXAMPLES])
    batches = Examples(frozen, "", [sample.take(chosen)]).raw_batches().cache()
    model, seconds = frozen.model, []
    for _ in range(1 + TIMES):  # the first reads the examples, and may have to be traced
        started = time.perf_counter()
        what, count = "features from 0", 0
        for (features,) in frozen.run(what, model.encoder, batches, lambda x: [model.features(x, False)]):
            count += len(features)
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds) / count


# ---------------------------------------------------------------- what it says


def summary(rows: list[dict], kind: str, splits, sample, config: RankConfig) -> dict:
    """Everything that rank.json holds, the best backbone first."""
    from pipelines.data import targets_of
    from pipelines.ranking import certainty, order_certainty, pareto_front, pretraining_worth, recommendation

    rows = sorted(rows, key=lambda row: -row["probe"]["accuracy"])
    correct = np.stack([row["probe"]["correct"] for row in rows])
    stays = order_certainty(correct, config.seed)
    front = pareto_front(rows)
    shares = targets_of(sample, len(splits.class_names)).mean(axis=0)
    chance = np.maximum(shares, 1 - shares).mean() if splits.multi_label else shares.max()
    trained = [row for row in rows if not row["name"].startswith(RANDOM)] or rows  # random ones are a yardstick
    chosen, sentence = recommendation(trained)
    of_train = targets_of(splits.train, len(splits.class_names)).sum(axis=0).astype(int).tolist()
    # Of several labels accuracy is the share of right yes-or-nos, from which no depth follows.
    figures = () if splits.multi_label else (chosen["probe"]["accuracy"], chosen["neighbours"]["accuracy"])
    paragraph = advice(kind, of_train, *figures, examples=splits.train.num_rows)
    kept = ("accuracy", "interval", "l2", "folds", "neighbours")
    return {
        "kind": kind,
        "data": config.data,
        "created": facts.now(),
        "fingerprint": splits.fingerprint,
        "examples": sample.num_rows,
        "classes": len(splits.class_names),
        "chance": float(chance),
        "multi_label": splits.multi_label,
        "recommended": chosen["name"],
        "recommendation": sentence + pretraining_worth(rows, chosen),
        "certainty": certainty(rows, stays),
        "advice": paragraph,
        "backbones": [
            {
                **row,
                "probe": {key: value for key, value in row["probe"].items() if key in kept},
                "neighbours": {key: value for key, value in row["neighbours"].items() if key in kept},
                "on_front": row["name"] in front,
                "stays_ahead": stay,
            }
            for row, stay in zip(rows, [*stays, None])
        ],
        "versions": facts.versions(),
    }
