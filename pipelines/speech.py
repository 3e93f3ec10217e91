"""Speech recognition end to end: a pretrained encoder and a manifest of transcripts in, a verified SavedModel out.

    python -m pipelines.speech --data transcripts.csv          (the same as: graft speech --data transcripts.csv)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks.
"""

from __future__ import annotations

import functools
import pathlib
import sys

from models import GraftError
from models.audio_families import audio_family_of
from models.names import RANDOM, check_backbone_name, check_depth
from pipelines import facts, guards, ladder, recovery, resume, runs
from pipelines.config import depth_blocks, parse_config, read_config
from pipelines.console import console, print_trainable_table, start_tensorflow
from pipelines.devices import settle
from pipelines.options import SpeechConfig
from pipelines.results import publish
from pipelines.speech_report import headline, write_speech_report
from pipelines.transcript_scores import error_rates
from pipelines.transcripts import clip_reader, find_transcripts, load_transcripts, wav_bytes_of

RUN_BYTES = 500_000_000  # free disk that a run needs: two checkpoints, export, report
VERIFIED_EXAMPLES = 100  # most test clips whose served transcripts are compared with training's


def main(argv: list[str]) -> int:
    config = parse_config(argv, SpeechConfig, "graft speech")
    folder = resume.begun(config.run)
    if folder:
        return resume.go_on(folder)
    run(config)
    return 0


def run(config: SpeechConfig, resumed: pathlib.Path | None = None) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder.

    resumed: the folder of a run that goes on.
    """
    found, run_dir = check_request(config, resumed)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} transcripts in {config.input.data}")
    start_tensorflow(config.training.seed)
    settle(config.training)
    from pipelines.callbacks import ProgressPrinter, tensorboard
    from pipelines.contract import trained_clip_contract
    from pipelines.distribute import from_chief, is_chief, leave, make_strategy, shard_of
    from pipelines.speech_training import fit_speech, written

    strategy = make_strategy(config.training.distribute, config.training.devices, config.training.tpu)
    chief = is_chief(strategy)  # of several workers, the one that writes
    splits, counts = load_transcripts(found, config.input.normalise, config.input.longest_seconds)
    print_vocabulary(counts, config.input.normalise)
    for warning in splits.warnings:
        console.print(f"[yellow]Note: {warning}")
    with strategy.scope():
        model = build_model(config, "".join(counts))

    with runs.explained(run_dir, shard_of(strategy)[1]):
        # The head only, then the transformer too, or as deep as --depth says.
        contract = trained_clip_contract(model.backbone.preprocess)
        if chief:
            runs.start_run_folder(run_dir, config, splits, contract, characters=model.characters)
        every_s = config.training.checkpoint_seconds
        saved = recovery.Recovery(run_dir if chief else None, every_s, functools.partial(from_chief, strategy))
        phases, outputs_of = fit_speech(
            model,
            splits,
            config,
            strategy,
            callbacks=[ProgressPrinter(), tensorboard(run_dir)] if chief else [],
            on_start=print_trainable_table,
            on_best=functools.partial(runs.save_checkpoint, run_dir) if chief else None,
            recovery=saved,
        )

        # How many words and characters are wrong.
        tables = {"val": splits.val, "test": splits.test}
        answers = {name: written(outputs_of(table), model.characters) for name, table in tables.items()}
        if not chief:
            return leave(strategy, run_dir)
        figures = {
            name: error_rates(table["text"].to_pylist(), answers[name][0], config.training.seed)
            for name, table in tables.items()
        }

        # A version for TensorFlow Serving, verified before it gets its number.
        version, checked = None, {}
        if config.run.export:
            samples = splits.test.slice(0, VERIFIED_EXAMPLES)
            version, checked = publish_recogniser(model, config, run_dir, samples, contract)

        gathered = {
            "title": run_dir.name,
            "kind": "speech",
            "created": facts.now(),
            "headline": headline(figures["test"]),
            "verdicts": verdicts(phases, config),
            **figures,
            **({"climb": ladder.story(phases)} if config.model.depth == "auto" else {}),
            "forgetting": guards.story(phases, config.guards.forgetting_limit),
            "normalise": config.input.normalise,
            "characters": counts,
            "examples": facts.split_sizes(splits),
            "fingerprint": splits.fingerprint,
            "backbone": {"name": model.backbone.name, **model.backbone.source},
            "data": config.input.data,
            "phases": phases,
            "warnings": splits.warnings,
            **({"serving": {"folder": str(version.relative_to(run_dir)), **checked}} if version else {}),
        }
        said, paths = (splits.test[name].to_pylist() for name in ("text", "path"))
        report = write_speech_report(run_dir, gathered, paths, said, *answers["test"], config.report.report_inputs)
        runs.write_json(run_dir / "metrics.json", gathered)  # last: a run that has it is complete
        saved.remove()
        leave(strategy, run_dir)
    console.print(f"\n[bold]{gathered['headline']}")
    for verdict in gathered["verdicts"]:
        console.print(verdict)
    console.print(f"Look first: worst mistakes   {report}")
    console.print(f"{facts.served_line(checked, 'clips')}   {version}" if version else facts.export_line(run_dir))
    return run_dir


def verdicts(phases: list[dict], config: SpeechConfig) -> list[str]:
    """What one would tell a colleague about training, by validation: what was tried, and what came of it."""
    climbed = [ladder.story(phases)["sentence"]] if config.model.depth == "auto" else []
    return [*climbed, *guards.verdicts(phases, config.guards.forgetting_limit), *recovery.verdicts(phases)]


def check_request(config: SpeechConfig, resumed: pathlib.Path | None = None):
    """What can be checked without TensorFlow; returns the examples found and the run folder to make.

    Raises:
        GraftError: no manifest, an unknown backbone, or one of a family that has no frames to read, no place for the
            run.
    """
    data = config.input
    found = find_transcripts(data.data, data.path_column, data.text_column, data.group_column)
    run_dir = resumed or runs.choose_run_folder(config.run.out, data.data)
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


def publish_recogniser(model, config: SpeechConfig, run_dir: pathlib.Path, samples, contract=None):
    """Export and verify on a table of clips, as `pipelines.results.publish` does.

    What it must answer comes from the files through the whole model, one by one, nothing from the cache.
    """
    from serving.export_speech import export_recogniser

    files, preprocess, data = wav_bytes_of(samples), model.backbone.preprocess, config.input

    def write(folder):
        details = {"source": model.backbone.source}
        return export_recogniser(model, preprocess, folder, data.longest_seconds, data.normalise, details)

    texts, confidences = answers_of(model, files)
    return publish(run_dir, write, files, {"transcript": texts, "confidence": confidences}, contract=contract)


def export_again(run_dir: pathlib.Path, state: dict) -> tuple[pathlib.Path, dict]:
    """`graft export` of a run of recognition; state: what `runs.start_run_folder` noted."""
    config = read_config(run_dir / "config.yaml", SpeechConfig)
    start_tensorflow(config.training.seed)
    model = build_model(config, state["characters"])
    model.load_weights(runs.find_checkpoint(run_dir))
    samples = runs.read_split(run_dir, "test", VERIFIED_EXAMPLES)
    return publish_recogniser(model, config, run_dir, samples, state.get("input_contract"))


def answers_of(model, files: list[bytes]) -> tuple[list[str], list[float]]:
    """Training's side: WAV files -> transcripts and confidences, each file for itself through the whole model."""
    import tensorflow as tf

    from models.recogniser import transcripts

    read = clip_reader(model.backbone.preprocess)

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def answer(data):
        inputs = [tensor[None] for tensor in read(data, 0)]
        return transcripts(model(inputs, training=False), model.characters)

    answers = [answer(data) for data in files]
    return [text.numpy()[0].decode() for text, _ in answers], [float(sure.numpy()[0]) for _, sure in answers]


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
