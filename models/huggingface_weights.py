"""The arrays of a checkpoint in PyTorch's naming, and how they become Keras' variables: nothing may be left over.

PyTorch stores kernels [out, in, height, width], [out, in, width] and [out, in]. A weight that the architecture has no
place for is an error, since ignoring it would compute something else.
"""

from __future__ import annotations

import pathlib
import re

import keras
import numpy as np

from models import GraftError, checkpoints


def read_weights(files: list[pathlib.Path]) -> dict[str, np.ndarray]:
    """All arrays of one file or of all shards; .bin files by way of their safetensors in the cache."""
    state = {}
    for file in files:
        state |= checkpoints.read_safetensors(checkpoints.cached_safetensors(file) if file.suffix == ".bin" else file)
    return state


class Weights:
    """The arrays of a checkpoint by name, each to be taken once."""

    def __init__(self, folder: pathlib.Path, state: dict[str, np.ndarray], naming: str = "transformers'"):
        """naming: whose names these are, for errors."""
        self.folder, self.state, self.naming = folder, state, naming

    def shape(self, name: str) -> tuple[int, ...]:
        return self._get(name).shape

    def _get(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise GraftError(
                f"{self.folder}: the weights lack {name} (in {self.naming} naming); expected those of a whole model"
            )
        return self.state[name]

    def take(self, name: str, shape) -> np.ndarray:
        """The array as float32 in this shape, which must have as many numbers; it is then used up."""
        array = self._get(name)
        if array.size != np.prod(shape, dtype=int):
            raise GraftError(f"{self.folder}: {name} has the shape {array.shape}, which does not fit {tuple(shape)}")
        del self.state[name]
        return np.asarray(array, np.float32).reshape(shape)

    def take_head(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The source classifier: kernel [features, n] and bias [n], float32; None where there is none."""
        if f"{name}.weight" not in self.state:
            return None
        kernel = self.take(f"{name}.weight", self.shape(f"{name}.weight")).T
        bias = f"{name}.bias" in self.state
        return kernel, self.take(f"{name}.bias", kernel.shape[1:]) if bias else np.zeros(kernel.shape[1], np.float32)

    def count(self, pattern: str) -> int:
        """How many different numbers the pattern's group takes: blocks of a stage, layers of a ViT."""
        return len({match[1] for match in (re.match(pattern, name) for name in self.state) if match})

    def check_all_used(self) -> None:
        if self.state:
            names = sorted(self.state)
            raise GraftError(
                f"{self.folder} holds weights that Graft's architecture has no place for: {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}. It is a variant that computes something "
                f"else, and Graft does not know it."
            )

    # What follows assigns to Keras' variables.

    def assign_convolution(self, layer: keras.layers.Layer, name: str) -> None:
        *sides, inputs, outputs = layer.kernel.shape
        kernel = self.take(f"{name}.weight", (outputs, inputs, *sides))
        layer.kernel.assign(kernel.transpose(*range(2, kernel.ndim), 1, 0))
        if layer.use_bias:
            layer.bias.assign(self.take(f"{name}.bias", layer.bias.shape))

    def assign_dense(self, layer: keras.layers.Layer, name: str, transposed: bool = True) -> None:
        """A Dense or EinsumDense layer from [out, in], or from [in, out] where not `transposed`; bias where it has one.

        Heads of attention are axes of their own in Keras: [in, heads, size], and [heads, size, out].
        """
        shape = tuple(layer.kernel.shape)
        array = self._get(f"{name}.weight")
        inputs = array.shape[-1 if transposed else 0] if array.ndim == 2 else 0
        if array.size != np.prod(shape) or inputs not in (shape[0], np.prod(shape[:-1])):
            raise GraftError(f"{self.folder}: {name}.weight has the shape {array.shape}, which does not fit {shape}")
        kernel = self.take(f"{name}.weight", array.shape)
        layer.kernel.assign((kernel.T if transposed else kernel).reshape(shape))
        if layer.bias is not None:
            layer.bias.assign(self.take(f"{name}.bias", layer.bias.shape))

    def assign(self, variable: keras.Variable, name: str) -> None:
        """A weight that has the same axes in Keras: an embedding, the scale of a norm."""
        array = self._get(name)
        if array.shape != tuple(variable.shape):
            raise GraftError(
                f"{self.folder}: {name} has the shape {array.shape}, which does not fit {tuple(variable.shape)}"
            )
        variable.assign(self.take(name, array.shape))

    def assign_norm(self, layer: keras.layers.Layer, name: str) -> None:
        """LayerNormalization, or BatchNormalization with its statistics."""
        layer.gamma.assign(self.take(f"{name}.weight", layer.gamma.shape))
        layer.beta.assign(self.take(f"{name}.bias", layer.beta.shape))
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(self.take(f"{name}.running_mean", layer.moving_mean.shape))
            layer.moving_variance.assign(self.take(f"{name}.running_var", layer.moving_variance.shape))
