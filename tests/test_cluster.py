"""TF_CONFIG from each scheduler's environment."""

import json

import pytest

from models import GraftError
from pipelines import cluster


def config(workers, index, job="worker"):
    return {"cluster": {job: workers}, "task": {"type": job, "index": index}}


def test_tf_config_is_taken_as_it_is():
    given = {"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "worker", "index": 1}}
    environment = {"TF_CONFIG": json.dumps(given), "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert cluster.tf_config_from(environment) == given
    assert cluster.place_in(given) == (2, 3)
    assert cluster.place_in(given | {"task": {"type": "chief", "index": 0}}) == (0, 3)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {}}',
        json.dumps(config(["a:1"], 1)),
        json.dumps({"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}),
    ],
)
def test_a_wrong_tf_config_is_one_message(text):
    with pytest.raises(GraftError, match="TF_CONFIG is .*expected such as"):
        cluster.tf_config_from({"TF_CONFIG": text})


def test_slurm_names_each_task():
    environment = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_NODELIST": "gpu[07-09]"}
    workers = ["gpu07:23456", "gpu08:23456", "gpu09:23456"]
    assert cluster.tf_config_from(environment) == config(workers, 2)
    environment |= {"SLURM_NTASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "GRAFT_PORT": "9000"}
    workers = ["gpu07:9000", "gpu07:9001", "gpu08:9000", "gpu08:9001", "gpu09:9000"]
    assert cluster.tf_config_from(environment) == config(workers, 2)
    environment["SLURM_STEP_TASKS_PER_NODE"] = ""
    assert cluster.tf_config_from(environment) == config(workers, 2)
    assert cluster.tf_config_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}) is None
    assert cluster.tf_config_from({"SLURM_JOB_NODELIST": "a,b"}) is None  # a batch script, outside srun


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("login", ["login"]),
        ("a1,b[2-3]", ["a1", "b2", "b3"]),
        ("n[001-003,010]", ["n001", "n002", "n003", "n010"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu[1,3]-ib,x", ["gpu1-ib", "gpu3-ib", "x"]),
    ],
)
def test_slurms_short_lists_of_nodes(text, nodes):
    assert cluster.expand_nodes(text) == nodes


def test_kubernetes_indexed_job_and_job_set():
    job = {"JOB_COMPLETION_INDEX": "1", "WORKER_HOSTS": "graft-0.graft, graft-1.graft,"}
    assert cluster.tf_config_from(job) == config(["graft-0.graft:23456", "graft-1.graft:23456"], 1)
    job_set = {"JOB_COMPLETION_INDEX": "0", "JOBSET_NAME": "flowers", "WORKER_COUNT": "2"}
    workers = ["flowers-worker-0-0.flowers:23456", "flowers-worker-0-1.flowers:23456"]
    assert cluster.tf_config_from(job_set) == config(workers, 0)
    job_set |= {"REPLICATED_JOB_NAME": "train", "JOB_COMPLETION_INDEX": "1"}
    assert cluster.tf_config_from(job_set)["cluster"]["worker"][1] == "flowers-train-0-1.flowers:23456"
    with pytest.raises(GraftError, match="This is worker 7, and the scheduler's environment names 2"):
        cluster.tf_config_from(job_set | {"JOB_COMPLETION_INDEX": "7"})
    assert cluster.tf_config_from({"JOB_COMPLETION_INDEX": "0"}) is None  # an indexed Job of another kind


def test_auto_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(cluster.os.path, "exists", lambda path: False)
    workers = {"JOB_COMPLETION_INDEX": "1", "WORKER_HOSTS": "a,b"}
    assert cluster.choose(4, workers) == "multiworker"
    assert cluster.choose(4, {"TPU_NAME": "local"}) == "tpu"
    assert cluster.choose(4, {}) == "mirrored"
    assert cluster.choose(1, {}) == cluster.choose(0, {"TF_CONFIG": json.dumps(config(["a:1"], 0))}) == "none"


def test_a_cluster_that_nothing_names_is_one_message(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GraftError, match="the environment names no cluster. Set TF_CONFIG"):
        cluster.set_tf_config()
