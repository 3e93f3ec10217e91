"""TF-Hub modules (reusable TF2 SavedModels, https://www.tensorflow.org/hub/reusable_saved_models) -> Backbone.

`hub.KerasLayer` is a Keras 2 layer and trains nothing inside a Keras 3 model; here the loaded module's own
variables become Keras 3 variables, one small layer per variable scope, so that freezing, learning rates
and checksums see them as they see any other layer. Hence `HubLayer`, which is also of use by itself.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re

import keras
import tensorflow as tf
from keras.src.saving import serialization_lib

from models import GraftError
from models.backbone import Backbone, ImagePreprocess
from models.tfhub_blocks import cut_into_blocks, group_by_scope
from models.tfhub_sounds import SAMPLE_RATE_HZ, sound_graph, sound_preprocess

DEFAULT_SIDE = 224  # pixels, for modules that take images of any size
# Of modules that answer with a dict, best first.
OUTPUT_KEYS = ("default", "pooled_output", "sequence_output", "embedding")
SHORTEST_SOUND = 1_000  # samples; a module that takes rows of fewer numbers takes no sound
POOLINGS_BY_RANK = {2: "none", 3: "tokens", 4: "average"}  # keys of models.backbone.POOLINGS
BATCH_NORM_STATISTIC = re.compile(r"(?:^|/)moving_(?:mean|variance|var)(?:_\d+)?(?:/|$)")


def load_hub_module(handle: str) -> Backbone:
    """Load a TF-Hub module as a backbone; call it inside the strategy's scope.

    Image modules get what https://www.tensorflow.org/hub/common_signatures/images promises them: RGB in
    0 to 1 at the size that the module was traced with, or 224 x 224; for a module that expects something
    else replace `preprocess`. Text modules take string [batch] and have `preprocess` None. Modules of sound take
    samples [batch, n] or, one clip at a time, [n], float at 16 kHz; of what YAMNet answers with, a tuple, the widest
    tensor counts. A module is one layer with one `training` flag: see `HubLayer.call`.

    Args:
        handle: a folder or a URL, with or without the prefix `tfhub:`.

    Raises:
        GraftError: no reusable SavedModel there, or one whose input or output a backbone cannot have.
    """
    handle = handle.removeprefix("tfhub:")
    layer = HubLayer(handle, trainable=True)
    shape, dtype = find_input(layer)
    is_sound = len(shape) == 1
    if is_sound:
        inputs, features = sound_graph(lambda waveform: choose_output(handle, layer(waveform)), *shape)
    else:
        inputs = keras.Input(shape=shape, dtype=dtype)
        features = choose_output(handle, layer(inputs))
    pooling = POOLINGS_BY_RANK.get(len(features.shape))
    if pooling is None or (is_sound and pooling != "none"):
        raise GraftError(
            f"TF-Hub module {handle} answers with shape {list(features.shape)}; a backbone's features are [batch, d], "
            f"[batch, tokens, d] or [batch, height, width, d]. Use its feature vector variant."
        )
    name = re.sub(r"^\w+://[^/]*/", "", handle).rstrip("/")
    name = os.path.basename(name) if is_local(handle) else name
    name = re.sub(r"[^\w.-]", "-", name)
    encoder = keras.Model(inputs, features, name=name)
    preprocess = None
    if is_sound:
        preprocess = sound_preprocess(*shape)
    elif shape:
        size = tuple(side or DEFAULT_SIDE for side in shape[:2])
        preprocess = ImagePreprocess(image_size=size, deviation=(255.0,) * 3)
    feature_size = features.shape[-1]
    if feature_size is None:  # the module does not say; one example tells
        if is_sound:
            example = [tf.zeros([1, SAMPLE_RATE_HZ]), tf.ones([1, SAMPLE_RATE_HZ], tf.int32)]
        else:
            example = tf.constant([""]) if preprocess is None else tf.zeros([1, *preprocess.image_size, 3])
        feature_size = encoder(example).shape[-1]
    source = {"handle": handle, "sha256": folder_sha256(layer.folder), "licence": "unknown"}
    if not is_local(handle):
        source["notice"] = (
            f"The TF-Hub module {handle} is a program: its graph runs on this machine as code does. "
            f"Use only modules whose publisher you trust."
        )
    return Backbone(
        name=name,
        encoder=encoder,
        preprocess=preprocess,
        blocks=cut_into_blocks(layer.scopes),
        feature_size=int(feature_size),
        pooling=pooling,
        source=source,
    )


class HubVariables(keras.layers.Layer):
    """The variables of one scope of a module, adopted, not copied; holds them and is never called.

    Its name is the scope's, with dots for slashes. `holds_batch_norm` where moving statistics are among them.
    """

    def __init__(self, scope: str, names: list[str], variables: list, module_trains: list[bool]):
        name = re.sub(r"[^\w.-]", ".", scope)
        super().__init__(name=name, dtype="float32")
        self.scope, self.variable_names, self.module_trains = scope, names, module_trains
        self.holds_batch_norm = any(BATCH_NORM_STATISTIC.search(name) for name in names)
        self.adopted = []
        for full_name, variable, trains in zip(names, variables, module_trains):
            last = re.sub(r"[^\w.-]", ".", full_name.removeprefix(f"{scope}/"))
            with keras.name_scope(name):
                adopted = keras.Variable(variable, trainable=trains, dtype=variable.dtype, name=last, autocast=False)
            # Keras does not document that it adopts a tf.Variable; a copy would train in vain.
            assert adopted.value is variable
            self.adopted.append(adopted)
        self.built = True


@keras.saving.register_keras_serializable("graft")
class HubLayer(keras.layers.Layer):
    """A reusable TF2 SavedModel as a Keras 3 layer; create it inside the strategy's scope.

    Loading runs the module's graph, so a `.keras` file with such a layer loads with `safe_mode=False` only.
    The file holds the weights and the handle: the module itself must still be where the handle says. Import
    this file first, so that Keras knows the class.

    Args:
        handle: folder or URL of the module.
        trainable: train all of it, or nothing.
        trainable_patterns: with `trainable`, only variables whose name, such as "block1/conv/kernel", matches
            one of these regular expressions.
        train_batch_norm: train BatchNorm too; otherwise it stays wholly frozen (statistics, gamma and beta).
        arguments: more keyword arguments for the module's `__call__`.

    Raises:
        GraftError: no reusable SavedModel there, or a pattern that matches no variable.
    """

    def __init__(
        self, handle, trainable=False, trainable_patterns=None, train_batch_norm=False, arguments=None, **options
    ):
        # The dtypes inside a SavedModel are fixed.
        super().__init__(**{"dtype": "float32", "autocast": False, **options})
        self.supports_jit = False  # XLA has no string tables
        self.handle, self.arguments = handle, dict(arguments or {})
        self.trainable_patterns, self.train_batch_norm = trainable_patterns, train_batch_norm
        # An attribute, so that tables and assets are exported with the layer.
        self._module, self.folder = load_module(handle)
        self._takes_training = "training" in inspect.signature(self._module.__call__).parameters
        variables, trained = find_variables(self._module)
        trained = {id(variable) for variable in trained}
        self.scopes = [
            HubVariables(scope, names, members, [id(member) in trained for member in members])
            for scope, (names, members) in group_by_scope(variables).items()
        ]
        self.built = True
        for pattern in trainable_patterns or []:
            if not any(re.search(pattern, name) for name, _ in self.named_variables()):
                names = ", ".join(name for name, _ in self.named_variables())
                raise GraftError(f"The pattern {pattern!r} matches no variable of {handle}. Its variables: {names}.")
        self.trainable = not trainable  # the value that it has already would be a no-op in Keras 3
        self.trainable = trainable

    def named_variables(self) -> list[tuple[str, keras.Variable]]:
        """(the module's own name for it, variable), in the order of the scopes."""
        return [pair for scope in self.scopes for pair in zip(scope.variable_names, scope.adopted)]

    @property
    def trainable(self):
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        for scope in getattr(self, "scopes", []):
            chosen = [value and self._is_chosen(scope, name) for name in scope.variable_names]
            scope.trainable = not any(chosen)  # see above
            scope.trainable = any(chosen)
            for variable, is_chosen in zip(scope.adopted, chosen):
                variable.trainable = variable.trainable and is_chosen

    def _is_chosen(self, scope: HubVariables, name: str) -> bool:
        if scope.holds_batch_norm and not self.train_batch_norm:
            return False
        patterns = self.trainable_patterns
        return patterns is None or any(re.search(pattern, name) for pattern in patterns)

    def call(self, inputs, training=False):
        """Run the module: its own input -> its own output (a tensor, or a dict of them).

        A module has one `training` flag for all of it. It is False while anything with moving statistics
        in it is frozen, whatever else trains: its dropout is off then too. It is True where something
        trains and all its BatchNorm does, or it has none: dropout then works in its frozen parts too. The
        module's regularisation losses are added where it trains and `training` is True.
        """
        trains = bool(training) and bool(self.trainable_variables)
        options = dict(self.arguments)
        if self._takes_training:
            options["training"] = trains and all(s.trainable for s in self.scopes if s.holds_batch_norm)
        of_a_clip = find_clip_outputs(self._module)
        if of_a_clip is None:
            outputs = self._module(inputs, **options)
        else:
            outputs = tf.map_fn(lambda row: self._module(row, **options), inputs, fn_output_signature=of_a_clip)
        if trains:
            for loss in getattr(self._module, "regularization_losses", []):
                self.add_loss(loss())
        return outputs

    def get_config(self):
        """With `trainable_patterns` that name what trains now, where freezing has changed it since."""
        patterns, train_batch_norm = self.trainable_patterns, self.train_batch_norm
        now = [name for name, variable in self.named_variables() if variable.trainable]
        asked = [
            name
            for scope in self.scopes
            for name, trains in zip(scope.variable_names, scope.module_trains)
            if trains and self.trainable and self._is_chosen(scope, name)
        ]
        if now != asked:
            patterns = [f"^{re.escape(name)}$" for name in now]
            train_batch_norm = any(scope.trainable for scope in self.scopes if scope.holds_batch_norm)
        return {
            **super().get_config(),
            "handle": self.handle,
            "trainable_patterns": patterns,
            "train_batch_norm": train_batch_norm,
            "arguments": dict(self.arguments),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None, safe_mode=None):
        # `in_safe_mode` is private (Keras 3.15.1, pinned); Keras's own TFSMLayer asks it the same.
        if (serialization_lib.in_safe_mode() if safe_mode is None else safe_mode) is not False:
            raise GraftError(
                f"This file holds a TF-Hub module ({config['handle']}), whose graph runs as code does, and Keras "
                f"loads such a layer with safe_mode=False only. If you trust the module, give safe_mode=False to the "
                f"loading function."
            )
        return cls(**config)


# ---------------------------------------------------------------- loading


def is_local(handle: str) -> bool:
    """Whether a handle is a folder on this machine, not a URL."""
    return "://" not in handle


def load_module(handle: str):
    """(the loaded module, its folder); a URL is downloaded, or found in TF-Hub's own cache.

    Raises:
        GraftError: not there, damaged, the TF1 Hub format, or a SavedModel that cannot be called.
    """
    folder = os.path.expanduser(handle)
    if not is_local(handle):
        import tensorflow_hub  # seconds, and only downloads need it

        try:
            folder = tensorflow_hub.resolve(handle)
        except Exception as error:  # of many kinds: network, archive, disk
            raise GraftError(
                f"TF-Hub module {handle} could not be downloaded: {error}. Check the URL, or download it elsewhere, "
                f"unpack it and give the folder."
            ) from error
    files = set(tf.io.gfile.listdir(folder)) if tf.io.gfile.isdir(folder) else set()
    if "tfhub_module.pb" in files:
        raise GraftError(
            f"TF-Hub module {handle} is in the TF1 Hub format (tfhub_module.pb), which cannot be trained in "
            f"TensorFlow 2. Use a version of it that is a TF2 SavedModel."
        )
    if "saved_model.pb" not in files:
        raise GraftError(
            f"TF-Hub module {handle}: {folder} holds no saved_model.pb, so it is no SavedModel. Give the folder in "
            f"which saved_model.pb and variables/ lie."
        )
    try:
        module = tf.saved_model.load(folder)
    except Exception as error:  # of many kinds: parsing, missing files, ops that this TensorFlow lacks
        raise GraftError(
            f"TF-Hub module {handle} could not be loaded: {error}. The folder is damaged, or needs ops that this "
            f"TensorFlow ({tf.__version__}) lacks."
        ) from error
    if not callable(module) or not hasattr(module.__call__, "concrete_functions"):
        raise GraftError(
            f"TF-Hub module {handle} is a SavedModel with signatures only, such as `model.export()` of Keras 3 or "
            f"TF1 writes; expected a reusable TF2 SavedModel, one with `__call__`, `variables` and "
            f"`trainable_variables`. Save the Keras 3 model as a preset, or write a reusable SavedModel: a "
            f"tf.train.Checkpoint subclass with these."
        )
    return module, folder


def find_variables(module) -> tuple[list, list]:
    """(all variables, those that may train) of a loaded module.

    A reusable SavedModel lists them. A saved tf.Module does not, for its `variables` is a property and is not
    saved: there they are what `__call__` uses, in the order of use.
    """
    if hasattr(module, "variables"):
        return list(module.variables), list(getattr(module, "trainable_variables", []))
    used = {id(v): v for function in module.__call__.concrete_functions for v in function.variables}
    return list(used.values()), [variable for variable in used.values() if variable.trainable]


def find_clip_outputs(module):
    """What a module that takes one clip at a time, [samples] float, answers with, as tf.TensorSpec; else None."""
    for function in module.__call__.concrete_functions:
        positional, _ = function.structured_input_signature
        spec = positional[0] if positional else None
        if isinstance(spec, tf.TensorSpec) and spec.dtype.is_floating and spec.shape.rank == 1:
            return tf.nest.map_structure(
                lambda output: tf.TensorSpec(output.shape, output.dtype), function.structured_outputs
            )
    return None


def find_input(layer: HubLayer) -> tuple[tuple, str]:
    """(shape without batch, dtype) of what a module was traced with: an image, a waveform, or a string.

    Raises:
        GraftError: it takes something else.
    """
    seen = []
    for function in layer._module.__call__.concrete_functions:
        positional, _ = function.structured_input_signature
        spec = positional[0] if positional else None
        seen.append(str(spec))
        if not isinstance(spec, tf.TensorSpec):
            continue
        if spec.dtype == tf.string and spec.shape.rank == 1:
            return (), "string"
        if spec.dtype.is_floating and spec.shape.rank == 4 and spec.shape[3] in (3, None):
            return (*spec.shape[1:3], 3), spec.dtype.name
        is_row = spec.dtype == tf.float32 and spec.shape.rank in (1, 2)
        if is_row and (spec.shape[-1] or SHORTEST_SOUND) >= SHORTEST_SOUND:
            return (spec.shape[-1],), "float32"
    raise GraftError(
        f"TF-Hub module {layer.handle} takes {'; '.join(seen) or 'nothing'}; a backbone takes images "
        f"([batch, height, width, 3] float), sound ([batch, samples] or [samples] float32) or text ([batch] string). "
        f"Use models.tfhub.HubLayer in a model of your own."
    )


def choose_output(handle: str, outputs):
    """The features among a module's outputs; GraftError where it is not clear which they are."""
    if isinstance(outputs, dict):
        for key in OUTPUT_KEYS:
            if key in outputs:
                return outputs[key]
        described = f"a dict of {', '.join(sorted(outputs))}"
    elif hasattr(outputs, "shape"):
        return outputs
    elif isinstance(outputs, (tuple, list)) and all((getattr(output, "shape", 0) or [0])[-1] for output in outputs):
        return max(outputs, key=lambda output: output.shape[-1])
    else:
        described = f"a {type(outputs).__name__}"
    raise GraftError(
        f"TF-Hub module {handle} answers with {described}; expected one tensor, or a dict with one of "
        f"{', '.join(OUTPUT_KEYS)}. Use models.tfhub.HubLayer in a model of your own."
    )


def folder_sha256(folder: str) -> str:
    """SHA-256 over names and bytes of saved_model.pb and of all files in variables/ and assets/, in order."""
    paths = [os.path.join(folder, "saved_model.pb")]
    for part in ("variables", "assets"):
        for parent, _, names in tf.io.gfile.walk(os.path.join(folder, part)):
            paths += [os.path.join(parent, name) for name in names]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(os.path.relpath(path, folder).encode() + b"\0")
        with tf.io.gfile.GFile(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
