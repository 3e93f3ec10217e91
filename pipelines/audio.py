"""Sounds end to end: a pretrained backbone and folders of clips in, a verified SavedModel and a report out.

    python -m pipelines.audio --data clips/          (the same as: graft audio --data clips/)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks, so that
--help and most mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import numpy as np

from models import GraftError
from models.names import check_backbone_name, check_depth, known_blocks
from pipelines import facts, resume, runs
from pipelines.calibration import exported
from pipelines.config import check_multi_label_flags, depth_blocks, parse_config, read_config
from pipelines.console import console, start_tensorflow
from pipelines.devices import settle
from pipelines.options import AudioConfig
from pipelines.results import VERIFIED_EXAMPLES, as_it_ended, check_strict, publish, score, write_results
from pipelines.sounds import check_window, find_sounds, load_sounds, long_clips_warning, sound_parts, sound_predictor
from pipelines.sources import drop_small_classes, is_multi_label

RUN_BYTES = 200_000_000  # free disk that a run of a small backbone needs: two checkpoints, export, report, logs


def main(argv: list[str]) -> int:
    config = parse_config(argv, AudioConfig, "graft audio")
    folder = resume.begun(config.run)
    if folder:
        return resume.go_on(folder)
    run(config)
    return 0


def run(config: AudioConfig, resumed: pathlib.Path | None = None) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder.

    resumed: the folder of a run that goes on.
    """
    clock = facts.Clock()
    found, run_dir = check_request(config, resumed)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} clips in {config.input.data}")
    start_tensorflow(config.training.seed)
    settle(config.training)
    from pipelines.contract import trained_sound_contract
    from pipelines.distribute import is_chief, leave, make_strategy, shard_of
    from pipelines.evaluate import check_positive
    from pipelines.label_checks import class_warnings
    from pipelines.leakage import check_copies
    from pipelines.log_mel import log_mel_baselines
    from pipelines.run_training import train_run
    from pipelines.sound_augmentation import sound_loader
    from pipelines.transfer import judge_transfer

    strategy = make_strategy(config.training.distribute, config.training.devices, config.training.tpu)
    chief = is_chief(strategy)  # of several workers, the one that writes
    splits = load_sounds(found, config.input.min_per_class)
    check_positive(config.report.positive or None, config.report.specificity, splits.class_names)
    check_copies(splits, config.guards.strict, "clip")
    clock.lap("data")

    with strategy.scope():
        model = build_model(config, splits.class_names, splits.multi_label)
    preprocess = model.backbone.preprocess
    splits.warnings += [*long_clips_warning(splits, preprocess), *class_warnings(splits, "clip")]
    facts.print_splits(splits, "clip")
    clock.lap("backbone")

    # Clips as they are, all windows of each; and in phase 2 one window of each, changed at random.
    read_inputs = functools.partial(sound_parts, preprocess=preprocess)
    loader = functools.partial(sound_loader, preprocess, noise_snr_db=config.fine_tune.noise_snr_db)

    with runs.explained(run_dir, shard_of(strategy)[1]):
        # The head only, then the top blocks too, then all: for as long as it pays, or as deep as --depth says.
        contract = trained_sound_contract(preprocess)
        trained = train_run(run_dir, config, "audio", model, splits, loader, strategy, contract, read_inputs)
        clock.lap("training")

        # How good it is, and what simpler methods reach.
        scored = score(splits, trained.logits_of, config)
        if not chief:
            return leave(strategy, run_dir)
        baselines = log_mel_baselines(splits, config.training.seed)
        clock.lap("evaluation")

        # The verdict on transfer, with what became of it.
        raw_accuracy = baselines[0]["accuracy"]
        transfer = judge_transfer(
            model, splits, loader, config, scored[0]["test"], read_inputs, raw_accuracy, trained.probed, kind="audio"
        )
        clock.lap("transfer verdict")

        # A version for TensorFlow Serving, verified before it gets its number.
        # What it must answer comes from the files through the whole model, nothing from the cache.
        version, checked = None, {}
        if config.run.export:
            predict = sound_predictor(model, preprocess, config.training.batch_size)
            samples = splits.test.slice(0, VERIFIED_EXAMPLES)
            version, checked = publish_sounds(
                model, splits.class_names, run_dir, samples, predict, *scored[2:4], contract
            )
            clock.lap("export and verification")

        findings = scored, version, checked, clock, transfer, trained.examined, baselines
        gathered, report = write_results(run_dir, config, "audio", splits, model.backbone, trained.phases, *findings)
        trained.recovery.remove()
        leave(strategy, run_dir)
    facts.print_ending(gathered, run_dir, version, report)
    check_strict(config, gathered, run_dir)
    return run_dir


def check_request(config: AudioConfig, resumed: pathlib.Path | None = None):
    """What can be checked without TensorFlow; returns the clips found and the run folder to make.

    Raises:
        GraftError: an unknown backbone, a depth that it lacks, no usable clips, flags that several labels per clip do
            not go with, no place for the run.
    """
    depth, blocks = depth_blocks(config.model.depth), known_blocks(config.model.backbone)
    if depth and blocks:
        check_depth(depth, config.model.backbone, blocks)
    data = config.input
    found = find_sounds(data.data, data.path_column, data.label_column, data.group_column, data.data_dir)
    drop_small_classes(found, data.min_per_class, "clip")
    if is_multi_label(found):
        check_multi_label_flags(config, "clip")
    run_dir = resumed or runs.choose_run_folder(config.run.out, data.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    check_backbone_name(config.model.backbone, "audio")  # last: it may have to be downloaded
    return found, run_dir


def build_model(config: AudioConfig, class_names: list[str], multi_label: bool = False):
    """The classifier that `config` asks for, with its pretrained backbone; call it inside the strategy's scope."""
    from models.backbone import AudioPreprocess, load_backbone
    from models.classifier import Classifier

    backbone = load_backbone(config.model.backbone, config.model.pooling)
    if not isinstance(backbone.preprocess, AudioPreprocess):
        raise GraftError(f"Backbone {config.model.backbone} takes no sound. Give an audio model.")
    if "notice" in backbone.source:
        console.print(f"[yellow]      Note: {backbone.source['notice']}")
    window_seconds = config.model.window_seconds
    check_window(window_seconds, backbone.preprocess.longest_seconds, backbone.name)
    backbone.preprocess = dataclasses.replace(backbone.preprocess, window_seconds=window_seconds)
    depth = depth_blocks(config.model.depth)
    if depth:
        check_depth(depth, backbone.name, len(backbone.blocks))
    return Classifier(backbone, len(class_names), config.model.dropout, config.training.seed, multi_label)


def publish_sounds(
    model,
    class_names: list[str],
    run_dir: pathlib.Path,
    samples,
    predict,
    thresholds=None,
    calibration=None,
    contract=None,
):
    """Export and verify on a table of clips, as `pipelines.results.publish` does.

    Args:
        predict: a function of a table -> logits of the whole model.
        thresholds: [classes] float32, of a multi-label model.
        calibration: as `pipelines.calibration.calibrate` gives it.
        contract: as `pipelines.results.publish` takes it.
    """
    from serving.export_audio import export_audio_classifier

    serves = exported(calibration)

    def write(folder):
        details = {"backbone": model.backbone.name, "source": model.backbone.source}
        more = {"details": details, "thresholds": thresholds, **serves}
        return export_audio_classifier(model, model.backbone.preprocess, class_names, folder, **more)

    files = [pathlib.Path(path).read_bytes() for path in samples["path"].to_pylist()]
    logits = predict(samples) / np.float32(serves["temperature"])
    return publish(run_dir, write, files, facts.probabilities_of(logits, model.multi_label), contract=contract)


def export_again(run_dir: pathlib.Path, state: dict) -> tuple[pathlib.Path, dict]:
    """`graft export` of a run on sounds; state: what `runs.start_run_folder` noted."""
    config = read_config(run_dir / "config.yaml", AudioConfig)
    start_tensorflow(config.training.seed)

    model = build_model(config, state["class_names"], state["multi_label"])
    model.load_weights(runs.find_checkpoint(run_dir))
    predict = sound_predictor(model, model.backbone.preprocess, config.training.batch_size)
    samples, *ended = as_it_ended(run_dir, config, state, predict)
    return publish_sounds(model, state["class_names"], run_dir, samples, predict, *ended)


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
