"""pipelines/deploy: training under Kubernetes, Slurm and on TPU VMs, checked by what reads such files."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from pipelines.cluster import tf_config_from
from pipelines.installed import requirements
from tests.test_deploy import bytes_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "pipelines" / "deploy"
BIN = pathlib.Path(sys.executable).parent
SBATCH = DEPLOY / "slurm" / "train.sbatch"
EXIT_CODES = {0, 1, 2, 3, 4, 75}  # README's


def manifests(name: str = "photos") -> dict:
    """The Kubernetes objects by kind and name, as the documented sed command would send them."""
    found = {}
    for path in sorted((DEPLOY / "kubernetes").iterdir()):
        for document in yaml.safe_load_all(path.read_text().replace("photos", name)):
            found[document["kind"], document["metadata"]["name"]] = document
    return found


@pytest.fixture
def job() -> dict:
    return manifests()["Job", "photos-train"]


@pytest.fixture
def container(job) -> dict:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


# ---- Kubernetes


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # podFailurePolicy is stable since 1.31
def test_kubernetes_schemas(version, job):
    for document in manifests().values():
        kubernetes_validate.validate(document, version, strict=True)
    job["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="onExitCode"):
        kubernetes_validate.validate(job, version, strict=True)


def test_objects_fit_each_other(job, container):
    found = manifests()
    assert set(found) == {
        ("Job", "photos-train"),
        ("Service", "photos-train"),
        ("PersistentVolumeClaim", "photos-data"),
        ("PersistentVolumeClaim", "photos-runs"),
    }
    template = job["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    service = found["Service", "photos-train"]["spec"]
    assert service["selector"].items() <= labels.items()
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == "photos-train"
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [(ports[port["targetPort"]], port["port"]) for port in service["ports"]] == [(2222, 2222)]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for name in ("data", "runs"):
        claim = found["PersistentVolumeClaim", volumes[name]["persistentVolumeClaim"]["claimName"]]["spec"]
        assert bytes_of(claim["resources"]["requests"]["storage"]) >= 1 << 30
        assert claim["accessModes"][0].endswith("Many")  # several machines at once
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/data": True, "/runs": False, "/tmp": False, "/dev/shm": False}
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert 0 < bytes_of(requests["memory"]) <= bytes_of(limits["memory"])
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_75_starts_a_pod_again_and_mistakes_end_the_job(job, container):
    spec = job["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy asks for it
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob", 4: "FailJob"} and set(by_code) <= EXIT_CODES
    assert all(rule.get("onExitCodes", {}).get("containerName", "train") == container["name"] for rule in rules)
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert spec["backoffLimit"] >= 1 and spec["activeDeadlineSeconds"] > 3600
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 30  # saving takes up to 10 s


@pytest.mark.parametrize("name", ["photos", "reviews"])
def test_workers_are_the_pods_of_the_job(name):
    found = manifests(name)
    spec = found["Job", f"{name}-train"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    # An indexed Job calls pod i JOB-i, and DNS knows it as JOB-i.SUBDOMAIN.
    wanted = [
        f"{name}-train-{index}.{spec['template']['spec']['subdomain']}:2222" for index in range(spec["completions"])
    ]
    assert environment["WORKER_HOSTS"].split(",") == wanted
    assert environment["GRAFT_CACHE"].startswith("/runs/")


def test_kubernetes_environment_gives_tf_config(container):
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    hosts = environment["WORKER_HOSTS"].split(",")
    for index in range(2):
        made = tf_config_from({**environment, "JOB_COMPLETION_INDEX": str(index)})
        assert made == {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_flags_exist(container):
    script = SBATCH.read_text()
    tpu = (DEPLOY / "tpu-vm.md").read_text()
    asked = {"image": flags_of(container["args"])}
    asked["text"] = flags_of(re.search(r"^srun .*$", script, re.MULTILINE)[0].split()) - {"--kill-on-bad-exit"}
    asked["image"] |= flags_of(re.search(r"^\S+graft image .*$", tpu, re.MULTILINE)[0].split())
    for command, flags in asked.items():
        words = [sys.executable, "-m", "pipelines", command, "--help"]
        shown = subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout
        assert flags and not {flag for flag in flags if flag not in shown}
    assert container["args"][0] == "image"


# ---- Slurm


def slurm(tmp_path, status: int, *words, **environment) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Run the script as Slurm would, with commands that note what they are told; srun ends with `status`."""
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    for name, code in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(
            f'#!/bin/bash\nprintf "%q " {name} "$@" >> {calls}\necho >> {calls}\nexit {code}\n'
        )
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", **environment}
    done = subprocess.run(["bash", SBATCH, *words], env=variables, capture_output=True, text=True, timeout=60)
    return done, [shlex.split(line) for line in calls.read_text().splitlines()]


def test_slurm_script_is_bash_with_directives_first():
    assert subprocess.run(["bash", "-n", SBATCH], capture_output=True).returncode == 0
    lines = SBATCH.read_text().splitlines()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SBATCH.read_text(), re.MULTILINE))
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command
    assert directives["requeue"] == "" and directives["open-mode"] == "append"
    assert directives["signal"].startswith("TERM@") and int(directives["signal"][5:]) >= 30  # seconds to save in
    assert int(directives["nodes"]) > 1 and directives["ntasks-per-node"] == "1"


@pytest.mark.parametrize("status, again", [(0, False), (2, False), (1, False), (75, True), (137, True)])
def test_slurm_requeues_what_can_go_on(tmp_path, status, again):
    done, calls = slurm(tmp_path, status, "--data", "my photos", "--out", "runs/photos")
    assert done.returncode == status
    command = calls[0]
    assert command[:4] == ["srun", "--kill-on-bad-exit=0", ".venv/bin/graft", "image"]
    assert command[4:] == ["--data", "my photos", "--out", "runs/photos", "--resume", "--distribute", "multiworker"]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if again else [])


def test_slurm_gives_up_after_many_restarts(tmp_path):
    done, calls = slurm(tmp_path, 75, SLURM_RESTART_COUNT="20")
    assert done.returncode == 75 and len(calls) == 1 and "given up" in done.stderr
    assert len(slurm(tmp_path, 75, SLURM_RESTART_COUNT="19")[1]) == 2


def test_slurm_environment_gives_tf_config():
    environment = {"SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    made = tf_config_from({**environment, "SLURM_TASKS_PER_NODE": "1(x2)"})
    hosts = [host.rpartition(":")[0] for host in made["cluster"]["worker"]]
    assert hosts == ["gpu07", "gpu08"] and made["task"] == {"type": "worker", "index": 1}


# ---- the image, the TPU's environment


def test_dockerfile():
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert re.findall("^USER (.*)", text, re.MULTILINE) == ["10001:10001"]


def test_no_key_twice_and_no_tab():
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    files = sorted((DEPLOY / "kubernetes").iterdir())
    done = subprocess.run([BIN / "yamllint", "-s", "-d", rules, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-beam.txt", "constraints-tpu.txt"])
def test_constraints_hold_what_graft_asks_for(name):
    """Every package of setup.cfg, in a version that it allows; but TensorFlow's own on TPUs, which stop at 2.20."""
    there = {key.replace("_", "-"): version for key, version in pins(name).items()}
    needed, extras = requirements()
    for line in needed + (extras["beam"] if "beam" in name else []):
        requirement = Requirement(line)
        package = requirement.name.lower().replace("_", "-")
        if "tpu" in name and package in ("tensorflow", "tensorflow-text", "tf-keras"):
            assert there.get(package if package != "tensorflow" else "tensorflow-tpu").startswith("2.20.")
            continue
        assert package in there, package
        assert requirement.specifier.contains(there[package]), f"{package} {there[package]}"


def test_tpu_environment_has_no_second_tensorflow():
    there = pins("constraints-tpu.txt")
    assert "tensorflow" not in there and {"tensorflow-tpu", "libtpu"} <= set(there)
    text = (DEPLOY / "tpu-vm.md").read_text()
    assert "Not tried on a TPU" in text and "--no-deps -r constraints-tpu.txt" in text
