"""The TensorFlow libraries of a server's release, to run a model with instead of the installed ones.

They lie in that release's wheel on PyPI, and do without its Python: `fetch_libraries` unpacks them into the cache,
`packages_with` lets another process find them. Nothing of the wheel is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import importlib.util
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from models import GraftError
from models.offline import cache_folder, whole_or_nothing
from serving.runtime import load_library, uses_text_ops

# Server -> release of TensorFlow, and of TF-Text. That of 2.19 does not load: ten of the libraries in the wheel
# tensorflow-text 2.19.0 need symbols of tflite::shim, which neither they nor TensorFlow 2.19.1 have.
RELEASES = {"2.20": ("2.20.0", "2.20.0"), "2.19": ("2.19.1", None)}
LIBRARY = "libtensorflow_*"  # the C library and the framework beside it
TEXT_OPS = "tensorflow_text/python/ops/_*.so"
TEXT_MARK = "tensorflow_text/__init__.py"  # makes the folder a package that can be found; it is not run


@contextlib.contextmanager
def packages_with(target: str, folder) -> Iterator[Path]:
    """A folder for PYTHONPATH in which `tensorflow` has the libraries of `target`, a server's release such as "2.20".

    All else of the package is the installed one: generated protobuf classes must fit the installed protobuf. It holds
    `tensorflow_text` too where the version folder `folder` uses its ops. Raises GraftError where there is none.
    """
    tensorflow, text = RELEASES[target]
    uses_text = uses_text_ops((Path(folder) / "saved_model.pb").read_bytes())
    if uses_text and text is None:
        raise GraftError(
            f"--libraries: {folder} uses ops of TF-Text, and no wheel of it works with the libraries of TensorFlow "
            f"{tensorflow}. Leave out --libraries, or use another --target"
        )
    libraries = fetch_libraries(tensorflow_wheel(tensorflow), [f"tensorflow/{LIBRARY}"]) / "tensorflow"
    installed = Path(importlib.util.find_spec("tensorflow").origin).parent
    with tempfile.TemporaryDirectory(prefix="graft-libraries-") as scratch:
        package = Path(scratch) / "tensorflow"
        package.mkdir()
        kept = [path for path in installed.iterdir() if not fnmatch.fnmatch(path.name, LIBRARY)]
        for path in (*kept, *libraries.iterdir()):
            (package / path.name).symlink_to(path)
        if uses_text:
            own = fetch_libraries(f"tensorflow-text=={text}", [TEXT_OPS, TEXT_MARK])
            (Path(scratch) / "tensorflow_text").symlink_to(own / "tensorflow_text")
        yield Path(scratch)


def fetch_libraries(requirement: str, patterns) -> Path:
    """The folder with those files of a wheel that match a pattern; fetched on first use, whole or not at all.

    requirement: such as "tensorflow-cpu==2.20.0". patterns: of paths in the wheel.
    Raises GraftError where pip finds no wheel of it for this Python and machine, or cannot fetch it.
    """
    folder = library_folder(requirement)
    if not folder.is_dir():
        with whole_or_nothing(folder) as temporary:
            wheel = download_wheel(requirement, temporary)
            with zipfile.ZipFile(wheel) as archive:
                members = {name for pattern in patterns for name in fnmatch.filter(archive.namelist(), pattern)}
                if not members:
                    raise GraftError(f"--libraries: {wheel.name} holds no {' or '.join(patterns)}")
                archive.extractall(temporary, members)
            wheel.unlink()
    return folder


def tensorflow_wheel(release: str) -> str:
    """The requirement whose wheel holds the libraries for CPUs."""
    # On x86 the wheel named tensorflow is more than twice as large, for GPUs.
    name = "tensorflow-cpu" if (sys.platform, platform.machine()) == ("linux", "x86_64") else "tensorflow"
    return f"{name}=={release}"


def library_folder(requirement: str) -> Path:
    """Where the cache has the files of a wheel."""
    place = f"{requirement.replace('==', '-')}-{sys.platform}-{platform.machine()}"
    return cache_folder().absolute() / "libraries" / place


def download_wheel(requirement: str, folder: Path) -> Path:
    """Have pip fetch one wheel into an empty folder, from `wheels/` of the cache or from its index."""
    by_hand = cache_folder() / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout=20", "--retries=2", f"--dest={folder}", requirement]
    if by_hand.is_dir():
        command.append(f"--find-links={by_hand}")
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "hint"))]
        raise GraftError(
            f"--libraries: pip could not get a wheel of {requirement} for Python {platform.python_version()} on "
            f"{sys.platform} {platform.machine()} (it said: {' '.join(said[-3:])}). Without a network, "
            f"put that wheel into {by_hand} by hand. Where there is none for this Python, use another Python, or leave "
            f"out --libraries"
        )
    return wheels[0]


def loaded_release() -> str:
    """The release of the TensorFlow library that this process uses, such as "2.20.0"."""
    function = load_library().TF_Version
    function.restype = ctypes.c_char_p
    return function().decode()
