"""Flags of `graft speech` alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pipelines.common_options import TrainingOptions
from pipelines.text_options import TextFineTuneOptions


@dataclasses.dataclass
class SpeechInputOptions:
    """What to learn from."""

    data: str = ""
    """A manifest of transcripts (CSV, TSV, JSONL or Parquet file with the columns path and text), a folder of
    {train,val,test} manifests, or one of Hugging Face datasets with a column of sounds. WAV, FLAC, OGG, MP3, any sample
    rate, any number of channels."""
    path_column: str = "path"
    """Column of a manifest with the files, absolute or relative to the manifest's folder."""
    text_column: str = "text"
    """Column of a manifest with what is said in each file."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the speaker (may be missing)."""
    normalise: Literal["letters", "lower", "none"] = "letters"
    """What becomes of transcripts before they are learnt: letters, lower case without punctuation (letters, digits and
    apostrophes stay); lower, lower case; none, as they are. Saved with the model, which answers in that form."""
    longest_seconds: float = 30.0
    """Clips that are longer are left out of training, and refused by the exported model."""


@dataclasses.dataclass
class SpeechModelOptions:
    """What to start from, and how much of it to train."""

    train_batch_norm: ClassVar[bool] = False  # speech models have none

    backbone: str = "hf://facebook/wav2vec2-base"
    """hf://USER/MODEL or a folder of Wav2Vec2 or HuBERT, XLS-R and MMS among them; after random: without its
    weights."""
    depth: str = "full"
    """Blocks to fine-tune in phase 2: head (none), a number counted from the top, or full: all but the convolutions.
    auto climbs from head to the top blocks (light) to full while it may pay, and keeps what does best on validation."""
    light_blocks: int = 2
    """Blocks that the middle rung of --depth auto thaws, counted from the top."""
    dropout: float = 0.1
    """Share of each frame's features dropped in training, 0 to 1."""


@dataclasses.dataclass
class SpeechHeadOptions:
    """Phase 1: the backbone frozen, only the new head trains."""

    head_epochs: int = 4
    """Most epochs of phase 1."""
    head_learning_rate: float = 1e-3
    """Learning rate of the head in phase 1."""


@dataclasses.dataclass
class SpeechFineTuneOptions(TextFineTuneOptions):
    """Phase 2: transformer blocks too. Block d below the head learns at rate * 0.1 * 0.8^(d-1)."""

    fine_tune_epochs: int = 20
    """Most epochs of phase 2."""
    fine_tune_learning_rate: float = 1e-3
    """Learning rate of the head in phase 2; blocks get less, by the formula above."""


@dataclasses.dataclass
class SpeechTrainingOptions(TrainingOptions):
    """Both phases."""

    class_weights: ClassVar[str] = "none"
    label_smoothing: ClassVar[float] = 0.0

    patience: int = 6
    """Stop a phase after so many epochs without a better validation loss; the best weights are kept."""
