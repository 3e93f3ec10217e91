"""Raw bytes -> model input: the only such code. tf.data runs it in training, the SavedModel in serving.

All of it is core TensorFlow ops, so it works inside `tf.data`, a `tf.function` and TensorFlow Serving.
What is read and what is refused: the table in `models/image_formats.py`.
"""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf

from models.backbone import ImagePreprocess
from models.image_formats import (
    FORMATS,
    HEADER_BYTES,
    NAMES,
    PLAIN_BYTES,
    PLAIN_DECODERS,
    REFUSALS,
    UNKNOWN,
    format_row,
    is_16_bit,
    plain_format,
    read_header,
)

SUPPORTED = "JPEG, PNG, GIF, BMP or WebP"
MAX_PIXELS = 50_000_000  # per image, by its header: 50 megapixels are 0.6 GB as float32 RGB
WHITE_LEVELS = (255, 1023, 4095, 65535)  # 8, 10, 12 and 16 significant bits
HEXADECIMAL = [f"{byte:02x}" for byte in range(256)]


def image_error(data):
    """Why encoded bytes (scalar string) cannot be an input, "" where they can; scalar string.

    Judged by magic bytes and header only, before anything is decoded. Raises InvalidArgument where a
    JPEG or GIF is damaged before its size is told.
    """
    header = read_header(data)
    row = format_row(header)
    nothing = tf.constant(0, tf.int64)
    sizes = [lambda size=entry["size"]: size(data, header) for entry in FORMATS if "size" in entry]
    height, width = tf.switch_case(row, [*sizes, lambda: (nothing, nothing)])
    too_large = tf.strings.join(
        [
            tf.gather(NAMES, row),
            " of ",
            tf.strings.as_string(width),
            " x ",
            tf.strings.as_string(height),
            f" pixels is above the limit of {MAX_PIXELS // 10**6} megapixels; make it smaller, "
            "for example with: magick in.png -resize 2000x2000 out.png",
        ]
    )
    pixels = tf.minimum(height, MAX_PIXELS + 1) * width  # so that no lie about both can overflow
    error = tf.where(pixels > MAX_PIXELS, too_large, tf.gather(REFUSALS, row))
    start = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 0, 8), tf.uint8), tf.int32)
    start = tf.strings.reduce_join(tf.gather(HEXADECIMAL, start), separator=" ")
    unknown = tf.strings.join(["not an image: starts with the bytes ", start, "; expected ", SUPPORTED])
    error = tf.where(row == UNKNOWN, unknown, error)
    return tf.where(data == "", f"empty input: no bytes; expected {SUPPORTED}", error)


def damage_error(data):
    """What to say of encoded images [...] string that look fine but did not decode; [...] string."""
    names = tf.gather(NAMES, format_row(read_header(data)))
    return tf.strings.join([names, " data could not be decoded; the file is damaged"])


def decode_image(data, white_level: int = 255, plain: str = ""):
    """One encoded image (scalar string) without `image_error` -> [height, width, 3] float32 RGB, 0 to 255.

    `white_level` is the value of white in 16-bit PNG, see `white_level_for`; 8-bit data does not use it.
    `plain` is what `inspect_images` says of the file, where it is known: the same pixels, sooner.
    Raises InvalidArgument on damaged data.
    """
    image = decode_by_format(data, white_level, lambda pixels: tf.cast(pixels, tf.float32), plain)
    return tf.ensure_shape(image, [None, None, 3])


def read_image(data, preprocess: ImagePreprocess, white_level: int = 255, plain: str = ""):
    """One encoded image (scalar string) -> [height, width, 3] float32 of `preprocess.image_size`, 0 to 255.

    Equals `resize_image(decode_image(data, white_level), preprocess)` to the bit, but spares a float32
    copy of the whole picture: most formats decode to uint8, and are cropped and resized from that.
    """
    image = decode_by_format(data, white_level, lambda pixels: resize_image(pixels, preprocess), plain)
    return tf.ensure_shape(image, [*preprocess.image_size, 3])


def decode_by_format(data, white_level, finish, plain: str = ""):
    """Decode with the table's function and apply `finish`: [h, w, 3] uint8 or float32 -> float32."""
    if plain:
        return finish(PLAIN_DECODERS[plain](data))
    header = read_header(data)

    def refuse():
        with tf.control_dependencies([tf.debugging.Assert(False, ["not a supported image", header[:8]])]):
            return finish(tf.zeros([1, 1, 3]))

    branches = [
        lambda decode=row["decode"]: finish(decode(data, header, white_level)) for row in FORMATS if "decode" in row
    ]
    return tf.switch_case(format_row(header), [*branches, refuse])


def resize_image(image, preprocess: ImagePreprocess):
    """Image [h, w, 3] or images [n, h, w, 3], RGB 0 to 255 -> float32 of `preprocess.image_size`.

    "crop" keeps the largest central box of the target's shape, times `crop_share`; its sides and its
    offset are rounded down, as Keras does for `crop_to_aspect_ratio`. Values are not clipped: bicubic
    interpolation may leave 0 to 255 by some levels, and TensorFlow's own preprocessing of EfficientNet
    passes that on to the network.
    """
    target_height, target_width = preprocess.image_size
    if preprocess.aspect == "crop":
        shape = tf.shape(image, out_type=tf.int64)
        height, width = shape[-3], shape[-2]
        crop_height = tf.minimum(height, width * target_height // target_width)
        crop_width = tf.minimum(width, height * target_width // target_height)
        if preprocess.crop_share != 1.0:
            crop_height, crop_width = (
                tf.cast(tf.cast(side, tf.float64) * preprocess.crop_share, tf.int64)
                for side in (crop_height, crop_width)
            )
        crop_height, crop_width = tf.maximum(crop_height, 1), tf.maximum(crop_width, 1)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        image = image[..., top : top + crop_height, left : left + crop_width, :]
    image = tf.image.resize(
        image, preprocess.image_size, method=preprocess.interpolation, antialias=preprocess.antialias
    )
    return tf.cast(image, tf.float32)


def scale_image(image, preprocess: ImagePreprocess):
    """RGB pixels [..., 3] in 0 to 255 -> (pixel - mean) / deviation in `channel_order`, float32."""
    mean, deviation = np.float32(preprocess.mean), np.float32(preprocess.deviation)
    image = tf.cast(image, tf.float32)
    shape = image.shape
    if shape.rank in (3, 4) and shape[1:].is_fully_defined():
        width = shape[-2]
        # Three values are spread over the last axis one by one, which takes as long as decoding; whole rows in vectors.
        rows = tf.reshape(image, [-1, *shape[1:-2], 3 * width])
        scaled = (rows - np.tile(mean, width)) / np.tile(deviation, width)
        scaled = tf.ensure_shape(tf.reshape(scaled, [-1, *shape[1:]]), shape)
    else:
        scaled = (image - mean) / deviation
    return scaled[..., ::-1] if preprocess.channel_order == "bgr" else scaled


def decode_images(data, preprocess: ImagePreprocess, white_level: int = 255):
    """Encoded images [n] string -> (images [n, height, width, 3] float32, errors [n] string), any n.

    Images are RGB, 0 to 255, resized, not scaled. An item that is not a supported image, or is damaged,
    is all zeros and has its error; it never fails its neighbours. For that the items run through a
    tf.data pipeline inside the graph: TensorFlow has no other way to go on after a kernel's error.
    """
    count = tf.size(data, out_type=tf.int64)

    @tf.autograph.experimental.do_not_convert
    def read(index, item):
        error = image_error(item)
        image = tf.cond(
            error == "",
            lambda: read_image(item, preprocess, white_level),
            lambda: tf.zeros([*preprocess.image_size, 3]),
        )
        return index, image, error

    # An empty item at the end is never damaged: something always survives, and its zeros are at hand.
    items = tf.data.Dataset.from_tensor_slices((tf.range(count + 1), tf.concat([data, [""]], 0)))
    items = items.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    items = items.ignore_errors().batch(count + 1).with_options(plain_options())
    survivors, images, errors = items.get_single_element()

    # Where each item's answer lies among the survivors; the empty item's place for those that failed.
    last = tf.size(survivors) - 1
    places = tf.fill([count], -1)
    places = tf.tensor_scatter_nd_update(places, survivors[:-1, None], tf.range(last))
    failed = places < 0
    images = tf.gather(images, tf.where(failed, last, places))
    errors = tf.where(failed, damage_error(data), tf.gather(errors, tf.maximum(places, 0)))
    return images, errors


def plain_options() -> tf.data.Options:
    """No tuning and rewriting, which cost more than they gain in a pipeline made anew for each request."""
    options = tf.data.Options()
    options.autotune.enabled = False  # AUTOTUNE then means one call per core, 16 at most
    options.experimental_optimization.apply_default_optimizations = False
    return options


def inspect_images(items, progress=None) -> list[dict]:
    """Decode files (paths) or encoded images (bytes), in parallel, and say for each, in order:

    `error` (as the served model would say it, or why the file cannot be read; "" where all is well),
    `height` and `width` in pixels, `bit_depth` (16 for 16-bit PNG, otherwise 8), `peak` (the largest
    colour value of 16-bit data, otherwise 0), `exif_orientation` (1 to 8; 1 where a JPEG has none, and
    for other formats), `plain` (as `models.image_formats.plain_format` says; "" where there is an error).
    Sizes are 0 where there is an error. `progress(done)` is called now and then.
    """
    items = list(items)
    starts = [item[:PLAIN_BYTES] if isinstance(item, bytes) else file_start(item) for item in items]
    kinds = [plain_format(start) for start in starts]
    findings = [None] * len(items)

    def look(inspect, wanted, plain):
        """Inspect those of `wanted` that are still unknown; what raises stays unknown."""
        wanted = [index for index in wanted if findings[index] is None]
        done = len(items) - findings.count(None)
        for index, error, (height, width), bit_depth, peak in inspect_each(inspect, items, wanted):
            findings[index] = {
                "error": error.decode(),
                "height": int(height),
                "width": int(width),
                "bit_depth": int(bit_depth),
                "peak": int(peak),
                "exif_orientation": exif_orientation(starts[index]) if kinds[index] == "JPEG" else 1,
                "plain": plain,
            }
            done += 1
            if progress and done % 64 == 0:
                progress(done)

    for kind in PLAIN_DECODERS:
        plain_images = [index for index, found in enumerate(kinds) if found == kind]
        look(lambda data, kind=kind: inspect_plain_image(data, kind), plain_images, kind)
    look(inspect_image, range(len(items)), "")
    if progress:
        progress(len(items))
    nothing = {"height": 0, "width": 0, "bit_depth": 8, "peak": 0, "exif_orientation": 1, "plain": ""}
    return [found or {"error": failure(item), **nothing} for item, found in zip(items, findings)]


def inspect_each(inspect, items, wanted):
    """Yield (index, *answer) of `inspect` for the wanted items, without those for which it raises."""
    if not wanted:
        return
    from_paths = not isinstance(items[0], bytes)
    chosen = [os.fsencode(items[index]) if from_paths else items[index] for index in wanted]

    @tf.autograph.experimental.do_not_convert
    def read(index, item):
        return index, *inspect(tf.io.read_file(item) if from_paths else item)

    dataset = tf.data.Dataset.from_tensor_slices((np.array(wanted), chosen))
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors().batch(64)
    for batch in dataset.prefetch(1).as_numpy_iterator():
        yield from zip(*batch)


def inspect_image(data):
    """One item -> its error, size [height, width] int32, bit depth and peak as in `inspect_images`."""
    error = image_error(data)
    deep = is_16_bit(read_header(data))

    def largest():
        return tf.cast(tf.reduce_max(tf.io.decode_png(data, channels=3, dtype=tf.uint16)), tf.int32)

    def decoded():
        return tf.shape(decode_image(data))[:2], tf.where(deep, 16, 8), tf.cond(deep, largest, lambda: 0)

    return error, *tf.cond(error == "", decoded, lambda: (tf.zeros([2], tf.int32), 8, 0))


def inspect_plain_image(data, plain: str):
    """As `inspect_image` for a plain file; raises where that would give an error."""
    (size,) = (row["size"] for row in FORMATS if row["name"] == plain)
    height, width = size(data, read_header(data))
    allowed = tf.minimum(height, MAX_PIXELS + 1) * width <= MAX_PIXELS
    image = PLAIN_DECODERS[plain](tf.where(allowed, data, ""))  # no bytes raise before anything is decoded
    return "", tf.shape(image)[:2], 8, 0


def file_start(path) -> bytes:
    """The first PLAIN_BYTES of a file; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(PLAIN_BYTES)
    except OSError:  # `failure` says why
        return b""


def failure(item) -> str:
    """Why an item raised: its file cannot be read, or its bytes are damaged."""
    if isinstance(item, bytes):
        return damage_error(item).numpy().decode()
    try:
        with open(item, "rb") as file:
            return damage_error(file.read(HEADER_BYTES)).numpy().decode()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def exif_orientation(start: bytes) -> int:
    """EXIF orientation, 1 to 8, from the start of a JPEG file; 1 where there is none or it makes no sense.

    CIPA DC-008 (EXIF 2.32), 4.5 and 4.6: an APP1 segment "Exif\\0\\0" holds a TIFF header, whose first
    directory has 12-byte entries: tag, type, count, value. Orientation is tag 0x0112, type 3 (16 bits).
    """
    place = 2
    while start[place : place + 1] == b"\xff" and start[place : place + 2] != b"\xff\xda":
        length = int.from_bytes(start[place + 2 : place + 4], "big")
        segment = start[place + 4 : place + 2 + length]
        if start[place : place + 2] == b"\xff\xe1" and segment.startswith(b"Exif\0\0"):
            return tiff_orientation(segment[6:])
        place += 2 + max(length, 2)
    return 1


def tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return 1

    def integer(offset, count):
        return int.from_bytes(tiff[offset : offset + count], order)

    directory = integer(4, 4)
    end = min(directory + 2 + 12 * integer(directory, 2), len(tiff))
    for entry in range(directory + 2, end, 12):
        if integer(entry, 2) == 0x0112 and integer(entry + 2, 2) == 3:
            value = integer(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def white_level_for(peak: int) -> int:
    """The smallest of WHITE_LEVELS that covers the largest value of a set's 16-bit data (0 where none)."""
    return next(level for level in WHITE_LEVELS if peak <= level)
