"""Which workers train together: TF_CONFIG as it is, or made from what Slurm or Kubernetes says. No TensorFlow here.

TF_CONFIG is TensorFlow's own description of a cluster: {"cluster": {"worker": ["host:port", ...]}, "task": {"type":
"worker", "index": 0}}. Worker 0, or the task of type chief where there is one, is the chief.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

from models import GraftError

PORT = 23456  # of the workers, where the environment names none (GRAFT_PORT moves it)


def tf_config_from(environment: Mapping[str, str]) -> dict | None:
    """The cluster that an environment describes, as TF_CONFIG has it; None where it describes none of several workers.

    Looked for in this order:

    - TF_CONFIG.
    - Slurm, inside `srun`: SLURM_STEP_NODELIST (or SLURM_JOB_NODELIST), SLURM_NTASKS, SLURM_PROCID,
      SLURM_STEP_TASKS_PER_NODE. Several tasks of a node get ports one after the other.
    - Kubernetes: WORKER_HOSTS, host names by commas, with JOB_COMPLETION_INDEX of an indexed Job; or a JobSet's
      JOBSET_NAME, REPLICATED_JOB_NAME and WORKER_COUNT: worker i is JOBSET-REPLICATED_JOB-0-i.JOBSET.

    Raises:
        GraftError: TF_CONFIG that is not what TensorFlow expects, or a worker that is not among those named.
    """
    if environment.get("TF_CONFIG"):
        return checked(environment["TF_CONFIG"])
    port = int(environment.get("GRAFT_PORT", PORT))
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        workers, index = slurm_workers(environment, port), int(environment["SLURM_PROCID"])
    elif "JOB_COMPLETION_INDEX" in environment:
        workers, index = kubernetes_workers(environment, port), int(environment["JOB_COMPLETION_INDEX"])
    else:
        return None
    if len(workers) < 2:
        return None
    if index >= len(workers):
        raise GraftError(
            f"This is worker {index}, and the scheduler's environment names {len(workers)}: {', '.join(workers)}. "
            f"Start as many tasks as there are workers."
        )
    return {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}


def checked(text: str) -> dict:
    """TF_CONFIG as a dict; raises GraftError where it is not what TensorFlow expects."""
    try:
        found = json.loads(text)
        task = found["task"]
        tasks = found["cluster"][task["type"]]
        fine = task["type"] in ("chief", "worker") and 0 <= int(task["index"]) < len(tasks)
    except (ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise GraftError(
            f"TF_CONFIG is {text!r}, expected such as "
            '{"cluster": {"worker": ["host0:23456", "host1:23456"]}, "task": {"type": "worker", "index": 0}}.'
        )
    return {"cluster": found["cluster"], "task": {"type": task["type"], "index": int(task["index"])}}


def slurm_workers(environment: Mapping[str, str], port: int) -> list[str]:
    """host:port of every task of a Slurm step, in the order of SLURM_PROCID (block distribution, Slurm's default)."""
    nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
    tasks = int(environment["SLURM_NTASKS"])
    shares = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = []
    for share in filter(None, shares.split(",")):  # such as 2(x3),1
        count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", share).groups()
        counts += [int(count)] * int(times or 1)
    if sum(counts) != tasks or len(counts) != len(nodes):
        counts = [tasks // len(nodes) + (number < tasks % len(nodes)) for number in range(len(nodes))]
    return [f"{node}:{port + local}" for node, count in zip(nodes, counts) for local in range(count)]


def expand_nodes(text: str) -> list[str]:
    """Slurm's short list of nodes, such as gpu[01-03,7],login -> their names."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        heads = [""]
        for plain, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            choices = []
            for piece in filter(None, ranges.split(",")):
                first, _, last = piece.partition("-")
                numbers = range(int(first), int(last or first) + 1)
                choices += [str(number).zfill(len(first)) for number in numbers]
            heads = [head + plain + choice for head in heads for choice in choices or [""]]
        names += heads
    return names


def kubernetes_workers(environment: Mapping[str, str], port: int) -> list[str]:
    """host:port of every pod of an indexed Job or a JobSet; empty where the environment names none."""
    if environment.get("WORKER_HOSTS"):
        hosts = [host.strip() for host in environment["WORKER_HOSTS"].split(",") if host.strip()]
    elif environment.get("JOBSET_NAME"):
        name, job = environment["JOBSET_NAME"], environment.get("REPLICATED_JOB_NAME", "worker")
        count = int(environment.get("WORKER_COUNT", 1))
        hosts = [f"{name}-{job}-0-{index}.{name}" for index in range(count)]
    else:
        return []
    return [host if ":" in host else f"{host}:{port}" for host in hosts]


def tf_config() -> dict | None:
    """The cluster of this process's environment."""
    return tf_config_from(os.environ)


def set_tf_config() -> dict:
    """Put the cluster of this process's environment into TF_CONFIG, where TensorFlow looks for it; returns it.

    Raises:
        GraftError: there is none.
    """
    found = tf_config()
    if found is None:
        raise GraftError(
            "--distribute multiworker: the environment names no cluster. Set TF_CONFIG, or start under Slurm's srun, "
            "an indexed Job with WORKER_HOSTS, or a JobSet (pipelines/deploy has examples)."
        )
    os.environ["TF_CONFIG"] = json.dumps(found)
    return found


def place_in(found: dict | None) -> tuple[int, int]:
    """(number of this worker, workers) in a cluster as TF_CONFIG has it; the chief is number 0."""
    if not found:
        return 0, 1
    sizes = {job: len(found["cluster"].get(job, ())) for job in ("chief", "worker")}
    before = sizes["chief"] if found["task"]["type"] == "worker" else 0
    return before + found["task"]["index"], sizes["chief"] + sizes["worker"]


def is_multi_worker(environment: Mapping[str, str]) -> bool:
    """Whether an environment describes a cluster of several workers."""
    return place_in(tf_config_from(environment))[1] > 1


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU VM: its environment, or its devices."""
    return "TPU_WORKER_ID" in environment or "TPU_NAME" in environment or os.path.exists("/dev/accel0")


def choose(gpus: int, environment: Mapping[str, str] = os.environ) -> str:
    """What --distribute auto means here; gpus: how many this machine has."""
    if is_multi_worker(environment):
        return "multiworker"
    if has_tpu(environment):
        return "tpu"
    return "mirrored" if gpus > 1 else "none"
