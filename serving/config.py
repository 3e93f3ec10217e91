"""The server's own files: models.config with its labels, batching_params.pbtxt, monitoring.config.

Written and read as text-format protos: models.config by the server's own message class, which is loaded without
TensorFlow. The package tensorflow-serving-api has no class for the other two, so they are rebuilt from their fields.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import secrets
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2

from models import GraftError
from serving.runtime import import_protos

MODELS_FILE = "models.config"  # in the folder that holds the models' folders
MONITORING_FILE = "monitoring.config"  # there too
BATCHING_FILE = "batching_params.pbtxt"  # in a version's folder, for --enable_per_model_batching_parameters
MAX_BATCH_SIZE = 32  # rows of a batch, and of a request: a larger one is refused
BATCH_SIZES = (1, 2, 4, 8, 16, MAX_BATCH_SIZE)  # that are tried: rows of the warm-up requests, and in verification
BATCH_TIMEOUT_MICROS = 0  # nobody waits for company: what came while all threads were busy is the next batch
MAX_ENQUEUED_BATCHES = 100  # more is refused as unavailable
METRICS_PATH = "/monitoring/prometheus/metrics"  # on the REST port
STABLE = "stable"  # the label of the version that answers
NAME_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
# Of tensorflow_serving/servables/tensorflow/session_bundle_config.proto and
# tensorflow_serving/config/monitoring_config.proto, TF Serving 2.20: field -> number, type.
REBUILT_FIELDS = {
    "BatchingParameters": {
        "max_batch_size": (1, "google.protobuf.Int64Value"),
        "batch_timeout_micros": (2, "google.protobuf.Int64Value"),
        "max_enqueued_batches": (3, "google.protobuf.Int64Value"),
        "num_batch_threads": (4, "google.protobuf.Int64Value"),
        "thread_pool_name": (5, "google.protobuf.StringValue"),
        "allowed_batch_sizes": (6, "repeated int64"),
        "pad_variable_length_inputs": (7, "bool"),
        "enable_large_batch_splitting": (8, "google.protobuf.BoolValue"),
        "max_execution_batch_size": (9, "google.protobuf.Int64Value"),
    },
    "PrometheusConfig": {"enable": (1, "bool"), "path": (2, "string")},
    "MonitoringConfig": {"prometheus_config": (1, "graft.PrometheusConfig")},
}


def check_name(name: str) -> str:
    """A model's name, which is a folder's and part of a URL; raises GraftError for one that cannot be."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise GraftError(
            f"model name {name!r}: it is part of a URL and names a folder. Use letters, digits, - _ and ., "
            f"the first one no dot"
        )
    return name


def batching_parameters(sizes=(), threads: int | None = None):
    """How requests are joined to batches, as the server's proto.

    Args:
        sizes: the only batch sizes to form, increasing; others are filled up to the next one. That suits GPUs, which
            prepare for every size anew; CPUs would only compute the filling. None: any size up to MAX_BATCH_SIZE.
        threads: batches that are computed at a time (None: the server takes as many as the machine has CPUs).

    Raises GraftError for sizes that the server would refuse.
    """
    sizes = list(sizes)
    if sizes and (sizes != sorted(set(sizes)) or sizes[0] < 1):
        raise GraftError(f"batch sizes {sizes}: expected increasing numbers from 1 on, such as 1 2 4 8")
    parameters = message("BatchingParameters")
    # The last allowed size, or the server refuses to load.
    parameters.max_batch_size.value = sizes[-1] if sizes else MAX_BATCH_SIZE
    parameters.batch_timeout_micros.value = BATCH_TIMEOUT_MICROS
    parameters.max_enqueued_batches.value = MAX_ENQUEUED_BATCHES
    parameters.allowed_batch_sizes.extend(sizes)
    if threads:
        parameters.num_batch_threads.value = threads
    return parameters


def monitoring_config():
    """Metrics for Prometheus at METRICS_PATH of the REST port, as the server's proto."""
    config = message("MonitoringConfig")
    config.prometheus_config.enable = True
    config.prometheus_config.path = METRICS_PATH
    return config


def find_model(models, name: str):
    """The entry of a model in the proto of models.config; None where it has none."""
    return next((model for model in models.model_config_list.config if model.name == name), None)


def set_labels(models, name: str, base_path: str, labels: dict[str, int]) -> None:
    """Label versions of a model: {label: version}. Other models stay as they are.

    A model that the proto lacks is added, its folder being `base_path`, absolute, as the server sees it; the server
    loads all its versions then. It must: it checks the labels of a new file before it loads what that file asks for
    (ServerCore::ReloadConfig), so that one which names a version and labels it at once is never accepted. A request
    without a label gets the newest version, canary or not: where there are labels, ask by label.
    """
    model = find_model(models, name)
    if model is None:
        if not base_path.startswith("/"):
            raise GraftError(f"base path {base_path!r} of model {name}: the server takes absolute paths only")
        model = models.model_config_list.config.add(name=name, base_path=base_path, model_platform="tensorflow")
        model.model_version_policy.all.SetInParent()
    model.version_labels.clear()
    model.version_labels.update(labels)


def chosen_versions(model, versions: list[int]) -> set[int]:
    """Of `versions` those that the server loads for an entry of models.config; None: for no entry, the newest."""
    policy = None if model is None else model.model_version_policy
    if policy is not None and policy.HasField("specific"):
        return set(policy.specific.versions) & set(versions)
    if policy is not None and policy.HasField("all"):
        return set(versions)
    count = max(policy.latest.num_versions, 1) if policy is not None else 1
    return set(sorted(versions)[-count:])


def labels_of(model) -> dict[str, int]:
    """{label: version} of an entry of models.config; empty for None."""
    return {} if model is None else dict(model.version_labels)


@contextlib.contextmanager
def locked(folder):
    """One writer at a time of the server's files in `folder`, across processes of one machine."""
    with open(Path(folder) / ".config.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_config(path, content) -> None:
    """Write a proto as text, whole or not at all: the server may read it at any moment."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text_format.MessageToString(content, as_utf8=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise GraftError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_config(path, kind: str):
    """Read a text-format file as a message of the server, such as "ModelServerConfig".

    Raises GraftError where the server could not read it either.
    """
    try:
        return text_format.Parse(Path(path).read_text("utf-8"), message(kind))
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise GraftError(f"{path}: cannot be read as the server's {kind} ({error}). Correct or remove it") from error


def read_models(repository):
    """models.config of a repository; an empty one where there is none."""
    path = Path(repository) / MODELS_FILE
    return read_config(path, "ModelServerConfig") if path.exists() else message("ModelServerConfig")


def message(kind: str):
    """A new message of the server's protos, by its name."""
    if kind == "ModelServerConfig":
        (module,) = import_protos("tensorflow_serving.config.model_server_config_pb2")
        return module.ModelServerConfig()
    return rebuilt_messages()[kind]()


@functools.cache
def rebuilt_messages() -> dict:
    """{name: class} of the messages that tensorflow-serving-api leaves out, from REBUILT_FIELDS."""
    file = descriptor_pb2.FileDescriptorProto(name="graft/serving_config.proto", package="graft", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    for kind, fields in REBUILT_FIELDS.items():
        described = file.message_type.add(name=kind)
        for name, (number, what) in fields.items():
            repeated, what = what.startswith("repeated "), what.removeprefix("repeated ")
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if what in ("bool", "int64", "string"):
                field.type = getattr(field, f"TYPE_{what.upper()}")
            else:
                field.type = field.TYPE_MESSAGE
                field.type_name = f".{what}"
    pool = descriptor_pool.Default()
    pool.Add(file)
    return {
        kind: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"graft.{kind}")) for kind in REBUILT_FIELDS
    }
