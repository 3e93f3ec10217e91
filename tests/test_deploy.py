"""serving/deploy: files for real engines, checked by the tools that read them and by what these tools miss."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from serving.config import batching_parameters, monitoring_config, read_config
from tests.stub_servers import rest_server, tiny_version

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "serving" / "deploy"
CONFIGS = sorted((DEPLOY / "config").iterdir())
BIN = pathlib.Path(sys.executable).parent
IMAGE = "tensorflow/serving:2.20.0"
# The flags of tensorflow_model_server that the project's reference for TF Serving names (tfserving.md, sections 0 and A
# to E); the server has more.
FLAGS = set(
    re.findall(
        r"\w+",
        """
    port rest_api_port rest_api_timeout_in_ms rest_api_num_threads rest_api_enable_cors_support grpc_max_threads
    model_name model_base_path model_config_file model_config_file_poll_wait_seconds file_system_poll_wait_seconds
    num_load_threads max_num_load_retries load_retry_interval_micros flush_filesystem_caches enable_model_warmup
    num_request_iterations_for_warmup enable_batching batching_parameters_file enable_per_model_batching_parameters
    tensorflow_session_parallelism tensorflow_intra_op_parallelism tensorflow_inter_op_parallelism
    per_process_gpu_memory_fraction allow_version_labels_for_unavailable_models monitoring_config_file ssl_config_file
    grpc_channel_arguments mixed_precision enable_profiler remove_unused_fields_from_bundle_metagraph saved_model_tags
    enable_signature_method_name_check enable_serialization_as_tensor_content xla_cpu_compilation_enabled
    xla_gpu_compilation_enabled
    """,
    )
)


def manifests(name: str = "photos") -> dict[str, dict]:
    """The Kubernetes objects by kind, as the documented sed command would send them."""
    found = {}
    for path in sorted((DEPLOY / "kubernetes").iterdir()):
        for document in yaml.safe_load_all(path.read_text().replace("photos", name)):
            assert document["kind"] not in found
            found[document["kind"]] = document
    return found


def compose(*words, **variables) -> subprocess.CompletedProcess:
    """Docker Compose itself; it needs no engine to read a file."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    command = [BIN / "docker-compose", "-f", DEPLOY / "docker-compose.yml", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(scope="module")
def composed() -> dict:
    done = compose("--profile", "*", "config", "--format", "json", NAME="photos", MODELS="/srv/models")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def dockerfile_command(word: str) -> list[str]:
    """The JSON list after CMD or the like in the Dockerfile."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    return json.loads(re.search(rf"{word} (\[.*\])", text).group(1))


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity of memory; its schema takes any string."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", quantity).groups()
    return int(number) << 10 * (1 + ["Ki", "Mi", "Gi", "Ti"].index(unit))


# ---- Kubernetes


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_schemas(version):
    for document in manifests().values():
        kubernetes_validate.validate(document, version, strict=True)
    wrong = manifests()["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinessProb"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_kubernetes_objects_fit_each_other():
    found = manifests()
    assert set(found) == {"Deployment", "Service", "PersistentVolumeClaim", "ConfigMap"}
    spec = found["Deployment"]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    for port in found["Service"]["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = found["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim
    assert volumes["config"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    annotations = spec["template"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) == ports["rest"]
    assert f'path: "{annotations["prometheus.io/path"]}"' in found["ConfigMap"]["data"]["monitoring.config"]


def test_kubernetes_probes_ask_for_the_model_by_its_name():
    (container,) = manifests("reviews")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "MODEL_NAME", "value": "reviews"}]
    named = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v1/models/reviews/metadata", "port": "rest"}
    assert container["livenessProbe"]["tcpSocket"]["port"] in named


def test_kubernetes_limits_and_rights():
    found = manifests()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert 0 < bytes_of(requests["memory"]) <= bytes_of(limits["memory"])
    assert 0 < int(requests["cpu"]) <= int(limits["cpu"])
    assert bytes_of(found["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]) >= 1 << 30
    flags = dict(flag.removeprefix("--").split("=") for flag in container["args"])
    for name in ("tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism"):
        assert flags[name] == limits["cpu"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert all(mount.get("readOnly") for mount in container["volumeMounts"] if mount["mountPath"] != "/tmp")


def test_the_config_map_holds_the_config_files():
    data = manifests()["ConfigMap"]["data"]
    assert data == {path.name: path.read_text() for path in CONFIGS}


# ---- Compose


def test_compose_reads_it(composed):
    assert set(composed["services"]) == {"serving", "serving-gpu"}
    for name, service in composed["services"].items():
        assert service["image"] == IMAGE + ("-gpu" if name == "serving-gpu" else "")
        ports = {(port["host_ip"], int(port["published"]), port["target"]) for port in service["ports"]}
        assert ports == {("127.0.0.1", 8500, 8500), ("127.0.0.1", 8501, 8501)}
        volumes = {volume["target"]: volume for volume in service["volumes"]}
        assert volumes["/models"]["source"] == "/srv/models"
        assert pathlib.Path(volumes["/config"]["source"]) == DEPLOY / "config"
        assert all(volume["read_only"] for volume in volumes.values())
        assert service["environment"] == {"MODEL_NAME": "photos"}
        assert service["user"] not in ("root", "0", "0:0") and service["cap_drop"] == ["ALL"] and service["read_only"]
        assert int(service["deploy"]["resources"]["limits"]["memory"]) >= 1 << 30
    (device,) = composed["services"]["serving-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


def test_compose_starts_one_profile_and_asks_for_what_is_missing():
    known = {"NAME": "photos", "MODELS": "/srv/models"}
    for profile, service in (("cpu", "serving"), ("gpu", "serving-gpu")):
        assert compose("--profile", profile, "config", "--services", **known).stdout.split() == [service]
    done = compose("--profile", "cpu", "config", "-q", MODELS="/srv/models")
    assert done.returncode != 0 and "NAME is missing a value: the name of the model" in done.stderr


# ---- the Dockerfile


def test_dockerfile():
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall("^FROM (.*)", text, re.MULTILINE) == [IMAGE]
    assert re.findall("^USER (.*)", text, re.MULTILINE) == ["10001:10001"]
    for source in re.findall(r"^COPY (serving\S+)", text, re.MULTILINE):
        assert (ROOT / source).is_dir()


# ---- what they have in common


def test_every_flag_is_one_of_the_servers(composed):
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    commands = {
        "Kubernetes": container["args"],
        "Dockerfile": dockerfile_command("\nCMD"),
        **{name: service["command"] for name, service in composed["services"].items()},
    }
    for where, words in commands.items():
        flags = dict(re.fullmatch(r"--(\w+)=(\S+)", word).groups() for word in words)
        assert set(flags) <= FLAGS, where
        assert len(flags) == len(words), where
        # What the image's entry point sets already.
        assert not {"port", "rest_api_port", "model_name", "model_base_path"} & set(flags), where
        files = {pathlib.PurePath(value) for value in flags.values() if value.startswith("/")}
        assert files == {pathlib.PurePath("/config", path.name) for path in CONFIGS}, where


def test_config_files_are_what_the_server_reads(composed):
    """And what serving/config.py makes, with as many threads as the containers may use CPUs."""
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    cpus = container["resources"]["limits"]["cpu"]
    assert composed["services"]["serving"]["deploy"]["resources"]["limits"]["cpus"] == int(cpus)
    assert read_config(DEPLOY / "config" / "monitoring.config", "MonitoringConfig") == monitoring_config()
    parsed = read_config(DEPLOY / "config" / "batching_params.pbtxt", "BatchingParameters")
    assert parsed == batching_parameters(threads=int(cpus))


def test_no_key_twice_and_no_tab():
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    files = [DEPLOY / "docker-compose.yml", *sorted((DEPLOY / "kubernetes").iterdir())]
    done = subprocess.run([BIN / "yamllint", "-s", "-d", rules, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_health_checks_tell_a_loaded_model_from_one_that_is_not(composed, tmp_path):
    checks = {"compose": composed["services"]["serving"]["healthcheck"]["test"][1:]}
    checks["Dockerfile"] = dockerfile_command("HEALTHCHECK .*CMD")
    with rest_server(tiny_version(tmp_path / "photos" / "1", seed=0)) as server:
        for where, words in checks.items():
            assert words[:2] == ["bash", "-c"], where
            script = words[2].replace("$$", "$").replace("8501", str(server.port))
            assert "8501" in words[2], where
            for name, code in (("photos", 0), ("nothing", 1)):
                environment = {**os.environ, "MODEL_NAME": name}
                done = subprocess.run(["bash", "-c", script], env=environment, timeout=20, capture_output=True)
                assert done.returncode == code, (where, name, done.stderr)
        script = script.replace(str(server.port), "1")  # nobody listens there
        assert subprocess.run(["bash", "-c", script], timeout=20, capture_output=True).returncode != 0
