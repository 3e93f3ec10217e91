"""A small Wav2Vec2 with random weights, and clips in which each character is a tone."""

from __future__ import annotations

import csv
import pathlib

import numpy as np

from models.offline_sounds import wav_bytes
from tests.tiny_sounds import tone

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZES |= {"conv_dim": [32, 48, 64, 64], "conv_kernel": [10, 8, 8, 4], "conv_stride": [5, 4, 4, 4]}
SIZES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer"}
SIZES |= {"do_stable_layer_norm": True, "conv_bias": True, "layerdrop": 0.0, "mask_time_prob": 0.0}
PREPROCESS = {"sampling_rate": 16_000, "do_normalize": True, "return_attention_mask": True}
PITCHES_HZ = {"a": 300, "b": 700, "c": 1_500, " ": 3_500}


def write_wav2vec2(folder: pathlib.Path, **sizes) -> pathlib.Path:
    """A folder in transformers' layout with random weights."""
    from models.wav2vec2 import wav2vec2_backbone
    from models.wav2vec2_settings import encoder_settings
    from models.wav2vec2_weights import write_wav2vec2_folder

    config = {"model_type": "wav2vec2", **SIZES, **sizes}
    backbone = wav2vec2_backbone(encoder_settings(folder, config), folder.name, "frames")
    write_wav2vec2_folder(backbone.encoder, folder, config, PREPROCESS)
    return folder


def write_transcripts(folder: pathlib.Path, count: int = 48, seed: int = 0) -> pathlib.Path:
    """A manifest of clips of 2 to 5 tones, each 0.12 s, and which characters they are."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for index in range(count):
        text = "".join(random.choice(["a", "b", "c"], int(random.integers(2, 6))))
        text = text[:1] + " " + text[1:]
        sound = np.concatenate([tone(PITCHES_HZ[c], 0.12, 16_000, seed * 1000 + index * 10) for c in text])
        (folder / f"{index:03}.wav").write_bytes(wav_bytes(sound, 16_000))
        rows.append((f"{index:03}.wav", text.upper() + "!"))
    with (folder / "transcripts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *rows])
    return folder / "transcripts.csv"
