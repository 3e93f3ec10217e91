"""The flags that `graft predict` and `graft embed` share."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from models import GraftError


@dataclasses.dataclass
class ModelInputs:
    """A model, and what it is asked."""

    run: tyro.conf.Positional[str]
    """Run folder, or the folder of an exported version."""
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of an image, audio or speech model: files, folders of them, or one CSV file with a column `path`. Of a text
    model: .txt files, or one CSV file with a column `text`. The columns of a CSV file are kept."""
    text: tuple[str, ...] = ()
    """Texts to ask of a text model: --text "How do I sort a list?" """
    text_column: str = "text"
    """Column of a table, or feature of TFRecords, with the texts."""
    second_column: str = "text_b"
    """Column or feature with the second texts, of a model that takes pairs."""


@dataclasses.dataclass
class JobOptions:
    """Large jobs: answers in shards, which a killed job goes on from when the same command is run again."""

    input: str = ""
    """What to ask, in place of files named one by one: a folder of images or .txt files, a manifest (CSV, TSV, JSONL or
    Parquet with a column `path` or `text`), a TFRecord file of tf.train.Example or a folder of such, or tfds:NAME of a
    set that is prepared."""
    output: str = ""
    """Folder for the shards: answers/ holds what was answered, failed/ what was not, each with its reason."""
    format: Literal["parquet", "tfrecord"] = "parquet"
    """Of the files in answers/."""
    shard_size: int = 1024
    """Inputs per shard, which is done whole or not at all."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    file_feature: str = ""
    """Feature of TFRecords with the encoded image or sound (empty: image_bytes, image/encoded or image, whichever is
    there; of sounds likewise)."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""
    runner: str = ""
    """Runner of Apache Beam, such as FnApiRunner (this machine), FlinkRunner or SparkRunner; all of Beam's own flags
    may follow, such as --direct_num_workers 2. Paths must lie on a disk that all workers share. Empty: without Beam."""


def parse(config_class, argv: list[str], prog: str) -> tuple[object, list[str]]:
    """The command line as a configuration, and the flags that are Beam's: those that are not ours beside --runner.

    Raises:
        GraftError: --input without --output or the like, values out of range.
    """
    beam_flags = []
    if any(word == "--runner" or word.startswith("--runner=") for word in argv):
        config, beam_flags = tyro.cli(config_class, args=argv, prog=prog, return_unknown_args=True)
    else:
        config = tyro.cli(config_class, args=argv, prog=prog)
    job = config.job
    if bool(job.input) != bool(job.output):
        missing, given = ("--output", "--input") if job.input else ("--input", "--output")
        raise GraftError(f"{given} needs {missing} too: --input says what to ask, --output the folder for the answers.")
    if job.runner and not job.input:
        raise GraftError(f"--runner {job.runner} needs --input and --output: Beam works on jobs in shards.")
    if job.input and (config.inputs or config.text or config.out):
        raise GraftError("--input goes without files, --text and --out: its answers are shards in --output.")
    if job.shard_size < 1:
        raise GraftError(f"--shard-size is {job.shard_size}, expected 1 or more.")
    return config, beam_flags
