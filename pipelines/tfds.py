"""Sets of TensorFlow Datasets (`tfds:NAME`, `tfds:NAME/CONFIG`, `tfds:NAME/CONFIG:VERSION`) -> examples.

What is prepared on this machine is found, and its features are checked, in a second and without TensorFlow;
TensorFlow reads the records once, and from then on the set is files in the cache.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import re
import urllib.parse

import numpy as np

from models import GraftError
from models.offline_sounds import wav_bytes
from pipelines.console import start_tensorflow
from pipelines.manifests import Example, TextExample
from pipelines.records import Record, graft_splits, set_key, write_once, write_texts_once

PREFIX = "tfds:"
SOUND_RATE_HZ = 16_000  # of sets whose sounds do not say
SOUND = ("*sound*",)  # in place of names of texts: one feature of sound, whatever it is called
VERSION = re.compile(r"\d+\.\d+\.\d+")


def tfds_examples(data: str, data_dir: str = "", label_column: str = "label") -> list[Example]:
    """The images of a TFDS set, as encoded files in the cache; prepared first (downloaded) where it is not yet.

    The splits train, validation and test are kept; a set that has only one is left for Graft to split, and
    others ("unsupervised") are left out. Images whose label is -1, which TFDS means as unknown, are left out too.

    Args:
        data: tfds:NAME, tfds:NAME/CONFIG, tfds:NAME:VERSION or tfds:NAME/CONFIG:VERSION. Without a version the
            newest prepared one, without a configuration the set's default.
        data_dir: where TFDS keeps prepared sets; "" for TFDS_DATA_DIR, else ~/tensorflow_datasets.
        label_column: the feature that holds the label, where it is not the one that the set is made for.

    Raises:
        GraftError: an unknown set, configuration or version; not prepared and its host cannot be reached; no image
            or no label among its features; damaged records.
    """
    folder = _prepared_folder(data, data_dir, label_column)
    return _read_prepared(data, folder, label_column)


def tfds_texts(
    data: str, data_dir: str = "", text_column: str = "text", second_column: str = "", label_column: str = "label"
) -> list[TextExample]:
    """The texts of a TFDS set, kept as one table in the cache; otherwise as `tfds_examples`.

    Args:
        text_column: the feature that holds the text; where there is none called "text", the one that the set is made
            for, else the only one.
        second_column: the feature of the second text of a pair; "" where there are no pairs.
    """
    texts = (text_column, second_column) if second_column else (text_column,)
    folder = _prepared_folder(data, data_dir, label_column, texts)
    return _read_prepared(data, folder, label_column, texts)


def tfds_sounds(data: str, data_dir: str = "", label_column: str = "label") -> list[Example]:
    """The sounds of a TFDS set, as WAV files in the cache; otherwise as `tfds_examples`."""
    folder = _prepared_folder(data, data_dir, label_column, SOUND)
    return _read_prepared(data, folder, label_column, SOUND)


def _prepared_folder(data: str, data_dir: str, label_column: str, texts: tuple[str, ...] = ()) -> pathlib.Path:
    match = re.fullmatch(rf"{PREFIX}(\w+)(?:/([^/:]+))?(?::({VERSION.pattern}))?", data)
    if not match:
        raise GraftError(
            f"--data {data}: this is no name of a TFDS set. Expected tfds:NAME, tfds:NAME/CONFIG or "
            f"tfds:NAME/CONFIG:VERSION, such as tfds:beans or tfds:cifar10:3.0.2."
        )
    name, config, version = match.groups(default="")
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = find_prepared(data, root, name, config, version)
    return folder or prepare(data, root, name, config, version, label_column, texts)


def prepared_sets(root: pathlib.Path) -> dict[tuple[str, str, str], pathlib.Path]:
    """(name, configuration or "", version) -> folder of every set that TFDS has prepared under `root`."""
    found = {}
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for file in sorted(root.glob(pattern)):
            name, *config, version = file.parent.relative_to(root).parts
            if VERSION.fullmatch(version):
                found[name, "".join(config), version] = file.parent
    return found


def find_prepared(data: str, root: pathlib.Path, name: str, config: str, version: str) -> pathlib.Path | None:
    """The folder of a prepared set, None where it is not there.

    Raises:
        GraftError: no configuration is asked for, several are prepared, and TFDS noted no default.
    """
    fitting = {
        key: folder
        for key, folder in prepared_sets(root).items()
        if key[0] == name and config in ("", key[1]) and version in ("", key[2])
    }
    configs = sorted({key[1] for key in fitting})
    if len(configs) > 1:
        noted = root / name / ".config" / "metadata.json"
        default = json.loads(noted.read_text()).get("default_config_name") if noted.is_file() else None
        if default not in configs:
            raise GraftError(
                f"--data {data}: {root} holds several configurations of it: {', '.join(configs)}. "
                f"Name one, such as {PREFIX}{name}/{configs[0]}."
            )
        fitting = {key: folder for key, folder in fitting.items() if key[1] == default}
    newest = max(fitting, key=lambda key: [int(part) for part in key[2].split(".")], default=None)
    return fitting.get(newest)


def prepare(
    data: str,
    root: pathlib.Path,
    name: str,
    config: str,
    version: str,
    label_column: str = "label",
    texts: tuple[str, ...] = (),
) -> pathlib.Path:
    """Let TFDS download a set that it knows and prepare it under `root`; returns the set's folder.

    Its features are checked before, and the host is tried: without a network TFDS itself would try again for minutes.

    Raises:
        GraftError: TFDS does not know the set, it has no image or no label, its host cannot be reached, or it cannot
            be prepared.
    """
    import tensorflow_datasets as tfds

    from models.hubs import reachable

    here = sorted({"/".join(filter(None, key[:2])) + f":{key[2]}" for key in prepared_sets(root)})
    prepared = f"Prepared in {root}: {', '.join(here) or 'none'}."
    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        names = sorted({*known, *(key[0] for key in prepared_sets(root))})
        near = [f"{PREFIX}{match}" for match in difflib.get_close_matches(name, names, n=3)]
        raise GraftError(
            f"--data {data}: TFDS {tfds.__version__} knows no set of this name, and {root} holds none."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
            + f" {prepared} Name another folder of prepared sets with --data-dir."
        )
    configs = tfds.builder_cls(name).builder_configs
    if config and config not in configs:
        near = difflib.get_close_matches(config, configs) or list(configs)[:10]
        raise GraftError(
            f"--data {data}: {name} has no configuration {config!r}; "
            + (f"of its {len(configs)}, the nearest: {', '.join(near)}. Name one" if configs else "it has none")
            + f", or leave it out. {prepared}"
        )
    wanted = name + (f"/{config}" if config else "") + (f":{version}" if version else "")
    try:
        builder = tfds.builder(wanted, data_dir=root)
        choose_features(data, builder.info.features, builder.info.supervised_keys, label_column, texts)
        url = next(iter(builder.url_infos or ()), "")  # a set that is generated, or brought by hand, has none
        if url and not reachable(url, seconds=2):
            host = urllib.parse.urlsplit(url).hostname
            raise GraftError(
                f"--data {data}: {builder.info.full_name} is not prepared in {root}, and {host}, from where TFDS "
                f"would download it, cannot be reached. {prepared} Prepare it on a machine with a network "
                f"(`tfds build {wanted}`) and name the folder with --data-dir, or give one of the prepared sets."
            )
        builder.download_and_prepare()
    except GraftError:
        raise
    except Exception as error:  # of many kinds: each set has download code of its own
        raise GraftError(
            f"--data {data}: TFDS could not prepare {wanted} in {root}: {error}\n{prepared} "
            f"Correct the name, or prepare it as https://www.tensorflow.org/datasets/catalog/{name} says."
        ) from error
    return pathlib.Path(builder.data_dir)


def _read_prepared(
    data: str, folder: pathlib.Path, label_column: str, texts: tuple[str, ...] = ()
) -> list[Example] | list[TextExample]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        features, available = builder.info.features, builder.info.splits
    except Exception as error:  # of many kinds: JSON, protobuf and missing files
        raise GraftError(
            f"--data {data}: what TFDS prepared in {folder} could not be read: {error}. Remove it and prepare it again."
        ) from error
    inputs, label = choose_features(data, features, builder.info.supervised_keys, label_column, texts)
    splits = graft_splits(available)
    count = sum(available[split].num_examples for split in splits)
    key = set_key(
        (file for file in folder.iterdir() if file.is_file()), builder.info.full_name, *inputs, label, str(splits)
    )
    name = f"tfds-{builder.info.full_name.replace('/', '-')}-{key}"
    if texts == SOUND:
        rate_hz = getattr(features[inputs[0]], "sample_rate", None) or SOUND_RATE_HZ
        values = _values(data, builder, inputs, label, splits)
        records = (Record(split, labels, wav_bytes(as_int16(sound), rate_hz)) for split, labels, (sound,) in values)
        return write_once(name, count, lambda: records, "clips")
    if texts:
        return write_texts_once(name, count, lambda: _text_records(_values(data, builder, inputs, label, splits)))
    decoders = {inputs[0]: tfds.decode.SkipDecoding()}
    return write_once(
        name,
        count,
        lambda: (
            Record(split, labels, image)
            for split, labels, (image,) in _values(data, builder, inputs, label, splits, decoders)
        ),
    )


def as_int16(samples) -> np.ndarray:
    """Samples [n] or [n, channels] as TFDS gives them, integers of 16 or 32 bits in any dtype or float, as int16."""
    samples = np.asarray(samples)
    if samples.dtype.kind == "f":
        return np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16)
    wide = np.abs(samples.astype(np.int64)).max(initial=0) > 32768
    return np.clip(samples >> 16 if wide else samples, -32768, 32767).astype(np.int16)


def _text_records(values):
    for split, labels, texts in values:
        yield TextExample(split, labels, *(text.decode("utf-8", "replace") for text in texts))


def choose_features(
    data: str, features, supervised_keys, label_column: str, texts: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], str]:
    """The names of the image and of the label among TFDS features: those that the set is made for, else the only ones.

    Args:
        texts: names of text features, in place of an image; a first one called "text" may be missing where it is
            clear which it is. SOUND for one feature of sound.

    Returns:
        The names of the image or the texts, and that of the label.

    Raises:
        GraftError: none, or several and nothing to choose by; lists the features that there are.
    """
    import tensorflow_datasets as tfds

    def is_image(feature):
        encoded = isinstance(feature, tfds.features.Image) and np.dtype(feature.np_dtype) in (np.uint8, np.uint16)
        return encoded and not isinstance(feature, tfds.features.LabeledImage)  # that is a mask

    def is_label(feature):
        return isinstance(getattr(feature, "feature", feature), tfds.features.ClassLabel)

    features = dict(sorted(features.items()))  # TFDS gives them in changing order
    wanted = _is_sound if texts == SOUND else _is_text if texts else is_image
    inputs = [name for name, feature in features.items() if wanted(feature)]
    labels = [name for name, feature in features.items() if is_label(feature)]
    if label_column != "label":
        labels = [name for name in labels if name == label_column]
    named = [name for name in texts if name in inputs]
    for chosen, candidates in zip(supervised_keys or (), (inputs, labels)):
        if chosen in candidates:
            candidates[:] = [chosen]
    listed = ", ".join(f"{name} ({_described(feature)})" for name, feature in features.items())
    if texts == SOUND:
        if len(inputs) != 1:
            raise GraftError(
                f"--data {data}: expected one feature of sound (Audio), found {', '.join(inputs) or 'none'}. The "
                f"features of this set: {listed}. Give a set of single sounds, or write them into class folders."
            )
    elif texts:
        inputs = named if named or texts != ("text",) else inputs
        if len(inputs) != len(texts):
            asked = "one text feature" if texts == ("text",) else f"text features named {' and '.join(texts)}"
            raise GraftError(
                f"--data {data}: expected {asked}, found {', '.join(inputs) or 'none'}. The features of this set: "
                f"{listed}. Name them with --text-column and, for pairs, --second-column."
            )
    elif len(inputs) != 1:
        raise GraftError(
            f"--data {data}: expected one image feature of 8 or 16 bits, found {', '.join(inputs) or 'none'}. "
            f"The features of this set: {listed}. Give a set of single images, or write the images into class folders."
        )
    if len(labels) > 1 and "label" in labels:
        labels = ["label"]
    if len(labels) != 1:
        wanted = "one label feature" if label_column == "label" else f"a label feature named {label_column!r}"
        raise GraftError(
            f"--data {data}: expected {wanted} (ClassLabel, or a Sequence of it), found "
            f"{', '.join(labels) or 'none'}. The features of this set: {listed}. Name the label with --label-column."
        )
    return tuple(inputs), labels[0]


def _is_text(feature) -> bool:
    """Whether a TFDS feature is one string; encoded images and sound are of other shapes."""
    return getattr(feature, "shape", None) == () and np.dtype(feature.np_dtype).kind in "OSU"


def _is_sound(feature) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Audio)


def _described(feature) -> str:
    inner = getattr(feature, "feature", None)
    name = type(feature).__name__
    if inner is not None:
        return f"{name} of {_described(inner)}"
    return f"{name}, {np.dtype(feature.np_dtype)}" if name in ("Image", "Tensor", "Scalar") else name


def _values(data, builder, inputs, label, splits, decoders=None):
    """Yields (split, labels or None, inputs) of every example of the splits, bytes as they are stored."""
    start_tensorflow(0)
    import absl.logging
    import tensorflow as tf
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns of calls of its own that it means to remove
    feature = builder.info.features[label]
    names = getattr(feature, "feature", feature)
    decoding = tfds.decode.PartialDecoding(dict.fromkeys((*inputs, label), True), decoders)
    reading = tfds.ReadConfig(try_autocache=False)
    for split, graft_split in splits.items():
        try:
            for example in builder.as_dataset(split=split, decoders=decoding, read_config=reading).as_numpy_iterator():
                values = example[label]
                if values.ndim == 0:
                    labels = (names.int2str(int(values)),) if values >= 0 else None
                else:
                    labels = tuple(dict.fromkeys(names.int2str(int(value)) for value in values if value >= 0))
                yield graft_split, labels, [example[name] for name in inputs]
        except (tf.errors.OpError, ValueError) as error:
            raise GraftError(
                f"--data {data}: the split {split} in {builder.data_dir} could not be read: {error}. "
                f"Remove that folder and prepare the set again."
            ) from error
