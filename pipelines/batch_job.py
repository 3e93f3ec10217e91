"""A batch job: inputs in shards of fixed size, each answered whole or not at all, here or by workers of Apache Beam.

    OUTPUT/answers/part-00003.parquet   one row per input that was answered
           failed/part-00003.csv        one row per input that was not: id, reason (no file where there are none)
           done/part-00003.json         written last; a shard that has it is not computed again
           inputs/part-00003.json       what the shard is asked (paths, places in files, texts); gone at the end
           job.json, summary.json       what was asked of which model; how it ended

All files appear by a rename, and a shard's names depend on its number alone: whoever computes one twice, after a kill
or because a runner tries a bundle again, writes the same files again. So nothing is answered twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from models import GraftError
from pipelines import runs
from pipelines.batch import BATCH, answers_in, files_kind, label_of, read_details
from pipelines.batch_inputs import features_asked, job_rows, rows_reader
from pipelines.batch_texts import input_names
from pipelines.console import console, progress_bar
from pipelines.tfrecords import example_of, write_records

SHOWN_REASONS = 3
POISON = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "DATA_LOSS")  # errors of the runtime that are about an input


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, so that it travels."""

    version: str  # folder of the exported model
    output: str
    signature: str
    format: str
    names: tuple[str, ...]  # inputs of the signature
    features: tuple[tuple[str, ...], ...]  # of TFRecords, for each input
    class_names: tuple[str, ...]

    def path(self, kind: str, number: int) -> pathlib.Path:
        """The file of a shard: kind is answers, failed, done or inputs."""
        suffix = {"answers": self.format, "failed": "csv", "done": "json", "inputs": "json"}[kind]
        return pathlib.Path(self.output, kind, f"part-{number:05}.{suffix}")


def run_job(config, version: pathlib.Path, signature: str, beam_flags: list[str]) -> int:
    """Answer `config.job.input` into `config.job.output`, as far as that is not done yet.

    Raises:
        GraftError: unusable inputs; a folder that holds something else, or another job; Beam is not there.
    """
    options, details = config.job, read_details(version)
    if options.runner:
        from pipelines.beam_runner import check_beam

        check_beam(options.runner, beam_flags)
    names = input_names(details) if "pairs" in details else (files_kind(details).input,)
    text_columns = (config.text_column, config.second_column)[: len(names)]
    job = Job(
        os.path.abspath(version),
        os.path.abspath(options.output),
        signature,
        options.format,
        names,
        tuple(features_asked(options, names, text_columns)),
        tuple(details.get("class_names", ())),
    )
    started = time.perf_counter()
    rows = job_rows(options, names, text_columns)
    try:
        shards, pending = plan(job, rows, options)
        if len(pending) < shards:
            console.print(f"{shards - len(pending):,} of {shards:,} shards are done already.")
        if options.runner and pending:
            from pipelines.beam_batch import run_with_beam

            run_with_beam(job, pending, options.runner, beam_flags)
        elif pending:
            run_here(job, pending)
        finish(job, shards, time.perf_counter() - started)
    except OSError as error:
        from serving.new_version import is_disk_full

        if not is_disk_full(error):
            raise
        raise GraftError(
            f"The disk of {options.output} is full. The shards that are done stay: free some space, then give the "
            f"same command again."
        ) from error
    return 0


# ---------------------------------------------------------------- what there is to do


def plan(job: Job, rows, options) -> tuple[int, list[int]]:
    """Write what each shard is asked; returns the number of shards, and those that are not done.

    Raises:
        GraftError: OUTPUT holds something else, or the shards of another job.
    """
    output = pathlib.Path(job.output)
    if output.exists() and not output.is_dir():
        raise GraftError(f"--output {options.output} is a file. Give a folder.")
    others = [p.name for p in output.iterdir() if not p.name.startswith(".tmp-")] if output.is_dir() else []
    if others and not (output / "job.json").is_file():
        raise GraftError(f"--output {options.output} holds other files ({others[0]}). Give a new folder.")
    temporary = output / f".tmp-inputs-{os.getpid()}"
    temporary.mkdir(parents=True, exist_ok=True)
    digest, count, pending = hashlib.sha256(), 0, []
    try:
        for number in itertools.count():
            shard = list(itertools.islice(rows, options.shard_size))
            if not shard:
                break
            digest.update(json.dumps(shard).encode())
            count += len(shard)
            if not (job.path("done", number).is_file() and job.path("answers", number).is_file()):
                pending.append(number)
                (temporary / job.path("inputs", number).name).write_text(json.dumps(shard))
        if not count:
            raise GraftError(f"--input {options.input}: nothing in it.")
        check_same_job(job, options, {"input": options.input, "inputs": count, "inputs_digest": digest.hexdigest()})
        for kind in ("answers", "failed", "done", "inputs"):
            (output / kind).mkdir(exist_ok=True)
        shards = number
        for number in pending:
            os.replace(temporary / job.path("inputs", number).name, job.path("inputs", number))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            output.rmdir()  # where nothing came of it
    return shards, pending


def check_same_job(job: Job, options, asked: dict) -> None:
    """Write job.json, or compare with the one that is there."""
    file = pathlib.Path(job.output, "job.json")
    what = {
        **asked,
        "version": job.version,
        "model_digest": model_digest(pathlib.Path(job.version)),
        "signature": job.signature,
        "format": job.format,
        "shard_size": options.shard_size,
    }
    if not file.is_file():
        runs.write_json(file, what)
        return
    before = json.loads(file.read_text())
    changed = [name for name in what if name not in ("input", "version") and before.get(name) != what[name]]
    if changed:
        said = ", ".join(f"{name} was {before.get(name)}, is {what[name]}" for name in changed)
        raise GraftError(
            f"--output {options.output} holds another job, which cannot be continued by this one: {said}. "
            f"Give a new folder, or remove that one."
        )


def model_digest(version: pathlib.Path) -> str:
    """12 hexadecimal digits that change with the model: its graph, and the list of its weights with their checksums."""
    digest = hashlib.sha256()
    for name in ("saved_model.pb", "variables/variables.index"):
        if (version / name).is_file():
            digest.update((version / name).read_bytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------- one shard


def answer_shard(session, job: Job, number: int) -> dict:
    """Answer one shard and write its files; returns what its mark says.

    {"answered", "failed"} and, in seconds, "seconds" of all of it, "read_seconds" and "model_seconds" of that.
    """
    started = time.perf_counter()
    rows = json.loads(job.path("inputs", number).read_text())
    read = rows_reader(rows, job.names, job.features)
    answered, failed, read_seconds, model_seconds = [], [], 0.0, 0.0
    for start in range(0, len(rows), BATCH):
        begun = time.perf_counter()
        asked, errors = read(start, start + BATCH)
        have_read = time.perf_counter()
        batch = answers_of_batch(session, job, asked, errors)
        read_seconds += have_read - begun
        model_seconds += time.perf_counter() - have_read
        for row, answer in zip(rows[start : start + BATCH], batch):
            if answer["error"]:
                failed.append({"id": row["id"], "reason": answer["error"]})
            else:
                answered.append({"id": row["id"], **answer_columns(answer, job)})
    write_whole(job.path("answers", number), lambda file: write_answers(file, answered, job))
    if failed:
        runs.write_csv(job.path("failed", number), failed, ["id", "reason"])
    else:
        job.path("failed", number).unlink(missing_ok=True)
    done = {
        "answered": len(answered),
        "failed": len(failed),
        "seconds": round(time.perf_counter() - started, 4),
        "read_seconds": round(read_seconds, 4),
        "model_seconds": round(model_seconds, 4),
    }
    runs.write_json(job.path("done", number), done)
    return done


def answers_of_batch(session, job: Job, asked: dict, errors: list[str]) -> list[dict]:
    """The answers to a batch; where an input makes the whole call fail, each is asked by itself to find which."""
    from serving.runtime import SessionError

    try:
        outputs = session.run(job.signature, asked)
    except SessionError as error:
        if error.code not in POISON:
            raise
        if len(errors) == 1:
            return [{"error": errors[0] or " ".join(str(error).split())}]
        singles = [{name: values[index : index + 1] for name, values in asked.items()} for index in range(len(errors))]
        return [answers_of_batch(session, job, one, [error])[0] for one, error in zip(singles, errors)]
    if job.signature == "serving_default":
        return answers_in(outputs, errors)
    return features_in(outputs, errors)


def features_in(outputs: dict, errors: list[str]) -> list[dict]:
    """The outputs of `features` for one batch, as one dict per example."""
    return [
        {"features": outputs["features"][index], "error": error or outputs["error"][index].decode()}
        for index, error in enumerate(errors)
    ]


def answer_columns(answer: dict, job: Job) -> dict:
    """An answer as the columns of a shard, in the order of `answer_schema`."""
    if job.signature == "features" or "transcript" in answer:
        return {name: value for name, value in answer.items() if name != "error"}
    columns = {"label": label_of(answer, list(job.class_names)), "score": float(answer["scores"][0])}
    if answer["chosen"] is not None:
        columns["chosen"] = [name for name, is_chosen in zip(job.class_names, answer["chosen"]) if is_chosen]
    if answer["unsure"] is not None:
        columns["unsure"] = answer["unsure"]
    return {**columns, "labels": answer["labels"], **{name: answer[name] for name in ("scores", "probabilities")}}


ANSWER_TYPES = {
    "id": pa.string(),
    "label": pa.string(),
    "score": pa.float32(),
    "chosen": pa.list_(pa.string()),
    "unsure": pa.bool_(),
    "labels": pa.list_(pa.string()),
    "scores": pa.list_(pa.float32()),
    "probabilities": pa.list_(pa.float32()),
    "features": pa.list_(pa.float32()),
    "transcript": pa.string(),
    "confidence": pa.float32(),
}


def answer_schema(job: Job) -> pa.Schema:
    """The columns of a shard, the same in each, also where none of its inputs was answered."""
    if job.signature == "features":
        names = ["id", "features"]
    else:
        details = read_details(pathlib.Path(job.version))
        extra = {"chosen": "thresholds" in details, "unsure": "unsure_below" in details}
        names = ["id", "label", "score", "chosen", "unsure", "labels", "scores", "probabilities"]
        names = [name for name in names if extra.get(name, True)]
        names = ["id", "transcript", "confidence"] if details.get("kind") == "speech" else names
    return pa.schema([(name, ANSWER_TYPES[name]) for name in names])


def write_answers(file: pathlib.Path, answered: list[dict], job: Job) -> None:
    """Write the answers of a shard, as Parquet or as records of tf.train.Example."""
    if job.format == "tfrecord":
        with open(file, "wb") as opened:
            write_records(opened, (example_of(row) for row in answered))
        return
    schema = answer_schema(job)
    columns = [[row[field.name] for row in answered] for field in schema]
    parquet.write_table(pa.table([column_of(*pair) for pair in zip(columns, schema)], schema=schema), file)


def column_of(values: list, field: pa.Field) -> pa.Array:
    """A column of Arrow; lists of floats in one go, as they are arrays of one length."""
    if pa.types.is_list(field.type) and field.type.value_type == pa.float32() and values:
        flat = np.concatenate(values).astype(np.float32)
        offsets = np.arange(0, len(flat) + 1, len(values[0]), dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, flat)
    return pa.array(values, field.type)


def write_whole(path: pathlib.Path, write) -> None:
    """Let write(temporary) make a file, flush it to disk and rename it."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- all shards


def run_here(job: Job, pending: list[int]) -> None:
    """Answer the shards one after the other in this process."""
    from serving.session import Session

    with Session(job.version) as session, progress_bar() as bar:
        task = bar.add_task("shards", total=len(pending), note="")
        for number in pending:
            answer_shard(session, job, number)
            bar.advance(task)


def finish(job: Job, shards: int, seconds: float) -> None:
    """Count what there is, write summary.json, remove what only the work needed, and say how it ended.

    Raises:
        GraftError: shards are missing: the runner gave up, or was not waited for.
    """
    output = pathlib.Path(job.output)
    missing = [number for number in range(shards) if not job.path("done", number).is_file()]
    if missing:
        raise GraftError(
            f"{len(missing):,} of {shards:,} shards are not done, the first: {missing[0]}. The same command again "
            f"computes those alone."
        )
    done = [json.loads(job.path("done", number).read_text()) for number in range(shards)]
    totals = {name: sum(entry[name] for entry in done) for name in ("answered", "failed")}
    runs.write_json(output / "summary.json", {**totals, "shards": shards})
    shutil.rmtree(output / "inputs", ignore_errors=True)
    for left in itertools.chain(output.glob(".tmp-*"), output.glob("*/.tmp-*")):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    console.print(f"{totals['answered']:,} answers in {output / 'answers'}, {seconds:.1f} s")
    if totals["failed"]:
        console.print(
            f"[yellow]{totals['failed']:,} of {sum(totals.values()):,} inputs have no answer; {output / 'failed'} "
            f"says why."
        )
