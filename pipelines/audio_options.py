"""Flags of `graft audio` alone; it finds files as `graft image` does, by the same flags."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pipelines.common_options import CacheOptions
from pipelines.image_options import InputOptions


@dataclasses.dataclass
class AudioInputOptions(InputOptions):
    """What to learn from."""

    data: str = "spoken_words"
    """Folder of class folders, folder of {train,val,test}/class folders, a manifest (CSV, TSV, JSONL or Parquet
    file of paths and labels), folder of {train,val,test} manifests, tfds:NAME, a folder of Hugging Face datasets, or
    the offline set spoken_words. WAV, FLAC, OGG, MP3, any sample rate, any number of channels."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the speaker or recording (may be missing)."""


@dataclasses.dataclass
class AudioModelOptions:
    """What to start from, and how much of it to train."""

    train_batch_norm: ClassVar[bool] = False  # audio models have none
    pooling: ClassVar[str] = "mean"  # over the real frames of the last layer

    backbone: str = "whisper_tiny_en"
    """Offline name (whisper_tiny_en), hf://USER/MODEL, or a folder of one of these: Wav2Vec2, HuBERT, Whisper."""
    window_seconds: float = 2.0
    """Seconds that the model hears at once, in training and when served; shorter clips are padded, of longer ones a
    few windows are heard and their answers averaged."""
    depth: str = "auto"
    """Blocks to fine-tune: auto climbs from head to the top blocks (light) to all (full) while it may pay, and keeps
    what does best on validation; or say it: head (none), a number counted from the top, or full."""
    light_blocks: int = 2
    """Blocks that the middle rung of --depth auto thaws, counted from the top."""
    dropout: float = 0.2
    """Share of pooled features dropped in training, 0 to 1."""


@dataclasses.dataclass
class AudioFineTuneOptions:
    """Phase 2: the top blocks too. Block d below the head learns at rate * 0.1 * 0.8^(d-1)."""

    random_erasing: ClassVar[float] = 0.0
    mixup: ClassVar[float] = 0.0
    cutmix: ClassVar[float] = 0.0

    fine_tune_epochs: int = 4
    """Most epochs of phase 2; of each deeper rung, light and full, with --depth auto."""
    fine_tune_learning_rate: float = 1e-4  # 5e-4 varied more from seed to seed on unseen voices of `spoken_words`
    """Learning rate of the head in phase 2; blocks get less, by the formula above."""
    augmentation: Literal["none", "noise", "spec-augment"] = "noise"
    """Random changes to training clips in phase 2: noise crops, shifts, changes the gain and adds white noise to half
    of them; spec-augment also masks bands of frequencies and spans of time."""
    noise_snr_db: float = 10.0
    """Least signal-to-noise ratio of that noise, decibels; it is drawn from here to 20 dB more."""


@dataclasses.dataclass
class AudioCacheOptions(CacheOptions):
    """What is frozen is computed once, and found again by later runs on the same data."""

    views: int = 4
    """Different augmentations of each clip that are cached for phase 2, taken in turn; each is computed when its epoch
    comes. As many as epochs is as without a cache; fewer take less time and space."""
