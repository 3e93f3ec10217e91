"""The audio families that Graft knows: the one table that names and loaders read. No TensorFlow."""

from __future__ import annotations

from models import GraftError

# family: `classes`, KerasHub's backbones; `types`, transformers' model_type; `presets`, KerasHub's folders of
# built-in presets.
FAMILIES = {
    "whisper": {"classes": ("WhisperBackbone",), "types": ("whisper",), "presets": ("whisper",)},
    "wav2vec2": {"classes": (), "types": ("wav2vec2",), "presets": ()},
    "hubert": {"classes": (), "types": ("hubert",), "presets": ()},
}
# "mean": over the real frames of the last layer, one vector per clip; "frames": all of them, for recognition.
POOLINGS = ("mean", "frames")


def audio_family_of(config: dict, layout: str = "") -> str | None:
    """The family of a folder's config.json, in a layout of models.layouts; None where it is no audio model."""
    if layout == "ctranslate2":
        return "whisper"  # the loader looks into the file
    keys = {"model_type": "types", "class_name": "classes"}
    key = next((key for key in keys if key in config), None)
    return next((name for name, family in FAMILIES.items() if key and config[key] in family[keys[key]]), None)


def audio_types() -> list[str]:
    """transformers' names of all the types that Graft reads."""
    return [kind for family in FAMILIES.values() for kind in family["types"]]


def check_audio_pooling(name: str, pooling: str | None) -> str:
    """The pooling asked for, "mean" where none is; GraftError for one that audio models have not."""
    if pooling not in (None, *POOLINGS):
        raise GraftError(
            f"Pooling {pooling!r} does not fit {name}, an audio model: choose {' or '.join(POOLINGS)}, or leave it "
            f"out for mean."
        )
    return pooling or "mean"
