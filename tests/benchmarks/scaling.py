"""Pictures per second of 1 and 2 worker processes that fine-tune together, beside what the machine can do at all.

    python -m tests.benchmarks.scaling

Each process has one thread. The machine's limit: as many processes that train alone at the same time, added up.
Efficiency is (workers together) / (workers * one worker alone on the idle machine).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests import loopback

STEPS, WARM_UP, BATCH, SIDE = 24, 6, 16, 96


def work() -> None:
    """One worker: train the top two blocks of EfficientNet-Lite0 on noise, and print what a step takes."""
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from models import freezing
    from models.backbone import load_backbone
    from models.classifier import Classifier
    from models.optimizer import make_optimizer
    from pipelines import cluster
    from pipelines.distribute import distributed, leave, make_strategy, shard_of
    from pipelines.steps import make_train_step

    strategy = make_strategy("multiworker" if cluster.tf_config() else "none")
    index, _ = shard_of(strategy)
    with strategy.scope():
        model = Classifier(load_backbone("efficientnet_lite0"), 10, seed=0)
        freezing.unfreeze_top(model, 2)
        optimizer = make_optimizer("adamw", model, 1e-4)
    train_step = make_train_step(model, optimizer, strategy)
    size = BATCH  # for each worker: the work of a worker stays the same
    images = np.random.default_rng(index).normal(size=(size, SIDE, SIDE, 3)).astype(np.float32)
    targets = np.eye(10, dtype=np.float32)[np.arange(size) % 10]
    batch = tf.data.Dataset.from_tensors((images, targets, np.ones(size, np.float32), np.arange(size, dtype=np.int32)))
    seconds = []
    for each in distributed(strategy, batch.repeat(STEPS)):
        started = time.perf_counter()
        train_step(each).numpy()
        seconds.append(time.perf_counter() - started)
    leave(strategy, None)
    print(json.dumps({"pictures_per_second": size / float(np.median(seconds[WARM_UP:]))}), flush=True)


def run(environments: list) -> list[float]:
    """Pictures per second of workers that run at the same time, each in its environment."""
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--work"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]
    found = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)
        found.append(json.loads(output.splitlines()[-1])["pictures_per_second"])
    return found


def main() -> None:
    single = {**loopback.cluster_of(1)[0]}
    del single["TF_CONFIG"]
    rows = {"alone": [], "side by side": [], "together": []}
    for _ in range(3):
        rows["alone"].append(sum(run([single])))
        rows["side by side"].append(sum(run([single, single])))
        rows["together"].append(sum(run(loopback.cluster_of(2))))
    middle = {name: sorted(values)[1] for name, values in rows.items()}
    alone, limit, together = middle["alone"], middle["side by side"], middle["together"]
    print(f"1 process                 {alone:6.1f} pictures/s")
    print(
        f"2 processes, each alone   {limit:6.1f} pictures/s, {limit / (2 * alone):.0%} efficient: the machine's limit"
    )
    print(f"2 workers together        {together:6.1f} pictures/s, {together / (2 * alone):.0%} efficient, "
          f"{together / limit:.0%} of the machine's limit")  # fmt: skip


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
