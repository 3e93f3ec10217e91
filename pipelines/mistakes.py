"""The worst mistakes of a model, for the report: what was taken for what, with the picture or the text."""

from __future__ import annotations

import io

import numpy as np

from pipelines import facts
from pipelines.data import targets_of
from pipelines.log_mel import is_sound, shown_sound

SHOWN_MISTAKES = 12
THUMBNAIL_SIDE = 192  # pixels
SHOWN_CHARACTERS = 400  # of a text


def worst_mistakes(
    table, probabilities, class_names, white_level: int, report_inputs: str, thresholds=None
) -> list[dict]:
    """The examples that were most confidently wrong, worst first.

    Args:
        table: the examples, with columns id, label, and path or text (and text_b).
        probabilities: [n, classes] float32.
        white_level: of 16-bit images, as in `pipelines.data.Splits`.
        report_inputs: "all" for pictures and texts, "none" for ids only: data that must not leave the machine.
        thresholds: [classes] float32 of a multi-label model.
    """
    if thresholds is None:
        mistakes = _wrong_answers(table["label"].to_numpy(), probabilities, class_names)
    else:
        mistakes = _wrong_choices(table, probabilities, class_names, thresholds)
    return [
        with_input(table.slice(row, 1).to_pylist()[0], mistake, white_level, report_inputs) for row, mistake in mistakes
    ]


def with_input(example: dict, mistake: dict, white_level: int, report_inputs: str) -> dict:
    """A mistake with what it was made on; nothing of that where inputs are not shown.

    A path and its picture; of a sound its spectrogram and what `pipelines.log_mel.shown_sound` gives; or texts.
    """
    shown = {"id": example["id"], "path": None, **mistake, "picture": None}
    if report_inputs == "all" and "path" in example:
        path = example["path"]
        shown |= {"path": example.get("source") or path}
        shown |= shown_sound(path) if is_sound(path) else {"picture": thumbnail(path, white_level)}
    elif report_inputs == "all":
        shown["texts"] = [shortened(example[name]) for name in ("text", "text_b") if name in example]
    return shown


def shortened(text: str) -> dict:
    """The beginning of a text, and of how many characters it is the beginning: {"text", "of"}; None where it is all."""
    return {"text": text[:SHOWN_CHARACTERS], "of": len(text) if len(text) > SHOWN_CHARACTERS else None}


def _wrong_answers(labels, probabilities, class_names) -> list[tuple[int, dict]]:
    """(row, mistake) of examples with one label; the least probable truth first."""
    predicted = probabilities.argmax(axis=1)
    true_probability = probabilities[np.arange(len(labels)), labels]
    wrong = [i for i in np.argsort(true_probability, kind="stable") if predicted[i] != labels[i]][:SHOWN_MISTAKES]
    return [
        (
            i,
            {
                "true": class_names[labels[i]],
                "predicted": class_names[predicted[i]],
                "probability": float(probabilities[i].max()),
                "true_probability": float(true_probability[i]),
            },
        )
        for i in wrong
    ]


def _wrong_choices(table, probabilities, class_names, thresholds) -> list[tuple[int, dict]]:
    """(row, mistake) of examples with several labels, some wrong or missing; the largest loss first."""
    truth, chosen = targets_of(table, len(class_names)) > 0, probabilities >= thresholds
    losses = -np.log(np.maximum(np.where(truth, probabilities, 1 - probabilities), np.finfo(np.float32).tiny))
    order = np.argsort(-losses.mean(axis=1), kind="stable")
    wrong = [i for i in order if (truth[i] != chosen[i]).any()][:SHOWN_MISTAKES]
    worst = np.where(truth != chosen, losses, -1).argmax(axis=1)  # the class that was most wrongly chosen or left out
    return [
        (
            i,
            {
                "true": facts.chosen_labels(class_names, truth[i]),
                "predicted": facts.chosen_labels(class_names, chosen[i]),
                "loss": float(losses[i].mean()),
                "worst_class": class_names[worst[i]],
                "worst_probability": float(probabilities[i, worst[i]]),
            },
        )
        for i in wrong
    ]


def thumbnail(path: str, white_level: int) -> bytes:
    """An image file as a JPEG whose longer side is THUMBNAIL_SIDE pixels; small images are enlarged without blur."""
    from PIL import Image  # for the report's pictures only: the model's input comes from models/inputs.py

    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey
            grey = np.clip(np.asarray(image, np.float32) / white_level, 0, 1) * 255
            image = Image.fromarray(grey.astype(np.uint8))
        rgba = image.convert("RGBA")
    picture = Image.new("RGB", rgba.size, "white")
    picture.paste(rgba, mask=rgba.getchannel("A"))
    scale = THUMBNAIL_SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
