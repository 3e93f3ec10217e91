"""`graft ask`: label files or texts with a model that is being served, over REST or gRPC."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import tyro

from models import GraftError
from pipelines.batch import answers_of, columns_of, print_answers, what_to_ask
from pipelines.console import console
from serving.client import TIMEOUT_S, Client

INPUTS = {  # inputs of serving_default -> what an export of Graft's says of itself there
    ("image_bytes",): {},
    ("text",): {"pairs": False},
    ("text_a", "text_b"): {"pairs": True},
    ("audio_bytes",): {"kind": "audio"},
}


@dataclasses.dataclass
class AskConfig:
    """Label files or texts with a served model: graft ask http://localhost:8501/v1/models/photos new/"""

    url: tyro.conf.Positional[str]
    """http://HOST:8501/v1/models/NAME (REST) or grpc://HOST:8500/NAME, where wanted with /versions/3 or /labels/stable
    after it."""
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of an image, audio or speech model: files, folders of them, or one CSV file with a column `path`. Of a text
    model: .txt files, or one CSV file with a column `text`."""
    text: tuple[str, ...] = ()
    """Texts to label, of a text model: --text "How do I sort a list?" """
    text_column: str = "text"
    """Column of a CSV file with the texts."""
    second_column: str = "text_b"
    """Column of a CSV file with the second texts, of a model that takes pairs."""
    timeout_s: float = TIMEOUT_S
    """Seconds that one request (of up to 32 files or texts) may take."""
    json: bool = False
    """Print JSON: model, version, seconds, and one entry per file or text."""


def ask_server(argv: list[str]) -> int:
    """`graft ask`: a table on the console, or JSON with --json."""
    config = tyro.cli(AskConfig, args=argv, prog="graft ask")
    with Client(config.url, config.timeout_s) as client:
        rows, read, column = what_to_ask(config, inputs_of(client, config.url))
        started = time.perf_counter()
        answers = answers_of(client, len(rows), read)
        seconds = time.perf_counter() - started
    class_names = names_of(answers)
    for row, answer in zip(rows, answers):
        row.update(columns_of(answer, class_names, probabilities=False))
    if config.json:
        entries = [json_entry(row, answer, column, class_names) for row, answer in zip(rows, answers)]
        content = {"model": client.name, "version": client.version, "seconds": round(seconds, 4), "answers": entries}
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return 0
    print_answers(rows, answers, column, most=len(rows))
    failed = sum(bool(row["error"]) for row in rows)
    without = f", [yellow]{failed:,} without an answer[/]" if failed else ""
    console.print(
        f"{client.name}, version {client.version}: {len(rows):,} answers in {seconds:.2f} s, "
        f"{1000 * seconds / len(rows):.1f} ms each{without}"
    )
    return 0


def inputs_of(model, where: str) -> dict:
    """What a Session or a Client takes, as an export says it: {} for images, {"pairs": ...} for texts, kind for sounds.

    Raises:
        GraftError: its serving_default takes something else, or does not answer with labels or transcripts.
    """
    signature = model.signatures.get("serving_default", {"inputs": {}, "outputs": {}})
    names, missing = tuple(sorted(signature["inputs"])), {"labels", "scores", "probabilities", "error"}
    missing -= set(signature["outputs"])
    if names == ("audio_bytes",) and {"transcript", "confidence", "error"} <= set(signature["outputs"]):
        return {"kind": "speech"}
    if names not in INPUTS or missing:
        raise GraftError(
            f"{where}: its serving_default takes {', '.join(names) or 'nothing'} and gives "
            f"{', '.join(sorted(signature['outputs'])) or 'nothing'}; expected a model that Graft exported "
            f"(image_bytes, audio_bytes or text in; labels, scores, probabilities and error out; or of speech "
            f"transcript, confidence and error)."
        )
    return INPUTS[names]


def names_of(answers: list[dict]) -> list[str]:
    """The class names of a served model, which only names the best classes of each answer.

    `labels` are in the order of the largest probabilities, equal ones by index (tf.math.top_k). A class that was
    never among them is called by its index.
    """
    names = [f"class {index}" for index in range(len(answers[0].get("probabilities", ())))]
    for answer in answers:
        if names and not answer["error"]:
            for index, label in zip(np.argsort(-answer["probabilities"], kind="stable"), answer["labels"]):
                names[index] = label
    return names


def json_entry(row: dict, answer: dict, column: str, class_names: list[str]) -> dict:
    """One file or text of --json: what was asked, then labels with scores (best first), a transcript, or the error."""
    asked = {name: row[name] for name in ("path", column) if name in row}
    if answer["error"]:
        return {**asked, "error": answer["error"]}
    if "transcript" in answer:
        return {**asked, "transcript": answer["transcript"], "confidence": round(answer["confidence"], 6)}
    scores = [round(float(score), 6) for score in answer["scores"]]
    entry = {**asked, "label": row["label"], "labels": answer["labels"], "scores": scores}
    if answer["unsure"] is not None:
        entry["unsure"] = answer["unsure"]
    if answer["chosen"] is not None:
        entry["chosen"] = [name for name, is_chosen in zip(class_names, answer["chosen"]) if is_chosen]
    return entry
