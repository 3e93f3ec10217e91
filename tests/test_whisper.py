"""Whisper's encoder: CTranslate2's states, transformers' spectrogram, transcripts; cuts, padding, files, served ops.

Small models have random weights; the offline one is read where numbers of others are compared with.
"""

import json
import pathlib
import struct

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import tensorflow as tf

from models import GraftError, freezing, offline
from models.audio_inputs import encoder_inputs, read_sound, window
from models.audio_layers import LONGEST, SHORTEST, LogMel, Sinusoids
from models.backbone import AudioPreprocess, load_backbone
from models.classifier import Classifier
from models.ctranslate2 import read_ctranslate2
from models.names import check_backbone_name, known_blocks
from models.precision import set_precision
from models.split import split
from models.whisper import load_whisper_ct2, transformers_names
from serving.static_checks import all_nodes, read_op_list
from tests.whisper_decoder import greedy, load_decoder

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "whisper"
STEPS = {"mel": 7, "states": 5}  # as make_fixture.py chose
SENTENCES = 10


@pytest.fixture(scope="module")
def expected():
    return np.load(FIXTURES / "expected.npz")


@pytest.fixture(scope="module")
def tiny_en():
    return load_backbone("whisper_tiny_en", pooling="frames")


def speech(number):
    return soundfile.read(FIXTURES / f"{number}.flac", dtype="float32")[0]


def thirty_seconds(waveform):
    """As Whisper's own feature extractor pads it: silence that is listened to."""
    return [np.pad(waveform, (0, LONGEST - len(waveform)))[None], np.ones((1, LONGEST), "int32")]


def whole(waveform):
    return [waveform[None], np.ones((1, len(waveform)), "int32")]


def tiny_preset(folder, **options):
    keras.utils.set_random_seed(0)
    sizes = {"vocabulary_size": 9, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    model = keras_hub.models.WhisperBackbone(**sizes, **options)
    for weight in model.trainable_weights:  # so that no bias is 0
        weight.assign_add(keras.random.normal(weight.shape, stddev=0.1))
    model.encoder_position_embedding.position_embeddings.assign(Sinusoids()((1500, 16)))
    model.save_to_preset(str(folder))
    return model


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset") / "tiny"
    return folder, tiny_preset(folder, dropout=0.1)


@pytest.fixture(scope="module")
def small(preset):
    return load_backbone(str(preset[0]))


def batch(rows=(48_000, 20_000, 1), samples=48_000):
    generator = np.random.default_rng(0)
    mask = (np.arange(samples) < np.array(rows)[:, None]).astype("int32")
    return [generator.normal(0, 0.1, mask.shape).astype("float32") * mask, mask]


# ---------------------------------------------------------------- numbers of others


def test_log_mel_equals_transformers(expected):
    log_mel = tf.function(LogMel(), reduce_retracing=True)
    for number in range(SENTENCES):
        waveform = speech(number)
        for inputs in (whole(waveform), thirty_seconds(waveform)):
            found = log_mel(*inputs)[0, : len(waveform) // 160 : STEPS["mel"]]
            assert np.abs(found - expected[f"mel_{number}"]).max() < 1e-4


def test_encoder_states_equal_ctranslate2s(expected, tiny_en):
    encode = tf.function(lambda waveform, mask: tiny_en.encoder([waveform, mask]))
    for number in (0, 9):
        waveform = speech(number)
        states = encode(*thirty_seconds(waveform))[0, : len(waveform) // 320 : STEPS["states"]]
        difference = np.abs(states - expected[f"states_{number}"])
        assert difference.max() < 2e-3 and difference.mean() < 1e-5


@pytest.mark.slow
def test_ten_sentences_have_the_states_and_transcripts_of_ctranslate2(expected, tiny_en, capsys):
    decoder = load_decoder(offline.fetch("whisper_tiny_en") / "model.bin")
    encode = tf.function(lambda waveform, mask: tiny_en.encoder([waveform, mask]))
    largest, means = 0.0, []
    for number in range(SENTENCES):
        waveform = speech(number)
        states = encode(*thirty_seconds(waveform))
        difference = np.abs(states[0, : len(waveform) // 320 : STEPS["states"]] - expected[f"states_{number}"])
        largest = max(largest, difference.max())
        means.append(difference.mean())
        assert greedy(decoder, states) == expected[f"tokens_{number}"].tolist()
    with capsys.disabled():
        print(f" states: largest difference {largest:.1e}, mean {np.mean(means):.1e}", end="")
    assert largest < 2e-3 and max(means) < 1e-5


def test_preset_states_equal_kerashubs(preset, small):
    _, original = preset
    inputs = thirty_seconds(batch()[0][0])
    mel = keras.Model(small.encoder.inputs, small.encoder.get_layer("log_mel").output)(inputs)
    rest = {"decoder_token_ids": tf.ones((1, 2), tf.int32), "decoder_padding_mask": tf.ones((1, 2), tf.int32)}
    states = original({"encoder_features": mel, **rest})["encoder_sequence_output"]
    ours = load_backbone(str(preset[0]), "frames").encoder(inputs)
    assert ours.shape == (1, 1500, 16)
    np.testing.assert_allclose(ours, states, atol=1e-5)
    np.testing.assert_allclose(small.encoder(inputs)[0], np.mean(ours[0], 0), atol=1e-5)


def test_positions_are_whispers_formula(tiny_en):
    layer = tiny_en.encoder.get_layer("encoder_position_embedding")
    np.testing.assert_allclose(layer.position_embeddings, Sinusoids()((1500, 384)), atol=1e-3)  # float16 in the file


# ---------------------------------------------------------------- blocks, cuts, padding


def test_blocks_of_the_offline_model(tiny_en):
    assert [block.name for block in tiny_en.blocks] == ["convolutions", "layer0", "layer1", "layer2", "layer3"]
    assert len(tiny_en.blocks) == known_blocks("whisper_tiny_en")
    assert tiny_en.name == "whisper_tiny_en" and tiny_en.source["licence"] == "MIT"
    assert tiny_en.preprocess == AudioPreprocess(16_000, 2.0, False, 30.0)
    assert [tensor.name for tensor in tiny_en.encoder.inputs] == ["waveform", "attention_mask"]
    check_backbone_name("whisper_tiny_en", "audio")
    for kind in ("image", "text"):
        with pytest.raises(GraftError, match=f"is not an? {kind} model but an audio model"):
            check_backbone_name("whisper_tiny_en", kind)
    with pytest.raises(GraftError, match="is not an audio model but a text model.*graft text"):
        check_backbone_name("minilm_l6", "audio")


def test_split_is_exact_at_every_block_with_gradients(small):
    freezing.unfreeze_all(Classifier(small, 2))
    inputs = batch()
    for cut in range(1, len(small.blocks)):
        prefix, suffix = split(small, cut)
        crossing = prefix(inputs)
        # States, where to attend and what is sound: 150 frames, no samples.
        assert sorted(tuple(tensor.shape) for tensor in crossing) == [(3, 150), (3, 150), (3, 150, 16)]
        variables = [weight.value for block in small.blocks[cut:] for weight in block.weights if weight.trainable]
        gradients = []
        for run in (lambda: small.encoder(inputs), lambda: suffix(crossing)):  # noqa: B023
            with tf.GradientTape() as tape:
                vectors = run()
                loss = tf.reduce_sum(vectors**2)
            gradients.append((vectors, tape.gradient(loss, variables)))
        (vectors, first), (others, second) = gradients
        assert np.abs(vectors - others).max() == 0
        for one, other in zip(first, second, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max() + 1e-7


def test_positions_never_train(small):
    model = Classifier(small, 2)
    freezing.unfreeze_all(model)
    table = freezing.trainable_table(model)
    assert table[0]["parameters"] - table[0]["trainable_parameters"] == 1500 * 16
    assert all(row["parameters"] == row["trainable_parameters"] for row in table[1:])


@pytest.mark.parametrize("count", [1, 16, 800, 20_000, SHORTEST, 40_001])
def test_a_clip_alone_and_beside_a_longer_one(count, tiny_en, small):
    longer = batch((70_000, 70_000), 70_000)
    alone = longer[0][:1, :count], longer[1][:1, :count]
    longer[1][0, count:] = 0  # the samples behind are noise: padding is known by the mask alone
    for backbone in (tiny_en, small):
        first, second = backbone.encoder(list(alone))[0].numpy(), backbone.encoder(longer)[0].numpy()
        real = -(-count // 320)  # of "frames"
        assert np.abs(first[:real] - second[:real]).max() < 1e-4


def test_silence_nothing_and_more_than_30_seconds(small):
    for inputs in (
        [np.zeros((2, 100), "float32"), np.ones((2, 100), "int32")],
        [np.zeros((2, 100), "float32"), np.zeros((2, 100), "int32")],
        [np.full((1, 500), 65_536.0, "float32"), np.ones((1, 500), "int32")],
    ):
        assert np.isfinite(small.encoder(inputs)).all()
    long = batch((LONGEST + 50_000,), LONGEST + 50_000)
    np.testing.assert_allclose(small.encoder(long), small.encoder([part[:, :LONGEST] for part in long]), atol=1e-5)


def test_half_precision_stays_near_and_finite(preset):
    backbone = load_backbone(str(preset[0]))
    inputs, before = batch(), backbone.encoder(batch()).numpy()
    for precision in ("bfloat16", "float16"):
        set_precision(Classifier(backbone, 2), precision)
        assert backbone.encoder.get_layer("log_mel").compute_dtype == "float32"
        found = backbone.encoder(inputs)
        assert found.dtype == "float32"
        assert np.abs(found - before).max() < 0.1


def test_saved_and_loaded_as_keras_does(small, tmp_path):
    small.encoder.save(tmp_path / "encoder.keras")
    again = keras.saving.load_model(tmp_path / "encoder.keras")
    assert np.array_equal(again(batch()), small.encoder(batch()))


# ---------------------------------------------------------------- bytes in, served


def wav(samples):
    values = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", 1, 1, 22_050, 44_100, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(values)) + values
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_wav_bytes_to_vectors_in_an_exported_graph(small, tmp_path):
    """Its ops are those of TF Serving 2.19; rows do not depend on the batch, and bad ones fail alone."""
    noise = batch()[0][0]
    files = [wav(noise), wav(noise[:22]), b"", b"some text", wav(noise)[:-500], wav(0 * noise)]

    def clip(data):
        return window(read_sound(data, small.preprocess), SHORTEST)

    signature = (tf.TensorSpec([SHORTEST]), tf.TensorSpec([SHORTEST], tf.int32))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(data):
        waveforms, masks = tf.map_fn(clip, data, fn_output_signature=signature)
        return {"features": small.encoder(encoder_inputs(waveforms, masks, small.preprocess))}

    archive = keras.export.ExportArchive()
    archive.track(small.encoder)
    archive.add_endpoint("serving_default", serve)
    archive.write_out(tmp_path / "1", verbose=False)
    run = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    together = run(tf.constant(files))["features"].numpy()
    assert np.isfinite(together).all()
    for row, file in enumerate(files[:3]):
        np.testing.assert_allclose(run(tf.constant([file]))["features"][0], together[row], atol=1e-5)
        inputs = encoder_inputs(*(part[None] for part in clip(file)), small.preprocess)
        np.testing.assert_allclose(small.encoder(inputs)[0], together[row], atol=1e-5)

    graph = serve.get_concrete_function().graph.as_graph_def()
    functions = {function.signature.name for function in graph.library.function}
    assert {node.op for _, node in all_nodes(graph)} - functions <= read_op_list("2.19") & read_op_list("2.20")


# ---------------------------------------------------------------- files


def transformers_folder(folder, shards=0, prefix="model.encoder.", config=None):
    """The offline model's encoder as transformers' folder, float16."""
    _, arrays = read_ctranslate2(offline.fetch("whisper_tiny_en") / "model.bin")
    state = {prefix + name: np.ascontiguousarray(array) for name, array in transformers_names("", arrays).items()}
    state |= {"model.decoder.layer_norm.weight": np.ones(384, "float16"), "proj_out.weight": np.ones((4, 4), "float16")}
    folder.mkdir()
    settings = {"model_type": "whisper", "d_model": 384, "encoder_attention_heads": 6, **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    extractor = {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "feature_size": 80}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    if not shards:
        safetensors.numpy.save_file(state, folder / "model.safetensors")
        return folder
    names, weight_map = list(state), {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        safetensors.numpy.save_file({name: state[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_transformers_folders_hold_the_same(tiny_en, tmp_path):
    inputs = whole(speech(0)[:9_000])
    for number, options in enumerate(({}, {"shards": 2}, {"prefix": "encoder."})):
        folder = transformers_folder(tmp_path / str(number), **options)
        check_backbone_name(str(folder), "audio")
        backbone = load_backbone(str(folder), "frames")
        assert np.array_equal(backbone.encoder(inputs), tiny_en.encoder(inputs))
        assert backbone.source["architecture"] == "transformers whisper"


def test_what_does_not_fit_is_refused(tmp_path, preset):
    folder = transformers_folder(tmp_path / "a", config={"activation_function": "relu"})
    with pytest.raises(GraftError, match="activation_function is 'relu'"):
        load_backbone(str(folder))
    folder = transformers_folder(tmp_path / "b")
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8_000}))
    with pytest.raises(GraftError, match="sampling_rate is 8000; Whisper's spectrogram has 16000"):
        load_backbone(str(folder))
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    del state["model.encoder.layers.2.fc1.bias"]
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(GraftError, match=r"the weights lack layers.2.fc1.bias"):
        load_backbone(str(folder))
    with pytest.raises(GraftError, match="Pooling 'cls' does not fit tiny, an audio model: choose mean or frames"):
        load_backbone(str(preset[0]), "cls")
    with pytest.raises(GraftError, match="holds a WhisperBackbone, which is not a text model but an audio model"):
        check_backbone_name(str(preset[0]), "text")


def ct2_file(path, specification=b"WhisperSpec", version=6, variables=(), cut=None):
    data = struct.pack("<I", version)
    for name in (specification,):
        data += struct.pack("<H", len(name) + 1) + name + b"\0"
    data += struct.pack("<II", 3, len(variables))
    for name, array in variables:
        data += struct.pack("<H", len(name) + 1) + name.encode() + b"\0" + struct.pack("<B", array.ndim)
        kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
        data += struct.pack(f"<{array.ndim}I", *array.shape) + struct.pack("<B", kinds[str(array.dtype)])
        data += struct.pack("<I", array.nbytes) + array.tobytes()
    data += struct.pack("<I", 0)
    path.write_bytes(data[:cut])
    return path


def test_ctranslate2_files_that_are_none(tmp_path):
    array = ("encoder/conv1/weight", np.arange(12, dtype="float16").reshape(2, 2, 3))
    specification, arrays = read_ctranslate2(ct2_file(tmp_path / "good.bin", variables=[array]))
    assert specification == "WhisperSpec" and np.array_equal(arrays[array[0]], array[1])
    heads = ("encoder/num_heads", np.array(2, "int16"))
    layer = ("encoder/layer_0/ffn/linear_0/weight", np.ones((3, 3), "float16"))
    scale = ("encoder/layer_0/ffn/linear_0/weight_scale", np.ones(3, "float32"))
    for options, message in (
        ({"version": 5}, "starts with the number 5; expected 6"),
        ({"variables": [array], "cut": 40}, "not a whole CTranslate2 model"),
        ({"cut": 2}, "not a whole CTranslate2 model"),
        ({"specification": b"TransformerSpec"}, "kind TransformerSpec; expected WhisperSpec"),
        ({"variables": [array, scale]}, "quantised weights.*--quantization float16"),
        ({"variables": [array]}, "does not say encoder/num_heads"),
        ({"variables": [array, heads]}, "the weights lack embed_positions.weight"),
        ({"variables": [array, heads, layer]}, "lacks encoder/layer_0/self_attention/linear_0/weight or its bias"),
    ):
        with pytest.raises(GraftError, match=message):
            load_whisper_ct2(ct2_file(tmp_path / "model.bin", **options))
    with pytest.raises(GraftError, match="cannot be read"):
        load_whisper_ct2(tmp_path / "absent.bin")


def test_random_copies_keep_the_sinusoids(preset):
    backbone = load_backbone(f"random:{preset[0]}")
    positions = backbone.encoder.get_layer("encoder_position_embedding").position_embeddings
    np.testing.assert_allclose(positions, Sinusoids()((1500, 16)), atol=1e-6)
    assert np.isfinite(backbone.encoder(batch())).all()
