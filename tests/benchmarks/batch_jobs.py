"""What a batch job costs on top of the model: `python -m tests.benchmarks.batch_jobs VERSION INPUT`, needs apache_beam.

Microseconds per input at a quarter, half and all of the inputs, in one process, the same batches each: the bare session
(read, ask, drop the answer), the job without Beam (shards on disk), the job on Beam's FnApiRunner, start-up included.
Rounds alternate; the fastest of each counts, since others use the machine too.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import tempfile
import time

from pipelines.batch import BATCH, read_details
from pipelines.batch_inputs import job_rows, rows_reader
from pipelines.batch_job import Job, plan, run_here
from pipelines.batch_options import JobOptions
from pipelines.batch_texts import input_names


def bare(session, rows, names) -> None:
    read = rows_reader(rows, names, [])
    for start in range(0, len(rows), BATCH):
        session.run("serving_default", read(start, start + BATCH)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="folder of an exported version")
    parser.add_argument("input", help="as graft predict --input takes it")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    from pipelines.beam_batch import run_with_beam
    from serving.session import Session

    version = arguments.version
    details = read_details(pathlib.Path(version))
    names = input_names(details) if "pairs" in details else ("image_bytes",)
    options = JobOptions(input=arguments.input)
    rows = list(job_rows(options, names, names))
    print("inputs   bare session   job, without Beam   job, on Beam   overhead per input: without, on Beam")
    with tempfile.TemporaryDirectory() as folder, Session(version) as session:
        numbers = itertools.count()

        def ask(rows):
            bare(session, rows, names)

        def here(rows):
            job = new_job(rows)
            run_here(job, plan(job, iter(rows), options)[1])

        def beam(rows):
            job = new_job(rows)
            run_with_beam(job, plan(job, iter(rows), options)[1], "FnApiRunner", [])

        def new_job(rows):
            output = f"{folder}/{next(numbers)}"
            return Job(version, output, "serving_default", "parquet", names, (), tuple(details["class_names"]))

        ask(rows[:BATCH])
        for count in (len(rows) // 4, len(rows) // 2, len(rows)):
            times = {ask: [], here: [], beam: []}
            for _ in range(arguments.rounds):
                for way, seconds in times.items():
                    started = time.perf_counter()
                    way(rows[:count])
                    seconds.append(time.perf_counter() - started)
            bare_us, here_us, beam_us = (1e6 * min(seconds) / count for seconds in times.values())
            print(
                f"{count:6}   {bare_us:12.0f}   {here_us:17.0f}   {beam_us:12.0f}   "
                f"{here_us - bare_us:+.0f} us, {beam_us - bare_us:+.0f} us",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
