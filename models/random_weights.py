"""A backbone's architecture with random weights: what pretraining is compared with."""

from __future__ import annotations

import keras
import numpy as np

from models.backbone import Backbone, ImagePreprocess

SAMPLES = 16  # made-up pictures from which BatchNorm learns the range of activations
GRIDS = (2, 8, 32)  # sides of their patterns: coarse, middle and fine, about as photographs have them


def random_copy(backbone: Backbone, seed: int = 0) -> Backbone:
    """Give every weight of a backbone a random value, in place, and return the backbone under a name that says so.

    A weight gets what its layer would start with; where a layer keeps no initialiser, or one of zeros that waits for a
    checkpoint, what its name and shape suggest: kernels Glorot and Bengio 2010, embeddings normal with deviation 0.02,
    norms 1 and 0, biases 0. BatchNorm statistics are taken from made-up pictures, so that activations stay in range.
    Equal seeds give equal weights.
    """
    for index, (layer, weight) in enumerate(own_weights(backbone.encoder)):
        weight.assign(fresh_value(layer, weight, seed * 1_000_003 + index))
    if isinstance(backbone.preprocess, ImagePreprocess):
        refresh_batch_norm(backbone.encoder, made_up_pictures(backbone.preprocess, seed))
    backbone.name, backbone.source_head = f"random:{backbone.name}", None
    backbone.source = {"notice": f"{backbone.name} has random weights (seed {seed}); nothing was pretrained."}
    return backbone


def own_weights(encoder: keras.Model):
    """Yield each weight once, with the layer that made it."""
    seen = set()
    for layer in encoder._flatten_layers(include_self=False):
        for weight in (*layer._trainable_variables, *layer._non_trainable_variables):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield layer, weight


def fresh_value(layer, weight, seed: int):
    """A start value for a weight: by its layer's initialiser, else by name and shape."""
    names = [f"{weight.name}_initializer", "initializer"]
    if isinstance(layer, keras.layers.DepthwiseConv2D) and weight.name == "kernel":
        names = ["depthwise_initializer"]
    for name in names:
        initializer = getattr(layer, name, None)
        if isinstance(initializer, keras.initializers.Initializer):
            config = initializer.get_config()
            seeded = type(initializer).from_config({**config, "seed": seed} if "seed" in config else config)
            value = np.asarray(seeded(tuple(weight.shape), dtype=weight.dtype))
            if len(weight.shape) < 2 or value.any():
                return value
    words = weight.name.lower()
    if any(word in words for word in ("embed", "token", "position")):
        return keras.initializers.RandomNormal(0.02, seed=seed)(tuple(weight.shape), dtype=weight.dtype)
    if len(weight.shape) >= 2:
        return keras.initializers.GlorotUniform(seed=seed)(tuple(weight.shape), dtype=weight.dtype)
    is_one = any(word in words for word in ("gamma", "scale", "variance")) or words == "weight"
    return np.full(tuple(weight.shape), 1 if is_one else 0, weight.dtype)


def refresh_batch_norm(encoder: keras.Model, inputs) -> None:
    """Set the moving statistics of every BatchNorm layer to those of one batch, layer upon layer in one pass.

    inputs: [batch, ...] as the encoder takes them.
    """

    def norms_in(layer):
        if not isinstance(layer, keras.layers.Layer):
            return []
        inner = layer._flatten_layers(include_self=True)
        return [part for part in inner if isinstance(part, keras.layers.BatchNormalization)]

    norms = [part for layer in encoder.layers for part in norms_in(layer)]
    # With momentum 0 what a layer keeps is what it normalised this batch by.
    changed = [(norm, "momentum", norm.momentum) for norm in norms]
    # A unit that is one layer trains as a whole; its dropout would make the statistics a matter of chance.
    changed += [(part, "rate", part.rate) for part in encoder._flatten_layers() if getattr(part, "rate", 0)]
    trainable = [(norm, norm.trainable) for norm in norms]
    try:
        for layer, name, _ in changed:
            setattr(layer, name, 0.0)
        for norm in norms:
            norm.trainable = True

        def call_operation(operation):
            if not norms_in(operation):
                return operation
            return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": True})

        # The private hook of `models.classifier.run_encoder`.
        encoder._run_through_graph(inputs, operation_fn=call_operation)
    finally:
        for layer, name, value in changed:
            setattr(layer, name, value)
        for norm, value in trainable:
            norm.trainable = value


def made_up_pictures(preprocess: ImagePreprocess, seed: int = 0):
    """Blurred noise of several scales as encoder input, [16, height, width, 3] float32."""
    from models.inputs import scale_image

    random, pixels = np.random.default_rng(seed), 0.0
    for grid in GRIDS:
        noise = random.uniform(0, 255, (SAMPLES, grid, grid, 3)).astype(np.float32)
        pixels += keras.ops.image.resize(noise, preprocess.image_size, data_format="channels_last") / len(GRIDS)
    return scale_image(pixels, preprocess)
