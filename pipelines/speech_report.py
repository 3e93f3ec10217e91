"""What is said of a recogniser: the report after training, and `graft evaluate` on other transcripts."""

from __future__ import annotations

import base64
import pathlib

from models import GraftError
from pipelines import facts, runs
from pipelines.batch import sent_sound
from pipelines.console import console
from pipelines.rescore import answer_all, skipped_warning, test_part, title_of
from pipelines.transcript_scores import error_rates, worst_transcripts
from pipelines.transcripts import find_transcripts, normalised

LARGEST_SOUND = 1_000_000  # bytes of a clip that the report plays


def headline(rates: dict) -> str:
    """What one would tell a colleague; rates: as `error_rates` gives them."""
    words, characters = (
        f"{rates[f'{kind}_error_rate']:.3f} ({rates[f'{kind}_interval'][0]:.3f} to {rates[f'{kind}_interval'][1]:.3f})"
        for kind in ("word", "character")
    )
    return f"Word error rate {words}, character error rate {characters} on {rates['examples']:,} test clips."


def write_speech_report(folder, gathered: dict, paths, said, texts, confidences, inputs="all") -> pathlib.Path:
    """Write report.html: error rates, the worst mistakes aligned and to listen to, and what is known of training.

    Args:
        gathered: title, headline, verdicts, warnings, data, normalise, examples and the figures test and val by split;
            of a run also characters, phases, backbone and serving.
        paths, said, texts, confidences: of each test clip.
        inputs: --report-inputs.
    """
    import jinja2

    mistakes = worst_transcripts(said, texts, confidences) if inputs == "all" else []
    for mistake in mistakes:
        path = pathlib.Path(paths[mistake["index"]])
        mistake["file"], data = path.name, sent_sound(path.read_bytes())
        if len(data) <= LARGEST_SOUND:
            mistake["sound"] = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
    figures = {"Test": gathered["test"], **({"Validation": gathered["val"]} if "val" in gathered else {})}
    template = pathlib.Path(__file__).with_name("speech.html.j2").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    runs.write_text(folder / "report.html", page.render(figures=figures, mistakes=mistakes, **gathered))
    return folder / "report.html"


def evaluate_speech(config, version: pathlib.Path, details: dict) -> int:
    """`graft evaluate` of a recogniser: the same error rates and report as after training, on other transcripts.

    config: `pipelines.rescore.EvaluateConfig`; details: what the export says of itself.
    """
    if config.positive:
        raise GraftError(f"--positive {config.positive}: this model writes transcripts, and has no classes.")
    found = test_part(find_transcripts(config.data, config.path_column, config.text_column, config.group_column))
    out, found, answers, skipped = answer_all(config, version, details, found)
    paths, said = [e.path for e in found], [normalised(e.labels[0], details["normalise"]) for e in found]
    texts, confidences = ([answer[name] for answer in answers] for name in ("transcript", "confidence"))
    rates = error_rates(said, texts)
    gathered = {
        "title": title_of(config, version),
        "kind": "speech",
        "created": facts.now(),
        "headline": headline(rates),
        "test": rates,
        "normalise": details["normalise"],
        "examples": {"test": len(found), "skipped": len(skipped)},
        "data": config.data,
        "warnings": skipped_warning(skipped),
    }
    out.mkdir(parents=True, exist_ok=True)
    runs.write_csv(out / "skipped.csv", skipped, ["path", "reason"])
    rows = [
        {"path": path, "said": text, "transcript": answer["transcript"], "confidence": f"{answer['confidence']:.6f}"}
        for path, text, answer in zip(paths, said, answers)
    ]
    runs.write_csv(out / "predictions.csv", rows, list(rows[0]))
    report = write_speech_report(out, gathered, paths, said, texts, confidences, config.report_inputs)
    runs.write_json(out / "metrics.json", gathered)
    console.print(f"[bold]{gathered['headline']}[/]   {report}")
    return 0
