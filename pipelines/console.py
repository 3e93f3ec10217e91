"""What a run prints: one console, progress bars with the time left, the table of what trains."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile

import rich.box
import rich.console
import rich.progress
import rich.table

from pipelines.cluster import is_multi_worker

console = rich.console.Console(highlight=False, soft_wrap=True)

PHASE_TITLES = {
    "head": "Head",
    "fine_tune": "Fine-tuning",
    "light": "Light fine-tuning",
    "full": "Full fine-tuning",
}


def progress_bar() -> rich.progress.Progress:
    """A bar with description, share, rate and time left; gone when it ends, absent where output is no terminal."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(compact=True),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def quiet_stderr():
    """Hold back what C++ writes to stderr; pass it on if the block fails.

    TensorFlow says there, at every start and before its own log level applies, that it found no GPU
    driver and which CPU instructions it uses.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        real = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(real, held.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


def start_tensorflow(seed: int) -> None:
    """Import TensorFlow and Keras without their chatter, let GPUs' memory grow, and seed them."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with console.status("starting TensorFlow"), quiet_stderr():
        import keras
        import tensorflow as tf

        from pipelines.devices import grow_memory

        grow_memory()
        if not is_multi_worker(os.environ):  # a worker's strategy must come before its devices
            tf.config.list_logical_devices()
    keras.utils.set_random_seed(seed)


def print_trainable_table(name: str, rows: list[dict]) -> None:
    """Print the rows of `models.freezing.trainable_table`; the frozen blocks below share a line."""
    table = rich.table.Table(title=f"{PHASE_TITLES[name]}: what trains", box=rich.box.SIMPLE_HEAD, title_justify="left")
    # A terminal of 80 columns holds the names of transformer layers too where nothing is said of BatchNorm.
    norms = any(row["batch_norm"] != "none" for row in rows)
    table.add_column("block", overflow="fold")
    for column in ("parameters", "trainable", "learning rate", *(["BatchNorm"] if norms else [])):
        table.add_column(column, justify="right", no_wrap=True)
    frozen = [row for row in rows if not row["trainable_parameters"]]
    if frozen:
        title = frozen[0]["name"] if len(frozen) == 1 else f"{frozen[0]['name']} to {frozen[-1]['name']}"
        parameters = sum(row["parameters"] for row in frozen)
        cells = title, f"{parameters:,}", "frozen", "", *(["frozen"] if norms else [])
        table.add_row(*cells, style="dim")
    for row in rows:
        if row["trainable_parameters"]:
            table.add_row(
                row["name"],
                f"{row['parameters']:,}",
                f"{row['trainable_parameters']:,}",
                f"{row['learning_rate']:.2e}" if row["learning_rate"] else "L-BFGS",
                *(["" if row["batch_norm"] == "none" else row["batch_norm"]] if norms else []),
            )
    console.print(table)
