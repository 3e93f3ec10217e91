"""Flags that kinds of data share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro


def flat(options):
    """A group of options whose flags carry no prefix."""
    return Annotated[options, tyro.conf.OmitArgPrefixes]


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
    export: bool = True
    """Make a verified version for TensorFlow Serving. Without, training and its report end sooner, and `graft export
    RUN` makes it later."""
    resume: bool = False
    """Go on with the run in --out where there is one, with the flags that it was begun with; else begin it. For
    schedulers, which start the same command again."""
    config: str = ""
    """YAML file with any of these flags (head_epochs: 8); flags on the command line win."""
    print_config: bool = False
    """Print the configuration as YAML and stop."""
