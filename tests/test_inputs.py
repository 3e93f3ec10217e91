"""models/inputs.py and its table of formats: a test per row, and what the served graph promises."""

from __future__ import annotations

import io
import struct
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from models import inputs
from models.backbone import ImagePreprocess
from models.image_formats import FORMATS, plain_format
from serving.session import Session

PREPROCESS = ImagePreprocess(image_size=(32, 24))


def picture(channels: int = 3, height: int = 45, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth random picture, [height, width, channels] uint8, that lossy formats keep well."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 6, channels)).astype("uint8")
    planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def encode(image, file_format: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.squeeze(image))
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_bmp(pixels, bits=32, compression=0, header_size=40, masks=b"", top_down=False, end=b""):
    """A BMP by hand: pixels [h, w, channels] in file order (blue first), any header that is wanted."""
    height, width = pixels.shape[:2]
    rows = pixels if top_down else pixels[::-1]
    padding = bytes(-len(rows[0].tobytes()) % 4)
    body = b"".join(row.tobytes() + padding for row in rows)
    info = struct.pack("<IiiHHIIiiII", header_size, width, -height if top_down else height, 1, bits,
                       compression, len(body), 0, 0, 0, 0)  # fmt: skip
    info += masks.ljust(header_size - 40, b"\0")
    start = b"BM" + struct.pack("<IHHI", 14 + len(info) + len(body), 0, 0, 14 + len(info))
    return start + info + body + end


def encode_png(pixels, bits: int, palette=None) -> bytes:
    """A PNG by hand, of any depth: pixels [h, w, 1 to 4 channels], or [h, w, 1] indices into a palette."""
    height, width, channels = pixels.shape
    if bits == 16:
        rows = pixels.astype(">u2")
    else:  # one channel, and the width fills whole bytes
        places = pixels.reshape(height, -1, 8 // bits).astype(int)
        rows = (places << np.arange(8 - bits, -1, -bits)).sum(-1).astype("uint8")

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    colour_type = 3 if palette is not None else (0, 4, 2, 6)[channels - 1]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)),
            b"" if palette is None else chunk(b"PLTE", palette.astype("uint8").tobytes()),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


def pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode)).astype("float32")


def over_white(rgba) -> np.ndarray:
    """The blend that the table promises: colour x alpha + 255 x (1 - alpha)."""
    alpha = rgba[..., 3:].astype("float64") / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


RGB, RGBA, GREY = picture(), picture(4, seed=1), picture(1, seed=2)
PALETTE = Image.fromarray(RGB).quantize(32)
SIXTEEN = np.random.RandomState(3).randint(0, 65536, (9, 12, 4)).astype("uint16")
TURNED = [Image.fromarray(np.rot90(RGB, 2)).quantize(32)]
BGRX = np.concatenate([RGB[..., ::-1], np.zeros_like(RGB[..., :1])], -1)
MASKS = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)


def case_values():
    """Name -> (encoded, expected pixels or None for Pillow's, largest mean difference in levels)."""
    yield "JPEG", (encode(RGB, "JPEG"), None, 0.5)
    yield "JPEG progressive", (encode(RGB, "JPEG", progressive=True, subsampling=2), None, 0.5)
    yield "JPEG grey", (encode(GREY, "JPEG"), None, 0.5)
    yield "JPEG CMYK", (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"), None, 1.0)
    yield "PNG", (encode(RGB, "PNG"), RGB, 0)
    yield "PNG grey", (encode(GREY, "PNG"), GREY.repeat(3, -1), 0)
    yield "PNG alpha", (encode(RGBA, "PNG"), over_white(RGBA), 1e-4)
    grey_alpha = Image.fromarray(RGBA).convert("LA")
    yield (
        "PNG grey with alpha",
        (encode(grey_alpha, "PNG"), over_white(np.asarray(grey_alpha.convert("RGBA"))), 1e-4),
    )
    yield "PNG palette", (encode(PALETTE, "PNG"), None, 0)
    see_through = encode(PALETTE, "PNG", transparency=bytes([0, 128] + [255] * 30))
    yield "PNG palette with transparency", (see_through, over_white(pillow(see_through, "RGBA")), 1e-4)
    for bits in (1, 2, 4):
        values = np.random.RandomState(bits).randint(0, 2**bits, (10, 16, 1))
        colours = np.random.RandomState(bits).randint(0, 256, (2**bits, 3))
        grey = (values * 255 // (2**bits - 1)).repeat(3, -1)
        yield f"PNG grey of {bits} bits", (encode_png(values, bits), grey, 0)
        yield f"PNG palette of {bits} bits", (encode_png(values, bits, colours), colours[values[..., 0]], 0)
    deep = SIXTEEN[..., :3]
    yield "PNG of 16 bits", (encode_png(deep, 16), np.minimum(deep * np.float64(1), 255), 1e-4)
    yield "GIF", (encode(PALETTE, "GIF"), None, 0)
    yield "GIF interlaced", (encode(PALETTE, "GIF", interlace=1, comment=b"made by hand" * 50), None, 0)
    yield "GIF animated", (encode(PALETTE, "GIF", save_all=True, append_images=TURNED, loop=0), None, 0)
    yield "BMP of 24 bits", (encode(RGB[:, :59], "BMP"), RGB[:, :59], 0)
    yield "BMP of 32 bits", (encode_bmp(BGRX), RGB, 0)
    yield "BMP of 32 bits with masks", (encode_bmp(BGRX, 32, 3, 108, MASKS), RGB, 0)
    yield "BMP from the top down", (encode_bmp(BGRX, top_down=True), RGB, 0)
    yield "BMP with padding", (encode_bmp(BGRX[..., :3], 24, end=b"\0\0"), RGB, 0)
    yield "WebP lossy", (encode(RGB, "WEBP", quality=80), None, 1.0)
    yield "WebP lossless", (encode(RGB, "WEBP", lossless=True), RGB, 0)
    yield "WebP alpha", (encode(RGBA, "WEBP", lossless=True, exact=True), over_white(RGBA), 1e-4)
    extended = encode(RGBA, "WEBP", quality=90)
    yield "WebP lossy with alpha", (extended, over_white(pillow(extended, "RGBA")), 1.0)


CASES = dict(case_values())
SAMPLES = [data for data, _, _ in CASES.values()]


@tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)])
def decode(data, white_level):
    return inputs.decode_image(data, white_level)


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def error_of(data):
    return inputs.image_error(data)


@tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
def served(data):
    return inputs.decode_images(data, PREPROCESS)


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_the_files_own(name):
    data, expected, tolerance = CASES[name]
    expected = pillow(data) if expected is None else expected
    pixels = decode(data, 255).numpy()
    assert error_of(data).numpy() == b""
    assert pixels.shape == expected.shape and pixels.dtype == np.float32
    assert np.abs(pixels - expected).mean() <= tolerance


@pytest.mark.parametrize("white_level", inputs.WHITE_LEVELS)
def test_16_bit_png_is_scaled_by_the_white_level(white_level):
    colours, alpha = SIXTEEN[..., :3].astype("float64"), SIXTEEN[..., 3:] / 65535.0
    expected = np.minimum(colours / white_level * 255, 255)
    opaque = decode(encode_png(SIXTEEN[..., :3], 16), white_level)
    np.testing.assert_allclose(opaque, expected, atol=1e-3)
    blended = decode(encode_png(SIXTEEN, 16), white_level)
    np.testing.assert_allclose(blended, expected * alpha + 255 * (1 - alpha), atol=1e-3)
    grey = decode(encode_png(SIXTEEN[..., :1], 16), white_level)
    np.testing.assert_allclose(grey, expected[..., :1].repeat(3, -1), atol=1e-3)


def test_white_level_leaves_8_bit_data_alone():
    for name in ("PNG", "PNG alpha", "PNG palette of 4 bits", "JPEG", "WebP alpha"):
        np.testing.assert_array_equal(decode(CASES[name][0], 1023), decode(CASES[name][0], 255))


@pytest.mark.parametrize(
    "peak, level", [(0, 255), (255, 255), (256, 1023), (4095, 4095), (4096, 65535), (65535, 65535)]
)
def test_white_level_for(peak, level):
    assert inputs.white_level_for(peak) == level


core_bmp = b"BM" + struct.pack("<IHHIIHHHH", 74, 0, 0, 26, 12, 4, 4, 1, 24) + bytes(48)
two_frames = encode(Image.fromarray(RGB), "WEBP", save_all=True, append_images=TURNED)
BMP_ROW = "BMP with a palette, compression or 16-bit pixels"
REFUSED = {  # name -> (row of the table, encoded, command to convert with)
    "animated WebP": ("Animated WebP", two_frames, "magick 'in.webp[0]' out.png"),
    "palette BMP": (BMP_ROW, encode(PALETTE, "BMP"), "magick in.bmp out.png"),
    "grey BMP": (BMP_ROW, encode(GREY, "BMP"), "magick in.bmp out.png"),
    "BMP of 1 bit": (BMP_ROW, encode(PALETTE.convert("1"), "BMP"), "magick in.bmp out.png"),
    "RLE BMP": (BMP_ROW, encode_bmp(GREY, 8, 1), "magick in.bmp out.png"),
    "BMP of 16 bits": (BMP_ROW, encode_bmp(RGBA[..., :2], 16), "magick in.bmp out.png"),
    "BMP with other masks": (BMP_ROW, encode_bmp(BGRX, 32, 3, 108, MASKS[::-1]), "magick in.bmp out.png"),
    "OS/2 BMP": (BMP_ROW, core_bmp, "magick in.bmp out.png"),
    "TIFF": ("TIFF", encode(RGB, "TIFF"), "magick in.tif out.png"),
    "TIFF big-endian": ("TIFF", b"MM\0*\0\0\0\x08", "magick in.tif out.png"),
    "DICOM": ("DICOM", bytes(128) + b"DICM\x02\0\0\0", "magick in.dcm out.png"),
    "HEIC": ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "magick in.heic out.png"),
    "AVIF": ("AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "magick in.avif out.png"),
    "JPEG XL": ("JPEG XL", b"\xff\x0a\xfa\x1f\x01", "djxl in.jxl out.png"),
    "JPEG XL container": ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14", "djxl in.jxl out.png"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_formats_say_their_name_and_how_to_convert(name):
    row, data, command = REFUSED[name]
    expected = f"{row} is not supported; convert it to PNG, for example with: {command}"
    assert error_of(data).numpy().decode() == expected
    with pytest.raises(tf.errors.InvalidArgumentError, match="not a supported image"):
        decode(data, 255)


def test_every_row_of_the_table_has_a_case():
    refused = {row for row, _, _ in REFUSED.values()}
    for row in FORMATS:
        assert row["name"] in refused or any(name.startswith(row["name"]) for name in CASES)


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", "empty input: no bytes; expected JPEG, PNG, GIF, BMP or WebP"),
        (b"<svg", "not an image: starts with the bytes 3c 73 76 67; expected JPEG, PNG, GIF, BMP or WebP"),
        (b"BMW is a car, and this is a text", "not an image: starts with the bytes 42 4d 57"),
        (bytes(1000), "not an image: starts with the bytes 00 00"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
    ],
)
def test_other_bytes_are_not_an_image(data, error):
    assert error_of(data).numpy().decode().startswith(error)


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def large_headers():
    """Small files whose headers claim 9000 x 7000 pixels."""
    jpeg, png, gif = (CASES[name][0] for name in ("JPEG", "PNG", "GIF"))
    yield "JPEG", patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 7000, 9000))
    yield "PNG", patched(png, 16, struct.pack(">II", 9000, 7000))
    yield "GIF", patched(gif, 6, struct.pack("<HH", 9000, 7000))
    frame = gif.index(b"," + bytes(4) + struct.pack("<HH", 60, 45))
    yield "GIF", patched(gif, frame + 5, struct.pack("<HH", 9000, 7000))
    yield "BMP", patched(CASES["BMP of 24 bits"][0], 18, struct.pack("<ii", 9000, 7000))
    yield "BMP", patched(CASES["BMP of 32 bits"][0], 18, struct.pack("<ii", 9000, -7000))
    yield "WebP", patched(CASES["WebP lossy"][0], 26, struct.pack("<HH", 9000, 7000))
    lossless = struct.pack("<I", 8999 | 6999 << 14)
    yield "WebP", patched(CASES["WebP lossless"][0], 21, lossless)
    extended = struct.pack("<I", 8999)[:3] + struct.pack("<I", 6999)[:3]
    yield "WebP", patched(CASES["WebP lossy with alpha"][0], 24, extended)


@pytest.mark.parametrize("name, data", list(large_headers()))
def test_large_images_are_refused_by_their_header(name, data):
    expected = f"{name} of 9000 x 7000 pixels is above the limit of 50 megapixels; make it smaller"
    assert error_of(data).numpy().decode().startswith(expected)


def test_the_limit_is_50_megapixels_and_cannot_overflow():
    png = CASES["PNG"][0]
    assert error_of(patched(png, 16, struct.pack(">II", 5000, 10_000))).numpy() == b""
    assert b"5001 x 10000 pixels" in error_of(patched(png, 16, struct.pack(">II", 5001, 10_000))).numpy()
    assert b"megapixels" in error_of(patched(png, 16, b"\xff" * 8)).numpy()


def test_jpeg_cut_short_keeps_its_first_rows():
    whole = encode(picture(height=200, width=300), "JPEG", quality=95)
    cut = decode(whole[: len(whole) // 2], 255).numpy()
    assert cut.shape == (200, 300, 3)
    np.testing.assert_array_equal(cut[:64], decode(whole, 255)[:64])
    images, errors = served([whole[: len(whole) // 2]])
    assert errors.numpy().tolist() == [b""] and images.numpy().any()


def test_only_the_first_frame_of_a_gif_is_read():
    animated = CASES["GIF animated"][0]
    assert Image.open(io.BytesIO(animated)).n_frames == 2
    np.testing.assert_array_equal(decode(animated[:-300], 255), decode(animated, 255))


DAMAGED = {
    "JPEG": CASES["JPEG"][0][:200],
    "JPEG without tables": CASES["JPEG"][0].replace(b"\xff\xdb", b"\xff\xfe"),
    "PNG": CASES["PNG"][0][:-300],
    "PNG with a wrong checksum": patched(CASES["PNG"][0], 60, b"graft"),
    "GIF": CASES["GIF"][0][:-300],
    "GIF without a frame": CASES["GIF"][0][:12],
    "BMP": CASES["BMP of 24 bits"][0][:-300],
    "WebP": CASES["WebP lossless"][0][:-300],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_one_bad_item_leaves_its_neighbours_alone(name):
    good = [CASES["PNG"][0], CASES["JPEG"][0], CASES["GIF animated"][0]]
    alone, _ = served(good)
    images, errors = served([good[0], DAMAGED[name], good[1], REFUSED["TIFF"][1], b"", good[2], DAMAGED[name]])
    damaged = f"{name.split(' ')[0]} data could not be decoded; the file is damaged".encode()
    tiff = b"TIFF is not supported; convert it to PNG, for example with: magick in.tif out.png"
    empty = b"empty input: no bytes; expected JPEG, PNG, GIF, BMP or WebP"
    assert errors.numpy().tolist() == [b"", damaged, b"", tiff, empty, b"", damaged]
    np.testing.assert_array_equal(images.numpy()[[0, 2, 5]], alone)
    assert not images.numpy()[[1, 3, 4, 6]].any()
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(DAMAGED[name], 255)


def test_all_items_may_be_bad():
    images, errors = served([DAMAGED["PNG"], b"", DAMAGED["JPEG"]])
    assert images.shape == (3, 32, 24, 3) and not images.numpy().any() and all(errors.numpy())


@pytest.mark.parametrize("count", [0, 1, 3, 17])
def test_a_batch_equals_its_items(count):
    images, errors = served(tf.constant(SAMPLES[:count], tf.string))
    assert images.shape == (count, 32, 24, 3) and errors.shape == (count,)
    for image, data in zip(images, SAMPLES[:count]):
        np.testing.assert_array_equal(image, served([data])[0][0])


@pytest.mark.parametrize("interpolation, antialias", [("bilinear", True), ("bicubic", False)])
def test_training_and_serving_read_the_same_pixels(interpolation, antialias):
    """In tf.data, one by one, as in training, in both forms; and as a batch, as in the served graph."""
    rule = ImagePreprocess((32, 24), crop_share=0.875, interpolation=interpolation, antialias=antialias)
    dataset = tf.data.Dataset.from_tensor_slices(SAMPLES)
    in_steps = dataset.map(lambda data: inputs.resize_image(inputs.decode_image(data, 4095), rule))
    at_once = dataset.map(lambda data: inputs.read_image(data, rule, 4095), num_parallel_calls=2)
    images, errors = tf.function(lambda data: inputs.decode_images(data, rule, 4095))(tf.constant(SAMPLES))
    assert set(errors.numpy()) == {b""}
    np.testing.assert_array_equal(images, np.stack(list(in_steps.as_numpy_iterator())))
    np.testing.assert_array_equal(images, np.stack(list(at_once.as_numpy_iterator())))


def test_served_through_the_cpp_loader(tmp_path):
    """One bad item among good ones in TensorFlow's C++ session, which is what TF Serving runs."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
    def endpoint(image_bytes):
        images, errors = inputs.decode_images(image_bytes, PREPROCESS)
        return {"images": images, "error": errors}

    module = tf.Module()
    tf.saved_model.save(module, tmp_path / "1", signatures={"serving_default": endpoint})
    expected, _ = served(SAMPLES)
    with Session(tmp_path / "1") as session:
        for count in (0, 1, 3, 17):
            answer = session.run("serving_default", {"image_bytes": SAMPLES[:count]})
            np.testing.assert_array_equal(answer["images"], expected[:count])
        answer = session.run("serving_default", {"image_bytes": [SAMPLES[0], *DAMAGED.values(), SAMPLES[1]]})
        np.testing.assert_array_equal(answer["images"][[0, -1]], expected[:2])
        assert [bool(error) for error in answer["error"]] == [False] + [True] * len(DAMAGED) + [False]


def test_crop_is_keras_own():
    image = picture(height=61, width=100).astype("float32")
    for size in [(32, 24), (24, 32), (61, 100), (7, 90)]:
        keras_own = keras.layers.Resizing(*size, interpolation="bilinear", crop_to_aspect_ratio=True)
        ours = inputs.resize_image(image, ImagePreprocess(size))
        np.testing.assert_allclose(ours, keras_own(image), atol=1e-3)


def test_crop_share_and_stretch():
    image = picture(height=40, width=80).astype("float32")
    half = inputs.resize_image(image, ImagePreprocess((20, 20), crop_share=0.5))
    np.testing.assert_array_equal(half, image[10:30, 30:50])
    stretched = inputs.resize_image(image, ImagePreprocess((20, 20), aspect="stretch"))
    np.testing.assert_array_equal(stretched, tf.image.resize(image, (20, 20)))


def test_resizing_takes_batches():
    batch = np.stack([picture(seed=seed).astype("float32") for seed in range(3)])
    resized = inputs.resize_image(batch, PREPROCESS)
    np.testing.assert_array_equal(resized, [inputs.resize_image(image, PREPROCESS) for image in batch])


def test_scaling():
    rule = ImagePreprocess((2, 2), mean=(127.0, 100.0, 0.0), deviation=(128.0, 50.0, 255.0))
    scaled = inputs.scale_image(np.full([1, 2, 2, 3], 255, "uint8"), rule).numpy()
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[0, 0, 0], [1.0, 3.1, 1.0])


def test_channels_are_turned_after_scaling():
    rule = ImagePreprocess((1, 1), mean=(10.0, 20.0, 30.0), deviation=(1.0, 2.0, 3.0), channel_order="bgr")
    scaled = inputs.scale_image(np.array([[[11, 24, 39]]], "uint8"), rule).numpy()
    np.testing.assert_allclose(scaled[0, 0], [3.0, 2.0, 1.0])


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(RGB, "JPEG", exif=exif)


def test_inspection_of_files(tmp_path):
    good = {"error": "", "height": 45, "width": 60, "bit_depth": 8, "peak": 0, "exif_orientation": 1, "plain": "PNG"}
    bad = {**good, "height": 0, "width": 0, "plain": ""}
    deep = np.minimum(SIXTEEN[..., :3], 3000)
    contents = {
        "plain é.png": (CASES["PNG"][0], good),
        "deep.png": (
            encode_png(deep, 16),
            {**good, "height": 9, "width": 12, "bit_depth": 16, "peak": 3000, "plain": ""},
        ),
        "turned.jpg": (with_orientation(6), {**good, "exif_orientation": 6, "plain": "JPEG"}),
        "damaged.png": (
            DAMAGED["PNG"],
            {**bad, "error": "PNG data could not be decoded; the file is damaged"},
        ),
        "empty.png": (b"", {**bad, "error": "empty input: no bytes; expected JPEG, PNG, GIF, BMP or WebP"}),
        "picture.tif": (REFUSED["TIFF"][1], {**bad, "error": error_of(REFUSED["TIFF"][1]).numpy().decode()}),
    }
    for name, (data, _) in contents.items():
        (tmp_path / name).write_bytes(data)
    paths = [*(tmp_path / name for name in contents), tmp_path / "missing.png", tmp_path]
    done = []
    findings = inputs.inspect_images(paths, progress=done.append)
    assert findings[:-2] == [expected for _, expected in contents.values()]
    assert findings[-2] == {**bad, "error": "cannot be read: No such file or directory"}
    assert findings[-1] == {**bad, "error": "cannot be read: Is a directory"}
    assert done[-1] <= len(paths)


@pytest.mark.parametrize("name", list(CASES))
def test_plain_files_decode_to_the_same_pixels(name):
    """What the format's own op makes of a file that is plain, and which of the cases are."""
    data = CASES[name][0]
    plain = plain_format(data)
    special = ("alpha", "transparency", "16 bits")
    is_plain = name.startswith(("JPEG", "PNG")) and not any(word in name for word in special)
    assert bool(plain) == is_plain
    if plain:
        np.testing.assert_array_equal(
            inputs.read_image(data, PREPROCESS, plain=plain), inputs.read_image(data, PREPROCESS)
        )
        np.testing.assert_array_equal(inputs.decode_image(data, plain=plain), inputs.decode_image(data))


def test_a_plain_file_above_the_limit_is_not_decoded(monkeypatch):
    monkeypatch.setattr(inputs, "MAX_PIXELS", 45 * 60 - 1)
    findings = inputs.inspect_images([CASES["PNG"][0], CASES["JPEG"][0]])
    assert ["megapixels" in found["error"] for found in findings] == [True, True]


def test_inspection_of_bytes_keeps_their_order():
    items = [DAMAGED["GIF"], *SAMPLES, DAMAGED["JPEG"]] * 3
    findings = inputs.inspect_images(items)
    assert [bool(found["error"]) for found in findings] == [item in DAMAGED.values() for item in items]
    sizes = [(found["width"], found["height"]) for found in findings if not found["error"]]
    assert sizes == [Image.open(io.BytesIO(item)).size for item in SAMPLES] * 3
    assert inputs.inspect_images([]) == []


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation(value):
    data = with_orientation(value)
    assert inputs.exif_orientation(data) == value
    np.testing.assert_array_equal(decode(data, 255), decode(CASES["JPEG"][0], 255))  # and it is ignored


def test_exif_orientation_of_garbage():
    data = with_orientation(8)
    generator = np.random.RandomState(0)
    for length in range(0, len(data), 7):
        assert inputs.exif_orientation(data[:length]) in (1, 8)
    for _ in range(300):
        noise = patched(data, generator.randint(2, 60), generator.bytes(4))
        assert 1 <= inputs.exif_orientation(noise) <= 8
    assert inputs.exif_orientation(b"") == 1
    big_endian = b"\xff\xd8\xff\xe1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x05\0\0\0\0\0\0"
    assert inputs.exif_orientation(big_endian) == 5
