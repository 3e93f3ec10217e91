"""Images end to end: a pretrained backbone and folders of pictures in, a verified SavedModel and a report out.

    python -m pipelines.image --data photos/          (the same as: graft image --data photos/)

Reads top to bottom: `run` is the whole story. TensorFlow is imported after the cheap checks, so that
--help and most mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import tyro

from models import GraftError
from models.names import check_backbone_name, check_depth, known_blocks
from pipelines import facts, runs
from pipelines.config import ImageConfig, config_yaml, depth_blocks, parse_config, read_config
from pipelines.console import console, print_trainable_table, progress_bar, start_tensorflow
from pipelines.data import Splits, dataset, drop_small_classes, find_images, image_loader, load_images

VERIFIED_FILES = 200  # most test files whose served answers are compared with training's
RUN_BYTES = 150_000_000  # free disk that a run of a small backbone needs: two checkpoints, export, report, logs


def main(argv: list[str]) -> int:
    run(parse_config(argv))
    return 0


def run(config: ImageConfig) -> pathlib.Path:
    """Train, evaluate, export, verify and report as `config` says; returns the run folder."""
    clock = facts.Clock()

    # ---- What needs no TensorFlow comes first: a mistake here answers at once.
    check_backbone_name(config.model.backbone)
    depth, blocks = depth_blocks(config.model.depth), known_blocks(config.model.backbone)
    if depth and blocks:
        check_depth(depth, config.model.backbone, blocks)
    found = find_images(config.input.data)
    drop_small_classes(found, config.input.min_per_class)
    run_dir = runs.choose_run_folder(config.run.out, config.input.data)
    runs.check_free_space(run_dir, RUN_BYTES)
    console.print(f"Data: {len(found):,} images in {config.input.data}")
    start_tensorflow(config.training.seed)
    from pipelines.callbacks import ProgressPrinter, tensorboard
    from pipelines.distribute import make_strategy
    from pipelines.evaluate import check_positive, evaluate
    from pipelines.report import write_report
    from pipelines.training import fit_two_phase, make_predict_step, mean_loss_and_accuracy, predict_logits

    # ---- Devices, data, model.
    strategy = make_strategy(config.training.distribute, config.training.devices)
    splits = load_images(found, config.input.min_per_class)
    check_positive(config.report.positive or None, config.report.specificity, splits.class_names)
    print_splits(splits)
    clock.lap("data")
    with strategy.scope():
        model = build_model(config, splits.class_names)
    if depth:
        check_depth(depth, config.model.backbone, len(model.blocks))
    clock.lap("backbone")

    def loader(augmentation):
        return image_loader(model.backbone.preprocess, splits.white_level, augmentation)

    predict_step = make_predict_step(model, strategy)

    def logits_of(table):
        batches = dataset(table, loader("none"), batch_size=config.training.batch_size)
        with progress_bar() as bar:
            task = bar.add_task("evaluating", total=len(batches), note="")
            return predict_logits(predict_step, strategy, batches, table.num_rows, lambda: bar.advance(task))

    def test_phase(phase):
        """Test figures after each phase, for the report only: nothing is chosen by them."""
        loss, accuracy = mean_loss_and_accuracy(splits.test["label"].to_numpy(), logits_of(splits.test))
        phase["test"] = {"accuracy": accuracy, "loss": loss}
        console.print(
            f"  {phase['seconds']:.0f} s. Best epoch {phase['best_epoch']} of {phase['epochs']}: "
            f"validation loss {phase['val_loss']:.3f}, test accuracy {accuracy:.3f}\n"
        )

    with runs.full_disk_is_an_error(run_dir):
        # ---- Two phases: head only, then the top blocks too.
        start_run_folder(run_dir, config, splits)
        try:
            phases = fit_two_phase(
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
        except KeyboardInterrupt:
            raise stopped(run_dir) from None
        clock.lap("training")

        # ---- How good it is.
        logits = {"val": logits_of(splits.val), "test": logits_of(splits.test)}
        metrics = {
            name: evaluate(
                getattr(splits, name)["label"].to_numpy(),
                logits[name],
                splits.class_names,
                positive=config.report.positive or None,
                specificity=config.report.specificity,
                seed=config.training.seed,
            )
            for name in logits
        }
        clock.lap("evaluation")

        # ---- A version for TensorFlow Serving, verified before it gets its number.
        probabilities = facts.softmax(logits["test"])
        samples = splits.test["path"].to_pylist()[:VERIFIED_FILES]
        version, checked = publish(model, splits.class_names, splits.white_level, run_dir, samples, probabilities)
        clock.lap("export and verification")

        # ---- The report, and metrics.json last: a run that has it is complete.
        gathered = {
            **facts.about_run(config, splits, model.backbone, phases, metrics),
            "mistakes": facts.worst_mistakes(
                splits.test["label"].to_numpy(),
                probabilities,
                splits.class_names,
                splits.test["path"].to_pylist(),
                splits.test["id"].to_pylist(),
                splits.white_level,
                with_pictures=config.report.report_inputs == "all",
            ),
            "timings": clock.laps,
            "serving": {"folder": str(version.relative_to(run_dir)), **checked},
        }
        report = write_report(run_dir, gathered)
        runs.write_json(run_dir / "metrics.json", facts.machine_metrics(gathered))
    print_ending(gathered, run_dir, version, report)
    return run_dir


def build_model(config: ImageConfig, class_names: list[str]):
    """The classifier that `config` asks for, with its pretrained backbone; call it inside the strategy's scope."""
    from models.backbone import load_backbone
    from models.classifier import Classifier

    backbone = load_backbone(config.model.backbone)
    if config.model.image_size:
        size = (config.model.image_size, config.model.image_size)
        backbone.preprocess = dataclasses.replace(backbone.preprocess, image_size=size)
    return Classifier(backbone, len(class_names), config.model.dropout, config.training.seed)


# ---------------------------------------------------------------- before training


def print_splits(splits: Splits) -> None:
    sizes = facts.split_sizes(splits)
    console.print(
        f"      {len(splits.class_names)} classes; {sizes['train']:,} to train, {sizes['val']:,} to validate, "
        f"{sizes['test']:,} to test"
    )
    for warning in splits.warnings:
        console.print(f"[yellow]      Note: {warning}")


def start_run_folder(run_dir: pathlib.Path, config: ImageConfig, splits: Splits) -> None:
    """Make the run folder with what is known before training: config.yaml, skipped.csv, splits.csv, state.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    runs.write_text(run_dir / "config.yaml", config_yaml(config))
    runs.write_csv(run_dir / "skipped.csv", splits.skipped, ["path", "reason"])
    rows = [
        {**row, "split": name, "class": splits.class_names[row["label"]], "path": os.path.abspath(row["path"])}
        for name, table in zip(("train", "val", "test"), splits)
        for row in table.to_pylist()
    ]
    runs.write_csv(run_dir / "splits.csv", rows, ["split", "class", "label", "id", "path"])
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    state = {"class_names": splits.class_names, "white_level": splits.white_level}
    runs.write_json(run_dir / "checkpoints" / "state.json", state)


def stopped(run_dir: pathlib.Path) -> GraftError:
    """The message for Ctrl-C; a run that has learned nothing yet leaves no folder."""
    if runs.find_checkpoint(run_dir):
        error = GraftError(
            f"Stopped. The best weights so far are saved: `graft export {run_dir}` makes a model of them."
        )
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        error = GraftError("Stopped before anything was learned; nothing was saved.")
    error.exit_code = 75
    return error


# ---------------------------------------------------------------- after training


def publish(model, class_names, white_level: int, run_dir: pathlib.Path, sample_paths, probabilities):
    """Export to RUN/serving/NAME/NUMBER, verified on sample files before it gets its number.

    Args:
        sample_paths: files; the first rows of `probabilities` [n, classes] are training's answers for them.

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
        )

    def check(folder):
        checked.update(verify(folder, samples, probabilities[: len(samples)]))

    with console.status("exporting and verifying the SavedModel"):
        version = publish_version(write, run_dir / "serving" / serving_name(run_dir), check)
    return version, checked


def serving_name(run_dir: pathlib.Path) -> str:
    """The model's name in TensorFlow Serving: the run folder's."""
    return run_dir.absolute().name


def print_ending(gathered: dict, run_dir: pathlib.Path, version: pathlib.Path, report: pathlib.Path) -> None:
    """What one would tell a colleague, and what to type next."""
    checked, name = gathered["serving"], version.parent.name
    console.print(
        f"[bold]{facts.headline(gathered['metrics']['test'])}[/] on {gathered['examples']['test']:,} test images. "
        f"{' '.join(gathered['verdicts'])}\n"
        f"Look first: {len(gathered['mistakes'])} worst mistakes   {report}\n"
        f"{served_line(checked)}   {version}\n"
        f"Try it:   graft predict {run_dir} FILES\n"
        f"          docker run -p 8501:8501 -v {version.parent.absolute()}:/models/{name} "
        f"-e MODEL_NAME={name} tensorflow/serving:2.20.0"
    )


def served_line(checked: dict) -> str:
    """What verification found, in one line."""
    if not checked["files"]:
        return "Verified for TensorFlow Serving; no test files were left to compare answers with training's."
    return (
        f"Served answers equal training's ({checked['files']} files, "
        f"largest difference {checked['largest_difference']:.0e})"
    )


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

    from pipelines.training import make_predict_step, predict_logits

    model = build_model(config, state["class_names"])
    model.load_weights(checkpoint)
    table = runs.read_split(run_dir, "test", VERIFIED_FILES)
    probabilities = np.zeros((0, len(state["class_names"])), np.float32)
    if table.num_rows:
        strategy = tf.distribute.get_strategy()
        load = image_loader(model.backbone.preprocess, state["white_level"])
        batches = dataset(table, load, batch_size=config.training.batch_size)
        logits = predict_logits(make_predict_step(model, strategy), strategy, batches, table.num_rows)
        probabilities = facts.softmax(logits)
    with runs.full_disk_is_an_error(run_dir):
        version, checked = publish(
            model,
            state["class_names"],
            state["white_level"],
            run_dir,
            table["path"].to_pylist(),
            probabilities,
        )
    console.print(f"Exported the weights of {checkpoint.name} to {version}\n{served_line(checked)}")
    return 0


if __name__ == "__main__":
    from pipelines.__main__ import guarded

    sys.exit(guarded(main, sys.argv[1:]))
