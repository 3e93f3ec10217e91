"""Flags of `graft text` alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal


@dataclasses.dataclass
class TextInputOptions:
    """What to learn from."""

    data: str = "topics"
    """A manifest (CSV, TSV, JSONL or Parquet file of texts and labels), folder of {train,val,test} manifests, folder of
    class folders with .txt files, tfds:NAME, a folder of Hugging Face datasets, or the offline set topics."""
    min_per_class: int = 0
    """Leave out classes with fewer examples than this (0: stop with an error at a class that has only one)."""
    text_column: str = "text"
    """Column of a manifest with the texts."""
    second_column: str = ""
    """Column with the second text, where an example is a pair of texts (empty: one text)."""
    label_column: str = "label"
    """Column of a manifest with the class of each text, or several as a|b."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the author or customer (may be missing)."""
    data_dir: str = ""
    """Folder of prepared TFDS sets, for tfds:NAME (empty: TFDS's own)."""


@dataclasses.dataclass
class TextModelOptions:
    """What to start from, and how much of it to train."""

    train_batch_norm: ClassVar[bool] = False  # text models have none

    backbone: str = "minilm_l6"
    """Offline name (minilm_l6), hf://USER/MODEL, a KerasHub name, or a folder of one of these: BERT, DistilBERT,
    RoBERTa, ALBERT, DeBERTa, ELECTRA, XLM-R, GPT-2, Llama, T5; or tfhub:FOLDER of a module that takes strings."""
    sequence_length: int = 128
    """Most tokens of a text that are kept; longer ones lose their end. Short texts cost no more than they are long."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """How token vectors become one: their mean, the first token's, the last token's (auto: as the checkpoint's
    sentence-transformers files say, else as suits the family)."""
    depth: str = "auto"
    """Blocks to fine-tune: auto climbs from head to the top blocks (light) to all (full) while it may pay, and keeps
    what does best on validation; or say it: head (none), a number counted from the top, or full."""
    light_blocks: int = 2
    """Blocks that the middle rung of --depth auto thaws, counted from the top."""
    dropout: float = 0.2
    """Share of pooled features dropped in training, 0 to 1."""


@dataclasses.dataclass
class TextFineTuneOptions:
    """Phase 2: the top blocks too. Block d below the head learns at rate * 0.1 * 0.8^(d-1)."""

    augmentation: ClassVar[str] = "none"  # texts are not changed at random
    random_erasing: ClassVar[float] = 0.0
    mixup: ClassVar[float] = 0.0
    cutmix: ClassVar[float] = 0.0

    fine_tune_epochs: int = 3
    """Most epochs of phase 2; of each deeper rung, light and full, with --depth auto."""
    fine_tune_learning_rate: float = 5e-4
    """Learning rate of the head in phase 2; blocks get less, by the formula above."""
