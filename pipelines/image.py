"""Images end to end: a pretrained backbone and folders of pictures in, a verified SavedModel and a report out.

    python -m pipelines.image --data photos/          (the same as: graft image --data photos/)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks, so that
--help and most mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import numpy as np
import tyro

from models import GraftError
from models.names import check_backbone_name, check_depth, known_blocks
from pipelines import facts, runs
from pipelines.config import ImageConfig, depth_blocks, parse_config, read_config
from pipelines.console import console, print_trainable_table, start_tensorflow
from pipelines.data import image_loader, load_images, targets_of
from pipelines.evaluate_multi_label import choose_thresholds
from pipelines.mistakes import worst_mistakes
from pipelines.sources import drop_small_classes, find_images, is_multi_label

VERIFIED_FILES = 200  # most test files whose served answers are compared with training's
RUN_BYTES = 150_000_000  # free disk that a run of a small backbone needs: two checkpoints, export, report, logs


def main(argv: list[str]) -> int:
    run(parse_config(argv))
    return 0


def run(config: ImageConfig) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder."""
    clock = facts.Clock()
    found, run_dir = check_request(config)  # needs no TensorFlow: a mistake answers at once
    console.print(f"Data: {len(found):,} images in {config.input.data}")
    start_tensorflow(config.training.seed)
    from pipelines.callbacks import ProgressPrinter, tensorboard
    from pipelines.distribute import make_strategy
    from pipelines.evaluate import check_positive
    from pipelines.model_card import write_model_card
    from pipelines.report import write_report
    from pipelines.training import fit_two_phase, predictor

    strategy = make_strategy(config.training.distribute, config.training.devices)
    splits = load_images(found, config.input.min_per_class)
    check_positive(config.report.positive or None, config.report.specificity, splits.class_names)
    facts.print_splits(splits)
    clock.lap("data")

    with strategy.scope():
        model = build_model(config, splits.class_names, splits.multi_label)
    clock.lap("backbone")

    def loader(augmentation, random_erasing=0.0):
        return image_loader(model.backbone.preprocess, splits.white_level, augmentation, random_erasing, splits.plain)

    def test_phase(phase, logits_of):
        """Test figures after each phase, for the report only: nothing is chosen by them."""
        facts.add_test_figures(phase, splits, logits_of(splits.test))

    with runs.explained(run_dir):
        # Two phases: the head only, then the top blocks too.
        runs.start_run_folder(run_dir, config, splits)
        phases, logits_of = fit_two_phase(
            model,
            splits,
            loader,
            config,
            strategy,
            callbacks=[ProgressPrinter(), tensorboard(run_dir)],
            on_start=print_trainable_table,
            on_best=lambda name, model: runs.save_checkpoint(model, run_dir, name),
            on_end=test_phase,
        )
        clock.lap("training")

        # How good it is.
        logits = {"val": logits_of(splits.val), "test": logits_of(splits.test)}
        thresholds = thresholds_for(splits.val, logits["val"]) if splits.multi_label else None
        metrics = facts.metrics_of(splits, logits, thresholds, config)
        clock.lap("evaluation")

        # A version for TensorFlow Serving, verified before it gets its number.
        # What it must answer comes from the files through the whole model, nothing from the cache.
        samples = splits.test.slice(0, VERIFIED_FILES)
        expected = predictor(model, strategy, loader("none"), config.training.batch_size)(samples)
        expected = facts.probabilities_of(expected, splits.multi_label)
        paths = samples["path"].to_pylist()
        version, checked = publish(model, splits.class_names, splits.white_level, run_dir, paths, expected, thresholds)
        clock.lap("export and verification")

        # The report; metrics.json last: a run that has it is complete.
        probabilities = facts.probabilities_of(logits["test"], splits.multi_label)
        gathered = {
            **facts.about_run(config, splits, model.backbone, phases, metrics),
            **({"thresholds": thresholds.tolist()} if splits.multi_label else {}),
            "mistakes": worst_mistakes(
                splits.test,
                probabilities,
                splits.class_names,
                splits.white_level,
                config.report.report_inputs,
                thresholds,
            ),
            "timings": clock.laps,
            "serving": {"folder": str(version.relative_to(run_dir)), **checked},
        }
        report = write_report(run_dir, gathered)
        write_model_card(run_dir, gathered)
        runs.write_json(run_dir / "metrics.json", facts.machine_metrics(gathered))
    facts.print_ending(gathered, run_dir, version, report)
    return run_dir


def check_request(config: ImageConfig):
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
        check_multi_label_flags(config)
    run_dir = runs.choose_run_folder(config.run.out, data.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    check_backbone_name(config.model.backbone)  # last: it may have to be downloaded
    return found, run_dir


def check_multi_label_flags(config: ImageConfig) -> None:
    """Raise GraftError for what makes sense with one label per image only."""
    if config.training.class_weights != "none":
        raise GraftError(
            f"--class-weights {config.training.class_weights}: --data {config.input.data} has several labels per "
            f"image, and an image weighs for all its classes at once. Leave the flag out: each class gets its own "
            f"threshold, so that rare classes are found too."
        )
    if config.report.positive:
        raise GraftError(
            f"--positive {config.report.positive}: --data {config.input.data} has several labels per image; "
            f"sensitivity at a specificity needs exactly one of two. Leave the flag out: the per-class table of the "
            f"report has precision, recall and threshold of every class."
        )


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


def thresholds_for(val, logits: np.ndarray) -> np.ndarray:
    """The threshold of each class, [classes] float32, that suits the validation set of a multi-label model best."""
    return choose_thresholds(targets_of(val, logits.shape[1]), facts.probabilities_of(logits, multi_label=True))


def publish(model, class_names, white_level: int, run_dir: pathlib.Path, sample_paths, probabilities, thresholds=None):
    """Export to RUN/serving/NAME/NUMBER, verified on sample files before it gets its number.

    Args:
        sample_paths: files; the first rows of `probabilities` [n, classes] are training's answers for them.
        thresholds: [classes] float32, of a multi-label model.

    Returns:
        The version's folder, and what was checked.
    """
    from serving.export import export_image_classifier, publish_version
    from serving.verify import verify

    samples = [pathlib.Path(path).read_bytes() for path in sample_paths]
    backbone = model.backbone
    checked = {}

    def write(folder):
        export_image_classifier(
            model,
            backbone.preprocess,
            class_names,
            folder,
            white_level=white_level,
            details={"backbone": backbone.name, "source": backbone.source},
            thresholds=thresholds,
        )

    def check(folder):
        checked.update(verify(folder, samples, probabilities[: len(samples)]))

    with console.status("exporting and verifying the SavedModel"):
        version = publish_version(write, run_dir / "serving" / runs.serving_name(run_dir), check)
    return version, checked


# ---------------------------------------------------------------- graft export


@dataclasses.dataclass
class ExportConfig:
    """Export a run again as its next version, or make a model of what a stopped run had learned."""

    run: tyro.conf.Positional[str]
    """Run folder."""


def export_run(argv: list[str]) -> int:
    """`graft export RUN`: rebuild the model from the run's best weights, export and verify it."""
    run_dir = pathlib.Path(tyro.cli(ExportConfig, args=argv, prog="graft export").run)
    if not (run_dir / "config.yaml").is_file():
        raise GraftError(
            f"{run_dir} is not a run folder: it holds no config.yaml. Give the folder that `graft image` wrote."
        )
    checkpoint = runs.find_checkpoint(run_dir)
    if checkpoint is None:
        raise GraftError(
            f"{run_dir} holds no saved weights: its training stopped before the first epoch ended. Train again."
        )
    config = read_config(run_dir / "config.yaml")
    state = json.loads((run_dir / "checkpoints" / "state.json").read_text())
    start_tensorflow(config.training.seed)
    import tensorflow as tf

    from pipelines.training import predictor

    class_names, multi_label = state["class_names"], state.get("multi_label", False)
    model = build_model(config, class_names, multi_label)
    model.load_weights(checkpoint)
    load = image_loader(model.backbone.preprocess, state["white_level"])
    predict = predictor(model, tf.distribute.get_strategy(), load, config.training.batch_size)

    def logits_of(table):
        return predict(table) if table.num_rows else np.zeros((0, len(class_names)), np.float32)

    table = runs.read_split(run_dir, "test", VERIFIED_FILES, multi_label)
    probabilities = facts.probabilities_of(logits_of(table), multi_label)
    thresholds = thresholds_of_run(run_dir, logits_of) if multi_label else None
    with runs.explained(run_dir):
        version, checked = publish(
            model,
            class_names,
            state["white_level"],
            run_dir,
            table["path"].to_pylist(),
            probabilities,
            thresholds,
        )
    console.print(f"Exported the weights of {checkpoint.name} to {version}\n{facts.served_line(checked)}")
    return 0


def thresholds_of_run(run_dir: pathlib.Path, logits_of) -> np.ndarray:
    """The thresholds of a multi-label run: those it ended with; of a stopped run chosen on its validation images."""
    if (run_dir / "metrics.json").is_file():
        return np.array(json.loads((run_dir / "metrics.json").read_text())["thresholds"], np.float32)
    val = runs.read_split(run_dir, "val", multi_label=True)
    if not val.num_rows:
        raise GraftError(
            f"{run_dir}: thresholds are chosen on the validation images, and all of those that splits.csv lists "
            f"are gone or changed. Put them back, or train again."
        )
    return thresholds_for(val, logits_of(val))


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
