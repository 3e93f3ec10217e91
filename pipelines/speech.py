"""Speech recognition end to end: a pretrained encoder and a manifest of transcripts in, a verified SavedModel out.

    python -m pipelines.speech --data transcripts.csv          (the same as: graft speech --data transcripts.csv)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks.
"""

from __future__ import annotations

import base64
import functools
import pathlib
import sys

from models import GraftError
from models.audio_families import audio_family_of
from models.names import RANDOM, check_backbone_name, check_depth
from pipelines import runs
from pipelines.config import config_yaml, depth_blocks, parse_config
from pipelines.console import console, print_trainable_table, start_tensorflow
from pipelines.options import SpeechConfig
from pipelines.transcript_scores import error_rates, worst_transcripts
from pipelines.transcripts import find_transcripts, load_transcripts, wav_bytes_of

RUN_BYTES = 500_000_000  # free disk that a run needs: two checkpoints, export, report
VERIFIED_EXAMPLES = 100  # most test clips whose served transcripts are compared with training's
LARGEST_SOUND = 1_000_000  # bytes of a clip that the report plays


def main(argv: list[str]) -> int:
    run(parse_config(argv, SpeechConfig, "graft speech"))
    return 0


def run(config: SpeechConfig) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder."""
    found, run_dir = check_request(config)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} transcripts in {config.input.data}")
    start_tensorflow(config.training.seed)
    from pipelines.callbacks import ProgressPrinter
    from pipelines.distribute import make_strategy
    from pipelines.speech_training import fit_speech, written

    strategy = make_strategy(config.training.distribute, config.training.devices, config.training.tpu)
    splits, counts = load_transcripts(found, config.input.normalise, config.input.longest_seconds)
    print_vocabulary(counts, config.input.normalise)
    for warning in splits.warnings:
        console.print(f"[yellow]Note: {warning}")
    with strategy.scope():
        model = build_model(config, "".join(counts))

    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    runs.write_csv(run_dir / "skipped.csv", splits.skipped, ["path", "reason"])
    runs.write_text(run_dir / "config.yaml", config_yaml(config))
    save = functools.partial(runs.save_checkpoint, run_dir)
    hooks = {"callbacks": [ProgressPrinter()], "on_start": print_trainable_table, "on_best": save}
    phases, outputs_of = fit_speech(model, splits, config, strategy, **hooks)

    answers = {name: written(outputs_of(table), model.characters) for name, table in named(splits)}
    figures = {
        name: error_rates(table["text"].to_pylist(), answers[name][0], config.training.seed)
        for name, table in named(splits)
    }
    samples = splits.test.slice(0, VERIFIED_EXAMPLES)
    version, checked = publish_recogniser(model, config, run_dir, samples)
    gathered = {
        "kind": "speech",
        "headline": headline(figures["test"], splits.test.num_rows),
        "test": figures["test"],
        "val": figures["val"],
        "normalise": config.input.normalise,
        "characters": counts,
        "examples": {name: table.num_rows for name, table in zip(("train", "val", "test"), splits)},
        "fingerprint": splits.fingerprint,
        "backbone": {"name": model.backbone.name, **model.backbone.source},
        "phases": phases,
        "warnings": splits.warnings,
        "serving": {"folder": str(version.relative_to(run_dir)), **checked},
    }
    report = write_report(run_dir, config, gathered, splits.test, *answers["test"])
    runs.write_json(run_dir / "metrics.json", gathered)  # last: a run that has it is complete
    console.print(f"\n[bold]{gathered['headline']}")
    console.print(f"Look first: worst mistakes   {report}")
    console.print(f"Served transcripts equal training's ({checked['files']} files)   {version}")
    return run_dir


def named(splits) -> list[tuple]:
    return [("val", splits.val), ("test", splits.test)]


def headline(rates: dict, clips: int) -> str:
    """What one would tell a colleague."""
    words, characters = (
        f"{rates[f'{kind}_error_rate']:.3f} ({rates[f'{kind}_interval'][0]:.3f} to {rates[f'{kind}_interval'][1]:.3f})"
        for kind in ("word", "character")
    )
    return f"Word error rate {words}, character error rate {characters} on {clips} test clips."


def check_request(config: SpeechConfig):
    """What can be checked without TensorFlow; returns the examples found and the run folder to make.

    Raises:
        GraftError: no manifest, an unknown backbone, or one of a family that has no frames to read, no place for the
            run.
    """
    if config.model.depth == "auto":
        raise GraftError(
            "--depth auto: recognition has two phases. Give head, a number of blocks from the top, or full."
        )
    data = config.input
    found = find_transcripts(data.data, data.path_column, data.text_column, data.group_column)
    run_dir = runs.choose_run_folder(config.run.out, data.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    check_backbone_name(config.model.backbone, "audio")  # last: it may have to be downloaded
    return found, run_dir


def build_model(config: SpeechConfig, characters: str):
    """The recogniser that `config` asks for, with its pretrained backbone; call it inside the strategy's scope."""
    from models.backbone import load_backbone
    from models.recogniser import Recogniser

    backbone = load_backbone(config.model.backbone, "frames")
    kind = backbone.encoder.name.removesuffix("_encoder")
    if audio_family_of({"model_type": kind}) not in ("wav2vec2", "hubert"):
        raise GraftError(
            f"Backbone {config.model.backbone} is a {kind}: a CTC head needs the frames of Wav2Vec2 or HuBERT. "
            f"Give one of these, for example hf://facebook/wav2vec2-base."
        )
    if config.model.backbone.startswith(RANDOM):
        console.print(f"[yellow]      Note: {backbone.source['notice']}")
    depth = depth_blocks(config.model.depth)
    if depth:
        check_depth(depth, backbone.name, len(backbone.blocks))
    return Recogniser(backbone, characters, config.model.dropout, config.training.seed)


def print_vocabulary(counts: dict[str, int], rule: str) -> None:
    """The characters that can be written, and how often the training transcripts have them."""
    shown = "  ".join(f"{'space' if not c.strip() else c} {count:,}" for c, count in counts.items())
    console.print(f"Vocabulary ({len(counts)} characters, --normalise {rule}): {shown}", markup=False)


def publish_recogniser(model, config: SpeechConfig, run_dir: pathlib.Path, samples) -> tuple[pathlib.Path, dict]:
    """Export to RUN/serving/NAME/NUMBER, verified on a table of clips before it gets its number.

    What it must answer comes from the files through the whole model, one by one, nothing from the cache.
    """
    from serving.export_speech import export_recogniser
    from serving.new_version import publish_version
    from serving.verify_speech import verify_speech

    checked, files, preprocess = {}, wav_bytes_of(samples), model.backbone.preprocess

    def write(folder):
        details = {"source": model.backbone.source}
        export_recogniser(model, preprocess, folder, config.input.longest_seconds, config.input.normalise, details)

    def check(folder):
        checked.update(verify_speech(folder, files, *answers_of(model, files)))

    with console.status("exporting and verifying the SavedModel"):
        return publish_version(write, run_dir / "serving" / runs.serving_name(run_dir), check), checked


def answers_of(model, files: list[bytes]) -> tuple[list[str], list[float]]:
    """Training's side: WAV files -> transcripts and confidences, each file for itself through the whole model."""
    import tensorflow as tf

    from models.audio_inputs import encoder_inputs, read_sound
    from models.recogniser import transcripts

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def answer(data):
        waveform = read_sound(data, model.backbone.preprocess)[None]
        inputs = encoder_inputs(waveform, tf.ones_like(waveform, tf.int32), model.backbone.preprocess)
        return transcripts(model(inputs, training=False), model.characters)

    answers = [answer(data) for data in files]
    return [text.numpy()[0].decode() for text, _ in answers], [float(sure.numpy()[0]) for _, sure in answers]


def write_report(run_dir: pathlib.Path, config: SpeechConfig, gathered: dict, test, texts, confidences) -> pathlib.Path:
    """Write report.html: error rates, the worst mistakes aligned and to listen to, training, vocabulary."""
    import jinja2

    shown = config.report.report_inputs == "all"
    mistakes = worst_transcripts(test["text"].to_pylist(), texts, confidences) if shown else []
    for mistake in mistakes:
        path = pathlib.Path(test["path"][mistake["index"]].as_py())
        mistake["file"], data = path.name, path.read_bytes()
        if len(data) <= LARGEST_SOUND:
            mistake["sound"] = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
    template = pathlib.Path(__file__).with_name("speech.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(template).render(
        name=run_dir.name,
        figures={"Test": gathered["test"], "Validation": gathered["val"]},
        mistakes=mistakes,
        counts=gathered["characters"],
        data=config.input.data,
        **{key: gathered[key] for key in ("headline", "warnings", "phases", "normalise", "examples", "serving")},
        backbone=gathered["backbone"]["name"],
    )
    runs.write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
