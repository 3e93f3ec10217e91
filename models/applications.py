"""keras.applications models with weights from a local file, or through Keras where its host answers.

Keras and TensorFlow are imported when a model is loaded, so that a wrong name or file answers at once.
"""

from __future__ import annotations

import os
import pathlib

from models import GraftError

HOST = "https://storage.googleapis.com"  # where Keras keeps these files

# Name -> (module of keras.applications, whose preprocess_input tells the scaling; native side in pixels;
# Keras's own weights file, with {} for what marks the one without the classifier, and that mark).
# Not offered: NASNet, whose cells all see the two before them, so that there is nowhere to cut;
# EfficientNetB0 to B7, which get one more scaling step for Keras's own file and not for any other
# (KerasHub has them); the small variants (alpha) of MobileNet.
_TENSORFLOW_FILE = "{name}_weights_tf_dim_ordering_tf_kernels{{}}.h5"
APPLICATIONS = {
    **{
        name: (module, side, _TENSORFLOW_FILE.format(name=file), "_notop")
        for name, module, side, file in [
            ("ResNet50", "resnet", 224, "resnet50"),
            ("ResNet101", "resnet", 224, "resnet101"),
            ("ResNet152", "resnet", 224, "resnet152"),
            ("ResNet50V2", "resnet_v2", 224, "resnet50v2"),
            ("ResNet101V2", "resnet_v2", 224, "resnet101v2"),
            ("ResNet152V2", "resnet_v2", 224, "resnet152v2"),
            ("DenseNet121", "densenet", 224, "densenet121"),
            ("DenseNet169", "densenet", 224, "densenet169"),
            ("DenseNet201", "densenet", 224, "densenet201"),
            ("VGG16", "vgg16", 224, "vgg16"),
            ("VGG19", "vgg19", 224, "vgg19"),
            ("InceptionV3", "inception_v3", 299, "inception_v3"),
            ("InceptionResNetV2", "inception_resnet_v2", 299, "inception_resnet_v2"),
            ("Xception", "xception", 299, "xception"),
        ]
    },
    "MobileNet": ("mobilenet", 224, "mobilenet_1_0_224_tf{}.h5", "_no_top"),
    "MobileNetV2": (
        "mobilenet_v2",
        224,
        "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224{}.h5",
        "_no_top",
    ),
    "MobileNetV3Small": ("mobilenet_v3", 224, "weights_mobilenet_v3_small_224_1.0_float{}.h5", "_no_top_v2"),
    "MobileNetV3Large": ("mobilenet_v3", 224, "weights_mobilenet_v3_large_224_1.0_float{}.h5", "_no_top_v2"),
    **{
        f"EfficientNetV2{variant.upper()}": ("efficientnet_v2", side, f"efficientnetv2-{variant}{{}}.h5", "_notop")
        for variant, side in [("b0", 224), ("b1", 240), ("b2", 260), ("b3", 300), ("s", 384), ("m", 480), ("l", 480)]
    },
    **{
        f"ConvNeXt{variant}": ("convnext", 224, f"convnext_{variant.lower()}{{}}.h5", "_notop")
        for variant in ("Tiny", "Small", "Base", "Large", "XLarge")
    },
}

# Scaling of RGB pixels per module, as its preprocess_input does it: (mean, deviation, channel order).
# Modules that are missing here (MobileNetV3, EfficientNetV2, ConvNeXt) scale inside the network.
_TENSORFLOW = ((127.5,) * 3, (127.5,) * 3, "rgb")
_TORCH = (tuple(255 * m for m in (0.485, 0.456, 0.406)), tuple(255 * d for d in (0.229, 0.224, 0.225)), "rgb")
_CAFFE = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), "bgr")
SCALINGS = {
    "resnet": _CAFFE,
    "vgg16": _CAFFE,
    "vgg19": _CAFFE,
    "densenet": _TORCH,
    "resnet_v2": _TENSORFLOW,
    "inception_v3": _TENSORFLOW,
    "inception_resnet_v2": _TENSORFLOW,
    "xception": _TENSORFLOW,
    "mobilenet": _TENSORFLOW,
    "mobilenet_v2": _TENSORFLOW,
}
# How each module names its units, as in models/blocks.py; the graph decides for the others.
PATTERNS = {
    "resnet": r" (conv\d+_block\d+)_",
    "resnet_v2": r" (conv\d+_block\d+)_",
    "densenet": r" (conv\d+_block\d+|pool\d+)_",
    "xception": r" (block(?:[2-9]|1\d))_",  # block1 is the stem
    "mobilenet": r" (conv_dw_\d+)(?:_|$)",
    "mobilenet_v2": r" (expanded_conv|block_\d+)_",
    "mobilenet_v3": r" (expanded_conv(?:_\d+)?)_",
    "efficientnet_v2": r" (block\d+[a-z])_",
    "convnext": r" \w+_(stage_\d+_block_\d+)_",
}


def weights_folder() -> pathlib.Path:
    """Where Keras keeps these files: $KERAS_HOME/models, else ~/.keras/models."""
    return pathlib.Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"


def find_application(name: str) -> tuple[str, pathlib.Path | None]:
    """`applications:NAME` or `applications:NAME:FILE` -> the model's name, and its weights file where there is one.

    Keras's file with the classifier is preferred to the one without.

    Raises:
        GraftError: a model that is not offered, or a named file that is not there.
    """
    model, _, path = name.removeprefix("applications:").partition(":")
    if model not in APPLICATIONS:
        raise GraftError(
            f"Backbone {name!r}: keras.applications has no {model!r} that Graft offers. There are: "
            f"{', '.join(APPLICATIONS)}. Write for example applications:ResNet50V2."
        )
    if path:
        file = pathlib.Path(path).expanduser()
        if not file.is_file():
            raise GraftError(
                f"Backbone {name!r}: there is no weights file {file}. Give the .h5 file that Keras or "
                f"`model.save_weights` wrote, or leave it out to use Keras's own in {weights_folder()}."
            )
        return model, file
    files = (weights_folder() / file for file in own_files(model))
    return model, next((file for file in files if file.is_file()), None)


def own_files(model: str) -> tuple[str, str]:
    """Names of Keras's weights files of a model: with its classifier, and without."""
    _, _, file, mark = APPLICATIONS[model]
    return file.format(""), file.format(mark)


def cached_applications() -> list[str]:
    """`applications:NAME` of every model whose weights Keras has already brought to this machine."""
    folder = weights_folder()
    return [
        f"applications:{model}" for model in APPLICATIONS if any((folder / file).is_file() for file in own_files(model))
    ]


def load_application(name: str):
    """The Backbone of `applications:NAME` or `applications:NAME:FILE`.

    Raises:
        GraftError: unknown model, or a file that is missing, damaged or of another model.
    """
    import keras

    from models.backbone import Backbone
    from models.blocks import find_blocks
    from models.checkpoints import file_sha256

    model, file = find_application(name)
    module = APPLICATIONS[model][0]
    if file is None:
        file = _download(model)
    encoder = getattr(keras.applications, model)(weights=None, include_top=False, input_shape=(None, None, 3))
    source_head = _load_weights(model, encoder, file)
    return Backbone(
        name=model.lower(),
        encoder=encoder,
        preprocess=image_preprocess(model),
        blocks=find_blocks(encoder, PATTERNS.get(module)),
        feature_size=int(encoder.output_shape[-1]),
        source_head=source_head,
        source={
            "hub": "keras.applications",
            "handle": model,
            "architecture": model,
            "file": file.name,
            "sha256": file_sha256(file),
            "licence": "unknown",  # keras.io names one per family, the files name none
            "url": f"https://keras.io/api/applications/#{model.lower()}",
        },
    )


def image_preprocess(model: str):
    """The ImagePreprocess of a model.

    Keras states no resize rule for these models: the native side and the scaling are theirs, the central
    crop and the antialiased bilinear resize are Graft's.
    """
    from models.backbone import ImagePreprocess

    module, side, _, _ = APPLICATIONS[model]
    mean, deviation, order = SCALINGS.get(module, ((0.0,) * 3, (1.0,) * 3, "rgb"))
    return ImagePreprocess((side, side), antialias=True, mean=mean, deviation=deviation, channel_order=order)


def _download(model: str) -> pathlib.Path:
    """Let Keras bring its file with the classifier; it checks the file's hash."""
    import keras

    try:
        getattr(keras.applications, model)(weights="imagenet", include_top=True)
    except Exception as error:  # URL errors, wrong hashes, a full disk: Keras raises bare Exceptions
        raise GraftError(
            f"Keras could not bring the weights of {model} from {HOST}: {error}. Put {own_files(model)[0]} into "
            f"{weights_folder()} by hand, or name a file: applications:{model}:FILE."
        ) from error
    return weights_folder() / own_files(model)[0]


def _load_weights(model: str, encoder, file: pathlib.Path):
    """Fill the encoder from a file with or without the classifier; the linear classifier, or None.

    The number of parameters tells which of the two a file is, since names do not.
    """
    import keras

    module = APPLICATIONS[model][0]
    held = _parameters_in(file)
    full = None
    if held != encoder.count_params():
        full = getattr(keras.applications, model)(weights=None, include_top=True)
        if held != full.count_params():
            raise GraftError(
                f"{file} holds {held:,} parameters; {model} has {encoder.count_params():,} without its classifier and "
                f"{full.count_params():,} with it (1,000 classes). Give a weights file of this very model."
            )
    try:
        (full or encoder).load_weights(file)
    except Exception as error:  # KeyError, ValueError, OSError, by what is wrong with the file
        raise GraftError(f"{file} could not be read as weights of {model}: {error}.") from error
    if full is None:
        return None
    # The classifier sits on top, so its weights come last. Names cannot tell: Keras counts some of them on.
    values = full.get_weights()
    encoder.set_weights(values[: len(encoder.weights)])
    top = values[len(encoder.weights) :]
    if len(top) != 2 or module == "convnext":  # VGG and MobileNetV3 have hidden layers there, ConvNeXt a norm
        return None
    kernel, bias = top
    return kernel.reshape(kernel.shape[-2:]), bias  # MobileNet's is a 1x1 convolution


def _parameters_in(file: pathlib.Path) -> int:
    """Number of floating point parameters in an HDF5 weights file, old or new layout."""
    import h5py

    sizes = []

    def add(name, item):
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f" and "optimizer" not in name:
            sizes.append(item.size)

    try:
        with h5py.File(file) as content:
            content.visititems(add)
    except OSError as error:
        raise GraftError(f"{file} is not an HDF5 weights file: {error}. Fetch it again.") from error
    return sum(sizes)
