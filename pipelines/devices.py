"""What suits each kind of device: memory, precision, XLA."""

from __future__ import annotations

import contextlib

BFLOAT16_SINCE = (8, 0)  # compute capability: Ampere, the first with bfloat16 matrix units
FLOAT16_SINCE = (7, 0)  # Volta, the first with float16 ones


def grow_memory() -> None:
    """Let TensorFlow take the memory of GPUs as it needs it, not all at its start; before any device is used."""
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):  # in use already: whoever started it has chosen
            tf.config.experimental.set_memory_growth(gpu, True)


def list_devices() -> list[dict]:
    """The devices of this machine: kind, name, and of GPUs compute_capability, a tuple (None: not known)."""
    import tensorflow as tf

    found = []
    for device in tf.config.list_physical_devices():
        entry = {"kind": device.device_type, "name": device.name.removeprefix("/physical_device:")}
        if device.device_type == "GPU":
            details = tf.config.experimental.get_device_details(device)
            capability = details.get("compute_capability")
            entry["compute_capability"] = tuple(capability) if capability else None
            entry["model"] = details.get("device_name", "")
        found.append(entry)
    return found


def best_precision(devices: list[dict]) -> str:
    """The precision in which these devices train fastest: the accelerators where there are any, the least of them.

    bfloat16 on TPUs and on GPUs since Ampere, float16 on Volta and Turing, else float32: older GPUs and CPUs gain
    nothing from 16 bits, or lose (CPUs with AMX gain, and are asked for by name: --precision bfloat16).
    """
    if any(device["kind"] == "TPU" for device in devices):
        return "bfloat16"
    capabilities = [device["compute_capability"] or (0, 0) for device in devices if device["kind"] == "GPU"]
    least = min(capabilities, default=(0, 0))
    return "bfloat16" if least >= BFLOAT16_SINCE else "float16" if least >= FLOAT16_SINCE else "float32"


def settle(training) -> None:
    """Settle what the training options leave to the devices; call it once TensorFlow is started.

    --precision auto becomes what it means here, so that config.yaml says it. With --xla, clusters of operations are
    compiled for GPUs, and for CPUs where TF_XLA_FLAGS holds --tf_xla_cpu_global_jit; ops that XLA does not know, such
    as those of strings, stay as they are. TPUs need no flag. Exported models hold nothing of it.
    """
    import tensorflow as tf

    if training.precision == "auto":
        training.precision = best_precision(list_devices())
    if training.xla:
        tf.config.optimizer.set_jit("autoclustering")
