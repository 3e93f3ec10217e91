"""Which versions of which models answer: loading, hot swap and unloading, as TF Serving does it.

`poll` looks at the models' folders. A new version is loaded whole before it answers anything; the one it
replaces answers until then, finishes the requests that it has begun, and is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.config import chosen_versions
from serving.runtime import SessionError, import_protos
from serving.session import Session
from serving.warmup import WARMUP_FILE, read_requests, replay_requests

DEFAULT_SIGNATURE = "serving_default"
TIMED_OUT = "Timed out waiting for notification"  # what the runtime says
NO_NAME = "ModelSpec has no name specified."


class RequestError(Exception):
    """What a request gets instead of an answer: the name of a gRPC status code, and a message."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


@dataclass
class Version:
    """One version of a model; `state` is that of the server's ModelVersionStatus."""

    state: str = "START"
    error: tuple[str, str] = ("OK", "")  # code and message of a load that failed
    session: Session | None = None
    signature_defs: dict | None = None  # {name: SignatureDef proto}, with the one for TensorFlow's own init op
    run: Callable | None = None  # as Session.run
    stop: Callable | None = None  # ends the threads behind `run`
    users: int = 0  # requests in progress
    attempts: int = 0
    retry_at: float = 0.0  # time.monotonic() before which a failed load is not tried again


class ModelsTable:
    """The versions of all models. Safe to use from several threads; only one may call `poll`."""

    def __init__(self, models, batching=None, retries: int = 5, retry_seconds: float = 60.0):
        """models: ModelConfig protos. batching(session) -> (run, stop) joins requests; None: each runs alone."""
        self._models = list(models)
        self._batching, self._retries, self._retry_seconds = batching, retries, retry_seconds
        self._changed = threading.Condition()
        self._versions: dict[str, dict[int, Version]] = {model.name: {} for model in self._models}
        self._labels: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def acquire(self, name: str, number: int | None = None, label: str | None = None):
        """Yield (number, Version) that answers a request: the named one, or the newest that is loaded.

        It is not freed meanwhile. Raises RequestError, with the real server's words, where there is none.
        """
        with self._changed:
            number, version = self._find(name, number, label)
            version.users += 1
        try:
            yield number, version
        finally:
            with self._changed:
                version.users -= 1
                self._changed.notify_all()

    def _find(self, name, number, label) -> tuple[int, Version]:
        if not name:
            raise RequestError("INVALID_ARGUMENT", NO_NAME)
        if label is not None:
            number = self._labels.get(name, {}).get(label)
            if number is None:
                raise RequestError("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
        answering = {at: one for at, one in self._versions.get(name, {}).items() if one.state == "AVAILABLE"}
        if number is None and answering:
            number = max(answering)
        if number not in answering:
            wanted = f"Latest({name})" if number is None else f"Specific({name}, {number})"
            raise RequestError("NOT_FOUND", f"Servable not found for request: {wanted}")
        return number, answering[number]

    def status(self, name: str, number: int | None = None) -> list[tuple[int, str, tuple[str, str]]]:
        """(number, state, (code, message)) of a model's versions, newest first; raises RequestError for none."""
        with self._changed:
            known = self._versions.get(name, {})
            if number is not None and number not in known:
                raise RequestError("NOT_FOUND", f"Could not find version {number} of model {name}")
            if not known:
                raise RequestError("NOT_FOUND", f"Could not find any versions of model {name}")
            numbers = sorted(known, reverse=True) if number is None else [number]
            return [(at, known[at].state, known[at].error) for at in numbers]

    def knows(self, name: str) -> bool:
        """Whether a model of this name is configured."""
        return name in self._versions

    def names(self) -> list[str]:
        """The configured models, in their order."""
        return [model.name for model in self._models]

    def configure(self, models) -> None:
        """Serve what these ModelConfig protos say, from the next `poll` on."""
        with self._changed:
            self._models = list(models)
            for model in self._models:
                self._versions.setdefault(model.name, {})

    def poll(self) -> None:
        """Load what the folders have gained, then free what is no longer wanted."""
        configured = {model.name for model in self._models}
        for model in self._models:
            folders = version_folders(model.base_path)
            wanted = chosen_versions(model, list(folders))
            for number in sorted(wanted):
                self._load_if_due(model.name, number, folders[number])
            states = {number: version.state for number, version in self._versions[model.name].items()}
            self._move_labels(model, states)
            # The last version stays until another one answers in its place.
            if any(states.get(number) == "AVAILABLE" for number in wanted):
                for number in states.keys() - wanted:
                    self._unload(model.name, number)
        for name in self._versions.keys() - configured:
            for number in list(self._versions[name]):
                self._unload(name, number)

    def missing(self) -> list[str]:
        """Models of which no version answers."""
        with self._changed:
            return [
                model.name
                for model in self._models
                if not any(version.state == "AVAILABLE" for version in self._versions[model.name].values())
            ]

    def problems(self, given_up: bool = False) -> list[str]:
        """What went wrong with versions that could not be loaded, or only with those that are not tried again."""
        with self._changed:
            return [
                f"version {number} of model {name}: {version.error[1]}"
                for name, versions in self._versions.items()
                for number, version in versions.items()
                if version.error[0] != "OK" and (version.state == "END" or not given_up)
            ]

    def close(self) -> None:
        """Free every version once the requests in progress have ended."""
        for name, versions in self._versions.items():
            for number in list(versions):
                self._unload(name, number)

    def _move_labels(self, model, states) -> None:
        """A label moves only to a version that answers, as in the server; until then it stays where it is."""
        with self._changed:
            labels = self._labels.get(model.name, {})
            wanted = model.version_labels
            moved = {label: at for label, at in wanted.items() if states.get(at) == "AVAILABLE"}
            self._labels[model.name] = {label: at for label, at in labels.items() if label in wanted} | moved

    def _load_if_due(self, name: str, number: int, folder: Path) -> None:
        """Load a version that is new, was unloaded, or failed and may be tried again; a failure is kept in it."""
        version = self._versions[name].get(number)
        if version is not None:
            waits = version.state == "LOADING" and time.monotonic() >= version.retry_at
            if not waits and (version.state != "END" or version.error[0] != "OK"):
                return
        if version is None or version.state == "END":
            version = Version()
        with self._changed:
            version.state = "LOADING"
            self._versions[name][number] = version
        try:
            session = warm_session(folder)
            signature_defs = read_signature_defs(folder)
            run, stop = self._batching(session) if self._batching else (session.run, None)
        except Exception as error:  # whatever is wrong with one version: the others go on
            with self._changed:
                version.attempts += 1
                version.retry_at = time.monotonic() + self._retry_seconds
                version.error = (getattr(error, "code", "UNKNOWN"), str(error))
                if version.attempts > self._retries:
                    version.state = "END"  # for good: the same files would fail again
            return
        trim_memory()
        with self._changed:
            version.session, version.signature_defs, version.run, version.stop = session, signature_defs, run, stop
            version.state, version.error, version.attempts = "AVAILABLE", ("OK", ""), 0

    def _unload(self, name: str, number: int) -> None:
        with self._changed:
            version = self._versions[name][number]
            if version.state != "AVAILABLE":
                return
            version.state = "UNLOADING"  # gets no more requests
            self._changed.wait_for(lambda: version.users == 0)
        if version.stop is not None:
            version.stop()
        version.session.close()
        trim_memory()
        with self._changed:
            version.session = version.signature_defs = version.run = version.stop = None
            version.state = "END"


def run_signature(version: Version, signature: str, inputs: dict, deadline: float | None = None) -> dict:
    """Run until `deadline` (time.monotonic(); None: to the end), with the runtime's own message as RequestError."""
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        raise RequestError("DEADLINE_EXCEEDED", TIMED_OUT)  # nobody waits for the answer any more
    try:
        return version.run(signature, inputs, remaining)
    except SessionError as error:
        # The session says where; a client of the server gets only what the runtime said.
        message = str(error).removeprefix(f"{version.session.folder}: signature {signature}: ")
        raise RequestError(error.code, message) from error


def refuse_examples(signature_def, method: str) -> RequestError:
    """What Classify or Regress get, whose requests hold tf.Example, from a signature (classifier.cc, regressor.cc).

    The signatures of Graft's models are not for them, and the real server says why. Those that are go unanswered.
    """
    outputs = signature_def.outputs
    classify, kind = method == "classify", "classification" if method == "classify" else "regression"
    if len(signature_def.inputs) != 1:
        message = "Expected one input Tensor."
    elif classify and len(outputs) not in (1, 2):
        message = f"Expected one or two output Tensors, found {len(outputs)}"
    elif not classify and len(outputs) != 1:
        message = "Expected one output Tensor."
    elif "inputs" not in signature_def.inputs:
        message = f"No {kind} inputs found in SignatureDef: {signature_def}"
    elif classify and not {"classes", "scores"} & set(outputs):
        message = (
            'Expected classification signature outputs to contain at least one of "classes" or "scores". '
            f"Signature was: {signature_def}"
        )
    elif not classify and "outputs" not in outputs:
        message = f"No regression outputs found in SignatureDef: {signature_def}"
    else:
        return RequestError("UNIMPLEMENTED", f"{method}: the embedded server only answers predict")
    return RequestError("INVALID_ARGUMENT", message)


def trim_memory() -> None:
    """Give back to the system what loading and unloading have freed: glibc keeps it, hundreds of megabytes."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def warm_session(folder: Path) -> Session:
    """The session of a version that has answered its warm-up requests, if it has some, as in the server."""
    session, file = Session(folder), folder / WARMUP_FILE
    try:
        replay_requests(session, read_requests(file) if file.is_file() else [])
    except Exception:
        session.close()
        raise
    return session


def version_folders(base_path) -> dict[int, Path]:
    """{number: folder} of the version folders in a model's folder; other names are ignored, as in the server."""
    try:
        names = sorted(os.listdir(base_path))
    except OSError:
        return {}  # not there yet: the server waits for it
    numbers = {int(name): Path(base_path) / name for name in names if name.isascii() and name.isdecimal()}
    return {number: folder for number, folder in numbers.items() if number < 2**63}


def read_signature_defs(folder) -> dict:
    """{name: SignatureDef proto} of a version folder, as they were written."""
    (saved_model_pb2,) = import_protos("tensorflow.core.protobuf.saved_model_pb2")
    content = (Path(folder) / "saved_model.pb").read_bytes()
    (metagraph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    defs = {}
    for name, signature in metagraph.signature_def.items():
        defs[name] = type(signature)()
        defs[name].CopyFrom(signature)  # so that the graph is not kept in memory with it
    return defs
