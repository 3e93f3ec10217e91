"""What the files of a SavedModel alone say: the first two steps of `serving/verify.py`; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from models import GraftError
from serving.runtime import import_protos
from serving.session import INIT_SIGNATURE, SERVE_TAG, describe_tensor

# Ops of TensorFlow core and of TF-Text as linked into the stock server of each release, one name a line.
OP_LISTS = {"2.20": ("2.20.0.txt", "text_2.20.0.txt"), "2.19": ("2.19.1.txt", "text_2.12.1.txt")}
OLDER_TARGET = "2.19"  # not required; what it lacks is reported
VARIABLE_OPS = {"VarHandleOp", "VariableV2", "Variable"}
PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
# What the server's REST interface can carry (tensorflow_serving/util/json_tensor.cc).
EDGE_DTYPES = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"}
EDGE_DTYPES |= {"bool", "string"}


class CheckFailed(Exception):
    """One check's finding: the item, what it is, what was expected."""


def check_layout(folder):
    """Return (graph proto, {signature: proto}) of a version folder that TF Serving can load and batch."""
    graph, signatures = read_metagraph(Path(folder))
    nodes = {node.name: node for node in graph.node}
    if VARIABLE_OPS & {node.op for node in graph.node}:
        check_variable_files(Path(folder) / "variables")
    for name, signature in signatures.items():
        if not signature.inputs or not signature.outputs:
            raise CheckFailed(f"signature {name}: has no inputs or no outputs, expected both")
        for side, tensors in (("input", signature.inputs), ("output", signature.outputs)):
            for key, info in tensors.items():
                check_edge(f"signature {name}, {side} {key}", info, nodes)
    for where, node in all_nodes(graph):
        if node.op in PYTHON_OPS:
            raise CheckFailed(
                f"{where}, node {node.name}: {node.op} calls Python, which the server does not have. "
                f"Use TensorFlow ops instead of tf.py_function and tf.numpy_function"
            )
    for where, attributes in all_attributes(graph):
        if "_XlaMustCompile" in attributes and attributes["_XlaMustCompile"].b:
            raise CheckFailed(
                f"{where}: must be compiled by XLA (_XlaMustCompile), which is off in the stock server. "
                f"Export without jit_compile=True"
            )
    return graph, signatures


def read_metagraph(folder: Path):
    """The graph and the signatures of the one metagraph in saved_model.pb."""
    file = folder / "saved_model.pb"
    if not file.is_file():
        raise CheckFailed(f"{file}: missing. Expected the folder of one version, such as serving/NAME/1")
    (saved_model_pb2,) = import_protos("tensorflow.core.protobuf.saved_model_pb2")
    try:
        metagraphs = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs
    except Exception as error:  # DecodeError, of whichever protobuf runtime is installed
        raise CheckFailed(f"{file}: cannot be parsed ({error}). Copy or export it again") from error
    tags = [sorted(metagraph.meta_info_def.tags) for metagraph in metagraphs]
    if tags != [[SERVE_TAG]]:
        raise CheckFailed(f"{file}: metagraphs tagged {tags}, expected one, tagged [{SERVE_TAG!r}]")
    signatures = {name: signature for name, signature in metagraphs[0].signature_def.items() if name != INIT_SIGNATURE}
    if "serving_default" not in signatures:
        raise CheckFailed(f"{file}: signatures {sorted(signatures)}, expected one named serving_default")
    return metagraphs[0].graph_def, signatures


def check_variable_files(folder: Path) -> None:
    """The index of the variables and every data file that belongs to it."""
    index = folder / "variables.index"
    # The server restores only what this file lists. Without it the load succeeds and requests fail.
    if not index.is_file():
        raise CheckFailed(f"{index}: missing, and the graph has variables. Copy the whole folder")
    counts = [re.fullmatch(r"variables\.data-\d{5}-of-(\d{5})", file.name) for file in folder.iterdir()]
    count = max((int(match[1]) for match in counts if match), default=1)  # each name says how many there are
    for number in range(count):
        data = folder / f"variables.data-{number:05}-of-{count:05}"
        if not data.is_file():
            raise CheckFailed(f"{data}: missing, and the graph has variables. Copy the whole folder")


def check_edge(what: str, info, nodes: dict) -> None:
    """One input or output: a plain tensor of the graph, of a dtype the server carries, any number of rows."""
    if info.WhichOneof("encoding") != "name":
        raise CheckFailed(f"{what}: a sparse or composite tensor, expected a dense one")
    if info.name.partition(":")[0] not in nodes:
        raise CheckFailed(f"{what}: the graph has no tensor {info.name}. Export the model again")
    dtype, shape = describe_tensor(info)
    if dtype not in EDGE_DTYPES:
        raise CheckFailed(f"{what}: {dtype}, which the server's REST interface cannot carry. Cast it, say to float32")
    if not shape or shape[0] is not None:
        found = "unknown" if shape is None else list(shape)
        raise CheckFailed(f"{what}: shape {found}, expected the first dimension free (None): it is the batch")


def check_ops(graph, target: str) -> tuple[list[str], list[str]]:
    """Return (ops of the graph, those that the older server lacks); raises CheckFailed for the target's."""
    linked, linked_in_older = read_op_list(target), read_op_list(OLDER_TARGET)
    functions = {function.signature.name for function in graph.library.function}
    places = {}  # op -> where it occurs first
    for where, node in all_nodes(graph):
        if node.op not in functions:
            places.setdefault(node.op, f"{where}, node {node.name}")
    missing = sorted(set(places) - linked)
    if missing:
        listed = "; ".join(f"{op} ({places[op]})" for op in missing)
        raise CheckFailed(f"ops that TF Serving {target} lacks: {listed}. Compute it in another way")
    return sorted(places), sorted(set(places) - linked_in_older)


def read_op_list(target: str) -> set[str]:
    """Names of the ops in the stock server of `target`, a release such as "2.20"."""
    if target not in OP_LISTS:
        raise GraftError(f"target {target!r}: no list of its ops. Known: {', '.join(OP_LISTS)}")
    folder = Path(__file__).parent / "ops"
    return {op for file in OP_LISTS[target] for op in (folder / file).read_text().split()}


def all_nodes(graph) -> Iterator:
    """(where, node) of the graph and of every function: the server checks functions only when they run."""
    for node in graph.node:
        yield "graph", node
    for function in graph.library.function:
        for node in function.node_def:
            yield f"function {function.signature.name}", node


def all_attributes(graph) -> Iterator:
    """(where, attributes) of every node and function."""
    for where, node in all_nodes(graph):
        yield f"{where}, node {node.name}", node.attr
    for function in graph.library.function:
        yield f"function {function.signature.name}", function.attr
