"""Sample rate conversion in core TensorFlow ops: one function for tf.data and for the served graph.

Band-limited interpolation with a windowed sinc (J. O. Smith, "Digital Audio Resampling",
https://ccrma.stanford.edu/~jos/resample/; J. F. Kaiser's window of 1974). The rate is a number in a file's header, so
nothing about it is known when the graph is made: the filter is computed in the graph too.
"""

from __future__ import annotations

import math

import tensorflow as tf

# Kaiser's formulas: ripple and stop band at -90 dB; the transition then takes 0.12 of the lower rate's half, so that
# the pass band ends at 0.88 of it (7.04 kHz of 8) and all is silent above it.
ZERO_CROSSINGS = 48  # of the sinc, on each side, in samples of the lower rate
BETA = 8.96
CUTOFF = 0.94  # of half the lower rate: the middle of the transition
LARGEST_MATRIX = 1 << 20  # numbers; rates such as 47,999 Hz would need a larger one
FINE_PHASES, OUTPUTS_AT_ONCE = 1024, 2048  # for these
AT_ONCE = 1 << 18  # samples: memory that is used again is far quicker than fresh memory, and an hour needs less of it


def resample(waveform, rate_hz, target_hz):
    """Samples [n] float32 at `rate_hz` -> [ceil(n * target_hz / rate_hz)] float32 at `target_hz`.

    Both rates are integers, or integer scalars of a graph. Beyond both ends there is silence. At equal rates the
    samples are returned as they are.
    """
    waveform = tf.ensure_shape(tf.convert_to_tensor(waveform, tf.float32), [None])
    rate, target = tf.cast(rate_hz, tf.int64), tf.cast(target_hz, tf.int64)
    return tf.cond(rate == target, lambda: waveform, lambda: _convert(waveform, rate, target))


def _convert(waveform, rate, target):
    divisor = greatest_common_divisor(rate, target)
    up, down = target // divisor, rate // divisor
    half = _ceil(ZERO_CROSSINGS * tf.maximum(rate, target), target)  # of the filter's length, in samples of the input
    cutoff = CUTOFF * tf.minimum(target / rate, 1.0)  # float64
    count = _ceil(tf.size(waveform, tf.int64) * target, rate)
    # So many periods, of `down` samples in and `up` out, make a block that is no shorter than the filter.
    periods = _ceil(2 * half, down)
    numbers = (down * periods + 2 * half) * up * periods
    converted = tf.cond(
        numbers <= LARGEST_MATRIX,
        lambda: _by_blocks(waveform, up, down, periods, half, cutoff, count),
        lambda: _one_by_one(waveform, rate, target, half, cutoff, count),
    )
    return tf.ensure_shape(converted, [None])


def _by_blocks(waveform, up, down, periods, half, cutoff, count):
    """Each block of the output is one and the same matrix times the block's samples and those of a filter's length."""
    block, outputs = down * periods, up * periods
    blocks = _ceil(count, outputs)
    ahead = half - 1
    padded = tf.pad(waveform, [[ahead, (blocks + 1) * block - ahead - tf.size(waveform, tf.int64)]])

    phases = tf.range(up)
    filters = filter_taps(tf.cast(phases * down % up, tf.float64) / tf.cast(up, tf.float64), half, cutoff)
    filters = tf.pad(filters, [[0, 0], [0, 1]])  # a zero for all that lies outside
    output = tf.range(outputs)
    first = tf.cast(output * down // up, tf.int32)  # of the filter, among the rows
    width = tf.cast(2 * half, tf.int32)
    tap = tf.range(tf.cast(block, tf.int32) + width)[:, None] - first  # [block + 2 half, outputs]
    tap = tf.where((tap >= 0) & (tap < width), tap, width)
    matrix = tf.gather(tf.reshape(filters, [-1]), tf.cast(output % up, tf.int32) * (width + 1) + tap)
    some = tf.maximum(AT_ONCE // block, 1)  # blocks

    def converted(first):
        rows = tf.minimum(some, blocks - first)
        rows = tf.reshape(padded[first * block : (first + rows + 1) * block], tf.stack([rows + 1, block]))
        rows = tf.concat([rows[:-1], rows[1:, : 2 * half]], 1)  # [rows, block + 2 half]
        return tf.reshape(tf.matmul(rows, matrix), [-1])

    return in_pieces(converted, blocks, some)[:count]


def _one_by_one(waveform, rate, target, half, cutoff, count):
    """Each sample of the output has a filter of its own, between two of a fine table.

    Linear interpolation between 1,024 phases is off by pi^2 / 8 / 1024^2, -118 dB.
    """
    fine = filter_taps(tf.linspace(tf.constant(0, tf.float64), 1, FINE_PHASES + 1), half, cutoff)
    padded = tf.pad(waveform, [[half - 1, half + 1]])
    last = tf.size(padded, tf.int64) - 1
    taps = tf.range(2 * half)

    def converted(first):
        place = (first + tf.range(OUTPUTS_AT_ONCE, dtype=tf.int64)) * rate
        phase = tf.cast(place % target, tf.float64) / tf.cast(target, tf.float64) * FINE_PHASES
        lower = tf.floor(phase)
        share = tf.cast(phase - lower, tf.float32)[:, None]
        row = tf.cast(lower, tf.int32)
        filters = tf.gather(fine, row) * (1 - share) + tf.gather(fine, row + 1) * share
        # The last places may lie beyond the end; their outputs are cut off below.
        samples = tf.gather(padded, tf.minimum((place // target)[:, None] + taps, last))
        return tf.reduce_sum(samples * filters, -1)

    return in_pieces(converted, count, OUTPUTS_AT_ONCE)[:count]


def in_pieces(make, count, step):
    """`make(0)`, `make(step)`, ... below `count`, each [any] float32, put together; int64 scalars of a graph."""
    step, count = tf.cast(step, tf.int64), tf.maximum(count, 1)  # of nothing a piece too: none cannot be put together
    pieces = tf.TensorArray(tf.float32, tf.cast(_ceil(count, step), tf.int32), element_shape=[None], infer_shape=False)

    def add(number, pieces):
        return number + 1, pieces.write(tf.cast(number, tf.int32), make(number * step))

    state = (tf.constant(0, tf.int64), pieces)
    return tf.while_loop(lambda number, _: number * step < count, add, state, parallel_iterations=1)[1].concat()


def filter_taps(phases, half, cutoff):
    """Phases [p] float64, parts of a sample from 0 to 1 -> [p, 2 half] float32, the weights of 2 half samples.

    Of an output that lies `phase` after an input sample, weights of the samples half - 1 before that one to half
    after it. `cutoff` is in units of half the input's rate. Each row sums to 1.
    """
    places = tf.range(1 - half, half + 1)
    distance = tf.cast(places, tf.float64) - phases[:, None]
    turns = distance * cutoff
    # Sine, Bessel function and exponential are many times quicker in float32, and exact enough of small numbers.
    sine = tf.sin(tf.cast(turns - 2 * tf.round(turns / 2), tf.float32) * math.pi)
    angle = tf.cast(turns, tf.float32) * math.pi
    sinc = tf.math.divide_no_nan(sine, angle) + tf.cast(angle == 0, tf.float32)
    inside = tf.cast(BETA * tf.sqrt(tf.maximum(1 - (distance / tf.cast(half, tf.float64)) ** 2, 0)), tf.float32)
    window = tf.math.bessel_i0e(inside) * tf.exp(inside - BETA)  # I0(inside), but for a factor
    weights = sinc * window
    return weights / tf.reduce_sum(weights, 1, keepdims=True)


def greatest_common_divisor(a, b):
    """By Euclid; int64 scalars of a graph."""
    return tf.while_loop(lambda a, b: b > 0, lambda a, b: (b, a % b), (a, b))[0]


def _ceil(a, b):
    return -(-a // b)
