"""What a WAV file says of itself, read in core TensorFlow ops: its chunks, its codec, and why it may be refused.

`tf.audio.decode_wav` takes 16-bit PCM alone and of that only files whose chunks lie just so; here the chunks are
walked. Sources: "Multimedia Programming Interface and Data Specifications 1.0" (IBM and Microsoft 1991) for RIFF,
"Multiple Channel Audio Data and WAVE Files" (Microsoft 2007) for WAVE_FORMAT_EXTENSIBLE, and EBU Tech 3306 for RF64.
"""

from __future__ import annotations

import tensorflow as tf

MAX_SECONDS = 3600
MAX_VALUES = MAX_SECONDS * 48_000 * 2  # samples of all channels: an hour of stereo at 48 kHz
RATES_HZ = (1_000, 400_000)  # lowest and highest sample rate that is believed
MAX_CHUNKS = 1_000  # so that a file of empty chunks takes no long time
# Programs that write to a pipe cannot go back to fill in the size: ffmpeg leaves 0xFFFFFFFF, SoX about 0x7FFFFFFF.
UNKNOWN_SIZE = 0x7FFF_0000
PCM, FLOAT, EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
TO_WAV = "convert it to WAV, for example with: ffmpeg -i {} -c:a pcm_s16le out.wav"
CODECS = {
    0x0002: "Microsoft ADPCM",
    0x0006: "A-law",
    0x0007: "mu-law",
    0x0011: "IMA ADPCM",
    0x0031: "GSM 6.10",
    0x0040: "G.721 ADPCM",
    0x0050: "MPEG audio",
    0x0055: "MP3",
    0x00FF: "AAC",
    0x0161: "Windows Media",
}
# (name, offset, bytes there, a file to name in the advice); what people take for WAV, and rename.
OTHERS = (
    ("FLAC", 0, b"fLaC", "in.flac"),
    ("OGG", 0, b"OggS", "in.ogg"),
    ("MP3", 0, b"ID3", "in.mp3"),
    ("MP3", 0, b"\xff\xfb", "in.mp3"),
    ("MP3", 0, b"\xff\xfa", "in.mp3"),
    ("MP3", 0, b"\xff\xf3", "in.mp3"),
    ("MP3", 0, b"\xff\xf2", "in.mp3"),
    ("MP3", 0, b"\xff\xe3", "in.mp3"),
    ("MP3", 0, b"\xff\xe2", "in.mp3"),
    ("AAC", 0, b"\xff\xf1", "in.aac"),
    ("AAC", 0, b"\xff\xf9", "in.aac"),
    ("M4A or MP4", 4, b"ftyp", "in.m4a"),
    ("WebM or Matroska", 0, b"\x1a\x45\xdf\xa3", "in.webm"),
    ("AIFF", 0, b"FORM", "in.aiff"),
    ("AU", 0, b".snd", "in.au"),
    ("Core Audio", 0, b"caff", "in.caf"),
    ("AMR", 0, b"#!AMR", "in.amr"),
    ("Windows Media", 0, b"\x30\x26\xb2\x75", "in.wma"),
    ("Wave64", 0, b"riff", "in.w64"),
    ("Big-endian WAV (RIFX)", 0, b"RIFX", "in.wav"),
    ("AVI", 8, b"AVI ", "in.avi"),
)
HEXADECIMAL = [f"{byte:02x}" for byte in range(256)]


def part(data, position, count):
    """`count` bytes of `data` (scalar string) from `position` on; fewer, or none, where it ends before."""
    length = tf.strings.length(data)
    position = tf.clip_by_value(tf.cast(position, tf.int64), 0, tf.cast(length, tf.int64))
    return tf.strings.substr(data, position, tf.cast(count, tf.int64))


def words(data, position, count: int):
    """`count` little-endian unsigned 16-bit numbers from `position` on, [count] int64; missing bytes are zeros."""
    found = tf.io.decode_raw(part(data, position, 2 * count), tf.uint16, fixed_length=2 * count)
    return tf.cast(found, tf.int64)


def double(found, place: int):
    """The unsigned 32-bit number of `words` at places `place` and the next."""
    return found[place] + found[place + 1] * 65_536


def parse_wav(data) -> dict:
    """What the headers of a WAV file (scalar string) say; nothing in the bytes makes it raise.

    Returns scalars, int64 unless said otherwise: `is_wav` bool, `has_format` and `has_data` bool, `codec` (the format
    tag, that of the subformat where it is extensible), `channels`, `rate_hz`, `bits`, `sample_bytes`, `frame_bytes`,
    `start`, `present_bytes` (after the start), `declared_bytes` (of samples; `present_bytes` where the header leaves
    it open) and `frames` (whole ones that are there).
    """
    length = tf.cast(tf.strings.length(data), tf.int64)
    outer = part(data, 0, 4)
    is_wav = tf.logical_and(tf.logical_or(outer == b"RIFF", outer == b"RF64"), part(data, 8, 4) == b"WAVE")
    none = tf.constant(-1, tf.int64)

    def more(position, count, fmt, samples, large):
        return (samples < 0) & (position + 8 <= length) & (count < MAX_CHUNKS)

    def next_chunk(position, count, fmt, samples, large):
        name, size = part(data, position, 4), double(words(data, position + 4, 2), 0)
        fmt = tf.where(name == b"fmt ", position + 8, fmt)
        samples = tf.where(name == b"data", position + 8, samples)
        large = tf.where(name == b"ds64", position + 8, large)
        return position + 8 + size + size % 2, count + 1, fmt, samples, large

    first = tf.where(is_wav, tf.constant(12, tf.int64), length)
    state = (first, tf.constant(0), none, none, none)
    _, _, fmt, start, large = tf.while_loop(more, next_chunk, state)
    has_format, has_data = fmt >= 0, start >= 0

    form = words(data, fmt, 13)
    codec = tf.where(form[0] == EXTENSIBLE, form[12], form[0])
    bits, frame_bytes = form[7], form[6]

    present = tf.where(has_data, length - start, 0)
    declared = double(words(data, start - 4, 2), 0)
    huge = words(data, large + 8, 4)
    huge = double(huge, 0) + double(huge, 2) % UNKNOWN_SIZE * 2**32
    declared = tf.where((large >= 0) & (declared == 0xFFFFFFFF), huge, declared)
    whole = double(words(data, 4, 2), 0)  # what follows these 8 bytes, as the header says
    # A size of 0 is a stream's too, unless the outer size says that the file is as short as it says.
    left_open = declared >= UNKNOWN_SIZE
    left_open |= (declared == 0) & ((whole + 8 < length) | (whole >= UNKNOWN_SIZE))
    declared = tf.where(left_open, present, declared)
    return {
        "is_wav": is_wav,
        "has_format": has_format,
        "has_data": has_data,
        "codec": codec,
        "channels": form[1],
        "rate_hz": double(form, 2),
        "bits": bits,
        "sample_bytes": (bits + 7) // 8,
        "frame_bytes": frame_bytes,
        "start": tf.maximum(start, 0),
        "present_bytes": present,
        "declared_bytes": declared,
        "frames": tf.minimum(declared, present) // tf.maximum(frame_bytes, 1),
    }


def wav_faults(data, wav: dict):
    """Which of FAULTS a file (scalar string) has, of which `parse_wav` says `wav`: [faults] bool."""
    pcm = (wav["codec"] == PCM) & (wav["sample_bytes"] >= 1) & (wav["sample_bytes"] <= 4)
    floats = (wav["codec"] == FLOAT) & ((wav["bits"] == 32) | (wav["bits"] == 64))
    found = {
        "empty": data == b"",
        "other": ~wav["is_wav"],
        "no format": ~wav["has_format"],
        "codec": (wav["codec"] != PCM) & (wav["codec"] != FLOAT),
        "bits": ~(pcm | floats),
        "contradiction": (wav["channels"] < 1) | (wav["frame_bytes"] != wav["channels"] * wav["sample_bytes"]),
        "rate": (wav["rate_hz"] < RATES_HZ[0]) | (wav["rate_hz"] > RATES_HZ[1]),
        "no data": ~wav["has_data"],
        "truncated": wav["declared_bytes"] > wav["present_bytes"],
        "no samples": wav["frames"] == 0,
        "long": wav["frames"] > MAX_SECONDS * wav["rate_hz"],
        "large": wav["frames"] * wav["channels"] > MAX_VALUES,
    }
    return tf.stack([found[name] for name in FAULTS])


def wav_error(data, wav: dict):
    """Why a file (scalar string), of which `parse_wav` says `wav`, cannot be an input; "" where it can."""
    faults = wav_faults(data, wav)

    def say():
        first = tf.argmax(tf.cast(faults, tf.int32), output_type=tf.int32)
        return tf.switch_case(first, [lambda reason=reason: reason(data, wav) for reason in FAULTS.values()])

    return tf.cond(tf.reduce_any(faults), say, lambda: tf.constant(""))


def _text(*parts):
    return tf.strings.join([item if isinstance(item, str) else tf.strings.as_string(item) for item in parts])


def _what_it_is(data):
    start = tf.cast(tf.io.decode_raw(part(data, 0, 8), tf.uint8), tf.int32)
    start = tf.strings.reduce_join(tf.gather(HEXADECIMAL, start), separator=" ")
    answer = tf.strings.join(["not a WAV file: starts with the bytes ", start, "; expected RIFF and WAVE"])
    for name, offset, value, file in reversed(OTHERS):
        found = part(data, offset, len(value)) == value
        answer = tf.where(found, f"{name} is not supported; {TO_WAV.format(file)}", answer)
    return answer


def _codec(data, wav):
    name = _text("with the codec number ", wav["codec"])
    for number, known in CODECS.items():
        name = tf.where(wav["codec"] == number, known, name)
    return _text("WAV file with ", name, " samples is not supported; " + TO_WAV.format("in.wav"))


def _seconds(wav):
    return wav["frames"] // tf.maximum(wav["rate_hz"], 1)


CUT = "cut it up, for example with: ffmpeg -i in.wav -f segment -segment_time 600 -c copy out%03d.wav"
# What is wrong, and how to say it; the first that is true counts.
FAULTS = {
    "empty": lambda data, wav: tf.constant("empty input: no bytes; expected a WAV file"),
    "other": lambda data, wav: _what_it_is(data),
    "no format": lambda data, wav: tf.constant(
        "WAV file without a format chunk before its samples; the file is damaged"
    ),
    "codec": _codec,
    "bits": lambda data, wav: _text(
        "WAV file with ",
        wav["bits"],
        " bits per sample; expected PCM of 8, 16, 24 or 32 bits, or float of 32 or 64 bits; " + TO_WAV.format("in.wav"),
    ),
    "contradiction": lambda data, wav: _text(
        "WAV file whose header contradicts itself: ",
        wav["channels"],
        " channels of ",
        wav["bits"],
        " bits in ",
        wav["frame_bytes"],
        " bytes; the file is damaged",
    ),
    "rate": lambda data, wav: _text(
        "WAV file with a sample rate of ",
        wav["rate_hz"],
        f" Hz; expected {RATES_HZ[0]} to {RATES_HZ[1]} Hz; the file is damaged, or no sound",
    ),
    "no data": lambda data, wav: tf.constant(
        "WAV file without samples: it has a format but no data chunk; it is truncated, or was never finished"
    ),
    "truncated": lambda data, wav: _text(
        "truncated WAV file: its header promises ",
        wav["declared_bytes"],
        " bytes of samples, ",
        wav["present_bytes"],
        " are there; copy or download it again",
    ),
    "no samples": lambda data, wav: tf.constant("WAV file without samples: its data chunk is empty"),
    "long": lambda data, wav: _text(
        "WAV file of ", _seconds(wav), f" seconds is above the limit of {MAX_SECONDS} seconds; {CUT}"
    ),
    "large": lambda data, wav: _text(
        "WAV file of ",
        _seconds(wav),
        " seconds with ",
        wav["channels"],
        " channels at ",
        wav["rate_hz"],
        f" Hz is above the limit of {MAX_VALUES // 10**6} million samples; {CUT}",
    ),
}
