"""Images end to end: a pretrained backbone and folders of pictures in, a verified SavedModel and a report out.

    python -m pipelines.image --data photos/          (the same as: graft image --data photos/)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks, so that
--help and most mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import types

import numpy as np

from models import GraftError
from models.names import check_backbone_name, check_depth, known_blocks
from pipelines import facts, resume, runs
from pipelines.calibration import exported
from pipelines.config import check_multi_label_flags, depth_blocks, parse_config, read_config
from pipelines.console import console, start_tensorflow
from pipelines.data import image_loader, load_images
from pipelines.devices import settle
from pipelines.options import ImageConfig
from pipelines.results import VERIFIED_EXAMPLES, as_it_ended, check_strict, publish, score, write_results
from pipelines.sources import drop_small_classes, find_images, is_multi_label

RUN_BYTES = 150_000_000  # free disk that a run of a small backbone needs: two checkpoints, export, report, logs


def main(argv: list[str]) -> int:
    config = parse_config(argv)
    folder = resume.begun(config.run)
    if folder:
        return resume.go_on(folder)
    run(config)
    return 0


def run(config: ImageConfig, resumed: pathlib.Path | None = None) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder.

    resumed: the folder of a run that goes on.
    """
    clock = facts.Clock()
    found, run_dir = check_request(config, resumed)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} images in {config.input.data}")
    start_tensorflow(config.training.seed)
    settle(config.training)
    from pipelines.contract import trained_image_contract
    from pipelines.distribute import is_chief, leave, local_strategy, make_strategy, shard_of
    from pipelines.evaluate import check_positive
    from pipelines.label_checks import class_warnings
    from pipelines.leakage import check_copies
    from pipelines.prediction import predictor
    from pipelines.run_training import train_run
    from pipelines.transfer import judge_transfer

    strategy = make_strategy(config.training.distribute, config.training.devices, config.training.tpu)
    chief = is_chief(strategy)  # of several workers, the one that writes
    splits = load_images(found, config.input.min_per_class)
    check_positive(config.report.positive or None, config.report.specificity, splits.class_names)
    check_copies(splits, config.guards.strict)
    splits.warnings += class_warnings(splits)
    facts.print_splits(splits)
    clock.lap("data")

    with strategy.scope():
        model = build_model(config, splits.class_names, splits.multi_label)
    clock.lap("backbone")

    def loader(augmentation, random_erasing=0.0):
        return image_loader(model.backbone.preprocess, splits.white_level, augmentation, random_erasing, splits.plain)

    with runs.explained(run_dir, shard_of(strategy)[1]):
        # The head only, then the top blocks too, then all: for as long as it pays, or as deep as --depth says.
        contract = trained_image_contract(model.backbone.preprocess, splits.white_level)
        trained = train_run(run_dir, config, "image", model, splits, loader, strategy, contract)
        clock.lap("training")

        # How good it is.
        scored = score(splits, trained.logits_of, config)
        if not chief:
            return leave(strategy, run_dir)
        clock.lap("evaluation")

        # The verdict on transfer, with what became of it.
        transfer = judge_transfer(model, splits, loader, config, scored[0]["test"], probed=trained.probed)
        clock.lap("transfer verdict")

        # A version for TensorFlow Serving, verified before it gets its number.
        # What it must answer comes from the files through the whole model, nothing from the cache.
        version, checked = None, {}
        if config.run.export:
            predict = predictor(model, local_strategy(strategy), loader("none"), config.training.batch_size)
            samples = splits.test.slice(0, VERIFIED_EXAMPLES)
            version, checked = publish_images(model, splits, run_dir, samples, predict, *scored[2:4], contract)
            clock.lap("export and verification")

        findings = scored, version, checked, clock, transfer, trained.examined
        gathered, report = write_results(run_dir, config, "image", splits, model.backbone, trained.phases, *findings)
        trained.recovery.remove()
        leave(strategy, run_dir)
    facts.print_ending(gathered, run_dir, version, report)
    check_strict(config, gathered, run_dir)
    return run_dir


def check_request(config: ImageConfig, resumed: pathlib.Path | None = None):
    """What can be checked without TensorFlow; returns the images found and the run folder to make.

    Raises:
        GraftError: an unknown backbone, a depth that it lacks, no usable images, flags that several labels per
            image do not go with, no place for the run.
    """
    depth, blocks = depth_blocks(config.model.depth), known_blocks(config.model.backbone)
    if depth and blocks:
        check_depth(depth, config.model.backbone, blocks)
    data = config.input
    found = find_images(data.data, data.path_column, data.label_column, data.group_column, data.data_dir)
    drop_small_classes(found, data.min_per_class)
    if is_multi_label(found):
        check_multi_label_flags(config, "image")
    run_dir = resumed or runs.choose_run_folder(config.run.out, data.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    check_backbone_name(config.model.backbone)  # last: it may have to be downloaded
    return found, run_dir


def build_model(config: ImageConfig, class_names: list[str], multi_label: bool = False):
    """The classifier that `config` asks for, with its pretrained backbone; call it inside the strategy's scope."""
    from models.backbone import load_backbone
    from models.classifier import Classifier

    backbone = load_backbone(config.model.backbone)
    if backbone.preprocess is None:
        raise GraftError(f"Backbone {config.model.backbone} takes text, not images. Give an image model.")
    if "notice" in backbone.source:
        console.print(f"[yellow]      Note: {backbone.source['notice']}")
    if config.model.image_size:
        size = (config.model.image_size, config.model.image_size)
        fixed = backbone.encoder.input_shape[1:3]
        if any(built and built != asked for built, asked in zip(fixed, size)):
            raise GraftError(
                f"--image-size {size[0]}: {backbone.name} was built for {fixed[0]} x {fixed[1]} pixels and takes no "
                f"other size. Leave the flag out."
            )
        backbone.preprocess = dataclasses.replace(backbone.preprocess, image_size=size)
    depth = depth_blocks(config.model.depth)
    if depth:
        check_depth(depth, backbone.name, len(backbone.blocks))
    return Classifier(backbone, len(class_names), config.model.dropout, config.training.seed, multi_label)


def publish_images(
    model, splits, run_dir: pathlib.Path, samples, predict, thresholds=None, calibration=None, contract=None
):
    """Export and verify on a table of images, as `pipelines.results.publish` does.

    Args:
        splits: whatever has class_names and white_level.
        predict: a function of a table -> logits of the whole model.
        thresholds: [classes] float32, of a multi-label model.
        calibration: as `pipelines.calibration.calibrate` gives it.
        contract: as `pipelines.results.publish` takes it.
    """
    from serving.export import export_image_classifier

    serves = exported(calibration)

    def write(folder, **options):
        return export_image_classifier(
            model,
            model.backbone.preprocess,
            splits.class_names,
            folder,
            white_level=splits.white_level,
            details={"backbone": model.backbone.name, "source": model.backbone.source},
            thresholds=thresholds,
            **serves,
            **options,
        )

    def write_variables(folder):
        return write(folder, folded_bytes=0)

    files = [pathlib.Path(path).read_bytes() for path in samples["path"].to_pylist()]
    expected = predict(samples) if files else np.zeros((0, len(splits.class_names)), np.float32)
    expected = facts.probabilities_of(expected / np.float32(serves["temperature"]), model.multi_label)
    return publish(run_dir, write, files, expected, write_variables, contract)


def export_again(run_dir: pathlib.Path, state: dict) -> tuple[pathlib.Path, dict]:
    """`graft export` of a run on images; state: what `runs.start_run_folder` noted."""
    config = read_config(run_dir / "config.yaml")
    start_tensorflow(config.training.seed)
    import tensorflow as tf

    from pipelines.prediction import predictor

    noted = types.SimpleNamespace(class_names=state["class_names"], white_level=state["white_level"])
    model = build_model(config, noted.class_names, state.get("multi_label", False))
    model.load_weights(runs.find_checkpoint(run_dir))
    load = image_loader(model.backbone.preprocess, noted.white_level)
    predict = predictor(model, tf.distribute.get_strategy(), load, config.training.batch_size)
    samples, *ended = as_it_ended(run_dir, config, state, predict)
    return publish_images(model, noted, run_dir, samples, predict, *ended)


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
