"""TensorFlow's C library through ctypes, and its protobuf classes, without `import tensorflow`.

TF Serving loads models with TensorFlow's C++ loader. The same code lies in every TensorFlow wheel and
exports a C API (tensorflow/c/c_api.h): `serving/session.py` is written in terms of what is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
import types
from pathlib import Path

import numpy as np

from models import GraftError

_STRING = 7  # TF_STRING
_STRING_BYTES = 24  # size of a TF_TString, opaque: touched only through the TF_String* functions
DTYPES = {  # TF_DataType (tensorflow/c/tf_datatype.h, equal to the DataType of the protos) -> numpy
    1: np.dtype("float32"),
    2: np.dtype("float64"),
    3: np.dtype("int32"),
    4: np.dtype("uint8"),
    5: np.dtype("int16"),
    6: np.dtype("int8"),
    9: np.dtype("int64"),
    10: np.dtype("bool"),
    19: np.dtype("float16"),
    22: np.dtype("uint32"),
    23: np.dtype("uint64"),
}

_LIBRARY_FILES = {"linux": "libtensorflow_cc.so.2", "darwin": "libtensorflow_cc.2.dylib"}
_FUNCTIONS = {  # name -> result, then arguments; letters as in _TYPES
    "TF_NewStatus": "p",
    "TF_DeleteStatus": "-p",
    "TF_GetCode": "ip",
    "TF_Message": "tp",
    "TF_NewBuffer": "p",
    "TF_NewBufferFromString": "pts",
    "TF_DeleteBuffer": "-p",
    "TF_NewGraph": "p",
    "TF_DeleteGraph": "-p",
    "TF_LoadLibrary": "ptp",
    "TF_GraphOperationByName": "ppt",
    "TF_OperationNumOutputs": "ip",
    "TF_NewSessionOptions": "p",
    "TF_DeleteSessionOptions": "-p",
    "TF_LoadSessionFromSavedModel": "ppptpippp",
    "TF_CloseSession": "-pp",
    "TF_DeleteSession": "-pp",
    "TF_SessionRun": "-ppppippipipp",
    "TF_AllocateTensor": "pipis",
    "TF_NewTensor": "pipipspp",
    "TF_DeleteTensor": "-p",
    "TF_TensorType": "ip",
    "TF_NumDims": "ip",
    "TF_Dim": "lpi",
    "TF_TensorData": "pp",
    "TF_StringInit": "-p",
    "TF_StringCopy": "-pts",
    "TF_StringGetDataPointer": "pp",
    "TF_StringGetSize": "sp",
    "TF_StringDealloc": "-p",
    # tensorflow::DisableXlaCompilation() of compiler/jit/flags.h; C++, hence the mangled name.
    "_ZN10tensorflow21DisableXlaCompilationEv": "-",
}
_TYPES = {
    "-": None,
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "s": ctypes.c_size_t,
    "t": ctypes.c_char_p,
}


STATUS_CODES = (  # TF_Code (tensorflow/c/tf_status.h) -> name, the same as in gRPC
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


class SessionError(GraftError):
    """The runtime refused a model or a request; the message holds TensorFlow's own, `code` is one of STATUS_CODES."""

    def __init__(self, message: str, code: str = "INVALID_ARGUMENT"):
        super().__init__(message)
        self.code = code


class Buffer(ctypes.Structure):  # TF_Buffer
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p)]


class Output(ctypes.Structure):  # TF_Output: one output of one operation of the graph
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


_import_lock = threading.Lock()


@functools.cache
def import_protos(*names: str) -> list[types.ModuleType]:
    """Import modules of generated protobuf classes that live inside the tensorflow package.

    Importing `tensorflow.core.protobuf.x_pb2` would run `tensorflow/__init__.py`, all of TensorFlow. So
    where it is not imported yet, the bare package, not executed, stands in for it meanwhile.
    Afterwards everything named tensorflow leaves `sys.modules`, and `import tensorflow` is itself again.
    """
    with _import_lock:
        if "tensorflow" in sys.modules:
            return [importlib.import_module(name) for name in names]
        sys.modules["tensorflow"] = importlib.util.module_from_spec(_tensorflow_spec())
        try:
            return [importlib.import_module(name) for name in names]
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow"]:
                del sys.modules[name]


def _tensorflow_spec():
    """Where the installed tensorflow package lies; nothing of it is imported."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or spec.origin is None:
        raise SessionError(f"no package named tensorflow in {sys.path}. Install it: pip install tensorflow")
    return spec


@functools.cache
def load_library() -> ctypes.CDLL:
    """TensorFlow's C library with its prototypes set."""
    file = _LIBRARY_FILES.get(sys.platform)
    if file is None:
        raise SessionError(
            f"{sys.platform}: no TensorFlow C library is known for it, only for {sorted(_LIBRARY_FILES)}"
        )
    path = Path(_tensorflow_spec().origin).parent / file  # it finds its framework library beside itself
    if not path.is_file():
        raise SessionError(f"{path}: not there, and the C library is needed. Install tensorflow 2.19 to 2.21")
    # TensorFlow's log would only repeat what is raised as SessionError; set the variable to 0 to see it.
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") != "0"
    # RTLD_LOCAL, as TensorFlow itself asks for: a later `import tensorflow` finds this same copy loaded,
    # and the SSL code linked into it stays out of the way of Python's own.
    with _silent_stderr() if quiet else contextlib.nullcontext():
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    for name, letters in _FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise SessionError(f"{path}: exports no {name}. TensorFlow 2.19 to 2.21 are known to")
        result, *arguments = (_TYPES[letter] for letter in letters)
        function.restype, function.argtypes = result, arguments
    if "tensorflow" not in sys.modules:
        # As in the stock server (tensorflow_serving/model_servers/main.cc). The switch is process-wide, so
        # it stays as it is where TensorFlow is imported: training there may well compile with XLA.
        library._ZN10tensorflow21DisableXlaCompilationEv()
    return library


@functools.cache
def load_text_ops() -> None:
    """Register TF-Text's ops, which are linked into the stock server, from the libraries of its wheel.

    Raises SessionError where it is not installed. Loading them again in a process that has imported
    tensorflow_text is allowed.
    """
    library = load_library()
    spec = importlib.util.find_spec("tensorflow_text")
    if spec is None or spec.origin is None:
        raise SessionError("the model uses ops of TF-Text, which is not installed: pip install tensorflow-text")
    for path in sorted((Path(spec.origin).parent / "python" / "ops").glob("_*.so")):
        with checked_status(library, str(path)) as status:
            library.TF_LoadLibrary(os.fsencode(path), status)


def uses_text_ops(graph: bytes) -> bool:
    """Whether a serialized saved_model.pb names an op of TF-Text; one look at its bytes, nothing is parsed."""
    names = (Path(__file__).parent / "ops" / "text_2.20.0.txt").read_bytes().split()
    return any(name in graph for name in names)


@contextlib.contextmanager
def _silent_stderr():
    """While the library is loaded: its start-up code prints three lines that no log level stops."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed: nothing to silence
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def checked_status(library, what: str):
    """A TF_Status for one call; raises SessionError with its message afterwards."""
    status = library.TF_NewStatus()
    try:
        yield status
        code = library.TF_GetCode(status)
        if code != 0:
            name = STATUS_CODES[code] if code < len(STATUS_CODES) else "UNKNOWN"
            raise SessionError(f"{what}: {library.TF_Message(status).decode(errors='replace')}", name)
    finally:
        library.TF_DeleteStatus(status)


def input_array(value, dtype: str, shape, what: str) -> np.ndarray:
    """An input as an array of the signature's dtype, or an error that says what it was."""
    expected = f"{dtype} {'of any shape' if shape is None else list(shape)}"
    if dtype == "string":
        if isinstance(value, np.ndarray) and value.dtype.kind == "S":
            raise SessionError(
                f"{what}: got fixed-width strings, which lose trailing zero bytes; expected a list of bytes"
            )
        array = np.asarray(value, dtype=object)
        for item in array.flat:
            if not isinstance(item, bytes):
                raise SessionError(f"{what}: got {type(item).__name__} {item!r:.40}, expected bytes")
        return array
    if dtype not in {known.name for known in DTYPES.values()}:
        raise SessionError(f"{what}: the signature takes {expected}, which numpy does not have")
    array = np.asarray(value)
    if isinstance(value, np.ndarray) and array.dtype.name != dtype:
        raise SessionError(f"{what}: got an array of {array.dtype}, expected {expected}")
    fractions_lost = array.dtype.kind == "f" and np.dtype(dtype).kind != "f"
    if array.size and (fractions_lost or array.dtype.kind not in "biuf"):
        raise SessionError(f"{what}: got a list of {array.dtype}, expected {expected}")
    try:
        return np.array(value, dtype, order="C")
    except OverflowError as error:
        raise SessionError(f"{what}: {error}; expected {expected}") from error


_string_memory: dict[int, ctypes.Array] = {}  # address -> memory of a string tensor still in TensorFlow's use


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
def _free_strings(data, length, argument):
    """Called by TensorFlow when nothing refers to a string tensor of ours any more."""
    for address in range(data, data + length, _STRING_BYTES):
        load_library().TF_StringDealloc(address)
    del _string_memory[data]


def to_tensor(library, array: np.ndarray) -> int:
    """A new TF_Tensor with a copy of `array`."""
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    if array.dtype != object:
        code = next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
        tensor = library.TF_AllocateTensor(code, shape, array.ndim, array.nbytes)
        ctypes.memmove(library.TF_TensorData(tensor), array.ctypes.data, array.nbytes)
        return tensor
    length = array.size * _STRING_BYTES
    memory = ctypes.create_string_buffer(max(length, 1))
    address = ctypes.addressof(memory)
    _string_memory[address] = memory
    for index, item in enumerate(array.flat):
        place = address + index * _STRING_BYTES
        library.TF_StringInit(place)
        library.TF_StringCopy(place, item, len(item))
    return library.TF_NewTensor(_STRING, shape, array.ndim, address, length, _free_strings, None)


def to_array(library, tensor: int, what: str) -> np.ndarray:
    """A copy of a TF_Tensor as an array; strings as an object array of bytes."""
    shape = tuple(library.TF_Dim(tensor, axis) for axis in range(library.TF_NumDims(tensor)))
    data, code = library.TF_TensorData(tensor), library.TF_TensorType(tensor)
    if code == _STRING:
        array = np.empty(shape, dtype=object)
        for index in range(array.size):
            place = data + index * _STRING_BYTES
            size = library.TF_StringGetSize(place)
            array.flat[index] = ctypes.string_at(library.TF_StringGetDataPointer(place), size)
        return array
    if code not in DTYPES:
        raise SessionError(f"{what}: its dtype (TF_DataType {code}) has no numpy equivalent. Cast it in the signature")
    array = np.empty(shape, DTYPES[code])
    if array.nbytes:
        ctypes.memmove(array.ctypes.data, data, array.nbytes)
    return array
