"""A state in a file: facts (what JSON holds) and arrays, with a digest, whole or absent. No TensorFlow here."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib

import numpy as np

FORMAT = 1  # of the files: raise it when they would be read wrongly
DIGEST_BYTES = 32  # of SHA-256


def write_state(path: pathlib.Path, facts: dict, arrays: dict) -> None:
    """Write facts (what JSON holds) and arrays into one file, whole or not at all."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w+b") as file:
            pack(file, facts, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(file, facts: dict, arrays: dict) -> None:
    """Write facts and arrays to a binary file: an .npz, and the SHA-256 of that."""
    text = json.dumps({"format": FORMAT, **facts}, default=float)
    np.savez(file, facts=np.frombuffer(text.encode(), np.uint8), **arrays)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()
    file.seek(0, os.SEEK_END)
    file.write(digest)


def unpack(data: bytes) -> tuple[dict, dict]:
    """What `pack` has written. Raises ValueError where it is damaged, or of another format."""
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("damaged")
    with np.load(io.BytesIO(content)) as parts:
        arrays = {name: parts[name] for name in parts.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    if facts.pop("format") != FORMAT:
        raise ValueError("of another version of Graft")
    return facts, arrays


def packed(facts: dict, arrays: dict) -> np.ndarray:
    """As `pack`, [n] uint8."""
    file = io.BytesIO()
    pack(file, facts, arrays)
    return np.frombuffer(file.getvalue(), np.uint8)
