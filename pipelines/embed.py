"""`graft embed`: one vector per file or text, as the backbone sees it: for search, for clusters, for another head."""

from __future__ import annotations

import dataclasses
import pathlib

from models import GraftError
from pipelines import runs
from pipelines.batch import BATCH, print_failed, read_details, what_to_ask
from pipelines.batch_options import JobOptions, ModelInputs, parse
from pipelines.common_options import flat
from pipelines.console import console, progress_bar


@dataclasses.dataclass
class EmbedConfig(ModelInputs):
    """Vectors of files or texts, from a run's exported model: graft embed runs/photos new/ --out features.parquet"""

    out: str = ""
    """Parquet file to write: the input's columns, then features (a list of float32, missing where there is an error)
    and error."""
    job: flat(JobOptions) = dataclasses.field(default_factory=JobOptions)


def embed(argv: list[str]) -> int:
    """`graft embed`: a Parquet file with --out; with --input, shards in --output."""
    config, beam_flags = parse(EmbedConfig, argv, prog="graft embed")
    version = runs.find_version(config.run)
    details = read_details(version)
    if details.get("kind") == "speech":
        raise GraftError(
            f"{version}: a recogniser has a vector for every few milliseconds, none for a clip. `graft predict` gives "
            f"its transcripts. For vectors of clips train `graft audio --depth head` on the same backbone."
        )
    if config.job.input:
        from pipelines.batch_job import run_job

        return run_job(config, version, "features", beam_flags)
    out = pathlib.Path(config.out)
    if out.suffix != ".parquet" or out.is_dir():
        raise GraftError(f"--out is {config.out!r}, expected the name of a file such as features.parquet.")
    rows, read, _ = what_to_ask(config, details)
    answers = features_of_rows(version, len(rows), read)
    write_features(out, rows, answers)
    size = next((len(answer["features"]) for answer in answers if not answer["error"]), 0)
    console.print(f"{len(rows):,} rows in {out}, {size} features each")
    print_failed([answer["error"] for answer in answers], details)
    return 0


def features_of_rows(version: pathlib.Path, count: int, read) -> list[dict]:
    """{"features": [d] float32, "error"} of each example; read: (start, stop) -> inputs by name, errors."""
    from pipelines.batch_job import features_in
    from serving.session import Session

    answers = []
    with Session(version) as session, progress_bar() as bar:
        task = bar.add_task("features", total=count, note="")
        for start in range(0, count, BATCH):
            asked, errors = read(start, start + BATCH)
            answers += features_in(session.run("features", asked), errors)
            bar.update(task, advance=len(errors))
    return answers


def write_features(out: pathlib.Path, rows: list[dict], answers: list[dict]) -> None:
    """Write the rows with their features as one Parquet file, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    from pipelines.batch_job import write_whole

    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
    features = [None if answer["error"] else answer["features"] for answer in answers]
    columns["features"] = pa.array(features, pa.list_(pa.float32()))
    columns["error"] = pa.array([answer["error"] for answer in answers], pa.string())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda file: parquet.write_table(pa.table(columns), file))
