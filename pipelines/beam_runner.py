"""Whether Apache Beam can be used as asked; everything here works without it."""

from __future__ import annotations

import importlib.util

from models import GraftError


def check_beam(runner: str, flags: list[str]) -> None:
    """Raise GraftError where Beam is not installed, or flags are neither Graft's nor Beam's."""
    if importlib.util.find_spec("apache_beam") is None:
        raise GraftError(
            f"--runner {runner} needs Apache Beam, which is not installed. From Graft's folder, and best in an "
            f"environment of its own, since Beam holds protobuf and pyarrow back: "
            f"pip install -e '.[beam]' -c constraints-beam.txt. Without --runner the same job runs in this process."
        )
    from pipelines.beam_batch import unknown_flags

    unknown = unknown_flags(flags)
    if unknown:
        raise GraftError(f"{' '.join(unknown)}: neither a flag of Graft's nor of Beam's. See graft predict --help.")
