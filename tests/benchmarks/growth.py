"""Cost of both phases at 1, 2, 4 and 8 times the data: `python -m tests.benchmarks.growth`.

The images of `two_phase`, 500 to 4,000 of them, once with memory for everything and once with a budget so small that
the cache is read from disk. Each run is a process of its own with an empty cache; imports and loading weights are
outside, everything from the first file read to the test metrics inside. Memory is what the process takes on top of
what it had before the first file was read. `--three-times` asks something else: whether features of three times the
memory budget train to the same metrics as in memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil

from tests.acceptance.tools import PYTHON, ROOT, own_cache
from tests.benchmarks.picture import save_result
from tests.benchmarks.two_phase import BATCH, DEPTH, FINE_TUNE_EPOCHS, HEAD_EPOCHS, IMAGES, build, chosen_tiles

SIZES = (500, 1000, 2000, 4000)
BUDGETS = {"memory": 1.0, "disk": 0.0001}  # gigabytes that activations may take; 500 images need 0.003


def run(seed: int, images: int, cache_memory: float, head_solver: str = "auto") -> dict:
    """Both phases on so many images of `two_phase`, evenly over its classes; seconds, MB at most, test metrics."""
    import tensorflow as tf

    from pipelines.config import ImageConfig
    from pipelines.data import image_loader, load_images, targets_of
    from pipelines.steps import mean_loss_and_accuracy
    from pipelines.training import fit_two_phase

    tf.keras.utils.set_random_seed(seed)
    found, (backbone, classifier) = chosen_tiles(seed)[:: IMAGES // images], build(seed)
    config = ImageConfig()
    config.training.seed, config.training.batch_size, config.training.patience = seed, BATCH, 99
    config.model.depth, config.fine_tune.augmentation = str(DEPTH), "none"
    config.head.head_epochs, config.fine_tune.fine_tune_epochs = HEAD_EPOCHS, FINE_TUNE_EPOCHS
    config.head.head_solver, config.cache.cache_memory = head_solver, cache_memory

    before, peak_before, started = psutil.Process().memory_info().rss, peak_memory(), time.perf_counter()
    splits = load_images(found)
    model = classifier(len(splits.class_names))
    strategy = tf.distribute.get_strategy()
    _, logits_of = fit_two_phase(
        model,
        splits,
        lambda change: image_loader(backbone.preprocess, splits.white_level, change, plain=splits.plain),
        config,
        strategy,
    )
    targets, logits = targets_of(splits.test, len(splits.class_names)), logits_of(splits.test)
    loss, accuracy = mean_loss_and_accuracy(targets, logits, False)
    seconds, peak = time.perf_counter() - started, peak_memory()
    if peak == peak_before:
        raise RuntimeError(
            f"Loading weights took more memory ({peak / 1e6:.0f} MB) than the run: nothing was measured."
        )
    return {"seconds": seconds, "megabytes": (peak - before) / 1e6, "loss": loss, "accuracy": accuracy}


def peak_memory() -> int:
    """Bytes that this process has held at most. (Linux counts kilobytes.)"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_apart(cache: pathlib.Path, *words) -> dict:
    """`run(*words)` in a process of its own, with a cache of its own."""
    command = [PYTHON, "-m", "tests.benchmarks.growth", "--one", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=own_cache(cache), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def grow(runs: int) -> dict:
    """Medians of seconds and of megabytes for every size, with each budget; prints the table."""
    rows = {(budget, size): [] for budget in BUDGETS for size in SIZES}
    for number in range(runs):
        for budget, size in list(rows) if number % 2 == 0 else list(rows)[::-1]:
            with tempfile.TemporaryDirectory() as cache:
                rows[budget, size].append(run_apart(pathlib.Path(cache), 0, size, BUDGETS[budget]))
    result = {"images": list(SIZES), "seconds": {}, "megabytes": {}}
    print("cache    images   both phases   memory at most   test accuracy")
    for budget in BUDGETS:
        for figure in ("seconds", "megabytes"):
            result[figure][budget] = [float(np.median([row[figure] for row in rows[budget, n]])) for n in SIZES]
        for size, seconds, megabytes in zip(SIZES, result["seconds"][budget], result["megabytes"][budget]):
            accuracy = rows[budget, size][0]["accuracy"]
            print(f"{budget:7} {size:7}   {seconds:9.2f} s   {megabytes:11.0f} MB   {accuracy:.3f}")
    return result


def from_linear(images, seconds) -> float:
    """The largest relative deviation of seconds from their least-squares line seconds = a + b * images."""
    slope, start = np.polyfit(images, seconds, 1)
    return float(np.max(np.abs((start + slope * np.array(images)) / seconds - 1)))


def three_times() -> dict:
    """The same run in memory, and with a third of the smallest entry's size as the budget; prints both."""
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        results["memory"] = run_apart(pathlib.Path(cache), 0, IMAGES, BUDGETS["memory"], "sgd")
        entries = pathlib.Path(cache).glob("features/*")
        sizes = sorted(sum(file.stat().st_size for file in entry.glob("*.npy")) for entry in entries)
    budget = sizes[0] / 3 / 1e9
    with tempfile.TemporaryDirectory() as cache:
        results["disk"] = run_apart(pathlib.Path(cache), 0, IMAGES, budget, "sgd")
    megabytes = " and ".join(f"{size / 1e6:.1f}" for size in sizes)
    print(f"features and activations of {megabytes} MB, with memory for everything and with {1e3 * budget:.1f} MB")
    for name, row in results.items():
        print(f"{name:7} test loss {row['loss']:.4f}   test accuracy {row['accuracy']:.4f}   {row['seconds']:.1f} s")
    same = all(round(results["memory"][key], 4) == round(results["disk"][key], 4) for key in ("loss", "accuracy"))
    print(f"the metrics are {'the same' if same else 'NOT the same'} to 4 decimals")
    return {"budget": budget * 1e3, "sizes": [size / 1e6 for size in sizes], **results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each size; medians count")
    parser.add_argument("--three-times", action="store_true", help="features of three times the memory budget")
    parser.add_argument("--json", help="file of results for `tests.benchmarks.picture`")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        seed, images, cache_memory, *solver = options.one
        print(json.dumps(run(int(seed), int(images), float(cache_memory), *solver)))
        return 0
    if options.three_times:
        name, result = "three_times", three_times()
    else:
        name, result = "growth", grow(options.runs)
        deviations = {budget: from_linear(SIZES, seconds) for budget, seconds in result["seconds"].items()}
        four, eight = result["megabytes"]["disk"][-2:]
        print(
            f"time is at most {deviations['memory']:.0%} from linear in memory, {deviations['disk']:.0%} from disk; "
            f"from 4 to 8 times the data, memory on disk grows by {eight - four:.0f} MB ({eight / four - 1:+.0%})"
        )
    if options.json:
        save_result(options.json, name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
