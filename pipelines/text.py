"""Texts end to end: a pretrained backbone and labelled strings in, a verified SavedModel and a report out.

    python -m pipelines.text --data reviews.csv          (the same as: graft text --data reviews.csv)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks, so that
--help and most mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np

from models import GraftError
from models.names import check_backbone_name, check_depth
from pipelines import facts, resume, runs
from pipelines.calibration import exported
from pipelines.config import check_multi_label_flags, depth_blocks, parse_config, read_config
from pipelines.console import console, start_tensorflow
from pipelines.devices import settle
from pipelines.options import TextConfig
from pipelines.results import VERIFIED_EXAMPLES, as_it_ended, check_strict, publish, score, write_results
from pipelines.sources import drop_small_classes, is_multi_label
from pipelines.texts import find_texts, load_texts

RUN_BYTES = 400_000_000  # free disk that a run of a small backbone needs: two checkpoints, export, report, logs


def main(argv: list[str]) -> int:
    config = parse_config(argv, TextConfig, "graft text")
    folder = resume.begun(config.run)
    if folder:
        return resume.go_on(folder)
    run(config)
    return 0


def run(config: TextConfig, resumed: pathlib.Path | None = None) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder.

    resumed: the folder of a run that goes on.
    """
    clock = facts.Clock()
    found, run_dir = check_request(config, resumed)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} texts in {config.input.data}")
    start_tensorflow(config.training.seed)
    settle(config.training)
    from pipelines.baselines import tfidf_baseline
    from pipelines.contract import trained_text_contract
    from pipelines.distribute import is_chief, is_tpu, leave, make_strategy, shard_of
    from pipelines.evaluate import check_positive
    from pipelines.label_checks import class_warnings
    from pipelines.leakage import check_copies
    from pipelines.run_training import train_run
    from pipelines.tokens import text_predictor, token_parts, truncation_warning
    from pipelines.transfer import judge_transfer

    strategy = make_strategy(config.training.distribute, config.training.devices, config.training.tpu)
    chief = is_chief(strategy)  # of several workers, the one that writes
    splits = load_texts(found, config.input.min_per_class)
    check_positive(config.report.positive or None, config.report.specificity, splits.class_names)
    clock.lap("data")

    with strategy.scope():
        model = build_model(config, splits.class_names, splits.multi_label)
    preprocess = model.backbone.preprocess
    if preprocess is None and is_tpu(strategy):
        raise GraftError(f"{model.backbone.name} takes strings, which a TPU cannot. Give a model that takes tokens.")
    splits.warnings += truncation_warning(splits, preprocess)
    check_copies(splits, config.guards.strict, "text")
    splits.warnings += class_warnings(splits, "text")
    facts.print_splits(splits, "text")
    clock.lap("backbone")

    def read_inputs(table):
        return token_parts(table, preprocess, one_length=is_tpu(strategy))

    with runs.explained(run_dir, shard_of(strategy)[1]):
        # The head only, then the top blocks too, then all: for as long as it pays, or as deep as --depth says.
        contract = trained_text_contract(preprocess)
        trained = train_run(run_dir, config, "text", model, splits, None, strategy, contract, read_inputs)
        clock.lap("training")

        # How good it is, and what a simpler method reaches.
        scored = score(splits, trained.logits_of, config)
        if not chief:
            return leave(strategy, run_dir)
        baseline = tfidf_baseline(splits, config.training.seed)
        clock.lap("evaluation")

        # The verdict on transfer, with what became of it.
        judged = model, splits, None, config, scored[0]["test"], read_inputs, baseline["accuracy"]
        transfer = judge_transfer(*judged, probed=trained.probed)
        clock.lap("transfer verdict")

        # A version for TensorFlow Serving, verified before it gets its number.
        # What it must answer comes from the strings through the whole model, nothing from the cache.
        version, checked = None, {}
        if config.run.export:
            predict = text_predictor(model, preprocess, config.training.batch_size)
            samples = splits.test.slice(0, VERIFIED_EXAMPLES)
            version, checked = publish_texts(
                model, splits.class_names, run_dir, samples, predict, *scored[2:4], contract
            )
            clock.lap("export and verification")

        findings = scored, version, checked, clock, transfer, trained.examined, [baseline]
        gathered, report = write_results(run_dir, config, "text", splits, model.backbone, trained.phases, *findings)
        trained.recovery.remove()
        leave(strategy, run_dir)
    facts.print_ending(gathered, run_dir, version, report)
    check_strict(config, gathered, run_dir)
    return run_dir


def check_request(config: TextConfig, resumed: pathlib.Path | None = None):
    """What can be checked without TensorFlow; returns the texts found and the run folder to make.

    Raises:
        GraftError: an unknown backbone, no usable texts, flags that several labels per text do not go with, no place
            for the run.
    """
    data = config.input
    found = find_texts(
        data.data, data.text_column, data.second_column, data.label_column, data.group_column, data.data_dir
    )
    drop_small_classes(found, data.min_per_class, "text")
    if is_multi_label(found):
        check_multi_label_flags(config, "text")
    run_dir = resumed or runs.choose_run_folder(config.run.out, data.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    check_backbone_name(config.model.backbone, "text")  # last: it may have to be downloaded
    return found, run_dir


def build_model(config: TextConfig, class_names: list[str], multi_label: bool = False):
    """The classifier that `config` asks for, with its pretrained backbone; call it inside the strategy's scope."""
    from models.backbone import ImagePreprocess, load_backbone
    from models.classifier import Classifier

    pooling = config.model.pooling
    backbone = load_backbone(config.model.backbone, None if pooling == "auto" else pooling)
    preprocess = backbone.preprocess
    if isinstance(preprocess, ImagePreprocess):
        raise GraftError(f"Backbone {config.model.backbone} takes images, not text. Give a text model.")
    if preprocess is None and config.input.second_column:
        raise GraftError(
            f"--second-column {config.input.second_column}: {backbone.name} takes one string per example. Put both "
            f"texts into one column, or give a model of another kind."
        )
    if preprocess:
        longest = preprocess.max_length
        if config.model.sequence_length > longest:
            raise GraftError(
                f"--sequence-length {config.model.sequence_length}: {backbone.name} was made for at most {longest} "
                f"tokens. Give a number up to {longest}."
            )
        backbone.preprocess = dataclasses.replace(preprocess, sequence_length=config.model.sequence_length)
    depth = depth_blocks(config.model.depth)
    if depth:
        check_depth(depth, backbone.name, len(backbone.blocks))
    return Classifier(backbone, len(class_names), config.model.dropout, config.training.seed, multi_label)


def publish_texts(
    model,
    class_names: list[str],
    run_dir: pathlib.Path,
    samples,
    predict,
    thresholds=None,
    calibration=None,
    contract=None,
):
    """Export and verify on a table of texts, as `pipelines.results.publish` does.

    Args:
        predict: a function of a table -> logits of the whole model.
        thresholds: [classes] float32, of a multi-label model.
        calibration: as `pipelines.calibration.calibrate` gives it.
        contract: as `pipelines.results.publish` takes it.
    """
    from pipelines.tokens import texts_of
    from serving.export_text import export_text_classifier

    columns = [[text.encode() for text in texts] for texts in texts_of(samples)]
    pairs, serves = len(columns) == 2, exported(calibration)

    def write(folder):
        details = {"backbone": model.backbone.name, "source": model.backbone.source}
        more = {"details": details, "thresholds": thresholds, "pairs": pairs, **serves}
        return export_text_classifier(model, model.backbone.preprocess, class_names, folder, **more)

    texts = list(zip(*columns, strict=True)) if pairs else columns[0]
    logits = predict(samples) / np.float32(serves["temperature"])
    return publish(run_dir, write, texts, facts.probabilities_of(logits, model.multi_label), contract=contract)


def export_again(run_dir: pathlib.Path, state: dict) -> tuple[pathlib.Path, dict]:
    """`graft export` of a run on texts; state: what `runs.start_run_folder` noted."""
    config = read_config(run_dir / "config.yaml", TextConfig)
    start_tensorflow(config.training.seed)
    from pipelines.tokens import text_predictor

    model = build_model(config, state["class_names"], state["multi_label"])
    model.load_weights(runs.find_checkpoint(run_dir))
    predict = text_predictor(model, model.backbone.preprocess, config.training.batch_size)
    samples, *ended = as_it_ended(run_dir, config, state, predict)
    return publish_texts(model, state["class_names"], run_dir, samples, predict, *ended)


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
