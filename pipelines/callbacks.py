"""Keras callbacks that observe a phase, and who tells them: the progress bar, and logs for TensorBoard."""

from __future__ import annotations

import contextlib
import pathlib

import keras

from pipelines.console import console, progress_bar


@contextlib.contextmanager
def observed(model, callbacks, epochs: int, steps: int, done: tuple[int, int]):
    """Around a phase: its callbacks as one, to be told of epochs and steps; done: those of earlier processes."""
    model.stop_training = False
    observers = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=epochs, steps=steps, done=done)
    observers.on_train_begin()
    try:
        yield observers
    finally:  # after Ctrl-C too: the progress bar gives the terminal back
        observers.on_train_end()


class ProgressPrinter(keras.callbacks.Callback):
    """A bar over the batches of a phase, and a line per epoch."""

    def on_train_begin(self, logs=None):
        self.bar = progress_bar()
        self.bar.start()
        total = self.params["epochs"] * self.params["steps"]
        self.epochs_done, steps_done = self.params.get("done", (0, 0))  # by an earlier process
        done = self.epochs_done * self.params["steps"] + steps_done
        self.task = self.bar.add_task("training", total=total, completed=done, note="")

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update(self.task, advance=1, note=f"loss {logs['loss']:.3f}  accuracy {logs['accuracy']:.3f}")

    def on_epoch_end(self, epoch, logs=None):
        self.epochs_done += 1
        likeness = f"   CKA {logs['cka']:.2f}" if "cka" in logs else ""  # of the features to the pretrained ones
        console.print(
            f"  epoch {self.epochs_done:>2}/{self.params['epochs']}"
            f"   loss {logs['loss']:.3f}   accuracy {logs['accuracy']:.3f}"
            f"   validation loss {logs['val_loss']:.3f}   accuracy {logs['val_accuracy']:.3f}{likeness}"
        )

    def on_train_end(self, logs=None):
        self.bar.stop()


def tensorboard(run_dir: pathlib.Path) -> keras.callbacks.TensorBoard:
    """Logs in RUN/tensorboard; the phases share one axis of epochs."""
    return keras.callbacks.TensorBoard(str(run_dir / "tensorboard"), write_graph=False)
