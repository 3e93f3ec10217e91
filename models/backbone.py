"""Backbone: a pretrained encoder, its exact preprocessing, and its ordered blocks."""

from __future__ import annotations

import collections
import dataclasses
import pathlib

import keras

from models import hubs, offline
from models.applications import load_application
from models.audio_families import audio_family_of
from models.layouts import folder_layout, read_config
from models.names import RANDOM, check_backbone_name
from models.text_families import family_of


@dataclasses.dataclass(frozen=True)
class ImagePreprocess:
    """How decoded pixels become encoder input; the values are the checkpoint's own, not ours.

    Steps, in this order: central crop, resize to `image_size`, then `(pixel - mean) / deviation`
    on RGB pixels in 0 to 255, then the channels in the order that the encoder wants.
    """

    image_size: tuple[int, int]  # height, width in pixels
    aspect: str = "crop"  # "crop": central crop to the target's shape; "stretch": ignore the shape
    crop_share: float = 1.0  # share of the largest such central crop that is kept
    interpolation: str = "bilinear"  # a tf.image.ResizeMethod value
    antialias: bool = False
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # per channel, 0 to 255
    deviation: tuple[float, float, float] = (1.0, 1.0, 1.0)  # per channel, 0 to 255
    channel_order: str = "rgb"  # "rgb" or "bgr"; mean and deviation are in RGB order either way


@dataclasses.dataclass(frozen=True)
class TextPreprocess:
    """How strings become encoder input: the checkpoint's own tokenizer and special tokens."""

    tokenizer: object  # strings [n] tf.string -> RaggedTensor [n, tokens] int32, core or TF-Text ops, inside a graph
    identity: str  # SHA-256 over everything the tokenizer's answers depend on (vocabulary, merges, flags); cache keys
    max_length: int  # most tokens of an example, special ones included: what the position embeddings allow, or 512
    pad: int  # token id of padding
    start: tuple[int, ...] = ()  # token ids before the first text (BERT: [CLS]; RoBERTa: <s>; Llama: <s>)
    separator: tuple[int, ...] = ()  # between the two texts of a pair (BERT: [SEP]; RoBERTa: </s></s>)
    end: tuple[int, ...] = ()  # after the last text (BERT: [SEP]; RoBERTa and T5: </s>; GPT-2 and Llama: none)
    segments: bool = False  # the encoder takes segment ids (0: the first text and its separator, 1: the second)
    sequence_length: int = 128  # tokens that are kept, special ones included


@dataclasses.dataclass(frozen=True)
class AudioPreprocess:
    """How decoded sound becomes encoder input; the values are the checkpoint's own.

    Steps, in this order: mono (the mean of the channels, -1 to 1), resample to `sample_rate_hz`, cut or pad with zeros
    to `window_seconds`, then, where `normalise`, zero mean and unit variance over the real samples. The encoder takes
    waveform [batch, samples] float32 and attention_mask [batch, samples] int32 (1: a real sample, 0: padding); what
    else a checkpoint wants (Whisper: a log-mel spectrogram) is part of the encoder.
    """

    sample_rate_hz: int = 16_000
    window_seconds: float = 2.0
    normalise: bool = False  # as Wav2Vec2FeatureExtractor with do_normalize
    longest_seconds: float | None = None  # what lies behind in a window is not heard (Whisper: 30); None: no limit


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual, MBConv or transformer unit: a name and its layers, bottom to top."""

    name: str
    layers: tuple[keras.layers.Layer, ...]

    @property
    def weights(self) -> list[keras.Variable]:
        return [weight for layer in self.layers for weight in layer.weights]


POOLINGS = {
    "average": lambda features: keras.ops.mean(features, axis=(1, 2)),  # over height and width
    "token": lambda features: features[:, 0],  # the class token, which comes first
    "tokens": lambda features: keras.ops.mean(features, axis=1),  # over all tokens
    "none": lambda features: features,  # one vector per example already
}


@dataclasses.dataclass
class Backbone:
    """A pretrained encoder and what must be known to feed, freeze and describe it."""

    name: str
    encoder: keras.Model  # flat functional graph: preprocessed input -> features
    preprocess: ImagePreprocess | TextPreprocess | AudioPreprocess | None  # None: text goes in as it is
    blocks: list[Block]  # bottom to top; block 0 holds the stem, the last one what follows the last unit
    feature_size: int  # width of the pooled features
    pooling: str = "average"  # a key of POOLINGS: how features become one vector per example
    frozen_front: int = 0  # bottom blocks that stay frozen even under --depth full (the convolutions of Wav2Vec2)
    source_head: tuple | None = None  # the original classifier: (kernel [feature_size, n], bias [n])
    source: dict = dataclasses.field(default_factory=dict)  # package, version, file, sha256, licence, url

    def __post_init__(self):
        check_blocks(self.name, self.encoder, self.blocks)
        if self.pooling not in POOLINGS:
            raise ValueError(f"Backbone {self.name}: pooling {self.pooling!r} is none of {', '.join(POOLINGS)}.")

    def pooled(self, features):
        """Encoder output [batch, height, width, d] or [batch, tokens, d], as `pooling` says -> [batch, d]."""
        return POOLINGS[self.pooling](features)


def check_blocks(name: str, encoder: keras.Model, blocks: list[Block]) -> None:
    """Raise ValueError unless the blocks hold every weight of the encoder exactly once.

    A weight outside every block could never be frozen or thawed, and one in two blocks would get
    two learning rates, so a partition that is not exact is a bug of the loader.
    """
    counts = collections.Counter(id(weight) for block in blocks for weight in block.weights)
    missing = [weight.path for weight in encoder.weights if counts[id(weight)] == 0]
    twice = [weight.path for weight in encoder.weights if counts[id(weight)] > 1]
    foreign = len(counts) - len(encoder.weights) + len(missing)
    if missing or twice or foreign:
        raise ValueError(
            f"The blocks of backbone {name} must hold each of its {len(encoder.weights)} weights exactly once. "
            f"In no block: {missing[:5]}. In several: {twice[:5]}. Not the encoder's: {foreign}."
        )


def load_backbone(name: str, pooling: str | None = None) -> Backbone:
    """Load a pretrained backbone, of images, of text or of sound.

    Args:
        name: an offline name (`efficientnet_lite0`); a built-in name of KerasHub (`resnet_50_imagenet`);
            `hf://user/model` or `hf://user/model@revision`; `kaggle://user/model/keras/variation`;
            `applications:ResNet50V2` or `applications:ResNet50V2:FILE`; `tfhub:URL` or `tfhub:FOLDER`;
            a folder that holds a KerasHub preset, a Hugging Face or timm model, or a CTranslate2 Whisper; or `random:`
            and one of these, for random weights.
        pooling: of a text model: "mean" (over real tokens), "cls" (the first one) or "last" (the last real one);
            None: as the model's own files say, else its family's. Of a model of sound: "mean" (None too, over a clip's
            own frames) or "frames" (a vector each). Other models have one pooling.

    Raises:
        GraftError: nothing by that name; says what was looked for and which offline names exist. A pooling that
            does not fit.
    """
    if name.startswith(RANDOM):
        from models.random_weights import random_copy

        return random_copy(load_backbone(name.removeprefix(RANDOM), pooling))
    if name == "efficientnet_lite0":
        from models.efficientnet_lite import load_efficientnet_lite0

        return load_efficientnet_lite0()
    check_backbone_name(name, kind=None)
    if name.startswith("applications:"):
        return load_application(name)
    if name.startswith("tfhub:"):
        from models.tfhub import load_hub_module

        return load_hub_module(name.removeprefix("tfhub:"))
    is_folder = not name.startswith(("hf://", "kaggle://")) and pathlib.Path(name).is_dir()
    is_offline = name in hubs.offline_names()
    if is_offline:
        folder = offline.fetch(name)
    else:
        folder = pathlib.Path(name) if is_folder else hubs.fetch_hub(name)
    config = read_config(folder)
    audio_family = audio_family_of(config, folder_layout(folder))
    if audio_family == "whisper":
        from models.whisper import load_whisper_folder  # keras_hub takes seconds to import

        backbone = load_whisper_folder(folder, pooling)
    elif audio_family:
        from models.wav2vec2 import load_wav2vec2_folder

        backbone = load_wav2vec2_folder(folder, pooling)
    elif family_of(config):
        from models.text import load_text_folder

        backbone = load_text_folder(folder, pooling)
    elif folder_layout(folder) == "kerashub":
        from models.kerashub import load_preset_folder

        backbone = load_preset_folder(folder)
    else:
        from models.huggingface import load_huggingface_folder

        backbone = load_huggingface_folder(folder)
    if is_offline:
        item = offline.WEIGHTS[name]
        backbone.source |= {"package": item["package"], "version": item["version"], "url": item["source"]}
        backbone.source["licence"] = item["licence"]
        backbone.name = name
    elif not is_folder:  # there the folder's own name is a version's number or a commit
        backbone.source |= hubs.hub_source(name)
        backbone.name = backbone.source["preset"]
    return backbone
