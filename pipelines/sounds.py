"""Sounds and their labels: class folders, manifests, TFDS, the offline set -> examples -> Splits -> encoder input.

WAV files are read as they are, by the same graph as in the served model. Anything else that soundfile reads (FLAC,
OGG, MP3, ADPCM in WAV, ...) is decoded once to a WAV file in the cache, by content.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib

import numpy as np
import pyarrow as pa

from models import GraftError, offline
from pipelines.console import progress_bar
from pipelines.huggingface import huggingface_examples
from pipelines.inspections import inspect_files
from pipelines.manifests import Example, manifest_files, read_manifests
from pipelines.sources import (
    check_skipped,
    check_two_classes,
    drop_small_classes,
    files_in_class_folders,
    is_multi_label,
    refuse_columns,
    renamed_columns,
)
from pipelines.splits import fingerprint, make_splits
from pipelines.tfds import PREFIX, tfds_sounds

OFFLINE_SOUND_SETS = tuple(name for name, entry in offline.DATA.items() if entry["kind"] == "audio")
# What counts as a sound by its name; what cannot be read is reported with the reason.
SOUND_SUFFIXES = frozenset((".aac", ".aif", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"))
FORMAT = 101  # in the table of what is known of files: raise it when `inspect_sounds` says other things
SILENT = 1e-4  # largest sample, 0 to 1, of a clip that is called silent: -80 dB
# What soundfile calls the samples of a file -> the samples of the WAV file that is made of it; others: 16 bits.
SUBTYPES = {"PCM_24": "PCM_24", "PCM_32": "PCM_32", "FLOAT": "FLOAT", "DOUBLE": "FLOAT"}


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


# ---------------------------------------------------------------- inspecting


def inspect_sounds(paths: list[str], progress=lambda done: None) -> list[dict]:
    """What each file is, in order, as `pipelines.inspections.inspect_files` wants it.

    Returns:
        error ("" where it can be used), and where it can: id (content hash of the WAV file), file (that file where it
        was made in the cache, else ""), frames, rate_hz, channels and peak (0 to 1, of all samples).
    """
    facts = []
    _looker()  # traced here, or every thread would trace it
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for fact in pool.map(_inspect_file, paths):
            facts.append(fact)
            progress(len(facts))
    return facts


def _inspect_file(path: str) -> dict:
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        return {"error": f"cannot be read: {error.strerror}"}
    fact = _look(data)
    if not fact["error"]:
        return {**fact, "file": ""}
    try:
        made = decoded_file(path, data)
    except Exception as error:  # soundfile raises many kinds, and what it says of a file that is no sound is terse
        return {"error": fact["error"], "reader": str(error)}
    return {**_look(made.read_bytes()), "file": str(made)}


def _look(data: bytes) -> dict:
    """What the served model's own reader says of a file."""
    error, frames, channels, rate_hz, peak = (value.numpy() for value in _looker()(data))
    if error:
        return {"error": error.decode()}
    identity = hashlib.sha256(data).hexdigest()[:16]
    fact = {"frames": int(frames), "rate_hz": int(rate_hz), "channels": int(channels), "peak": float(peak)}
    return {"error": "" if frames else "WAV file without a single sample", "id": identity, **fact}


@functools.cache
def _looker():
    import tensorflow as tf

    from models.audio_inputs import audio_error, decode_wav

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def look(data):
        samples, rate_hz = decode_wav(data)
        frames, channels = tf.unstack(tf.shape(samples))
        return audio_error(data), frames, channels, rate_hz, tf.reduce_max(tf.abs(tf.pad(samples, [[0, 1], [0, 0]])))

    look.get_concrete_function()
    return look


def decoded_file(path: str, data: bytes) -> pathlib.Path:
    """The WAV file in the cache that a sound file of another kind was decoded to; made where it is not there yet."""
    import soundfile

    made = offline.cache_folder() / "sounds" / f"{hashlib.sha256(data).hexdigest()[:16]}.wav"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_name(f".tmp-{os.getpid()}-{made.name}")
        try:
            write_wav(path, temporary, soundfile.info(path).subtype)
            os.replace(temporary, made)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def write_wav(source, target, subtype: str) -> None:
    """Decode a file with soundfile to a WAV file; source and target are paths or files in memory."""
    import soundfile

    samples, rate_hz = soundfile.read(source, dtype="float32" if subtype != "PCM_32" else "float64", always_2d=True)
    subtype = SUBTYPES.get(subtype, "PCM_16")
    if subtype == "PCM_16":
        samples = np.clip(samples, -1.0, 1.0)  # decoders of MP3 and OGG may give a little more
    soundfile.write(target, samples, rate_hz, subtype=subtype, format="WAV")


def wav_of(data: bytes) -> bytes:
    """A sound file of any kind that soundfile reads as the bytes of a WAV file; as it is where it cannot be read."""
    import io

    import soundfile

    try:
        target = io.BytesIO()
        write_wav(io.BytesIO(data), target, soundfile.info(io.BytesIO(data)).subtype)
        return target.getvalue()
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError):
        return data


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
    with progress_bar() as bar:
        task = bar.add_task("reading clips", total=len(paths), note="")
        done = lambda count: bar.update(task, completed=count)  # noqa: E731
        facts = inspect_files(paths, done, inspect_sounds, FORMAT)
    skipped = [{"path": path, "reason": fact["error"]} for path, fact in zip(paths, facts) if fact["error"]]
    check_skipped(skipped, len(paths), "clips", "cannot be read")
    fact_of = {example.path: fact for example, fact in zip(found, facts) if not fact["error"]}
    multi_label = is_multi_label(found)
    kept, _ = drop_small_classes([e for e in found if e.path in fact_of], min_per_class, "clip")
    class_names = sorted({label for example in kept for label in example.labels})
    index_of = {name: index for index, name in enumerate(class_names)}
    rows, any_made = [], any(fact["file"] for fact in fact_of.values())
    for example in kept:
        fact, indices = fact_of[example.path], sorted(index_of[label] for label in example.labels)
        rows.append(
            {
                "id": fact["id"],
                "path": fact["file"] or example.path,
                **({"source": example.path} if any_made else {}),
                "label": indices if multi_label else indices[0],
                "group": example.group or fact["id"],
                "split": example.split,
            }
        )
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
