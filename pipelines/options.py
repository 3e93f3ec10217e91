"""The dataclasses behind every flag: `head_epochs` is `--head-epochs`, its docstring the help text."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import tyro


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
class AudioInputOptions(InputOptions):
    """What to learn from."""

    data: str = "spoken_words"
    """Folder of class folders, folder of {train,val,test}/class folders, a manifest (CSV, TSV, JSONL or Parquet
    file of paths and labels), folder of {train,val,test} manifests, tfds:NAME, a folder of Hugging Face datasets, or
    the offline set spoken_words. WAV, FLAC, OGG, MP3, any sample rate, any number of channels."""
    group_column: str = "group"
    """Column of a manifest with what must stay in one split, such as the speaker or recording (may be missing)."""


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
class HeadOptions:
    """Phase 1: the backbone frozen, only the new head trains."""

    head_epochs: int = 8
    """Most epochs of phase 1."""
    head_learning_rate: float = 1e-3
    """Learning rate of the head in phase 1."""
    head_solver: Literal["auto", "sgd"] = "auto"
    """auto: logistic regression by L-BFGS where features are cached: seconds, its L2 penalty chosen on
    validation; epochs, rate and dropout have no part in it. sgd: the training loop, with --optimizer, always."""


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


@dataclasses.dataclass
class AudioFineTuneOptions:
    """Phase 2: the top blocks too. Block d below the head learns at rate * 0.1 * 0.8^(d-1)."""

    random_erasing: ClassVar[float] = 0.0
    mixup: ClassVar[float] = 0.0
    cutmix: ClassVar[float] = 0.0

    fine_tune_epochs: int = 4
    """Most epochs of phase 2; of each deeper rung, light and full, with --depth auto."""
    fine_tune_learning_rate: float = 1e-4  # 5e-4 lost 2.5 points of `spoken_words` on unseen voices, this none
    """Learning rate of the head in phase 2; blocks get less, by the formula above."""
    augmentation: Literal["none", "noise", "spec-augment"] = "noise"
    """Random changes to training clips in phase 2: noise crops, shifts, changes the gain and adds white noise to half
    of them; spec-augment also masks bands of frequencies and spans of time."""
    noise_snr_db: float = 10.0
    """Least signal-to-noise ratio of that noise, decibels; it is drawn from here to 20 dB more."""


@dataclasses.dataclass
class TrainingOptions:
    """Both phases."""

    batch_size: int = 32
    """Examples per update, over all devices."""
    accumulation_steps: int = 1
    """Compute each batch in so many parts: the same update with less memory."""
    optimizer: Literal["adamw", "sgd", "lion", "adafactor"] = "adamw"
    """adamw; sgd with Nesterov momentum 0.9; lion, which wants rates 3 to 10 times lower and a decay as much higher;
    adafactor, which needs least memory and wants higher rates (1e-2): its steps are in proportion to the weights."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over a phase."""
    warmup: float = 0.1
    """Share of a phase's steps in which the rate rises from 0 (cosine only)."""
    weight_decay: float = 0.01
    """Decoupled weight decay; never on biases and norms."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped (0: no clipping)."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes, 0 to 1."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs the same in the loss, however many examples it has."""
    ema: float = 0.0
    """Validate, keep and export a moving average of the weights over updates, of this decay; 0: off; usual: 0.99."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """What the backbone computes in while it trains; weights, evaluation and the exported model stay float32.
    bfloat16 suits TPUs and new GPUs and CPUs, float16 older GPUs; elsewhere they are slower. auto: what suits the
    devices that are there, float32 on CPUs."""
    xla: bool = False
    """Compile clusters of operations with XLA on GPUs: faster steps, after a minute or so of compiling. TPUs always do;
    exported models never."""
    patience: int = 3
    """Stop a phase after so many epochs without a better validation loss; the best weights are kept."""
    target: float = 0.0
    """Validation accuracy that is enough, such as 0.95: training ends once the best weights reach it (0: never)."""
    budget: str = ""
    """Most time for training, such as 90s, 10m or 2h: no deeper phase begins that would likely need more, and one that
    does ends with its epoch (empty: no limit)."""
    distribute: Literal["none", "mirrored", "multiworker", "tpu", "auto"] = "none"
    """mirrored: all local GPUs, or --devices. multiworker: processes on one or many machines, as TF_CONFIG, Slurm or
    Kubernetes names them. tpu: --tpu. auto: multiworker where the environment names workers, else a TPU, else all
    local GPUs where there are several, else one device."""
    devices: tuple[str, ...] = ()
    """Devices for mirrored, such as GPU:0 GPU:1 (none named: all local GPUs)."""
    tpu: str = ""
    """Name or address of a TPU (empty: the one of this TPU VM)."""
    scale_batch: Literal["none", "linear"] = "none"
    """none: --batch-size is over all devices, so that any number of them gives the same figures and rates stay as they
    are. linear: --batch-size is for each device; the batch and all learning rates grow with their number."""
    steps_per_call: int = 1
    """Steps that are one graph: the same figures, and less waiting for Python between them. TPUs want 50 or so."""
    checkpoint_seconds: float = 60.0
    """Save where training is so often, and at each epoch's end: `graft resume RUN` goes on from there."""
    seed: int = 0
    """Same seed, same command, same machine: same figures."""


@dataclasses.dataclass
class ForgettingOptions:
    """What watches over the run."""

    forgetting_limit: float = 0.0
    """Least likeness (linear CKA, 1: the same) of the features to the pretrained ones: a phase that goes below it is
    stopped, and its best weights within it are kept (0: no limit; 0.5 stops what destroys a backbone)."""
    wise_ft: bool = False
    """Average the pretrained and the fine-tuned weights, in the proportion that does best on validation (WiSE-FT)."""


@dataclasses.dataclass
class GuardOptions(ForgettingOptions):
    """What watches over the run."""

    baseline: Literal["none", "scratch"] = "none"
    """scratch: also train the same architecture from random weights, for the epochs of both phases together, and
    compare on the test set. Takes longer than the run itself."""
    strict: bool = False
    """Exit with 3 where transfer hurts; the run is complete all the same. Also where examples of a given test set are
    in train or val too; then nothing is trained."""
    check_labels: bool = False
    """Look for wrong labels: answer each example by a model that has not seen it, and list those whose label it doubts
    most. Takes a minute or so per 10,000 examples."""
    gap_limit: float = 0.1
    """Largest gap between training and validation accuracy, a share of one, that is let pass: the report warns of a
    larger one, and says what to change (0: no limit). It stops nothing: early stopping, see --patience, does."""
    calibrate: bool = True
    """Divide logits by a temperature that suits the validation set best, in the exported model too: its probabilities
    then say how often it is right. The answers stay the same."""
    abstain_below_precision: float = 0.0
    """Precision that sure answers should have, such as 0.95: the exported model marks an answer `unsure` below a
    probability that is chosen on validation for it (0: no such mark). Labels stay as they are."""


@dataclasses.dataclass
class CacheOptions:
    """What is frozen is computed once, and found again by later runs on the same data."""

    cache: Literal["auto", "memory", "none"] = "auto"
    """auto: kept on disk for later runs, and read into memory where it fits; memory: gone with the run; none: compute
    frozen layers in every epoch."""
    cache_dir: str = ""
    """Folder of the cache (empty: features/ in ~/.cache/graft; GRAFT_CACHE moves that)."""
    cache_memory: float = 0.0
    """Gigabytes that cached activations may take in memory before they are read from disk (0: a quarter of what is
    free)."""


@dataclasses.dataclass
class ImageCacheOptions(CacheOptions):
    """What is frozen is computed once, and found again by later runs on the same data."""

    views: int = 4
    """Different augmentations of each image that are cached for phase 2, taken in turn; each is computed when its epoch
    comes. As many as epochs is as without a cache; fewer take less time and space."""


@dataclasses.dataclass
class AudioCacheOptions(CacheOptions):
    """What is frozen is computed once, and found again by later runs on the same data."""

    views: int = 4
    """Different augmentations of each clip that are cached for phase 2, taken in turn; each is computed when its epoch
    comes. As many as epochs is as without a cache; fewer take less time and space."""


@dataclasses.dataclass
class ReportOptions:
    """What is measured and shown."""

    positive: str = ""
    """For two classes, the one to find: adds sensitivity at --specificity."""
    specificity: float = 0.9
    """Specificity at which sensitivity is reported, 0 to 1."""
    report_inputs: Literal["all", "none"] = "all"
    """Show the worst mistakes themselves in the report (pictures, texts, players for sounds), or by id only."""


@dataclasses.dataclass
class RunOptions:
    """Where results go."""

    out: str = ""
    """Run folder (empty: runs/NAME OF THE DATA, then -2, -3); never overwritten."""
    resume: bool = False
    """Go on with the run in --out where there is one, with the flags that it was begun with; else begin it. For
    schedulers, which start the same command again."""
    config: str = ""
    """YAML file with any of these flags (head_epochs: 8); flags on the command line win."""
    print_config: bool = False
    """Print the configuration as YAML and stop."""


def flat(options):
    """A group of options whose flags carry no prefix."""
    return Annotated[options, tyro.conf.OmitArgPrefixes]


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
