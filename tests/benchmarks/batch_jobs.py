"""What a batch job costs on top of the model: `python -m tests.benchmarks.batch_jobs VERSION INPUT`, needs apache_beam.

Microseconds per input at a quarter, half and all of the inputs: in the bare session (reading and asking, of the same
run), and all that the job adds (listing, shards on disk, Beam with its start): without Beam, and on its FnApiRunner.
Both sides of a figure come from one run, and so from the same load of the machine.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time

from pipelines.batch import read_details
from pipelines.batch_inputs import job_rows
from pipelines.batch_job import Job, plan, run_here
from pipelines.batch_options import JobOptions
from pipelines.batch_texts import input_names


def microseconds(job: Job, rows: list[dict], options: JobOptions, run) -> tuple[float, float]:
    """Microseconds per input in the session, reading included, and on top of that; run(job, numbers of shards)."""
    started = time.perf_counter()
    shards, pending = plan(job, iter(rows), options)
    run(job, pending)
    seconds = time.perf_counter() - started
    done = [json.loads(job.path("done", number).read_text()) for number in range(shards)]
    bare = sum(entry["read_seconds"] + entry["model_seconds"] for entry in done)
    return 1e6 * bare / len(rows), 1e6 * (seconds - bare) / len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="folder of an exported version")
    parser.add_argument("input", help="as graft predict --input takes it")
    arguments = parser.parse_args()
    from pipelines.beam_batch import run_with_beam

    details = read_details(pathlib.Path(arguments.version))
    names = input_names(details) if "pairs" in details else ("image_bytes",)
    options = JobOptions(input=arguments.input)
    rows = list(job_rows(options, names, names))
    ways = {"without Beam": run_here, "on FnApiRunner": lambda *job: run_with_beam(*job, "FnApiRunner", [])}
    print("inputs   job              bare session   job adds (us per input)")
    with tempfile.TemporaryDirectory() as folder:
        for count in (len(rows) // 4, len(rows) // 2, len(rows)):
            for name, run in ways.items():
                output = f"{folder}/{count}-{name}"
                job = Job(
                    arguments.version, output, "serving_default", "parquet", names, (), tuple(details["class_names"])
                )
                bare, added = microseconds(job, rows[:count], options, run)
                print(f"{count:6}   {name:14}   {bare:12.0f}   {added:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
