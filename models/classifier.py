"""A backbone and a new head: one Keras model from scaled input to float32 logits."""

from __future__ import annotations

import keras

from models.backbone import Backbone


@keras.saving.register_keras_serializable("graft")
class Classifier(keras.Model):
    """Backbone -> pooled features -> dropout -> one Dense layer giving float32 logits [batch, classes].

    The logits are those of a softmax over the classes; with `multi_label` of a sigmoid for each class.

    A frozen layer always runs in inference mode, whatever `training` says. In a plain functional
    model it would not: `fit` overrides `backbone(x, training=False)` (keras issue 20285).
    """

    def __init__(
        self, backbone: Backbone, class_count: int, dropout: float = 0.2, seed: int = 0, multi_label: bool = False
    ):
        super().__init__(name="classifier")
        self.backbone = backbone
        self.multi_label = multi_label
        self.encoder = backbone.encoder
        self.dropout = keras.layers.Dropout(dropout, seed=seed, name="dropout")
        self.head = keras.layers.Dense(
            class_count,
            dtype="float32",
            name="head",
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        )
        self.head.build((None, backbone.feature_size))
        self.built = True

    def features(self, inputs, training=False, encoder=None):
        """Scaled input -> pooled features [batch, feature_size] float32.

        `encoder` may be what is left of the backbone above a cut (`models.split`); then `inputs` are the
        tensors that cross it. Where examples are several windows, [batch, windows, ...], the features of these are
        averaged, which for a linear head is to average their logits.
        """
        encoder = encoder or self.encoder
        windows = has_windows(encoder, inputs)
        features = (run_on_windows if windows else run_encoder)(encoder, inputs, training)
        if not windows:
            return self.backbone.pooled(keras.ops.cast(features, "float32"))
        # A backbone of sounds pools for itself: one vector per window.
        return keras.ops.mean(keras.ops.cast(features, "float32"), axis=1)

    def logits(self, features, training=False):
        """Pooled features -> logits [batch, classes] float32."""
        return self.head(self.dropout(features, training=training))

    def call(self, inputs, training=False):
        return self.logits(self.features(inputs, training), training)

    @property
    def blocks(self):
        """The backbone's blocks, bottom to top; the head is not among them."""
        return self.backbone.blocks


def has_windows(encoder: keras.Model, inputs) -> bool:
    """Whether inputs have an axis more than an encoder takes: the windows of each example, [batch, windows, ...]."""
    first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
    return len(first.shape) > len(encoder.inputs[0].shape)


def run_on_windows(encoder: keras.Model, inputs, training: bool):
    """As `run_encoder`, each window for itself: tensors [batch, windows, ...] in and out."""
    inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    ops = keras.ops
    batch, windows = ops.shape(inputs[0])[:2]
    flat = [ops.reshape(x, (batch * windows, *ops.shape(x)[2:])) for x in inputs]
    outputs = run_encoder(encoder, flat if len(flat) > 1 else flat[0], training)
    several = isinstance(outputs, (list, tuple))
    folded = [ops.reshape(x, (batch, windows, *ops.shape(x)[1:])) for x in (outputs if several else [outputs])]
    return folded if several else folded[0]


def run_encoder(encoder: keras.Model, inputs, training: bool):
    """Run a functional encoder; a layer that is frozen gets training=False.

    `_run_through_graph` is a private hook of Keras (3.15.1, pinned): there is no public way to give
    each layer of a functional model its own `training`. tests/test_freezing.py holds it in place.
    """

    def call_operation(operation):
        if not isinstance(operation, keras.layers.Layer):
            return operation
        layer_trains = bool(training) and operation.trainable
        return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": layer_trains})

    return encoder._run_through_graph(inputs, operation_fn=call_operation)
