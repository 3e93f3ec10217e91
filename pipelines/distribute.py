"""Where training runs: one tf.distribute strategy per process, and what several workers must do together.

With several workers (processes, on one machine or many) each runs the whole story. Each loads and trains on its share
of every batch; gradients, losses and predictions are summed over all. What decides anything is either such a sum or
said by the chief, so that all go the same way. Only the chief writes.
"""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

from models import GraftError
from pipelines import cluster, stopping
from pipelines.console import console

HEARTBEAT_S = 20  # without a sign of life a worker counts as dead


def make_strategy(name: str = "none", devices: tuple[str, ...] = (), tpu: str = "") -> tf.distribute.Strategy:
    """Make the strategy. Call it once per process: several MirroredStrategy objects block each other.

    Args:
        name: "none" (one device), "mirrored" (the named devices, or all local GPUs), "multiworker" (the workers that
            TF_CONFIG or a scheduler's environment names), "tpu" or "auto", as `pipelines.cluster.choose` does.
        devices: such as "GPU:0"; logical CPUs ("CPU:0") work too.
        tpu: name or address of a TPU; empty: the local one.

    Raises:
        GraftError: a device that this machine lacks; lists those there are. No cluster, or no TPU.
    """
    if name == "auto":
        name = cluster.choose(len(tf.config.list_physical_devices("GPU")))
        console.print(f"[dim]--distribute auto: {name}[/]")
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multiworker":
        return multi_worker_strategy()
    if name == "tpu":
        return tpu_strategy(tpu)
    known = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    unknown = [device for device in devices if device.removeprefix("/device:").upper() not in known]
    if unknown:
        raise GraftError(f"--devices {' '.join(unknown)}: not on this machine. It has {', '.join(known)}.")
    return tf.distribute.MirroredStrategy(list(devices) or None)


def multi_worker_strategy():
    """One worker's part of a MultiWorkerMirroredStrategy; waits until all workers are there."""
    found = cluster.set_tf_config()
    index, count = cluster.place_in(found)
    console.quiet = index > 0
    stopping.leave_at_once()  # the end of an interpreter would wait for workers that are gone
    console.print(f"Worker {index} of {count}: waiting for the others")
    _watch_peers(found, count)
    return tf.distribute.MultiWorkerMirroredStrategy()


def _watch_peers(found: dict, count: int) -> None:
    """Have TensorFlow's coordination service notice a dead worker in HEARTBEAT_S rather than its own longer time."""
    from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
    from tensorflow.python.eager import context

    jobs = [
        CoordinatedJob(name=job, num_tasks=len(found["cluster"][job]))
        for job in ("chief", "worker")
        if job in found["cluster"]
    ]
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=f"/job:{jobs[0].name}/replica:0/task:0",
        heartbeat_timeout_in_ms=1000 * HEARTBEAT_S,
        shutdown_barrier_timeout_in_ms=1000 * HEARTBEAT_S,
        coordinated_jobs=jobs,
    )


def tpu_strategy(name: str):
    """The strategy of a TPU that has been found and initialised; name: as for `make_strategy`."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name or "local")
        if name:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GraftError(
            f"--distribute tpu: {'TPU ' + name if name else 'a local TPU'} cannot be used: {reason} On a TPU VM, "
            f"install constraints-tpu.txt; elsewhere name the TPU with --tpu."
        ) from error
    return tf.distribute.TPUStrategy(resolver)


# ---------------------------------------------------------------- who one is


def shard_of(strategy) -> tuple[int, int]:
    """(number of this worker, workers); (0, 1) where one process does everything."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0, 1
    return cluster.place_in(cluster.tf_config())


def is_chief(strategy) -> bool:
    return shard_of(strategy)[0] == 0


def local_strategy(strategy):
    """What a worker computes with alone; the strategy itself where there is one process."""
    return strategy if shard_of(strategy)[1] == 1 else tf.distribute.get_strategy()


def is_tpu(strategy) -> bool:
    return isinstance(strategy, tf.distribute.TPUStrategy)


# ---------------------------------------------------------------- together


def distributed(strategy, batches):
    """Batches as `strategy.run` takes them; with several workers `batches` are this worker's share."""
    _, workers = shard_of(strategy)
    if workers == 1:
        return strategy.experimental_distribute_dataset(batches)
    replicas = strategy.num_replicas_in_sync // workers
    if replicas > 1:
        size = tf.nest.flatten(batches.element_spec)[0].shape[0]
        batches = batches.rebatch(size // replicas, drop_remainder=True)
    return strategy.distribute_datasets_from_function(lambda context: batches)


def summed(strategy, values: np.ndarray) -> np.ndarray:
    """The sum over all workers of an array that each of them has, of any shape; the same on each."""
    if shard_of(strategy)[1] == 1:
        return values
    values = np.asarray(values)
    return _sum_function(strategy, values.shape, values.dtype)(tf.constant(values)).numpy()


@functools.cache
def _sum_function(strategy, shape: tuple[int, ...], dtype):
    """What sums arrays of one shape and dtype over all workers."""
    replicas = strategy.num_replicas_in_sync // shard_of(strategy)[1]

    @tf.function(autograph=False)
    def total(values):
        def on_replica(values):
            context = tf.distribute.get_replica_context()
            first = tf.equal(context.replica_id_in_sync_group % replicas, 0)  # of this worker: it counts once
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(first, values, tf.zeros_like(values)))

        return strategy.experimental_local_results(strategy.run(on_replica, args=(values,)))[0]

    return total


def chief_says(strategy, values) -> list[float]:
    """The chief's numbers, on every worker."""
    values = np.asarray(values, np.float64)
    return summed(strategy, values if is_chief(strategy) else np.zeros_like(values)).tolist()


def from_chief(strategy, state: tuple[dict, dict] | None) -> tuple[dict, dict] | None:
    """The chief's facts and arrays, as `pipelines.states.pack` takes them, or its None, on every worker."""
    from pipelines.states import packed, unpack

    if shard_of(strategy)[1] == 1:
        return state
    data = packed(*state) if state and is_chief(strategy) else np.zeros(0, np.uint8)
    (size,) = chief_says(strategy, [len(data)])
    if not size:
        return None
    sent = np.zeros(int(size), np.int32)
    sent[: len(data)] = data
    return unpack(summed(strategy, sent).astype(np.uint8).tobytes())


def leave(strategy, run_dir):
    """Wait for all workers, so that none takes another for dead; gives back `run_dir`."""
    chief_says(strategy, [0.0])
    return run_dir
