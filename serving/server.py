"""The embedded server: `python -m serving.server FOLDER`, TF Serving's REST and gRPC interfaces on one machine.

For trying out and for tests; production is TensorFlow Serving, whose clients need no change for this one. Flags
have the real server's names and meanings; those it lacks are marked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import uvicorn

from models import GraftError
from serving.batching import read_parameters, start_batching
from serving.config import message, read_config
from serving.grpc_api import start_grpc
from serving.metrics import Metrics
from serving.models_table import ModelsTable, version_folders
from serving.rest import create_app

THREADS = 4 * (os.cpu_count() or 1)
FIRST_POLL_SECONDS = 0.2  # between looks while nothing answers yet
OTHER_FLAGS = """
    allow_version_labels_for_unavailable_models enable_grpc_healthcheck_service enable_model_warmup
    enable_per_model_batching_parameters enable_profiler enable_serialization_as_tensor_content
    enable_signature_method_name_check flush_filesystem_caches grpc_channel_arguments grpc_socket_path mixed_precision
    num_load_threads num_request_iterations_for_warmup num_tflite_interpreters_per_pool num_tflite_pools
    num_unload_threads per_process_gpu_memory_fraction platform_config_file prefer_tflite_model
    remove_unused_fields_from_bundle_metagraph saved_model_tags skip_initialize_tpu ssl_config_file
    tensorflow_inter_op_parallelism tensorflow_intra_op_parallelism tensorflow_session_config_file
    tensorflow_session_parallelism thread_pool_factory_config_file use_alts_credentials version
    xla_cpu_compilation_enabled xla_gpu_compilation_enabled
"""  # of the real server (tensorflow_serving/model_servers/main.cc), not here
ENCRYPTION_FLAGS = ("ssl_config_file", "use_alts_credentials")


def parse_arguments(words=None) -> argparse.Namespace:
    """The flags; argparse prints what is wrong with them and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.server",
        usage="%(prog)s FOLDER [--FLAG VALUE ...]   (--help lists the flags)",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", nargs="?", help="a model's folder with version folders in it; short for --model_base_path")
    add("--host", default="127.0.0.1", help="address to listen on (not in the real server; default: %(default)s)")
    add("--port", type=int, default=8500, help="for gRPC, 0: none (default: %(default)s)")
    add("--rest_api_port", type=int, default=8501, help="for REST, 0: none (default: %(default)s, as in its images)")
    add("--rest_api_num_threads", type=int, default=THREADS, help="requests at once (default: %(default)s)")
    add("--rest_api_timeout_in_ms", type=int, default=30_000, help="per request (default: %(default)s)")
    add("--rest_api_enable_cors_support", type=boolean, nargs="?", const=True, default=False)
    add("--grpc_max_threads", type=int, default=THREADS, help="requests at once (default: %(default)s)")
    add("--model_name", help="name of the model in FOLDER (default: the folder's; in the real server: default)")
    add("--model_base_path", help="the model's folder")
    add("--model_config_file", help="models.config, for several models, version policies and labels")
    add("--model_config_file_poll_wait_seconds", type=float, default=0, help="how often it is read again; 0: never")
    add("--file_system_poll_wait_seconds", type=float, default=1, help="between looks for versions; 0: only once")
    add("--max_num_load_retries", type=int, default=5, help="after a load that failed (default: %(default)s)")
    add("--load_retry_interval_micros", type=int, default=60_000_000, help="default: a minute")
    add("--enable_batching", type=boolean, nargs="?", const=True, default=False, help="answer requests together")
    add("--batching_parameters_file", help="batching_params.pbtxt")
    add("--monitoring_config_file", help="monitoring.config, says where on the REST port Prometheus finds metrics")
    add("--max_body_bytes", type=int, default=100_000_000, help="larger requests are refused (not in the real server)")
    add("--max_waiting_requests", type=int, default=256, help="more are refused (not in the real server)")
    options, unknown = parser.parse_known_args(words)
    for name in (word.removeprefix("--").partition("=")[0] for word in unknown):
        if name in ENCRYPTION_FLAGS:
            parser.error(f"--{name}: the embedded server does not encrypt. Put a proxy before it, or use TF Serving")
        if name in OTHER_FLAGS.split():
            parser.error(f"--{name}: a flag of TF Serving that the embedded server does not have. Leave it out")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def boolean(word: str) -> bool:
    """true or false, as the real server's flags take them."""
    if word.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{word!r}: expected true or false")
    return word.lower() in ("true", "1")


def read_models(options) -> list:
    """The ModelConfig protos of models.config, or one for the folder; raises GraftError."""
    if options.model_config_file:
        models = list(read_config(options.model_config_file, "ModelServerConfig").model_config_list.config)
        if not models:
            raise GraftError(f"{options.model_config_file}: no models in it. Expected model_config_list {{ config ...")
        return models
    if bool(options.folder) == bool(options.model_base_path):
        raise GraftError("no model, or two: expected one of FOLDER, --model_base_path and --model_config_file")
    folder = Path(options.folder or options.model_base_path).absolute()
    if not folder.is_dir():
        found = "a file, no folder" if folder.exists() else "no such folder"
        raise GraftError(f"{folder}: {found}. Expected a model's, such as runs/photos/serving/photos, or a run's")
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and version_folders(path)]
    if not inner and (folder / "serving").is_dir():  # a run folder
        inner = [path for path in sorted((folder / "serving").iterdir()) if path.is_dir() and version_folders(path)]
    if not version_folders(folder) and len(inner) == 1:
        folder = inner[0]  # runs/photos/serving holds photos/1
    models = message("ModelServerConfig").model_config_list.config
    return [models.add(name=options.model_name or folder.name, base_path=str(folder), model_platform="tensorflow")]


def check_ports(options) -> None:
    """Raise GraftError where one cannot be listened on: before the models are loaded, which takes seconds."""
    with contextlib.ExitStack() as held:  # so that both cannot be the same
        for flag, port in (("--port", options.port), ("--rest_api_port", options.rest_api_port)):
            if not port:
                continue
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            try:
                held.enter_context(socket.create_server((options.host, port), family=family))
            except (OSError, OverflowError) as error:
                said = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
                raise GraftError(
                    f"{flag} {port}: cannot listen on {options.host} ({said}). Does another server run there? "
                    f"Choose another port with {flag}"
                ) from error


def make_table(options) -> ModelsTable:
    """The table of the models that the flags name; nothing is loaded yet."""
    batching = None
    if options.enable_batching:
        parameters = message("BatchingParameters")
        if options.batching_parameters_file:
            parameters = read_config(options.batching_parameters_file, "BatchingParameters")
        values = read_parameters(parameters)

        def batching(session):
            return start_batching(session, values)
    elif options.batching_parameters_file:
        raise GraftError("--batching_parameters_file: needs --enable_batching, as in the real server")
    retry_seconds = options.load_retry_interval_micros / 1e6
    return ModelsTable(read_models(options), batching, options.max_num_load_retries, retry_seconds)


def wait_until_loaded(table: ModelsTable, stopped: threading.Event) -> None:
    """Poll until every model answers: only then does the real server open its ports. GraftError where one cannot."""
    told = poll(table, [])
    if table.missing() and not told:
        print(f"No version yet: waiting for one of {', '.join(table.missing())}", file=sys.stderr, flush=True)
    while table.missing() and not stopped.wait(FIRST_POLL_SECONDS):
        given_up = table.problems(given_up=True)
        if given_up:
            raise GraftError(f"cannot load {'; '.join(given_up)}. Verify it: python -m serving.verify FOLDER")
        told = poll(table, told)


def poll(table: ModelsTable, told: list[str]) -> list[str]:
    """Poll, and say which loads have failed, but for those in `told`; returns all of them."""
    table.poll()
    problems = table.problems()
    for problem in problems:
        if problem not in told:
            print(f"cannot load {problem}", file=sys.stderr, flush=True)
    return problems


def keep_polling(table: ModelsTable, options, stopped: threading.Event) -> None:
    """Look for new versions, and for new models where that is asked for, until `stopped`."""
    read_at, told = time.monotonic(), table.problems()
    while not stopped.wait(options.file_system_poll_wait_seconds):
        wait = options.model_config_file_poll_wait_seconds
        if options.model_config_file and wait and time.monotonic() - read_at >= wait:
            read_at = time.monotonic()
            try:
                table.configure(read_models(options))
            except GraftError as error:  # half written, say: what is served goes on
                print(error, file=sys.stderr, flush=True)
        told = poll(table, told)


def metrics_path(options) -> str | None:
    """Where monitoring.config wants the metrics; None where it does not."""
    if not options.monitoring_config_file:
        return None
    config = read_config(options.monitoring_config_file, "MonitoringConfig").prometheus_config
    return (config.path or "/monitoring/prometheus/metrics") if config.enable else None


def serve(options, stopped: threading.Event) -> None:
    """Answer until `stopped` is set or a signal comes; raises GraftError where that cannot begin."""
    check_ports(options)
    table, metrics, path = make_table(options), Metrics(), metrics_path(options)
    wait_until_loaded(table, stopped)
    if stopped.is_set():  # by a signal, while it waited
        table.close()
        return
    limits = {"max_body_bytes": options.max_body_bytes, "max_waiting": options.max_waiting_requests}
    print("Embedded server of Graft, for trying out. For production use TensorFlow Serving.", flush=True)
    grpc_server = None
    if options.port:
        try:
            address = f"{options.host}:{options.port}"
            grpc_server, _ = start_grpc(table, metrics, address, options.grpc_max_threads, **limits)
        except RuntimeError as error:
            raise GraftError(f"--port {options.port}: cannot listen on {address}. Is another server there?") from error
    print_addresses(table, options)
    poller = threading.Thread(target=keep_polling, args=(table, options, stopped), daemon=True)
    if options.file_system_poll_wait_seconds:
        poller.start()
    try:
        if options.rest_api_port:
            app = create_app(
                table,
                metrics,
                path,
                options.rest_api_num_threads,
                options.rest_api_timeout_in_ms / 1000,
                cors=options.rest_api_enable_cors_support,
                **limits,
            )
            serve_rest(app, options)
        else:
            stopped.wait()
    finally:
        stopped.set()
        if grpc_server is not None:
            grpc_server.stop(grace=5).wait()
        if poller.is_alive():
            poller.join()
        table.close()


def print_addresses(table: ModelsTable, options) -> None:
    """Where each model is asked, and where people find the page."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    for name in table.names():
        with table.acquire(name) as (number, _):
            quoted = urllib.parse.quote(name, safe="")
            addresses = {
                options.rest_api_port: f"http://{host}:{options.rest_api_port}/v1/models/{quoted}",
                options.port: f"grpc://{host}:{options.port}/{quoted}",
            }
            listed = "   ".join(address for port, address in addresses.items() if port)
            print(f"{name}, version {number}: {listed}", flush=True)
    if options.rest_api_port:
        print(f"A page for people: http://{host}:{options.rest_api_port}/   Ctrl-C ends the server.", flush=True)


def serve_rest(app, options) -> None:
    """Run uvicorn until SIGINT or SIGTERM; raises GraftError where the port is taken."""
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.rest_api_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # so does uvicorn say that the port is taken
        raise GraftError(
            f"--rest_api_port {options.rest_api_port}: cannot listen on {options.host}. Is another server there?"
        ) from error
    uvicorn.Server(config).run([socket])


def main(words=None) -> int:
    """The command; returns the exit code."""
    options, stopped = parse_arguments(words), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())  # uvicorn has its own while it runs
    try:
        serve(options, stopped)
    except GraftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
