"""TF-Hub modules of sound as backbones: waveforms in batches or one at a time, frames, lengths that are fixed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import GraftError, freezing
from models.audio_inputs import encoder_inputs
from models.backbone import AudioPreprocess, load_backbone
from models.classifier import Classifier
from models.tfhub_sounds import FramesOfSound


class Sounds(tf.Module):
    """What tf.Module and Keras 2 models save: frames of 400 samples through two matrices."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(0)
        with tf.name_scope("net"):
            self.first = tf.Variable(random.normal(0, 0.1, (400, 8)), dtype=tf.float32, name="block1/kernel")
            self.second = tf.Variable(random.normal(0, 0.5, (8, 6)), dtype=tf.float32, name="block2/kernel")

    def frames(self, waveform):
        count = tf.shape(waveform)[-1] // 400
        cut = waveform[..., : count * 400]
        return tf.tanh(tf.reshape(cut, tf.concat([tf.shape(cut)[:-1], [count, 400]], 0)) @ self.first)


class OneClip(Sounds):
    """As YAMNet: [samples] -> scores, embeddings, spectrogram, a row each for every frame."""

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def __call__(self, waveform):
        frames = self.frames(waveform)
        return frames[:, :5], frames, frames @ self.second


class Frames(Sounds):
    """[batch, samples] -> {"embedding": [batch, frames, 6]}"""

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def __call__(self, waveform):
        return {"embedding": self.frames(waveform) @ self.second}


class Fixed(Sounds):
    """[batch, 4000] -> [batch, 6]"""

    @tf.function(input_signature=[tf.TensorSpec([None, 4000])])
    def __call__(self, waveform):
        return tf.reduce_mean(self.frames(waveform) @ self.second, 1)


class Row(Sounds):
    """[batch, 20] -> [batch, 20]"""

    @tf.function(input_signature=[tf.TensorSpec([None, 20])])
    def __call__(self, numbers):
        return numbers * self.second[0, 0]


def load(kind, tmp_path):
    tf.saved_model.save(kind(), str(tmp_path / kind.__name__))
    return load_backbone(f"tfhub:{tmp_path / kind.__name__}")


def waves(rows=(8_000, 3_200, 400), samples=8_000):
    mask = (np.arange(samples) < np.array(rows)[:, None]).astype("int32")
    return [np.random.default_rng(1).normal(0, 1, mask.shape).astype("float32"), mask]


@pytest.mark.parametrize("kind", [OneClip, Frames, Fixed])
def test_vectors_are_the_modules_over_the_real_frames(kind, tmp_path):
    backbone, module = load(kind, tmp_path), kind()
    fixed = 0.25 if kind is Fixed else None
    assert backbone.preprocess == AudioPreprocess(16_000, fixed or 2.0, longest_seconds=fixed)
    assert [tensor.name for tensor in backbone.encoder.inputs] == ["waveform", "attention_mask"]
    assert backbone.feature_size == (8 if kind is OneClip else 6) and backbone.pooling == "none"
    waveform, mask = waves()
    vectors = backbone.encoder([waveform, mask])
    for row, real in enumerate(mask.sum(1)):
        clean = waveform[row] * mask[row]
        if kind is Fixed:
            expected = module(clean[None, :4_000])[0]
        elif kind is Frames:
            expected = np.mean(module(clean[None])["embedding"][0, : real // 400], 0)
        else:
            expected = np.mean(module(clean)[1][: real // 400], 0)
        np.testing.assert_allclose(vectors[row], expected, atol=1e-5)
        alone = backbone.encoder([part[row : row + 1, : max(real, 4_000)] for part in (waveform, mask)])
        np.testing.assert_allclose(alone[0], vectors[row], atol=1e-5)


def test_a_module_trains_and_is_exported(tmp_path):
    backbone = load(OneClip, tmp_path)
    model = Classifier(backbone, 3)
    freezing.unfreeze_all(model)
    inputs = encoder_inputs(*waves(), backbone.preprocess)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(inputs) ** 2)
    weights = [weight for block in backbone.blocks for weight in block.weights]
    gradients = tape.gradient(loss, [weight.value for weight in weights])
    # The tuple's widest tensor does not pass through the second matrix.
    assert np.abs(gradients[0]).max() > 0 and len(weights) >= 1
    archive = keras.export.ExportArchive()
    archive.track(backbone.encoder)
    specs = [tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None, None], tf.int32)]
    archive.add_endpoint("serve", tf.function(lambda w, m: backbone.encoder([w, m])), specs)
    archive.write_out(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served")).serve(*inputs)
    np.testing.assert_allclose(served, backbone.encoder(inputs), atol=1e-6)


def test_frames_of_sound():
    mask = tf.constant([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = FramesOfSound()(tf.zeros([4, 3, 2]), mask)
    assert found.numpy().tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_a_module_of_few_numbers_is_no_sound(tmp_path):
    with pytest.raises(GraftError, match=r"TF-Hub module .*Row takes .*sound \(\[batch, samples\] or \[samples\]"):
        load(Row, tmp_path)
