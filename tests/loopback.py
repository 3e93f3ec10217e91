"""Workers on this machine's loopback: start them, and train in each what a test asks for.

`python -m tests.loopback OUT FOLDER` is one worker, the one that TF_CONFIG says; it writes OUT.NUMBER.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

CASES = {  # name: (kind of model, options)
    "image": ("image", {"cache": "memory", "optimizer": "adamw", "clip_norm": 0.5, "weight_decay": 0.1}),
    "climb": (
        "image",
        {
            "depth": "auto",
            "ema": 0.9,
            "optimizer": "sgd",
            "head_solver": "sgd",
            "augmentation": "flip-crop",
            "mixup": 0.4,
            "forgetting_limit": 0.01,
            "wise_ft": True,
            "batch_size": 24,  # two parts for each of up to four devices
            "accumulation_steps": 2,
        },
    ),
    "text": ("text", {"depth": "1", "optimizer": "sgd", "cache": "none"}),
    "hub": ("hub", {"depth": "1", "optimizer": "sgd", "cache": "none"}),
}


def cluster_of(count: int) -> list[dict[str, str]]:
    """The environments of so many workers, on ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    tasks = [{"type": "worker", "index": index} for index in range(count)]
    texts = [json.dumps({"cluster": {"worker": workers}, "task": task}) for task in tasks]
    return [{**os.environ, "TF_CONFIG": text, "TF_CPP_MIN_LOG_LEVEL": "2"} for text in texts]


def start_all(count: int, command: list[str], **options) -> list[subprocess.Popen]:
    """`python COMMAND` in so many workers."""
    return [subprocess.Popen([sys.executable, *command], env=each, **options) for each in cluster_of(count)]


def train_case(name: str, folder: pathlib.Path, strategy) -> dict:
    """The losses of both phases of a case, and what else all workers must agree on."""
    import dataclasses

    import numpy as np

    from models.backbone import load_backbone
    from models.classifier import Classifier
    from pipelines import training
    from pipelines.data import image_loader, load_images
    from pipelines.sources import find_images
    from pipelines.texts import find_texts, load_texts
    from pipelines.tokens import token_parts
    from tests.conftest import tiny_backbone
    from tests.test_training import make_config

    kind, options = CASES[name]
    config = make_config(**{"batch_size": 12, "head_epochs": 2, "fine_tune_epochs": 2, "depth": "2", **options})
    loader = read_inputs = None
    with strategy.scope():
        if kind == "image":
            backbone = tiny_backbone()
        elif kind == "text":
            backbone = load_backbone(str(folder / "bert"))
            for layer in backbone.encoder._flatten_layers():
                if hasattr(layer, "rate"):
                    layer.rate = 0.0  # dropout is not the same on any number of devices
            backbone.preprocess = dataclasses.replace(backbone.preprocess, sequence_length=16)
        else:
            backbone = load_backbone(f"tfhub:{folder / 'module'}")
        model = Classifier(backbone, 3, dropout=0.0, seed=1)
    if kind == "text":
        splits = load_texts(find_texts(str(folder / "texts.csv")))

        def read_inputs(table):
            return token_parts(table, backbone.preprocess)

    else:
        splits = load_images(find_images(str(folder / "pictures")))

        def loader(augmentation, random_erasing=0.0):
            return image_loader(backbone.preprocess, splits.white_level, augmentation, random_erasing)

    phases, logits_of = training.fit_two_phase(model, splits, loader, config, strategy, read_inputs=read_inputs)
    return {
        "losses": [[row[key] for key in ("loss", "val_loss")] for phase in phases for row in phase["history"]],
        "accuracies": [row["accuracy"] for phase in phases for row in phase["history"]],
        "decisions": [[phase["name"], phase["kept"], phase["epochs"], phase.get("wise_ft", {}).get("share")]
                      for phase in phases],
        "cka": [row["cka"] for phase in phases for row in phase["history"] if "cka" in row],
        "logits": logits_of(splits.test).tolist(),
        "weights": [float(np.abs(weight.numpy()).sum()) for weight in model.weights],
        "train": splits.train.num_rows,
    }  # fmt: skip


def logical_devices(count: int):
    """The strategy of so many logical CPUs."""
    import tensorflow as tf

    from pipelines.distribute import make_strategy

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    return make_strategy("mirrored" if count > 1 else "none", [f"CPU:{number}" for number in range(count)])


def main(out: str, folder: str, *names: str) -> None:
    from pipelines import cluster
    from pipelines.distribute import make_strategy

    if "LOGICAL_DEVICES" in os.environ:  # one process, with so many devices
        strategy = logical_devices(int(os.environ["LOGICAL_DEVICES"]))
    else:
        strategy = make_strategy("multiworker")
    found = {name: train_case(name, pathlib.Path(folder), strategy) for name in names}
    number, _ = cluster.place_in(cluster.tf_config())
    pathlib.Path(f"{out}.{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
