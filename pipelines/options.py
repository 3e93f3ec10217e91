"""Every flag of a command: `head_epochs` is `--head-epochs`, its docstring the help text.

A command's flags come in groups, dataclasses too: `common_options.py` has those that kinds of data share,
`image_options.py` and its like those that one kind has to itself.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pipelines.audio_options import AudioCacheOptions, AudioFineTuneOptions, AudioInputOptions, AudioModelOptions
from pipelines.common_options import (
    CacheOptions,
    ForgettingOptions,
    GuardOptions,
    HeadOptions,
    ReportOptions,
    RunOptions,
    TrainingOptions,
    flat,
)
from pipelines.image_options import FineTuneOptions, ImageCacheOptions, InputOptions, ModelOptions
from pipelines.speech_options import (
    SpeechFineTuneOptions,
    SpeechHeadOptions,
    SpeechInputOptions,
    SpeechModelOptions,
    SpeechTrainingOptions,
)
from pipelines.text_options import TextFineTuneOptions, TextInputOptions, TextModelOptions


@dataclasses.dataclass
class ImageConfig:
    """Fine-tune a pretrained image model on your pictures, and export it for TensorFlow Serving.

    Trains a new head on the frozen backbone first, then the top blocks too, slower, then all where that may pay.
    Start with: graft image --data photos/   (one folder of images per class)
    """

    input: flat(InputOptions) = dataclasses.field(default_factory=InputOptions)
    model: flat(ModelOptions) = dataclasses.field(default_factory=ModelOptions)
    head: flat(HeadOptions) = dataclasses.field(default_factory=HeadOptions)
    fine_tune: flat(FineTuneOptions) = dataclasses.field(default_factory=FineTuneOptions)
    training: flat(TrainingOptions) = dataclasses.field(default_factory=TrainingOptions)
    cache: flat(ImageCacheOptions) = dataclasses.field(default_factory=ImageCacheOptions)
    guards: flat(GuardOptions) = dataclasses.field(default_factory=GuardOptions)
    report: flat(ReportOptions) = dataclasses.field(default_factory=ReportOptions)
    run: flat(RunOptions) = dataclasses.field(default_factory=RunOptions)


@dataclasses.dataclass
class TextConfig:
    """Fine-tune a pretrained text model on your texts, and export it for TensorFlow Serving.

    Trains a new head on the frozen backbone first, then the top blocks too, slower, then all where that may pay.
    Start with: graft text --data reviews.csv   (columns text and label)
    """

    input: flat(TextInputOptions) = dataclasses.field(default_factory=TextInputOptions)
    model: flat(TextModelOptions) = dataclasses.field(default_factory=TextModelOptions)
    head: flat(HeadOptions) = dataclasses.field(default_factory=HeadOptions)
    fine_tune: flat(TextFineTuneOptions) = dataclasses.field(default_factory=TextFineTuneOptions)
    training: flat(TrainingOptions) = dataclasses.field(default_factory=TrainingOptions)
    cache: flat(CacheOptions) = dataclasses.field(default_factory=CacheOptions)
    guards: flat(GuardOptions) = dataclasses.field(default_factory=GuardOptions)
    report: flat(ReportOptions) = dataclasses.field(default_factory=ReportOptions)
    run: flat(RunOptions) = dataclasses.field(default_factory=RunOptions)


@dataclasses.dataclass
class AudioConfig:
    """Fine-tune a pretrained audio model on your clips, and export it for TensorFlow Serving.

    Trains a new head on the frozen backbone first, then the top blocks too, slower, then all where that may pay.
    Start with: graft audio --data clips/   (one folder of clips per class)
    """

    kind: ClassVar[str] = "audio"

    input: flat(AudioInputOptions) = dataclasses.field(default_factory=AudioInputOptions)
    model: flat(AudioModelOptions) = dataclasses.field(default_factory=AudioModelOptions)
    head: flat(HeadOptions) = dataclasses.field(default_factory=HeadOptions)
    fine_tune: flat(AudioFineTuneOptions) = dataclasses.field(default_factory=AudioFineTuneOptions)
    training: flat(TrainingOptions) = dataclasses.field(default_factory=TrainingOptions)
    cache: flat(AudioCacheOptions) = dataclasses.field(default_factory=AudioCacheOptions)
    guards: flat(GuardOptions) = dataclasses.field(default_factory=GuardOptions)
    report: flat(ReportOptions) = dataclasses.field(default_factory=ReportOptions)
    run: flat(RunOptions) = dataclasses.field(default_factory=RunOptions)


@dataclasses.dataclass
class SpeechConfig:
    """Teach a pretrained speech model to write down what is said, and export it for TensorFlow Serving.

    A CTC head over the characters of your transcripts: trained on the frozen backbone first, then with the transformer.
    Start with: graft speech --data transcripts.csv   (columns path and text)
    """

    kind: ClassVar[str] = "speech"

    input: flat(SpeechInputOptions) = dataclasses.field(default_factory=SpeechInputOptions)
    model: flat(SpeechModelOptions) = dataclasses.field(default_factory=SpeechModelOptions)
    head: flat(SpeechHeadOptions) = dataclasses.field(default_factory=SpeechHeadOptions)
    fine_tune: flat(SpeechFineTuneOptions) = dataclasses.field(default_factory=SpeechFineTuneOptions)
    training: flat(SpeechTrainingOptions) = dataclasses.field(default_factory=SpeechTrainingOptions)
    cache: flat(CacheOptions) = dataclasses.field(default_factory=CacheOptions)
    guards: flat(ForgettingOptions) = dataclasses.field(default_factory=ForgettingOptions)
    report: flat(ReportOptions) = dataclasses.field(default_factory=ReportOptions)
    run: flat(RunOptions) = dataclasses.field(default_factory=RunOptions)
