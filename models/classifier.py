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
        tensors that cross it.
        """
        encoder = encoder or self.encoder
        features = run_encoder(encoder, inputs, training)
        return self.backbone.pooled(keras.ops.cast(features, "float32"))

    def logits(self, features, training=False):
        """Pooled features -> logits [batch, classes] float32."""
        return self.head(self.dropout(features, training=training))

    def call(self, inputs, training=False):
        return self.logits(self.features(inputs, training), training)

    @property
    def blocks(self):
        """The backbone's blocks, bottom to top; the head is not among them."""
        return self.backbone.blocks


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
