"""An exported network against other engines that run the same one: `python -m tests.benchmarks.export_speed`.

EfficientNet-Lite0 at 224 pixels, float32, on two threads, one process: milliseconds per image of TensorFlow's C++
session (what TF Serving runs) with weights as variables and as constants, of ONNX Runtime and of OpenVINO; then of the
whole served signature, JPEG files in and labels out. Rounds alternate between the sides; medians count.

The engines are no dependencies of Graft. One that cannot be imported is left out; to have them:
    pip install --no-deps --target ENGINES onnxruntime onnx tf2onnx openvino openvino-telemetry
    PYTHONPATH=ENGINES python -m tests.benchmarks.export_speed
`--profile` prints which kernels TensorFlow's time goes to, with oneDNN and without (TF_ENABLE_ONEDNN_OPTS).
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from tests.acceptance.tools import PYTHON, ROOT
from tests.benchmarks.picture import save_result

SIDE, THREADS, CLASSES, PHOTOGRAPH = 224, 2, 15, (375, 500)
PAUSE_SECONDS = 0.02  # between sides: idle threads of an engine spin for a while
KINDS = ("variables", "constants")


def write_models(folder: pathlib.Path) -> None:
    """Write the exports with variables and with constants, and of each the network alone; network.onnx if possible."""
    import tensorflow as tf

    from models.backbone import load_backbone
    from models.classifier import Classifier
    from serving.export import export_image_classifier, network, write_archive
    from serving.folding import FOLDED_BYTES, fold_weights

    backbone = load_backbone("efficientnet_lite0")
    model, names = Classifier(backbone, CLASSES), [f"class {number}" for number in range(CLASSES)]
    specs = [tf.TensorSpec([None, SIDE, SIDE, 3], tf.float32, name="images")]
    example = [tf.random.stateless_normal([1, SIDE, SIDE, 3], [0, 0])]
    for kind, limit in zip(KINDS, (0, FOLDED_BYTES), strict=True):
        weights = export_image_classifier(model, backbone.preprocess, names, folder / kind, folded_bytes=limit)
        if weights["kept_as"] != kind:
            sys.exit(f"the export with {kind} has {weights}")
        run, _ = fold_weights(network(model), specs, example, limit)
        write_archive(folder / f"{kind}_network", {"serving_default": (only_probabilities(run), specs)})
    try:
        from tf2onnx import convert
    except ImportError:
        return
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    concrete = tf.function(only_probabilities(network(model)), input_signature=specs, autograph=False)
    constant = convert_variables_to_constants_v2(concrete.get_concrete_function())
    ends = [[tensor.name for tensor in tensors] for tensors in (constant.inputs, constant.outputs)]
    convert.from_graph_def(constant.graph.as_graph_def(), None, *ends, output_path=str(folder / "network.onnx"))


def only_probabilities(run):
    return lambda images: {"probabilities": run(images)[1]}


def network_sides(folder: pathlib.Path) -> dict:
    """{side: a function of images [n, side, side, 3] float32, scaled -> probabilities}."""
    from serving.session import Session

    sides = {}
    for kind in KINDS:
        session = Session(folder / f"{kind}_network")
        sides[f"TensorFlow, {kind}"] = lambda images, session=session: session.run(
            "serving_default", {"images": images}
        )["probabilities"]
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        onnx = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
        sides["ONNX Runtime"] = lambda images: onnx.run(None, {onnx.get_inputs()[0].name: images})[0]
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or tf2onnx was not and no file is there
        print(f"ONNX Runtime is left out: {error}")
    try:
        import openvino

        model = openvino.convert_model(str(folder / "variables_network"))
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
        compiled = openvino.compile_model(model, "CPU", settings)
        sides["OpenVINO"] = lambda images: compiled(images)[0]
    except ImportError as error:
        print(f"OpenVINO is left out: {error}")
    return sides


def measure(sides: dict, inputs, rounds: int) -> dict[str, float]:
    """Median milliseconds per item of each side; the first two rounds are not counted."""
    times = collections.defaultdict(list)
    for number in range(rounds + 2):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            sides[name](inputs)
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - started) / len(inputs))
    return {name: float(np.median(times[name])) for name in sides}


def photographs(count: int) -> list[bytes]:
    """JPEG files of noise, as warm-up requests hold them."""
    from serving.warmup import noise_jpeg

    return [noise_jpeg(seed, {}) for seed in range(count)]


def profile(folder: pathlib.Path, batch: int) -> None:
    """Print milliseconds by kind of kernel for one batch, the quickest of ten, as TensorFlow's own tracing has them."""
    import tensorflow.compat.v1 as tf

    with tf.Session(graph=tf.Graph()) as session:
        signature = tf.saved_model.load(session, ["serve"], str(folder)).signature_def["serving_default"]
        images = np.random.default_rng(0).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)
        feeds = {signature.inputs["images"].name: images}
        runs = []
        for _ in range(12):
            traced, kernels = tf.RunMetadata(), collections.Counter()
            options = tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE)
            session.run(signature.outputs["probabilities"].name, feeds, options, traced)
            for node in traced.step_stats.dev_stats[0].node_stats:
                operation = node.timeline_label.partition(" = ")[2].partition("(")[0]
                kernels[operation] += (node.op_end_rel_micros - node.op_start_rel_micros) / 1e3
            runs.append(kernels)
    best = min(runs[2:], key=lambda kernels: kernels.total())
    print(f"  batch {batch}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in best.most_common(6)))


def child(*words, **environment) -> None:
    """Run this module in a process of its own; its log is shown only where it fails."""
    command = [PYTHON, "-m", "tests.benchmarks.export_speed", *map(str, words)]
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", help="file to which the result is added")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # TensorFlow takes as many threads
    if options.write:
        write_models(pathlib.Path(options.write))
        return 0
    if options.trace:
        for batch in options.batches:
            profile(pathlib.Path(options.trace), batch)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        child("--write", folder)
        result = compare(folder, options.batches, options.rounds)
        for switch in "10" if options.profile else "":
            print(f"kernels of TensorFlow, constants, oneDNN {'on' if switch == '1' else 'off'}:", flush=True)
            words = ["--trace", folder / "constants_network", "--batches", *options.batches]
            child(*words, TF_ENABLE_ONEDNN_OPTS=switch)
    if options.json:
        save_result(options.json, "export_speed", result)
    return 0


def compare(folder: pathlib.Path, batches: list[int], rounds: int) -> dict:
    """Measure and print; returns {"batch N": {side: milliseconds per image}}."""
    from serving.session import Session

    sides, result = network_sides(folder), {}
    sessions = {kind: Session(folder / kind) for kind in KINDS}
    served = {
        f"served from JPEG, {kind}": lambda files, session=session: session.run(
            "serving_default", {"image_bytes": files}
        )
        for kind, session in sessions.items()
    }
    print("batch   side                           ms per image   largest difference")
    for batch in batches:
        images = np.random.default_rng(0).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)
        expected = sides["TensorFlow, variables"](images)
        times = measure(sides, images, rounds)
        for name, side in sides.items():
            difference = np.abs(side(images) - expected).max()
            print(f"{batch:5}   {name:30} {times[name]:12.2f}   {difference:.1e}")
        whole = measure(served, photographs(batch), rounds)
        for name, milliseconds in whole.items():
            print(f"{batch:5}   {name:30} {milliseconds:12.2f}")
        ours = times["TensorFlow, constants"]
        print(f"        variables take {times['TensorFlow, variables'] / ours:.2f} times as long as constants", end="")
        others = {name: value for name, value in times.items() if not name.startswith("TensorFlow")}
        if others:
            best = min(others, key=others.get)
            print(f"; constants {ours / others[best]:.2f} times as long as {best}", end="")
        print(flush=True)
        result[f"batch {batch}"] = times | whole
    return result


if __name__ == "__main__":
    sys.exit(main())
