"""`graft doctor`: what this machine has, whether Graft can run on it, and what to change.

TensorFlow is started in a process of its own: one that dies there (a CPU without AVX, a broken driver) is a finding.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import urllib.parse

import psutil
import rich.table
import tyro

from models import offline
from models.hubs import SECONDS, reachable
from pipelines.console import console
from pipelines.devices import best_precision
from pipelines.facts import cpu_count
from pipelines.installed import check_packages

LEAST_DISK, LITTLE_DISK = 0.15e9, 2e9  # bytes free: what the smallest run needs; where a warning begins
LITTLE_MEMORY = 2e9  # bytes: less than a small backbone takes with its data
LARGE_CACHE = 20e9  # bytes of cached activations that are worth a word
START_SECONDS = 120  # the longest that TensorFlow may take to start
HUBS = {  # what cannot be had without it
    "huggingface.co": "hf:// models",
    "www.kaggle.com": "kaggle:// models and KerasHub presets by name",
    "tfhub.dev": "tfhub: modules by URL",
    "storage.googleapis.com": "TFDS sets that are not prepared yet, and keras.applications",
}
ENGINES = ("docker", "podman", "nerdctl")
DEVICES_SCRIPT = """
import json, os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras, tensorflow as tf
from pipelines.devices import list_devices
found = {"tensorflow": tf.__version__, "keras": keras.__version__, "backend": keras.backend.backend()}
found["cuda"] = bool(tf.test.is_built_with_cuda())
found["devices"] = list_devices()
print("found " + json.dumps(found))
"""


@dataclasses.dataclass
class DoctorConfig:
    """What this machine has, whether Graft can run on it, and what to change. Ends with 2 where it cannot."""

    json: bool = False
    """Print JSON: can_run, checks (what, state, found, advice)."""


@dataclasses.dataclass
class Finding:
    """One line of the table."""

    what: str
    state: str  # ok, note (works, could be better), stop (Graft cannot run)
    found: str
    advice: str = ""  # a sentence that says what to change


def doctor(argv: list[str]) -> int:
    """`graft doctor`: a table and sentences, or JSON with --json."""
    config = tyro.cli(DoctorConfig, args=argv, prog="graft doctor")
    with console.status("looking around"), concurrent.futures.ThreadPoolExecutor() as pool:
        checks = (check_python, check_packages_here, check_tensorflow, check_memory, check_disk, check_cache)
        checks += (check_network, check_containers)
        findings = [finding for found in pool.map(lambda check: check(), checks) for finding in found]
    can_run = all(finding.state != "stop" for finding in findings)
    if config.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"can_run": can_run, "checks": checks}, indent=1, ensure_ascii=False))
    else:
        print_findings(findings, can_run)
    return 0 if can_run else 2


def print_findings(findings: list[Finding], can_run: bool) -> None:
    table = rich.table.Table(box=None)
    table.add_column("")
    table.add_column("")
    table.add_column("")
    signs = {"ok": "[green]ok", "note": "[yellow]note", "stop": "[red]stop"}
    for finding in findings:
        table.add_row(finding.what, signs[finding.state], rich.markup.escape(finding.found))
    console.print(table)
    advice = [(finding.state, finding.advice) for finding in findings if finding.advice]
    for state, sentence in sorted(advice, key=lambda pair: pair[0] != "stop"):
        console.print(f"[red]- {sentence}" if state == "stop" else f"- {sentence}", markup=state == "stop")
    console.print("[bold]Graft can run here." if can_run else "[bold red]Graft cannot run here.")


# ---------------------------------------------------------------- software


def check_python():
    wanted = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if wanted else "Install Python 3.11 to 3.13: TensorFlow has no wheels for others."
    yield Finding("Python", "ok" if wanted else "stop", f"{platform.python_version()}, {sys.platform}", advice)


def check_packages_here():
    """The installed versions against those that setup.cfg asks for."""
    wrong, extras, count = check_packages()
    found = "; ".join(wrong) or f"all {count} as setup.cfg asks"
    advice = "pip install -e . -c constraints.txt installs what setup.cfg asks for." if wrong else ""
    yield Finding(
        "packages", "stop" if any("missing" in one for one in wrong) else "note" if wrong else "ok", found, advice
    )
    yield Finding("extras", "ok", ", ".join(extras) or "none")


def check_tensorflow():
    """Whether TensorFlow starts, and what it computes on."""
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", DEVICES_SCRIPT],
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env=environment,
        )
        said = re.search("^found (.*)$", done.stdout, re.MULTILINE)
        problem = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
    except subprocess.TimeoutExpired:
        said, problem = None, [f"no answer within {START_SECONDS} s"]
    if not said:
        advice = f"TensorFlow does not start here ({problem[0][:200]}). Its wheels want a CPU with AVX."
        yield Finding("TensorFlow", "stop", "does not start", advice)
        return
    found = json.loads(said[1])
    backend = found["backend"]
    advice = "" if backend == "tensorflow" else f"Keras computes with {backend}: set KERAS_BACKEND=tensorflow."
    yield Finding("TensorFlow", "stop" if advice else "ok", f"{found['tensorflow']}, Keras {found['keras']}", advice)
    yield from check_devices(found["devices"], found["cuda"])


def check_devices(devices: list[dict], cuda: bool):
    """The devices that TensorFlow sees, and what suits them."""
    for device in devices:
        if device.get("compute_capability"):
            device["compute_capability"] = tuple(device["compute_capability"])
    gpus, tpus = ([device for device in devices if device["kind"] == kind] for kind in ("GPU", "TPU"))
    yield Finding("CPU", "ok", f"{cpu_count()} cores, {platform.machine()}")
    precision = best_precision(devices)
    for gpu in gpus:
        capability = ".".join(map(str, gpu["compute_capability"] or ("?",)))
        yield Finding("GPU", "ok", f"{gpu['name']}: {gpu['model'] or 'unknown'}, compute capability {capability}")
    if gpus:
        advice = (
            f"Train with --precision {precision}, which these GPUs compute faster. " if precision != "float32" else ""
        )
        advice += "For long runs try --xla. Graft takes GPU memory as it grows, so that others can use the rest."
        advice += " --distribute mirrored uses all of them." if len(gpus) > 1 else ""
        yield Finding("GPU settings", "ok", f"--precision auto means {precision}; memory grows", advice)
    if tpus:
        advice = "Train with --distribute tpu --precision bfloat16; XLA is always on there."
        yield Finding("TPU", "ok", f"{len(tpus)} cores", advice)
    elif pathlib.Path("/dev/accel0").exists() or "TPU_NAME" in os.environ:
        advice = "There are TPUs that TensorFlow does not see: pipelines/deploy/tpu-vm.md says how to install for them."
        yield Finding("TPU", "note", "there, not seen by TensorFlow", advice)
    if not gpus and (pathlib.Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        install = "" if cuda else "this TensorFlow was built without CUDA; "
        advice = f"There is an NVIDIA driver, but TensorFlow sees no GPU: {install}pip install -e '.[gpu]'."
        yield Finding("GPU", "note", "driver there, no GPU seen by TensorFlow", advice)
    elif not gpus and not tpus:
        yield Finding("GPU", "ok", "none: heads train in minutes on CPUs, deep fine-tuning is slow")


# ---------------------------------------------------------------- room


def check_memory():
    memory, limit = psutil.virtual_memory(), container_limit()
    free = min(memory.available, limit) if limit else memory.available
    said = f"{free / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    said += f", {limit / 1e9:.1f} GB for this container" if limit else ""
    advice = "Little memory is free: close other programs, or train with --cache none and a smaller --batch-size."
    yield Finding("memory", "note" if free < LITTLE_MEMORY else "ok", said, advice if free < LITTLE_MEMORY else "")


def container_limit() -> int | None:
    """The bytes that the control group of this process may use; None where there is no limit."""
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = pathlib.Path(place).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < psutil.virtual_memory().total:
            return int(text)
    return None


def check_disk():
    """Free disk where runs go, the present folder, and where the cache lies."""
    for what, folder in (("disk, here", pathlib.Path.cwd()), ("disk, cache", offline.cache_folder())):
        free = offline.free_bytes(folder)
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        writable = os.access(above, os.W_OK)
        state = "stop" if free < LEAST_DISK or not writable else "note" if free < LITTLE_DISK else "ok"
        move = "go to another folder, or give --out" if what == "disk, here" else "set GRAFT_CACHE to another folder"
        advice = {"stop": f"Nothing can be written in {above}: free some space there, or {move}.", "ok": ""}
        advice["note"] = f"Little is free in {above}: large backbones need gigabytes; free some space, or {move}."
        said = f"{free / 1e9:.1f} GB free in {folder}" + ("" if writable else ", not writable")
        yield Finding(what, state, said, advice[state])


def check_cache():
    """What the cache holds, and whether the offline weights are there."""
    folder = offline.cache_folder()
    sizes = (
        {part.name: folder_bytes(part) for part in sorted(folder.iterdir()) if part.is_dir()} if folder.is_dir() else {}
    )
    said = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items()) or "empty"
    advice = []
    if sizes.get("features", 0) > LARGE_CACHE:
        advice.append(
            f"Cached activations take {sizes['features'] / 1e9:.0f} GB: {folder / 'features'} can be removed."
        )
    here = [name for name, item in offline.WEIGHTS.items() if is_fetched(name, item)]
    missing = [name for name in offline.WEIGHTS if name not in here]
    if missing:
        advice.append(f"To work without a network, fetch once: python -m models.offline fetch {' '.join(missing)}.")
    said += f"; offline weights: {', '.join(here) or 'none'}"
    yield Finding("cache", "ok" if not advice else "note", said, " ".join(advice))


def is_fetched(name: str, item: dict) -> bool:
    """Whether the weights are in the cache, as `models.offline.fetch` leaves them."""
    return (offline.cache_folder() / "unpacked" / f"{name}-{item['sha256'][:12]}").is_dir()


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of the files in a folder and those below."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)


# ---------------------------------------------------------------- around


def check_network():
    """Which hubs can be reached within 2 s; without any, Graft works with what is on the machine."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = dict(zip(HUBS, pool.map(lambda host: reachable(f"https://{host}"), HUBS)))
        index = pool.submit(package_index)
        where, there = index.result()
    for host, answers_ in answers.items():
        lacking = f"not within {SECONDS:.0f} s: {HUBS[host]} only as far as they are on this machine"
        yield Finding(host, "ok" if answers_ else "note", "reachable" if answers_ else lacking)
    advice = "" if there else "pip cannot fetch the offline weights either: copy ~/.cache/graft from another machine."
    yield Finding(where, "ok" if there else "note", "reachable" if there else "not reachable", advice)
    if not any(answers.values()):
        advice = "No hub can be reached; set HTTPS_PROXY if you need a proxy. Offline backbones: "
        yield Finding("network", "note", "no hub", advice + ", ".join(offline.WEIGHTS) + ".")


def package_index() -> tuple[str, bool]:
    """What pip installs from: its name, and whether it can be reached. Of a mirror no address is told."""
    words = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    settings = dict(re.findall(r"^.*\.([\w-]+)='(.*)'$", done.stdout, re.MULTILINE))
    url = os.environ.get("PIP_INDEX_URL") or settings.get("index-url") or settings.get("find-links", "")
    if not url:
        return "pypi.org", reachable("https://pypi.org")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("http", "https"):
        return "pip's mirror", reachable(url)
    return "pip's folder", pathlib.Path(urllib.parse.unquote(parts.path)).exists()


def check_containers():
    """A container engine, for TensorFlow Serving."""
    there = [engine for engine in ENGINES if shutil.which(engine)]
    for engine in there:
        try:
            done = subprocess.run([engine, "info"], capture_output=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if not done.returncode:
            yield Finding("containers", "ok", f"{engine}: TensorFlow Serving can be started")
            return
    said = f"{there[0]}, but its engine does not answer" if there else "none"
    advice = "Without a container engine, serve with python -m serving.server RUN; production wants TensorFlow Serving."
    yield Finding("containers", "note", said, advice)
