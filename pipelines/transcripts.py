"""Clips and what is said in them: manifests -> normalised transcripts -> vocabulary -> Splits -> encoder input."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import unicodedata

import numpy as np
import pyarrow as pa

from models import GraftError
from pipelines.console import progress_bar
from pipelines.huggingface import huggingface_examples
from pipelines.inspections import inspect_files
from pipelines.manifests import Example, manifest_files, read_manifests
from pipelines.sound_files import FORMAT, inspect_sounds
from pipelines.sounds import sound_warnings
from pipelines.sources import check_skipped
from pipelines.splits import fingerprint, make_splits

MOST_BUCKETS = 8  # lengths that clips are padded to
APOSTROPHES = "'\u2019"


def normalised(text: str, rule: str) -> str:
    """A transcript as it is learnt, answered and scored; rule: --normalise."""
    text = unicodedata.normalize("NFC", text)
    if rule != "none":
        text = text.lower()
    if rule == "letters":
        text = text.replace(APOSTROPHES[1], APOSTROPHES[0])
        kept = (c if unicodedata.category(c)[0] in "LMN" or c == APOSTROPHES[0] else " " for c in text)
        text = "".join(kept)
    return " ".join(text.split())


def find_transcripts(data: str, path_column: str = "path", text_column: str = "text", group_column: str = "group"):
    """The examples of transcripts: labels are the texts.

    From a manifest, a folder of {train,val,test} manifests, or a folder of Hugging Face `datasets`.

    Raises:
        GraftError: none of these, and all that their readers raise.
    """
    try:
        found = huggingface_examples(data, text_column, group_column, "Audio") if data else None
        files = manifest_files(data) if data and found is None else {}
        if files:
            found = read_manifests(files, path_column, text_column, group_column)
    except GraftError as error:
        raise GraftError(str(error).replace("--label-column", "--text-column")) from None
    if found is None:
        raise GraftError(
            f"--data {data or '(empty)'}: expected a manifest of transcripts (CSV, TSV, JSONL or Parquet) with the "
            f"columns {path_column} and {text_column}, a folder of train, val and test manifests, or one of Hugging "
            f"Face `datasets` with a column of sounds."
        )
    # A vertical bar in a manifest parts several labels of one example: a transcript has none.
    return [example._replace(labels=(" ".join(example.labels),)) for example in found]


def count_characters(texts: list[str]) -> dict[str, int]:
    """How often each character occurs, in the order of the vocabulary: the space first, then by code point."""
    counts = collections.Counter("".join(texts))
    return {character: counts[character] for character in sorted(counts)}


def load_transcripts(found: list[Example], rule: str, longest_seconds: float):
    """Inspect the clips, normalise the transcripts and split.

    Returns:
        `pipelines.data.Splits`, whose tables have the columns path, text, frames, rate_hz and characters (places in
        the vocabulary [longest], -1 behind the end); and the counts of the characters of the training set.

    Raises:
        GraftError: too many unreadable files, or nothing left to learn from.
    """
    from pipelines.data import Splits

    paths = [example.path for example in found]
    with progress_bar() as bar:
        task = bar.add_task("reading clips", total=len(paths), note="")
        done = lambda count: bar.update(task, completed=count)  # noqa: E731
        facts = inspect_files(paths, done, inspect_sounds, FORMAT)
    skipped = [{"path": path, "reason": fact["error"]} for path, fact in zip(paths, facts) if fact["error"]]
    check_skipped(skipped, len(paths), "clips", "cannot be read")
    rows, kept, long = [], [], 0
    for example, fact in zip(found, facts):
        text = normalised(example.labels[0], rule)
        if fact["error"] or not text:
            continue
        if fact["frames"] > longest_seconds * fact["rate_hz"]:
            long += 1
            continue
        kept.append(fact)
        lengths = {"frames": fact["frames"], "rate_hz": fact["rate_hz"]}
        row = {"id": fact["id"], "path": fact["file"] or example.path, "label": 0, "text": text, **lengths}
        rows.append({**row, "group": example.group or fact["id"], "split": example.split})
    if len(rows) < 3:
        raise GraftError(
            f"{len(rows)} of {len(found)} clips can be used: at least 3 are needed, to train, validate and test. "
            f"{long} are longer than --longest-seconds {longest_seconds:g}, {len(skipped)} cannot be read."
        )
    rows.sort(key=lambda row: (row["id"], row["path"]))
    warnings = sound_warnings([], 0, skipped, kept)
    if long:
        warnings.append(f"{long} clips are longer than --longest-seconds {longest_seconds:g} and were left out.")
    by_row = {(row["id"], row["path"]): row for row in rows}
    tables = make_splits(rows, ["speech"], warnings, "clip")
    texts = {name: texts_of(table, by_row) for name, table in tables.items()}
    counts = count_characters(texts["train"])
    unseen = sorted({c for name in ("val", "test") for text in texts[name] for c in text} - set(counts))
    if unseen:
        warnings.append(f"Characters that no training transcript has, and that cannot be learnt: {' '.join(unseen)}")
    width = max(len(text) for values in texts.values() for text in values)
    for name, table in tables.items():
        tables[name] = with_transcripts(table, by_row, texts[name], "".join(counts), width)
    said = {name: table.drop_columns("label").rename_columns({"text": "label"}) for name, table in tables.items()}
    splits = Splits(
        **tables, class_names=["speech"], fingerprint=fingerprint(said), white_level=255, skipped=skipped,
        warnings=warnings,
    )  # fmt: skip
    return splits, counts


def texts_of(table: pa.Table, by_row: dict) -> list[str]:
    return [by_row[key]["text"] for key in zip(table["id"].to_pylist(), table["path"].to_pylist())]


def with_transcripts(table: pa.Table, by_row: dict, texts: list[str], characters: str, width: int) -> pa.Table:
    """The table with the columns text, frames, rate_hz and characters; what the vocabulary lacks is left out there."""
    keys = list(zip(table["id"].to_pylist(), table["path"].to_pylist()))
    for name in ("frames", "rate_hz"):
        table = table.append_column(name, pa.array([by_row[key][name] for key in keys], pa.int64()))
    place = {character: index for index, character in enumerate(characters)}
    sequences = np.full((len(texts), width), -1, np.int32)
    for row, text in zip(sequences, texts):
        known = [place[character] for character in text if character in place]
        row[: len(known)] = known
    if "text" in table.column_names:
        table = table.drop_columns(["text"])
    table = table.append_column("text", pa.array(texts, pa.string()))
    column = pa.FixedSizeListArray.from_arrays(pa.array(sequences.ravel(), pa.int32()), max(width, 1))
    return table.append_column("characters", column)


# ---------------------------------------------------------------- encoder input


@dataclasses.dataclass
class ClipRows:
    """One of the encoder's two inputs for clips that are padded to one length, [m, samples]: read by the graph."""

    paths: list[str]
    shape: tuple[int, int]
    dtype: np.dtype
    preprocess: object

    def load(self, parts, part, indices):
        """As `pipelines.data.cached_dataset` wants it: a part, which of its clips [b] -> both inputs [b, samples]."""
        import tensorflow as tf

        starts = np.cumsum([0, *(len(rows[0].paths) for rows in parts[:-1])])
        paths = tf.gather([path for rows in parts for path in rows[0].paths], tf.gather(starts, part) + indices)
        samples, read = tf.gather([rows[0].shape[1] for rows in parts], part), clip_reader(self.preprocess)
        specs = tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.int32)
        return list(tf.map_fn(lambda path: read(tf.io.read_file(path), samples), paths, fn_output_signature=specs))


@functools.cache
def clip_reader(preprocess):
    """A WAV file's bytes, and samples to cut or pad it to (0: as long as it is) -> the encoder's two inputs [samples].

    Traced once, not anew for every data set.
    """
    import tensorflow as tf

    from models.audio_inputs import encoder_inputs, read_sound, window

    @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)], autograph=False)
    def read(data, samples):
        sound = read_sound(data, preprocess)
        waveform, mask = window(sound, tf.where(samples > 0, samples, tf.size(sound)))
        return tuple(tensor[0] for tensor in encoder_inputs(waveform[None], mask[None], preprocess))

    return read


def clip_samples(table: pa.Table, rate_hz: int) -> np.ndarray:
    """Samples [n] of each clip at the backbone's rate, as `models.resample` rounds."""
    return -(-table["frames"].to_numpy() * rate_hz // table["rate_hz"].to_numpy())


def clip_parts(table: pa.Table, preprocess, batch_size: int) -> list[tuple[np.ndarray, list[ClipRows]]]:
    """A table in parts of about equal length: for each its rows [m], and the encoder's inputs [m, samples]."""
    lengths, paths = clip_samples(table, preprocess.sample_rate_hz), np.array(table["path"].to_pylist(), object)
    buckets = int(np.clip(len(lengths) // (4 * batch_size), 1, MOST_BUCKETS))
    found = []
    for rows in np.array_split(np.argsort(lengths, kind="stable"), buckets):
        rows = np.sort(rows)
        shape = (len(rows), int(lengths[rows].max()))
        inputs = [ClipRows(list(paths[rows]), shape, np.dtype(kind), preprocess) for kind in ("float32", "int32")]
        found.append((rows, inputs))
    return found


def wav_bytes_of(table: pa.Table) -> list[bytes]:
    return [pathlib.Path(path).read_bytes() for path in table["path"].to_pylist()]
