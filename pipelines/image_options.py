"""Flags of `graft image` alone."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pipelines.common_options import CacheOptions


@dataclasses.dataclass
class InputOptions:
    """What to learn from."""

    data: str = "textures"
    """Folder of class folders, folder of {train,val,test}/class folders, a manifest (CSV, TSV, JSONL or Parquet
    file of paths and labels), folder of {train,val,test} manifests, or an offline set: textures, digits."""
    min_per_class: int = 0
    """Leave out classes with fewer examples than this (0: stop with an error at a class that has only one)."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    label_column: str = "label"
    """Column of a manifest with the class of each file."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the patient or customer (may be missing)."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""


@dataclasses.dataclass
class ModelOptions:
    """What to start from, and how much of it to train."""

    backbone: str = "efficientnet_lite0"
    """Offline name (efficientnet_lite0), or the folder of a KerasHub preset: EfficientNet, ResNet, MobileNet or ViT."""
    image_size: int = 0
    """Side of the model's square input, pixels (0: the backbone's native size)."""
    depth: str = "auto"
    """Blocks to fine-tune: auto climbs from head to the top blocks (light) to all (full) while it may pay, and keeps
    what does best on validation; or say it: head (none), a number counted from the top, or full."""
    light_blocks: int = 2
    """Blocks that the middle rung of --depth auto thaws, counted from the top."""
    dropout: float = 0.2
    """Share of pooled features dropped in training, 0 to 1."""
    train_batch_norm: bool = False
    """Also train BatchNorm layers of thawed blocks. Off: their batch statistics are noise on small data."""


@dataclasses.dataclass
class FineTuneOptions:
    """Phase 2: the top blocks too. Block d below the head learns at rate * 0.1 * 0.8^(d-1)."""

    fine_tune_epochs: int = 4
    """Most epochs of phase 2; of each deeper rung, light and full, with --depth auto."""
    fine_tune_learning_rate: float = 3e-4
    """Learning rate of the head in phase 2; blocks get less, by the formula above."""
    augmentation: Literal["none", "crop", "flip-crop", "rand-augment"] = "flip-crop"
    """Random changes to training images in phase 2: left-right flips and crops (crop: those alone, for what has another
    meaning when mirrored, such as digits); rand-augment adds two of 14 changes of colour and shape (RandAugment, N 2,
    magnitude 9 of 30): more variety for longer training."""
    random_erasing: float = 0.0
    """Share of training images in phase 2 of which a random box is filled with noise, 0 to 1; usual: 0.25."""
    mixup: float = 0.0
    """Train phase 2 on blends of two examples and of their labels (MixUp). The share of each is drawn from
    Beta(A, A), A this number; 0: off; usual: 0.2, where most blends are nearly one of the two."""
    cutmix: float = 0.0
    """Train phase 2 on images with a box pasted in from another, labels shared by area (CutMix). As --mixup; usual: 1.
    With both, each batch takes one of them by a coin."""


@dataclasses.dataclass
class ImageCacheOptions(CacheOptions):
    """What is frozen is computed once, and found again by later runs on the same data."""

    views: int = 4
    """Different augmentations of each image that are cached for phase 2, taken in turn; each is computed when its epoch
    comes. As many as epochs is as without a cache; fewer take less time and space."""
