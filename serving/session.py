"""A SavedModel that answers, through TensorFlow's own C++ loader and without `import tensorflow`.

Loading takes well under a second where `import tensorflow` takes five, and errors are the ones that
TF Serving gives. Used to verify an export and to answer with it afterwards.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import numpy as np

from serving.runtime import (
    DTYPES,
    Buffer,
    Output,
    SessionError,
    checked_status,
    import_protos,
    input_array,
    load_library,
    load_text_ops,
    to_array,
    to_tensor,
    uses_text_ops,
)

SERVE_TAG = "serve"
INIT_SIGNATURE = "__saved_model_init_op"  # written by TensorFlow into every SavedModel; not for callers


class Session:
    """A loaded SavedModel: `run` answers a signature.

    `signatures` is {name: {"inputs": {name: (dtype, shape)}, "outputs": {...}}}: dtype a name such as
    "float32" or "string", shape a tuple with None for unknown dimensions, or None for an unknown rank.
    `run` may be called from several threads at once. Close it, or use it in a `with` statement.
    """

    def __init__(self, folder):
        """Load the version folder `folder`: graph, variables, assets, init op.

        Raises SessionError with the runtime's own message where the loader refuses it.
        """
        self.folder = Path(folder)
        if not (self.folder / "saved_model.pb").is_file():
            raise SessionError(
                f"{folder}: no saved_model.pb in it. Expected the folder of a version, such as serving/NAME/1",
                "NOT_FOUND",
            )
        self._library = library = load_library()
        if uses_text_ops((self.folder / "saved_model.pb").read_bytes()):
            load_text_ops()
        self._condition = threading.Condition()
        self._running = 0  # calls of `run` in progress; `close` waits for them
        self._session = None
        self._graph = library.TF_NewGraph()
        options, metagraph = library.TF_NewSessionOptions(), library.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(SERVE_TAG.encode())
        path = os.fsencode(self.folder)
        try:
            with checked_status(library, str(folder)) as status:
                self._session = library.TF_LoadSessionFromSavedModel(
                    options, None, path, tags, 1, self._graph, metagraph, status
                )
            buffer = Buffer.from_address(metagraph)
            self._read_signatures(ctypes.string_at(buffer.data, buffer.length))
        except BaseException:
            self.close()
            raise
        finally:
            library.TF_DeleteSessionOptions(options)
            library.TF_DeleteBuffer(metagraph)

    def run(self, signature: str, inputs: dict, timeout_seconds: float | None = None) -> dict[str, np.ndarray]:
        """Answer one signature: {input name: array, or list of bytes} -> {output name: array}.

        Strings are bytes, in lists or object arrays, and come back as object arrays of bytes. Arrays
        must have the signature's dtype: as in the server nothing is cast. Plain lists of numbers are
        converted. Raises SessionError for unknown names, wrong dtypes and whatever the runtime refuses, and
        with the code DEADLINE_EXCEEDED where it took longer than `timeout_seconds`; then it has been stopped.
        """
        if signature not in self.signatures:
            known = ", ".join(sorted(self.signatures))
            raise SessionError(f"{self.folder}: no signature {signature!r}. Expected one of: {known}")
        expected = self.signatures[signature]["inputs"]
        what = f"{self.folder}: signature {signature}"
        if set(inputs) != set(expected):
            raise SessionError(f"{what}: got the inputs {sorted(inputs)}, expected {sorted(expected)}")
        arrays = [input_array(value, *expected[name], f"{what}: input {name}") for name, value in inputs.items()]
        with self._condition:
            session = self._session
            if session is None:
                raise SessionError(f"{self.folder}: this session is closed")
            self._running += 1
        try:
            return self._run(session, signature, list(inputs), arrays, timeout_seconds)
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def close(self) -> None:
        """Free the model once the runs in progress have ended. Closing twice is allowed."""
        with self._condition:
            session, graph = self._session, self._graph
            self._session = self._graph = None
            self._condition.wait_for(lambda: self._running == 0)
        if session is not None:
            with checked_status(self._library, str(self.folder)) as status:
                self._library.TF_CloseSession(session, status)
            with checked_status(self._library, str(self.folder)) as status:
                self._library.TF_DeleteSession(session, status)
        if graph is not None:
            self._library.TF_DeleteGraph(graph)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _read_signatures(self, content: bytes) -> None:
        """Fill `signatures`, and where in the graph each of their tensors lies."""
        (meta_graph_pb2,) = import_protos("tensorflow.core.protobuf.meta_graph_pb2")
        metagraph = meta_graph_pb2.MetaGraphDef.FromString(content)
        self.signatures, self._places = {}, {}
        for name, signature in metagraph.signature_def.items():
            if name == INIT_SIGNATURE:
                continue
            self.signatures[name] = {"inputs": {}, "outputs": {}}
            for side, described in self.signatures[name].items():
                for key, info in getattr(signature, side).items():
                    described[key] = describe_tensor(info)
                    self._places[name, side, key] = self._place(f"signature {name}: {key}", info.name)

    def _place(self, what: str, tensor: str) -> Output:
        operation, _, index = tensor.partition(":")
        found = self._library.TF_GraphOperationByName(self._graph, operation.encode())
        if not found or int(index or 0) >= self._library.TF_OperationNumOutputs(found):
            raise SessionError(f"{self.folder}: {what}: the graph has no tensor {tensor!r}. Export the model again")
        return Output(found, int(index or 0))

    def _run(self, session, signature, input_names, arrays, timeout_seconds) -> dict[str, np.ndarray]:
        library, options = self._library, None
        names = list(self.signatures[signature]["outputs"])
        feeds = [self._places[signature, "inputs", name] for name in input_names]
        fetches = [self._places[signature, "outputs", name] for name in names]
        tensors = (ctypes.c_void_p * len(feeds))()
        results = (ctypes.c_void_p * len(fetches))()
        try:
            if timeout_seconds is not None:
                options = new_run_options(library, timeout_seconds)
            for index, array in enumerate(arrays):
                tensors[index] = to_tensor(library, array)
            with checked_status(library, f"{self.folder}: signature {signature}") as status:
                library.TF_SessionRun(
                    session,
                    options,
                    (Output * len(feeds))(*feeds),
                    tensors,
                    len(feeds),
                    (Output * len(fetches))(*fetches),
                    results,
                    len(fetches),
                    None,
                    0,
                    None,
                    status,
                )
            return {
                name: to_array(library, result, f"{self.folder}: signature {signature}: output {name}")
                for name, result in zip(names, results, strict=True)
            }
        finally:
            for tensor in filter(None, (*tensors, *results)):
                library.TF_DeleteTensor(tensor)
            if options is not None:
                library.TF_DeleteBuffer(options)


def new_run_options(library, timeout_seconds: float) -> int:
    """A TF_Buffer with RunOptions for one run; at least a millisecond, for 0 would mean no limit."""
    (config_pb2,) = import_protos("tensorflow.core.protobuf.config_pb2")
    milliseconds = max(1, min(int(timeout_seconds * 1000), 2**62))
    content = config_pb2.RunOptions(timeout_in_ms=milliseconds).SerializeToString()
    return library.TF_NewBufferFromString(content, len(content))


def describe_tensor(info) -> tuple[str, tuple | None]:
    """A TensorInfo proto -> (dtype name, shape with None for unknown, or None for an unknown rank)."""
    names = info.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number
    known = DTYPES.get(info.dtype)
    dtype = known.name if known else names[info.dtype].name.removeprefix("DT_").lower()
    if info.tensor_shape.unknown_rank:
        return dtype, None
    return dtype, tuple(None if d.size < 0 else d.size for d in info.tensor_shape.dim)
