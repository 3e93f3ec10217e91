"""Files of sounds: what each is, and a WAV file of those that are none.

WAV files are read as they are, by the same graph as in the served model. Anything else that soundfile reads (FLAC,
OGG, MP3, ADPCM in WAV, ...) is decoded once to a WAV file in the cache, by content.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib

import numpy as np

from models import offline

# What counts as a sound by its name; what cannot be read is reported with the reason.
SOUND_SUFFIXES = frozenset((".aac", ".aif", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"))
FORMAT = 101  # in the table of what is known of files: raise it when `inspect_sounds` says other things
# What soundfile calls the samples of a file -> the samples of the WAV file that is made of it; others: 16 bits.
SUBTYPES = {"PCM_24": "PCM_24", "PCM_32": "PCM_32", "FLOAT": "FLOAT", "DOUBLE": "FLOAT"}


def inspect_sounds(paths: list[str], progress=lambda done: None) -> list[dict]:
    """What each file is, in order, as `pipelines.inspections.inspect_files` wants it.

    Returns:
        error ("" where it can be used), and where it can: id (content hash of the WAV file), file (that file where it
        was made in the cache, else ""), frames, rate_hz, channels and peak (0 to 1, of all samples).
    """
    facts = []
    _looker()  # traced here, or every thread would trace it
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for fact in pool.map(_inspect_file, paths):
            facts.append(fact)
            progress(len(facts))
    return facts


def _inspect_file(path: str) -> dict:
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        return {"error": f"cannot be read: {error.strerror}"}
    fact = _look(data)
    if not fact["error"]:
        return {**fact, "file": ""}
    try:
        made = decoded_file(path, data)
    except Exception as error:  # soundfile raises many kinds, and what it says of a file that is no sound is terse
        return {"error": fact["error"], "reader": str(error)}
    return {**_look(made.read_bytes()), "file": str(made)}


def _look(data: bytes) -> dict:
    """What the served model's own reader says of a file."""
    error, frames, channels, rate_hz, peak = (value.numpy() for value in _looker()(data))
    if error:
        return {"error": error.decode()}
    identity = hashlib.sha256(data).hexdigest()[:16]
    fact = {"frames": int(frames), "rate_hz": int(rate_hz), "channels": int(channels), "peak": float(peak)}
    return {"error": "" if frames else "WAV file without a single sample", "id": identity, **fact}


@functools.cache
def _looker():
    import tensorflow as tf

    from models.audio_inputs import audio_error, decode_wav

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def look(data):
        samples, rate_hz = decode_wav(data)
        frames, channels = tf.unstack(tf.shape(samples))
        return audio_error(data), frames, channels, rate_hz, tf.reduce_max(tf.abs(tf.pad(samples, [[0, 1], [0, 0]])))

    look.get_concrete_function()
    return look


def decoded_file(path: str, data: bytes) -> pathlib.Path:
    """The WAV file in the cache that a sound file of another kind was decoded to; made where it is not there yet."""
    import soundfile

    made = offline.cache_folder() / "sounds" / f"{hashlib.sha256(data).hexdigest()[:16]}.wav"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_name(f".tmp-{os.getpid()}-{made.name}")
        try:
            write_wav(path, temporary, soundfile.info(path).subtype)
            os.replace(temporary, made)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def write_wav(source, target, subtype: str) -> None:
    """Decode a file with soundfile to a WAV file; source and target are paths or files in memory."""
    import soundfile

    samples, rate_hz = soundfile.read(source, dtype="float32" if subtype != "PCM_32" else "float64", always_2d=True)
    subtype = SUBTYPES.get(subtype, "PCM_16")
    if subtype == "PCM_16":
        samples = np.clip(samples, -1.0, 1.0)  # decoders of MP3 and OGG may give a little more
    soundfile.write(target, samples, rate_hz, subtype=subtype, format="WAV")


def wav_of(data: bytes) -> bytes:
    """A sound file of any kind that soundfile reads as the bytes of a WAV file; as it is where it cannot be read."""
    import io

    import soundfile

    try:
        target = io.BytesIO()
        write_wav(io.BytesIO(data), target, soundfile.info(io.BytesIO(data)).subtype)
        return target.getvalue()
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError):
        return data
