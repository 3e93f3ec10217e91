"""The frozen prefix of EfficientNet-Lite0 on engines that there are: `python -m tests.benchmarks.frozen_engines`.

Milliseconds per image at 96 and 224 pixels, batch 32: TensorFlow with variables, TensorFlow with constants (what Graft
runs), and OpenVINO reading the SavedModel as it is (`pip install openvino`; left out where it is not installed). Rounds
alternate in one process; the median counts. The frozen pass is a part of a run: end to end OpenVINO wins less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import numpy as np

BATCH = 32


def openvino_engine(prefix, side: int):
    """A function: images [b, side, side, 3] float32 -> activations, through OpenVINO; None where it is not there."""
    try:
        import openvino
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        prefix.export(folder, verbose=False)
        model = openvino.convert_model(folder, input=[-1, side, side, 3])
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    import tensorflow as tf

    from models.backbone import load_backbone
    from models.classifier import run_encoder
    from models.frozen import frozen_function
    from models.split import split

    backbone = load_backbone("efficientnet_lite0")
    prefix, _ = split(backbone, len(backbone.blocks) - 2)

    def compute(images):
        return run_encoder(prefix, images, training=False)

    variables = tf.function(compute, autograph=False)
    print("pixels   engine                     ms per image   largest difference")
    for side in (96, 224):
        images = np.random.default_rng(0).normal(size=(BATCH, side, side, 3)).astype(np.float32)
        constants = frozen_function(compute, [((side, side, 3), "float32")])
        engines = {
            "TensorFlow, variables": lambda x, run=variables: tf.nest.flatten(run(tf.constant(x)))[0].numpy(),
            "TensorFlow, constants": lambda x, run=constants: run(tf.constant(x))[0].numpy(),
            "OpenVINO, float32": openvino_engine(prefix, side),
        }
        expected, times = engines["TensorFlow, variables"](images), {}
        engines = {name: engine for name, engine in engines.items() if engine}
        for number in range(rounds + 1):
            for name in list(engines) if number % 2 else list(engines)[::-1]:
                started = time.perf_counter()
                engines[name](images)
                if number:  # the first round compiles
                    times.setdefault(name, []).append(time.perf_counter() - started)
        for name, engine in engines.items():
            difference = np.abs(engine(images) - expected).max()
            print(f"{side:6}   {name:25}   {1e3 * np.median(times[name]) / BATCH:10.2f}   {difference:.1e}")
        if len(engines) == 3:
            ratio = np.median(times["TensorFlow, constants"]) / np.median(times["OpenVINO, float32"])
            print(f"         OpenVINO is {ratio:.2f} times as fast as constants in TensorFlow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
