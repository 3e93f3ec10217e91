"""The image formats that are read and those that are refused: one table, `FORMATS`, at the end.

All of it is core TensorFlow ops on the encoded bytes of one image. DecodeWebP needs TensorFlow
Serving 2.20, the rest runs in 2.19 too. EXIF orientation is ignored: pixels are taken as stored.
"""

from __future__ import annotations

import struct

import numpy as np
import tensorflow as tf

HEADER_BYTES = 160  # enough for every field below; the last one is DICOM's mark at 128
PNG_START = b"\x89PNG\r\n\x1a\n"


def number(header, offset: int, count: int, big_endian: bool = False):
    """Unsigned integer of `count` bytes at `offset` of header [HEADER_BYTES] uint8, as int64."""
    powers = 256 ** np.arange(count, dtype=np.int64)
    digits = tf.cast(header[offset : offset + count], tf.int64)
    return tf.reduce_sum(digits * (powers[::-1] if big_endian else powers))


# Sizes: (data, header) -> (height, width) int64 in pixels, from the header alone.


def jpeg_size(data, header):
    """libjpeg walks the segments up to the frame header; raises InvalidArgument where it is damaged."""
    shape = tf.image.extract_jpeg_shape(data, output_type=tf.int64)
    return shape[0], shape[1]


def png_size(data, header):
    return number(header, 20, 4, big_endian=True), number(header, 16, 4, big_endian=True)


def gif_size(data, header):
    """The canvas, or the first frame where that is larger; raises InvalidArgument where there is none."""
    content = tf.io.decode_raw(data, tf.uint8)
    frame = content[gif_first_frame(content) :]
    height = tf.maximum(number(header, 8, 2), number(frame, 7, 2))
    return height, tf.maximum(number(header, 6, 2), number(frame, 5, 2))


def bmp_size(data, header):
    """The height is signed: negative where the rows run from the top down."""
    height = number(header, 22, 4)
    return tf.minimum(height, 2**32 - height), number(header, 18, 4)


def webp_size(data, header):
    """Lossy ("VP8 "), lossless ("VP8L") and extended ("VP8X") files each have their own header."""
    packed = number(header, 21, 4)  # lossless: 14 bits of width - 1, then 14 bits of height - 1
    lossy = (number(header, 28, 2) % 2**14, number(header, 26, 2) % 2**14)
    lossless = (packed // 2**14 % 2**14 + 1, packed % 2**14 + 1)
    extended = (number(header, 27, 3) + 1, number(header, 24, 3) + 1)
    kind = header[15]
    return tuple(
        tf.where(kind == ord("L"), lossless[axis], tf.where(kind == ord("X"), extended[axis], lossy[axis]))
        for axis in (0, 1)
    )


# Decoders: (data, header, white_level) -> [height, width, 3] RGB, 0 to 255, uint8 or float32.


def decode_jpeg(data, header, white_level):
    """A file cut short keeps the rows it has. The accurate transform is libjpeg's, and Pillow's, default."""
    return tf.io.decode_jpeg(data, channels=3, try_recover_truncated=True, dct_method="INTEGER_ACCURATE")


def decode_png(data, header, white_level):
    """Four channels blended on white; 16-bit colours are scaled by the white level."""

    def decode_8_bit():
        pixels = tf.io.decode_png(data, channels=4, dtype=tf.uint8)
        # TensorFlow fills the alpha of opaque images of 1, 2 and 4 bits with 1, 3 and 15, not with 255.
        opaque = tf.cast(2 ** tf.minimum(number(header, 24, 1), 8) - 1, tf.uint8)
        return blend_on_white(tf.cast(pixels[..., :3], tf.float32), pixels[..., 3:], opaque)

    def decode_16_bit():
        pixels = tf.io.decode_png(data, channels=4, dtype=tf.uint16)
        colours = tf.cast(pixels[..., :3], tf.float32) * 255.0 / tf.cast(white_level, tf.float32)
        return blend_on_white(tf.minimum(colours, 255.0), pixels[..., 3:], 65535)

    return tf.cond(is_16_bit(header), decode_16_bit, decode_8_bit)


def decode_gif(data, header, white_level):
    """The first frame alone; its transparent pixels are black, as TensorFlow gives no alpha for GIF.

    The file is cut after that frame: TensorFlow would unpack all of them, and then drop the others.
    """
    content = tf.io.decode_raw(data, tf.uint8)
    frame = gif_first_frame(content)
    blocks = frame + 10 + gif_colour_bytes(content[frame + 9]) + 1
    data = tf.strings.substr(data, 0, gif_blocks_end(content, blocks)) + ";"  # ";" ends a GIF
    return tf.ensure_shape(tf.io.decode_image(data, channels=3, expand_animations=False), [None, None, 3])


def gif_first_frame(content):
    """Place of the first frame's descriptor in a GIF [bytes] uint8: after palette and extensions ("!")."""
    place = 13 + gif_colour_bytes(content[10])
    (place,) = tf.while_loop(
        lambda place: content[place] == ord("!"), lambda place: [gif_blocks_end(content, place + 2)], [place]
    )
    return place


def gif_colour_bytes(flags):
    """Size in bytes of the palette that a GIF's screen or frame descriptor announces."""
    flags = tf.cast(flags, tf.int32)
    return tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)


def gif_blocks_end(content, place):
    """Place after the data blocks that start at `place`: each a length byte and its data, the last empty."""

    def next_block(place):
        return [place + 1 + tf.cast(content[place], tf.int32)]

    (place,) = tf.while_loop(lambda place: content[place] > 0, next_block, [place])
    return place + 1


def decode_bmp(data, header, white_level):
    """The fourth channel of 32-bit files is ignored: most writers leave zeros there, which is no alpha."""
    height, width = bmp_size(data, header)
    row_bytes = (width * number(header, 28, 2) // 8 + 3) // 4 * 4
    # TensorFlow refuses bytes after the pixels; some writers pad the file with two zeros.
    end = number(header, 10, 4) + height * row_bytes
    return tf.io.decode_bmp(tf.strings.substr(data, tf.zeros_like(end), end), channels=3)


def decode_webp(data, header, white_level):
    """Files with alpha give four channels, others three: an opaque one is added, the first four taken."""
    pixels = tf.raw_ops.DecodeWebP(contents=data)[0]
    pixels = tf.concat([pixels, tf.fill(tf.shape(pixels[..., :1]), np.uint8(255))], -1)
    return blend_on_white(tf.cast(pixels[..., :3], tf.float32), pixels[..., 3:4], 255)


def blend_on_white(colours, alpha, opaque):
    """Colours [h, w, 3] float32 in 0 to 255 over white; alpha [h, w, 1] of an integer type's full range.

    Where every alpha is `opaque`, the colours are left as they are.
    """

    def blend():
        opacity = tf.cast(alpha, tf.float32) / alpha.dtype.max
        return colours * opacity + 255.0 * (1.0 - opacity)

    return tf.cond(tf.reduce_all(alpha == opaque), lambda: colours, blend)


def is_16_bit(header):
    """Whether the header is a PNG's with 16 bits per channel."""
    png = tf.reduce_all(header[:8] == np.frombuffer(PNG_START, np.uint8))
    return tf.logical_and(png, header[24] == 16)


# 24 bits, 32 bits, and 32 bits with masks that say blue, green, red as in the plain layout.
BMP_LAYOUTS = (
    ((28, b"\x18\0\0\0\0\0"),),
    ((28, b"\x20\0\0\0\0\0"),),
    ((28, b"\x20\0\x03\0\0\0"), (54, b"\0\0\xff\0\0\xff\0\0\xff\0\0\0")),
)
BMP_STARTS = tuple(
    ((0, b"BM"), (14, struct.pack("<I", header_size)), *layout)
    for header_size in (40, 52, 56, 108, 124)
    for layout in BMP_LAYOUTS
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# One row per format; the first row that matches counts. `starts` lists the alternatives; each is a set
# of (offset, bytes) or (offset, bytes, mask of the bits that count) that must all be there.
# A row has `size` and `decode`, or else `convert`: a command for the refusal to suggest. Those with
# `decode` come first: their row numbers are branch numbers in the graph.
FORMATS = (
    {"name": "JPEG", "starts": (((0, b"\xff\xd8\xff"),),), "size": jpeg_size, "decode": decode_jpeg},
    {"name": "PNG", "starts": (((0, PNG_START),),), "size": png_size, "decode": decode_png},
    {
        "name": "GIF",
        "starts": (((0, b"GIF87a"),), ((0, b"GIF89a"),)),
        "size": gif_size,
        "decode": decode_gif,
    },
    {"name": "BMP", "starts": BMP_STARTS, "size": bmp_size, "decode": decode_bmp},
    {
        "name": "WebP",
        "starts": (
            ((0, b"RIFF"), (8, b"WEBPVP8 ")),
            ((0, b"RIFF"), (8, b"WEBPVP8L")),
            ((0, b"RIFF"), (8, b"WEBPVP8X"), (20, b"\0", b"\x02")),
        ),
        "size": webp_size,
        "decode": decode_webp,
    },
    {
        "name": "Animated WebP",
        "starts": (((0, b"RIFF"), (8, b"WEBPVP8X")),),
        "convert": "magick 'in.webp[0]' out.png",
    },
    {
        # TensorFlow would take palette indices for grey levels.
        "name": "BMP with a palette, compression or 16-bit pixels",
        "starts": (((0, b"BM"), (15, b"\0\0\0")),),
        "convert": "magick in.bmp out.png",
    },
    {
        "name": "TIFF",
        "starts": (((0, b"II*\0"),), ((0, b"MM\0*"),), ((0, b"II+\0"),), ((0, b"MM\0+"),)),
        "convert": "magick in.tif out.png",
    },
    {"name": "DICOM", "starts": (((128, b"DICM"),),), "convert": "magick in.dcm out.png"},
    {
        "name": "HEIC",
        "starts": tuple(((4, b"ftyp"), (8, brand)) for brand in HEIC_BRANDS),
        "convert": "magick in.heic out.png",
    },
    {
        "name": "AVIF",
        "starts": tuple(((4, b"ftyp"), (8, brand)) for brand in (b"avif", b"avis")),
        "convert": "magick in.avif out.png",
    },
    {
        "name": "JPEG XL",
        "starts": (((0, b"\xff\x0a"),), ((0, b"\0\0\0\x0cJXL \r\n\x87\n"),)),
        "convert": "djxl in.jxl out.png",
    },
)
UNKNOWN = len(FORMATS)  # the row number of everything else
NAMES = [row["name"] for row in FORMATS] + ["Image"]
REFUSALS = [
    f"{row['name']} is not supported; convert it to PNG, for example with: {row['convert']}" if "convert" in row else ""
    for row in FORMATS
] + [""]


def start_patterns():
    """The table's `starts` as arrays: masks and values [n, HEADER_BYTES] uint8, row numbers [n + 1].

    The last row number is UNKNOWN's, for a header that matches no pattern.
    """
    alternatives = [(row, start) for row in range(UNKNOWN) for start in FORMATS[row]["starts"]]
    masks = np.zeros([len(alternatives), HEADER_BYTES], np.uint8)
    values = np.zeros_like(masks)
    for line, (_, start) in enumerate(alternatives):
        for offset, value, *mask in start:
            place = slice(offset, offset + len(value))
            masks[line, place] = np.frombuffer(mask[0], np.uint8) if mask else 255
            values[line, place] = np.frombuffer(value, np.uint8)
    return masks, values, np.array([row for row, _ in alternatives] + [UNKNOWN])


START_MASKS, START_VALUES, START_ROWS = start_patterns()


# Most data sets hold one kind of file. Where it is known that each of them is plain, the kind's own op does what the
# table's function does, without asking about every file again.
PLAIN_DECODERS = {
    "JPEG": lambda data: decode_jpeg(data, None, None),
    "PNG": lambda data: tf.io.decode_png(data, channels=3),
}
PLAIN_BYTES = 65_536  # from the start of a file, to tell; an EXIF block and most colour profiles are smaller


def plain_format(start: bytes) -> str:
    """The key of PLAIN_DECODERS that reads a file which starts so as the table's functions do, else "".

    Every JPEG; a PNG of at most 8 bits per channel and without alpha, be it a channel or a tRNS chunk.
    """
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if not start.startswith(PNG_START) or len(start) < 33 or start[24] > 8 or start[25] not in (0, 2, 3):
        return ""
    place = 33  # the first chunk, IHDR, always has 25 bytes
    while place + 8 <= len(start):
        name = start[place + 4 : place + 8]
        if name in (b"IDAT", b"tRNS"):
            return "PNG" if name == b"IDAT" else ""
        place += int.from_bytes(start[place : place + 4], "big") + 12
    return ""


def read_header(data):
    """Encoded images [...] string -> their first bytes [..., HEADER_BYTES] uint8, zeros where too short."""
    return tf.io.decode_raw(data, tf.uint8, fixed_length=HEADER_BYTES)


def format_row(header):
    """Headers [..., HEADER_BYTES] uint8 -> row of FORMATS [...] int32, or UNKNOWN."""
    matches = tf.reduce_all(tf.bitwise.bitwise_and(header[..., None, :], START_MASKS) == START_VALUES, -1)
    last = tf.ones_like(matches[..., :1])
    first_match = tf.argmax(tf.cast(tf.concat([matches, last], -1), tf.int32), -1)
    return tf.gather(START_ROWS.astype(np.int32), first_match)
