"""Sounds and their labels: class folders, manifests, TFDS, the offline set -> examples -> Splits -> encoder input."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np
import pyarrow as pa

from models import GraftError, offline
from pipelines.huggingface import huggingface_examples
from pipelines.inspections import read_files
from pipelines.manifests import Example, manifest_files, read_manifests
from pipelines.sound_files import FORMAT, SOUND_SUFFIXES, inspect_sounds
from pipelines.sources import (
    check_two_classes,
    drop_small_classes,
    files_in_class_folders,
    is_multi_label,
    refuse_columns,
    renamed_columns,
)
from pipelines.splits import fingerprint, make_splits, rows_of
from pipelines.tfds import PREFIX, tfds_sounds

OFFLINE_SOUND_SETS = tuple(name for name, entry in offline.DATA.items() if entry["kind"] == "audio")
SILENT = 1e-4  # largest sample, 0 to 1, of a clip that is called silent: -80 dB


# ---------------------------------------------------------------- finding


def find_sounds(
    data: str,
    path_column: str = "path",
    label_column: str = "label",
    group_column: str = "group",
    data_dir: str = "",
) -> list[Example]:
    """List the clips of a folder, a manifest, a TFDS set or an offline set, sorted by path.

    Layouts: FOLDER/class/..., FOLDER/{train,val,test}/class/..., a manifest (CSV, TSV, JSONL, Parquet), a folder with
    the manifests {train,val,test}.csv and the like, or a folder of Hugging Face `datasets`. Needs no TensorFlow; only
    the first use of a TFDS set does.

    Args:
        path_column, label_column, group_column: what a manifest calls them.
        data_dir: folder of prepared TFDS sets ("": TFDS's own).

    Raises:
        GraftError: no such folder, manifest or set, no clips, clips outside class folders, one class only; column
            names for data that has none; all that `read_manifests` and the readers of sets raise.
    """
    renamed = renamed_columns(path=path_column, label=label_column, group=group_column)
    if data.startswith(PREFIX):
        refuse_columns(renamed, ("--path-column", "--group-column"), f"the TFDS set {data}")
        found, give = tfds_sounds(data, data_dir, label_column), "a set of at least two labels"
    elif (in_set := huggingface_examples(pathlib.Path(data), label_column, group_column, "Audio")) is not None:
        refuse_columns(renamed, ("--path-column",), f"the Hugging Face folder {data}")
        found, give = in_set, "a set of at least two labels"
    elif files := manifest_files(data):
        found = read_manifests(files, path_column, label_column, group_column)
        give = "rows of at least two labels"
    elif data in OFFLINE_SOUND_SETS and not pathlib.Path(data).exists():
        from models.offline_sounds import sound_data_file

        refuse_columns(renamed, tuple(renamed), f"the offline set {data}")
        found, give = read_manifests({"": sound_data_file(data)}), ""
    else:
        refuse_columns(renamed, tuple(renamed), f"--data {data}")
        found = files_in_class_folders(data, pathlib.Path(data), SOUND_SUFFIXES, "clip", OFFLINE_SOUND_SETS)
        give = "one folder of clips per class"
    check_two_classes(data, found, give)
    return found


# ---------------------------------------------------------------- splitting


def load_sounds(found: list[Example], min_per_class: int = 0):
    """Inspect every clip, leave out what cannot be read, and split; returns `pipelines.data.Splits`.

    Its tables have the columns id (content hash of the WAV file), path (of that file), label, group and weight, frames
    and rate_hz, and source where some file is no WAV file: what it was decoded from.

    Raises:
        GraftError: more unreadable files than max(1%, 3), or a class that loses all but one clip.
    """
    from pipelines.data import Splits

    found, dropped = drop_small_classes(found, min_per_class, "clip")
    paths = [example.path for example in found]
    facts, skipped = read_files(paths, "clips", inspect_sounds, FORMAT)
    fact_of = {example.path: fact for example, fact in zip(found, facts) if not fact["error"]}
    multi_label = is_multi_label(found)
    kept, _ = drop_small_classes([e for e in found if e.path in fact_of], min_per_class, "clip")
    any_made = any(fact["file"] for fact in fact_of.values())
    inputs = [
        {
            "id": fact_of[example.path]["id"],
            "path": fact_of[example.path]["file"] or example.path,
            **({"source": example.path} if any_made else {}),
        }
        for example in kept
    ]
    rows, class_names = rows_of(kept, inputs, multi_label)
    # By content, not by path: the same clips give the same batches wherever they lie.
    rows.sort(key=lambda row: (row["id"], row["path"]))
    warnings = sound_warnings(dropped, min_per_class, skipped, [fact_of[example.path] for example in kept])
    facts_by_id = {fact["id"]: fact for fact in fact_of.values()}
    tables = make_splits(rows, class_names, warnings, "clip")
    return Splits(
        **{name: with_lengths(table, facts_by_id) for name, table in tables.items()},
        class_names=class_names,
        fingerprint=fingerprint(tables),
        white_level=255,  # means nothing here
        skipped=skipped,
        warnings=warnings,
    )


def with_lengths(table: pa.Table, facts_by_id: dict) -> pa.Table:
    """The table with the columns frames and rate_hz, from which follows how many windows a clip has."""
    for name in ("frames", "rate_hz"):
        values = [facts_by_id[identity][name] for identity in table["id"].to_pylist()]
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table


def sound_warnings(dropped, min_per_class: int, skipped, facts: list[dict]) -> list[str]:
    """What the user should know about the files."""
    warnings = []
    if dropped:
        warnings.append(f"{len(dropped)} classes with fewer than {min_per_class} clips were left out: {dropped}.")
    if skipped:
        warnings.append(f"{len(skipped)} files could not be read and were skipped (skipped.csv says why).")
    silent = sum(fact["peak"] < SILENT for fact in facts)
    if silent:
        warnings.append(f"{silent} clips are silent: no sample is louder than -80 dB. Are they meant to be?")
    made = sum(bool(fact["file"]) for fact in facts)
    if made:
        warnings.append(
            f"{made} clips are no WAV files that TensorFlow Serving could read: they were decoded to WAV to learn "
            f"from. `graft predict` does the same; other clients must send WAV."
        )
    narrow = sum(fact["rate_hz"] < 16_000 for fact in facts)
    if narrow:
        warnings.append(
            f"{narrow} clips were recorded at less than 16,000 samples per second: they hold nothing above half their "
            f"rate, which the backbone knows from elsewhere."
        )
    return warnings


def long_clips_warning(splits, preprocess) -> list[str]:
    """What to tell the user of clips that are longer than the window: one sentence, or none."""
    seconds = np.concatenate([table["frames"].to_numpy() / table["rate_hz"].to_numpy() for table in splits])
    longer = seconds > preprocess.window_seconds
    if not longer.any():
        return []
    from models.sound_windows import MOST_WINDOWS

    return [
        f"{longer.mean():.1%} of clips are longer than the window of {preprocess.window_seconds:g} s (half of all have "
        f"up to {np.median(seconds):.1f} s, the longest has {seconds.max():,.0f} s): the answers of up to "
        f"{MOST_WINDOWS} windows are averaged. --window-seconds takes more at once."
    ]


# ---------------------------------------------------------------- encoder input


@dataclasses.dataclass
class SoundRows:
    """One of the encoder's two inputs for clips of equally many windows, [m, windows, samples]: read by the graph."""

    paths: list[str]
    shape: tuple[int, int, int]
    dtype: np.dtype
    preprocess: object

    def load(self, parts, part, indices):
        """As `pipelines.data.cached_dataset` wants it: a part, and which of its clips [b] -> both inputs [b, ...]."""
        import tensorflow as tf

        starts = np.cumsum([0, *(len(rows[0].paths) for rows in parts[:-1])])
        paths = tf.gather([path for rows in parts for path in rows[0].paths], tf.gather(starts, part) + indices)
        samples = self.shape[-1]
        specs = [tf.TensorSpec([None, samples], tf.float32), tf.TensorSpec([None, samples], tf.int32)]
        return tf.map_fn(_window_reader(self.preprocess), paths, fn_output_signature=specs)


@functools.cache
def _window_reader(preprocess):
    """Path of a WAV file -> [windows, masks]; traced once, not anew for the data set of every epoch."""
    import tensorflow as tf

    from models.sound_windows import read_windows

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def read(path):
        return read_windows(tf.io.read_file(path), preprocess)

    return read


def sound_parts(table: pa.Table, preprocess) -> list[tuple[np.ndarray, list[SoundRows]]]:
    """A table in parts of equally many windows: for each its rows [m], and the encoder's inputs [m, windows, samples].

    table: with the columns path, frames and rate_hz.
    """
    from models.sound_windows import window_count, window_samples

    samples, paths = window_samples(preprocess), np.array(table["path"].to_pylist(), object)
    # As `models.resample` rounds.
    resampled = -(-table["frames"].to_numpy() * preprocess.sample_rate_hz // table["rate_hz"].to_numpy())
    counts = np.array([window_count(int(count), samples) for count in resampled])
    found = []
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        shape = (len(rows), int(count), samples)
        found.append(
            (rows, [SoundRows(list(paths[rows]), shape, np.dtype(kind), preprocess) for kind in ("float32", "int32")])
        )
    return found


def sound_predictor(model, preprocess, batch_size: int):
    """A function: table -> logits [n, classes] float32, from the files through the whole model as it is served."""
    import tensorflow as tf

    from models.sound_windows import average_rows, read_windows_of_many

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def predict(audio_bytes):
        inputs, rows, _ = read_windows_of_many(audio_bytes, preprocess)
        return model.logits(average_rows(model.features(inputs), rows))

    def logits_of(table: pa.Table) -> np.ndarray:
        paths, found = table["path"].to_pylist(), [np.zeros((0, model.head.units), np.float32)]
        for start in range(0, len(paths), batch_size):
            files = [pathlib.Path(path).read_bytes() for path in paths[start : start + batch_size]]
            found.append(predict(tf.constant(files)).numpy())
        return np.concatenate(found)

    return logits_of


def check_window(window_seconds: float, longest_seconds: float | None, name: str) -> None:
    """Raise GraftError for a window that is longer than what a backbone was made for (None: any)."""
    if longest_seconds and window_seconds > longest_seconds:
        raise GraftError(
            f"--window-seconds {window_seconds:g}: {name} was made for at most {longest_seconds:g} s. "
            f"Give up to {longest_seconds:g}; longer clips are answered by several windows."
        )
