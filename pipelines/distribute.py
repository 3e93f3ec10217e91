"""Where training runs: one tf.distribute strategy per process."""

from __future__ import annotations

import tensorflow as tf

from models import GraftError


def make_strategy(name: str = "none", devices: tuple[str, ...] = ()) -> tf.distribute.Strategy:
    """Make the strategy. Call it once per process: several MirroredStrategy objects block each other.

    Args:
        name: "none" (one device) or "mirrored" (the named devices, or all local GPUs).
        devices: such as "GPU:0"; logical CPUs ("CPU:0") work too.

    Raises:
        GraftError: a device that this machine lacks; lists those there are.
    """
    if name == "none":
        return tf.distribute.get_strategy()
    known = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    unknown = [device for device in devices if device.removeprefix("/device:").upper() not in known]
    if unknown:
        raise GraftError(f"--devices {' '.join(unknown)}: not on this machine. It has {', '.join(known)}.")
    return tf.distribute.MirroredStrategy(list(devices) or None)
