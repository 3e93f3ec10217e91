"""Small sound models and small sounds: a random Whisper of two units, and clips whose pitch tells the class."""

from __future__ import annotations

import pathlib

import numpy as np

from models.offline_sounds import wav_bytes

PITCHES_HZ = {"high": 2_000, "low": 220, "middle": 700}


def write_whisper(folder: pathlib.Path) -> pathlib.Path:
    """A KerasHub preset of a random Whisper with two units of width 16 that hears 3 s at most."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.WhisperBackbone(
        vocabulary_size=8, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32, num_mels=80,
        max_encoder_sequence_length=300, max_decoder_sequence_length=8,
    )  # fmt: skip
    for weight in backbone.trainable_weights:  # so that no bias is 0, and units differ from passing their input on
        weight.assign_add(keras.random.normal(weight.shape, stddev=0.1))
    backbone.save_to_preset(str(folder))
    return folder


def tone(pitch_hz: float, seconds: float, rate_hz: int = 16_000, seed: int = 0) -> np.ndarray:
    """A tone with a little noise, [n] int16."""
    random = np.random.default_rng(seed)
    places = np.arange(max(1, round(seconds * rate_hz))) / rate_hz
    sound = 0.3 * np.sin(2 * np.pi * pitch_hz * places + random.uniform(0, 6)) + random.normal(0, 0.03, len(places))
    return (sound * 32767).astype(np.int16)


def write_tones(folder: pathlib.Path, per_class: int = 10, longest: float = 1.4, rates_hz=(16_000,)) -> pathlib.Path:
    """A folder of class folders with WAV files of tones, 0.1 s to `longest`."""
    random = np.random.default_rng(1)
    for label, pitch_hz in PITCHES_HZ.items():
        (folder / label).mkdir(parents=True)
        for index in range(per_class):
            rate_hz = rates_hz[index % len(rates_hz)]
            sound = tone(pitch_hz * random.uniform(0.9, 1.1), random.uniform(0.1, longest), rate_hz, index)
            (folder / label / f"{index:02}.wav").write_bytes(wav_bytes(sound, rate_hz))
    return folder
