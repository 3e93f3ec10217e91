"""WAV bytes to encoder input: every codec, every fault, the resampler against references, and the served graph."""

import io
import struct
import time

import numpy as np
import pytest
import scipy.signal
import tensorflow as tf

from models.audio_inputs import audio_error, decode_wav, encoder_inputs, read_sound, resample, window
from models.backbone import AudioPreprocess
from models.wav_format import MAX_SECONDS
from serving.static_checks import all_nodes, read_op_list

RATES = (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
PREPROCESS = AudioPreprocess(window_seconds=0.5)


def chunk(name: bytes, content: bytes, size=None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content + b"\0" * (len(content) % 2)


def wav(values: bytes, codec=1, channels=1, rate=16_000, bits=16, extensible=False, before=b"", after=b"", **sizes):
    frame = channels * ((bits + 7) // 8)
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else codec, channels, rate, rate * frame % 2**32, frame, bits)
    if extensible:
        tail = bytes.fromhex("000000001000800000aa00389b71")
        form += struct.pack("<HHIH", 22, bits, 0, codec) + tail
    body = b"WAVE" + before + chunk(b"fmt ", form) + chunk(b"data", values, sizes.get("data")) + after
    return b"RIFF" + struct.pack("<I", sizes.get("riff", len(body))) + body


def encoded(sound, codec, bits) -> bytes:
    """[n, channels] float64 in -1 to 1 as the codec's little-endian numbers."""
    if codec == 3:
        return sound.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(sound * 127 + 128).astype(np.uint8).tobytes()
    numbers = np.round(sound * (2 ** (bits - 1) - 1)).astype("<i4")
    return numbers.reshape(-1, 1).view(np.uint8)[:, : bits // 8].tobytes()


def sound(channels=1, frames=777):
    return np.random.default_rng(1).uniform(-1, 1, (frames, channels))


def tone(rate, hertz, seconds=1.0, start=0.0):
    return np.sin(2 * np.pi * hertz * (np.arange(int(rate * seconds)) / rate + start))


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("codec, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_codec_and_channel_count(codec, bits, channels):
    original = sound(channels)
    for extensible in (False, True):
        data = wav(encoded(original, codec, bits), codec, channels, 44_100, bits, extensible)
        assert audio_error(data) == b""
        samples, rate = decode_wav(data)
        assert rate == 44_100
        assert samples.shape == original.shape
        np.testing.assert_allclose(samples, original, atol=2 ** (2 - bits) if codec == 1 and bits < 24 else 1e-6)


def test_16_bit_and_float_are_exact():
    numbers = np.arange(-32768, 32768, dtype="<i2")
    assert np.array_equal(decode_wav(wav(numbers.tobytes()))[0][:, 0], numbers / np.float32(32768))
    numbers = np.float32([0, 1.5, -3e4, 1e-30])
    assert np.array_equal(decode_wav(wav(numbers.tobytes(), 3, bits=32))[0][:, 0], numbers)


def test_what_soundfile_reads():
    soundfile = pytest.importorskip("soundfile")
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"):
        for container in ("WAV", "WAVEX", "RF64"):
            file = io.BytesIO()
            soundfile.write(file, sound(2), 22_050, subtype=subtype, format=container)
            expected, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
            np.testing.assert_allclose(decode_wav(file.getvalue())[0], expected, atol=1e-7)
    for subtype, name in (("ULAW", "mu-law"), ("ALAW", "A-law"), ("IMA_ADPCM", "IMA ADPCM"), ("MS_ADPCM", "Microsoft")):
        file = io.BytesIO()
        soundfile.write(file, sound(1), 8_000, subtype=subtype, format="WAV")
        assert name in audio_error(file.getvalue()).numpy().decode()
    for container, name in (("FLAC", "FLAC"), ("OGG", "OGG"), ("AIFF", "AIFF"), ("MP3", "MP3"), ("AU", "AU")):
        file = io.BytesIO()
        soundfile.write(file, sound(1, 8_000), 8_000, format=container)
        assert audio_error(file.getvalue()).numpy().decode().startswith(f"{name} is not supported; convert it to WAV")


def test_chunks_in_any_order_and_sizes_of_streams():
    values = encoded(sound(), 1, 16)
    plain = decode_wav(wav(values))[0]
    odd = chunk(b"LIST", b"INFOabc")
    files = [
        wav(values, before=chunk(b"LIST", b"INFO") + chunk(b"bext", bytes(602))),
        wav(values, before=odd, after=odd),
        wav(values, data=0xFFFFFFFF, riff=0xFFFFFFFF),  # ffmpeg -f wav -
        wav(values, data=0x7FFFFFDB, riff=0x7FFFFFFF),  # sox -t wav -
        wav(values, data=0, riff=36),
        wav(values, data=0, riff=0),
        wav(values + b"\1"),  # half a sample at the end
    ]
    for data in files:
        assert audio_error(data) == b""
        assert np.array_equal(decode_wav(data)[0], plain)


def test_float_samples_that_are_no_numbers():
    numbers = np.float32([0.5, np.nan, np.inf, -np.inf, 1e30])
    assert decode_wav(wav(numbers.tobytes(), 3, bits=32))[0][:, 0].numpy().tolist() == [0.5, 0, 0, 0, 65_536]
    numbers = np.float64([0.5, 1e300, np.nan])
    assert decode_wav(wav(numbers.tobytes(), 3, bits=64))[0][:, 0].numpy().tolist() == [0.5, 0, 0]


BAD = {
    "empty input": b"",
    "starts with the bytes 68 65 6c 6c 6f 20 77 6f": b"hello world, I am called sound.wav",
    "starts with the bytes 52 49 46 46": b"RIFF",
    "not a WAV file": b"RIFF\x10\0\0\0WEBPVP8 ",
    "AVI is not supported": b"RIFF\x10\0\0\0AVI LIST",
    "MP3 is not supported": b"ID3\4\0\0\0\0\0\0",
    "M4A or MP4": b"\0\0\0\x20ftypM4A ",
    "without a format chunk": b"RIFF\4\0\0\0WAVE",
    "format chunk before its samples": b"RIFF\4\0\0\0WAVE" + chunk(b"data", bytes(100)),
    "no data chunk": wav(bytes(100))[:36],
    "its data chunk is empty": wav(b""),
    "truncated WAV file: its header promises 2000 bytes of samples, 1000 are there": wav(bytes(2_000))[:-1_000],
    "mu-law samples": wav(bytes(100), 7, bits=8),
    "Microsoft ADPCM samples": wav(bytes(100), 2, bits=4),
    "codec number 4660": wav(bytes(100), 0x1234),
    "40 bits per sample": wav(bytes(100), bits=40),
    "16 bits per sample; expected PCM": wav(bytes(100), 3, bits=16),
    "0 channels": wav(bytes(100), channels=0),
    "sample rate of 0 Hz": wav(bytes(100), rate=0),
    "sample rate of 4000000000 Hz": wav(bytes(100), rate=4_000_000_000),
    f"of {MAX_SECONDS + 400} seconds is above the limit": wav(bytes((MAX_SECONDS + 400) * 1_000), rate=1_000, bits=8),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused_says_why_and_gives_no_samples(message):
    assert message in audio_error(BAD[message]).numpy().decode()
    assert decode_wav(BAD[message])[0].shape == (0, 1)
    assert read_sound(BAD[message], PREPROCESS).shape == (0,)


def test_no_bytes_make_it_raise():
    generator = np.random.default_rng(0)
    good = wav(encoded(sound(2, 50), 1, 24), channels=2, bits=24, extensible=True, before=chunk(b"LIST", b"abc"))
    read = tf.function(
        lambda data: (audio_error(data), read_sound(data, PREPROCESS)), input_signature=[tf.TensorSpec([], tf.string)]
    )
    for _ in range(150):
        data = bytearray(good[: generator.integers(len(good) + 1)] if generator.random() < 0.3 else good)
        for place in generator.integers(0, max(len(data), 1), generator.integers(1, 6)):
            if data:
                data[min(place, 90)] = generator.choice([0, 1, 2, 127, 128, 255, generator.integers(256)])
        error, waveform = read(bytes(data))
        assert (error == b"") == (len(waveform) > 0)
        assert np.isfinite(waveform).all()


@pytest.mark.parametrize("rate", RATES)
def test_resampled_tones_are_the_tones_of_the_new_rate(rate):
    """Error below -60 dB in the pass band, and nothing of what the new rate cannot hold."""
    for hertz in (50, 440, 1_000, 0.25 * rate, 0.44 * min(rate, 16_000)):
        if hertz > 0.44 * min(rate, 16_000):
            continue
        found = resample(np.float32(tone(rate, hertz)), rate, 16_000).numpy()
        expected = tone(16_000, hertz)
        middle = slice(2_000, -2_000)  # away from the ends, where tones begin and stop
        error = 10 * np.log10(np.mean((found - expected)[middle] ** 2) / np.mean(expected[middle] ** 2))
        assert error < -80, f"{rate} Hz, {hertz} Hz: {error:.0f} dB"
    if rate > 16_000:
        found = resample(np.float32(tone(rate, 0.5 * (16_000 + min(rate, 24_000)) / 2)), rate, 16_000).numpy()
        assert 10 * np.log10(np.mean(found[2_000:-2_000] ** 2) / 0.5) < -80


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampler_against_scipy(rate):
    """Noise that fills the pass band, faded in and out: scipy's with a filter eight times as long is the reference."""
    noise = np.random.default_rng(rate).standard_normal(rate)
    edge = 0.44 * min(rate, 16_000)
    noise = scipy.signal.sosfiltfilt(scipy.signal.cheby2(16, 90, edge, fs=rate, output="sos"), noise)
    noise *= scipy.signal.windows.tukey(rate, 0.2)
    up, down = (number // np.gcd(rate, 16_000) for number in (16_000, rate))
    taps = scipy.signal.firwin(2 * 400 * max(up, down) + 1, 0.97 / max(up, down), window=("kaiser", 12))
    expected = scipy.signal.resample_poly(noise, up, down, window=taps)
    found = resample(np.float32(noise), rate, 16_000).numpy()
    assert found.shape == expected.shape
    error = 10 * np.log10(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < -70, f"{error:.1f} dB"


@pytest.mark.parametrize("rate", [44_056, 47_999, 22_255, 5_513])
def test_odd_rates(rate):
    hertz = 0.4 * min(rate, 16_000)
    found = resample(np.float32(tone(rate, hertz)), rate, 16_000).numpy()
    expected = tone(16_000, hertz)
    assert len(found) == 16_000
    assert np.abs(found - expected)[2_000:-2_000].max() < 1e-3


def test_resampling_few_samples_and_equal_rates():
    assert np.array_equal(resample(np.float32([1, 2, 3]), 16_000, 16_000), [1, 2, 3])
    for rate in (*RATES, 47_999):
        for count in (0, 1, 2, 17):
            found = resample(np.ones(count, np.float32), rate, 16_000).numpy()
            assert len(found) == -(-count * 16_000 // rate)
            assert np.isfinite(found).all()


def test_same_waveform_in_tf_data_and_in_the_served_graph(tmp_path):
    """Bytes through tf.data equal bytes through an exported graph to the bit; its ops are core ops of 2.19."""
    files = [
        wav(encoded(sound(2, 9_000), 1, 24), channels=2, rate=44_100, bits=24),
        b"not a sound",
        wav(encoded(sound(1, 3_000), 1, 8), rate=8_000, bits=8),
        wav(encoded(sound(1, 20_000), 3, 32), 3, rate=47_999, bits=32),
        wav(bytes(2)),
    ]

    def one(data):
        waveform, mask = window(read_sound(data, PREPROCESS), 8_000)
        return waveform, mask, audio_error(data)

    signature = (tf.TensorSpec([8_000]), tf.TensorSpec([8_000], tf.int32), tf.TensorSpec([], tf.string))
    module = tf.Module()
    module.read = tf.function(
        lambda data: dict(zip("wme", tf.map_fn(one, data, fn_output_signature=signature))),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    tf.saved_model.save(module, str(tmp_path), signatures=module.read)
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"](tf.constant(files))
    rows = list(tf.data.Dataset.from_tensor_slices(files).map(one, num_parallel_calls=2).as_numpy_iterator())
    for row, waveform, mask, error in zip(rows, served["w"], served["m"], served["e"]):
        assert np.array_equal(row[0], waveform)
        assert np.array_equal(row[1], mask)
        assert row[2] == error
    assert served["m"].numpy().sum(1).tolist() == [3_266, 0, 6_000, 6_667, 1]

    graph = module.read.get_concrete_function().graph.as_graph_def()
    ops = {node.op for _, node in all_nodes(graph)}
    functions = {function.signature.name for function in graph.library.function}
    assert ops - functions <= read_op_list("2.19") & read_op_list("2.20")


def test_stereo_is_mixed_down():
    both = sound(2, 500)
    found = read_sound(wav(encoded(both, 3, 32), 3, 2, bits=32), PREPROCESS)
    np.testing.assert_allclose(found, both.mean(1), atol=1e-6)


def test_window():
    waveform = tf.range(10, dtype=tf.float32)
    cut, mask = window(waveform, 4, 3)
    assert cut.numpy().tolist() == [3, 4, 5, 6] and mask.numpy().tolist() == [1, 1, 1, 1]
    cut, mask = window(waveform, 6, 8)
    assert cut.numpy().tolist() == [8, 9, 0, 0, 0, 0] and mask.numpy().tolist() == [1, 1, 0, 0, 0, 0]
    cut, mask = window(waveform, 3, tf.constant(12))
    assert cut.numpy().tolist() == [0, 0, 0] and mask.numpy().tolist() == [0, 0, 0]


def test_encoder_inputs():
    waveform = np.float32([[1, 2, 3, 4, 9], [5, 5, 5, 5, 5], [1, 0, 0, 0, 0]])
    mask = np.int32([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    plain, same = encoder_inputs(waveform, mask, AudioPreprocess())
    assert np.array_equal(plain, waveform * mask) and np.array_equal(same, mask)
    scaled, _ = encoder_inputs(waveform, mask, AudioPreprocess(normalise=True))
    first = np.float32([1, 2, 3, 4])
    np.testing.assert_allclose(scaled[0, :4], (first - first.mean()) / np.sqrt(first.var() + 1e-7), rtol=1e-5)
    assert scaled[0, 4] == 0 and not np.any(scaled[1:])


def test_one_hour(capsys):
    """An hour at 8 kHz is read, in seconds of work."""
    data = wav(bytes(3_600 * 8_000), rate=8_000, bits=8)
    started = time.perf_counter()
    waveform = read_sound(data, PREPROCESS)
    with capsys.disabled():
        print(f" one hour at 8 kHz: {time.perf_counter() - started:.1f} s", end="")
    assert waveform.shape == (3_600 * 16_000,)
    np.testing.assert_allclose(waveform[1000:-1000:1000], -1, atol=1e-5)
