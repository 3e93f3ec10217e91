"""What the probe of `serving/contract.py` becomes in training: through the input pipeline that training uses."""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import pyarrow as pa

from pipelines.data import image_loader
from pipelines.sound_augmentation import sound_loader
from pipelines.tokens import token_parts
from pipelines.transcripts import clip_parts
from serving.contract import (
    LONG_PROBE,
    TEXT_PROBE,
    TONE_RATE_HZ,
    TONE_SECONDS,
    image_contract,
    image_probe,
    sound_contract,
    sound_probe,
    text_contract,
)


def trained_image_contract(preprocess, white_level: int) -> dict:
    """The contract of pictures, as `serving.contract.image_contract` gives it, read from a file as training reads."""
    with tempfile.TemporaryDirectory(prefix="graft-probe-") as folder:
        file = pathlib.Path(folder, "probe.png")
        file.write_bytes(image_probe())
        return image_contract(image_loader(preprocess, white_level)(str(file), np.zeros(2, np.int32)))


def trained_sound_contract(preprocess) -> dict:
    """The contract of sounds, as `serving.contract.sound_contract` gives it, read from a file as training reads."""
    with tempfile.TemporaryDirectory(prefix="graft-probe-") as folder:
        file = pathlib.Path(folder, "probe.wav")
        file.write_bytes(sound_probe())
        waveform, mask = sound_loader(preprocess)(str(file), np.zeros(2, np.int32))
    return sound_contract(waveform[0], mask[0], preprocess.sample_rate_hz)


def trained_clip_contract(preprocess) -> dict:
    """As `trained_sound_contract`, of clips that are heard as a whole, for recognition."""
    with tempfile.TemporaryDirectory(prefix="graft-probe-") as folder:
        file = pathlib.Path(folder, "probe.wav")
        file.write_bytes(sound_probe())
        facts = {"path": [str(file)], "frames": [int(TONE_SECONDS * TONE_RATE_HZ)], "rate_hz": [TONE_RATE_HZ]}
        ((_, inputs),) = clip_parts(pa.table(facts), preprocess, 1)
        (waveform,), (mask,) = inputs[0].load([inputs], 0, [0])
    return sound_contract(waveform, mask, preprocess.sample_rate_hz)


def trained_text_contract(preprocess) -> dict:
    """The contract of texts, as `serving.contract.text_contract` gives it; {} for a model that takes strings."""
    if preprocess is None:
        return {}
    texts = [TEXT_PROBE, LONG_PROBE, TEXT_PROBE.upper(), TEXT_PROBE.lower()]
    ids = [None] * len(texts)
    for rows, (token_ids, mask, *_) in token_parts(pa.table({"text": texts}), preprocess):
        for row, numbers, real in zip(rows, token_ids, mask):
            ids[row] = numbers[real > 0]
    return text_contract(*ids)
