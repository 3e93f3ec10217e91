"""The offline set of sounds, `spoken_words`: words that eSpeak NG speaks in many voices, as WAV files in the cache.

eSpeak NG comes with espeakng-loader, in the extra `offline`, and is called through ctypes. It is under the GPL-3: it
makes data for demos and tests, and no part of Graft needs it. This file imports neither TensorFlow nor Keras.
"""

from __future__ import annotations

import csv
import ctypes
import importlib.metadata
import io
import itertools
import pathlib
import threading
import wave

import numpy as np

from models import GraftError
from models.offline import DATA, cache_folder, whole_or_nothing

SAMPLE_RATE_HZ = 22_050  # what eSpeak NG speaks at
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS += ("yes", "no", "up", "down", "left", "right", "stop", "go", "on", "off")
# accent+variant: a variant changes the throat, an accent the vowels. Those of test appear in no other split.
VOICES = {
    "train": (
        *("en-US+m1", "en-US+m3", "en-US+f1", "en-US+f2"),
        *("en+m2", "en+m4", "en+f3", "en+m7"),
        *("en-GB-x-rp+m5", "en-GB-x-rp+m6", "en-GB-x-rp+f4", "en-GB-x-rp+michael"),
    ),
    "val": ("en-US+m8", "en+f5", "en-GB-x-rp+max", "en-US+andy"),
    "test": (
        *("en-GB-scotland+adam", "en-GB-x-gbclan+linda", "en-GB-x-gbcwmd+david"),
        *("en-029+steph", "en-US-nyc+paul", "en-GB-scotland+belinda"),
    ),
}
# Words per minute and pitch (0 to 100, 50 is the voice's own) of the clips of each voice.
MANNERS = {
    "train": ((140, 40), (160, 60), (180, 35), (200, 55)),
    "val": ((150, 50), (190, 45)),
    "test": ((145, 55), (170, 40), (195, 60)),
}
SET_VERSION = 1  # in the cache's folder name: raise it when anything above makes other clips
SYNCHRONOUS, DONT_EXIT = 2, 0x8000  # espeak_AUDIO_OUTPUT and an option of espeak_Initialize (speak_lib.h)
RATE, PITCH = 1, 3  # espeak_PARAMETER
UTF8, CHARACTER = 1, 1  # encoding of the text; what positions count
EXTRA = "eSpeak NG is not installed: pip install 'graft-transfer[offline]' (espeakng-loader)"

_one_at_a_time = threading.Lock()  # the library keeps everything in global variables


def sound_data_file(name: str) -> pathlib.Path:
    """The data set `spoken_words` as a manifest: a CSV file with the columns path, label, split and group (the voice).

    960 clips to train (12 voices), 160 to validate (4), 360 to test (6 voices, whose variants and accents are in no
    other split), 20 words, 16-bit WAV, 22,050 Hz, mono. Made in the cache on first use, the same everywhere the same
    eSpeak NG runs, safe as `models.offline.fetch` is.

    Raises:
        GraftError: an unknown name, no espeakng-loader, and all that `speak` raises.
    """
    known = [key for key, item in DATA.items() if item["kind"] == "audio"]
    if name not in known:
        raise GraftError(f"{name}: no data set of sounds by this name; there are {', '.join(known)}")
    folder = cache_folder() / "data" / f"{name}-{SET_VERSION}-espeakng-loader-{loader_version()}"
    if not folder.is_dir():
        with whole_or_nothing(folder) as made:
            rows = list(_write_clips(made))
            with (made / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("path", "label", "split", "group"), *rows])
    return folder / f"{name}.csv"


def _write_clips(folder: pathlib.Path):
    """Write the clips as SPLIT/WORD/VOICE-RATE-PITCH.wav; yields (path, word, split, voice)."""
    for split, voices in VOICES.items():
        for word, voice, (rate, pitch) in itertools.product(WORDS, voices, MANNERS[split]):
            path = pathlib.Path(split, word, f"{voice}-{rate}-{pitch}.wav")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(wav_bytes(*speak(word, voice, rate, pitch)))
            yield str(path), word, split, voice


def loader_version() -> str:
    """The installed version of espeakng-loader, with which the clips change; raises GraftError where there is none."""
    try:
        return importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError:
        raise GraftError(EXTRA) from None


def speak(text: str, voice: str = "en-US+m1", rate: int = 175, pitch: int = 50) -> tuple[np.ndarray, int]:
    """What eSpeak NG says: (samples [n] int16, mono; their rate, 22,050 Hz). Same arguments, same samples.

    Args:
        voice: an accent of English and a variant: "en-GB-scotland+f2"; or the accent alone.
        rate: words per minute, 80 to 450. pitch: 0 to 100; 50 is the voice's own.

    Raises:
        GraftError: eSpeak NG is not installed, has no such voice, or fails.
    """
    loader_version()
    import espeakng_loader

    with _one_at_a_time:
        # Loaded anew for each clip, and seeded: otherwise the same call gives other samples the second time, even
        # another length, whatever is terminated and initialised in between.
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            return _speak(library, espeakng_loader.get_data_path(), text, voice, rate, pitch), SAMPLE_RATE_HZ
        finally:
            library.espeak_Terminate()
            _unload(library)


def _speak(library, data_folder, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    found = library.espeak_Initialize(SYNCHRONOUS, 0, str(data_folder).encode(), DONT_EXIT)
    if found != SAMPLE_RATE_HZ:
        raise GraftError(f"eSpeak NG did not start: it says {found}, expected {SAMPLE_RATE_HZ}, from {data_folder}.")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    # The languages' folder is part of a voice's name: "gmw/en-US" is found, "en-US+f2" is not.
    status = library.espeak_SetVoiceByName(f"gmw/{voice}".encode())
    if status:
        raise GraftError(f"eSpeak NG has no voice {voice!r} (status {status}). Expected an accent of English such as "
                         f"en-US, en-GB-scotland or en-029, and where wanted a variant: en-US+f2.")  # fmt: skip
    library.espeak_SetParameter(RATE, rate, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    encoded = text.encode()
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    status = library.espeak_Synth(encoded, len(encoded) + 1, 0, CHARACTER, 0, UTF8, None, None)
    status = status or library.espeak_Synchronize()
    if status:
        raise GraftError(f"eSpeak NG could not say {text!r}: status {status}.")
    return np.concatenate([np.zeros(0, np.int16), *chunks])


def _unload(library) -> None:
    import _ctypes

    close = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
    close(library._handle)


def wav_bytes(samples: np.ndarray, rate_hz: int) -> bytes:
    """Samples [n] or [n, channels] int16 as the bytes of a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        writer.setsampwidth(2)
        writer.setframerate(rate_hz)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()
