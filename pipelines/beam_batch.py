"""The shards of a batch job on Apache Beam (the extra `beam`): FnApiRunner here, any other runner by Beam's own flags.

An element is the number of a shard. A DoFn around `serving.session`, not RunInference: Beam's TensorFlow handlers
import TensorFlow, cannot load what Keras 3 exports, and batch in sizes that vary, which would change answers by
rounding.
"""

from __future__ import annotations

import argparse

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from models import GraftError
from pipelines.batch_job import Job, answer_shard


class AnswerShards(beam.DoFn):
    """Answer shards by number; the model is loaded once per process, and its session serves all threads."""

    def __init__(self, job: Job):
        self.job, self.shared = job, Shared()

    def setup(self):
        from serving.session import Session

        self.session = self.shared.acquire(lambda: Session(self.job.version))

    def process(self, number: int):
        done = answer_shard(self.session, self.job, number)
        for name in ("answered", "failed"):
            Metrics.counter("graft", name).inc(done[name])
        yield number


def run_with_beam(job: Job, pending: list[int], runner: str, flags: list[str]) -> None:
    """Answer the shards on a runner, and wait for it.

    Raises:
        GraftError: the runner is not known, or cannot be started as its flags say.
    """
    try:
        options = PipelineOptions(flags, runner=runner)
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        raise GraftError(f"--runner {runner}: {error}") from error
    # Without the reshuffle, Create and ParDo would be one fused stage in one worker.
    _ = pipeline | beam.Create(pending) | beam.Reshuffle() | beam.ParDo(AnswerShards(job))
    pipeline.run().wait_until_finish()


def unknown_flags(flags: list[str]) -> list[str]:
    """Those of the flags that no options of Beam know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for group in PipelineOptions.__subclasses__():
        if "_add_argparse_args" in vars(group):
            group._add_argparse_args(parser)
    return [word for word in parser.parse_known_args(flags)[1] if word.startswith("-")]
