"""The contract of preprocessing: each family's probe is what its own settings say, and a served graph that sees it
otherwise is refused with a message that says what differs."""

import dataclasses
import json

import numpy as np
import pytest

from models.backbone import load_backbone
from serving.answer_checks import DETAILS_FILE, check_contract
from serving.contract import differences, image_contract, image_probe
from serving.static_checks import CheckFailed
from tests import tiny_presets, tiny_text_presets

BARS = {"red": (200, 0, 0), "green": (0, 220, 0), "blue": (0, 0, 240)}  # the probe's, RGB 0 to 255


def served_image(preprocess, white_level=255):
    from models.inputs import decode_images, scale_image

    return image_contract(scale_image(decode_images([image_probe()], preprocess, white_level)[0], preprocess)[0])


def quick_and_slow(quick, families):
    """One family in the quick tier, the others in the slow one."""
    slow = (pytest.param(name, marks=pytest.mark.slow) for name in families)
    return pytest.mark.parametrize("family", [quick, *slow])


@quick_and_slow("efficientnet_lite0", tiny_presets.WRITERS)
def test_pictures_reach_every_family_of_backbones_as_its_settings_say_in_training_and_when_served(family, tmp_path):
    from pipelines.contract import trained_image_contract

    name = family if family == "efficientnet_lite0" else str(tiny_presets.WRITERS[family](tmp_path / family))
    preprocess = load_backbone(name).preprocess
    trained = trained_image_contract(preprocess, 255)
    assert differences(trained, served_image(preprocess)) == []
    mean, deviation = np.array(preprocess.mean), np.array(preprocess.deviation)
    lowest, highest = ((np.full(3, level) - mean) / deviation for level in (0, 255))
    assert trained["range"] == pytest.approx([lowest.min(), highest.max()], abs=1e-3 * (highest - lowest).max())
    order = slice(None, None, -1) if preprocess.channel_order == "bgr" else slice(None)
    wanted = [((np.array(bar) - mean) / deviation)[order] for bar in BARS.values()]
    np.testing.assert_allclose(trained["channel_means"], wanted, atol=0.02 * (highest - lowest).max())


def served_text(preprocess):
    from serving.export_text import served_text_contract

    return served_text_contract(preprocess)


@quick_and_slow("minilm_l6", tiny_text_presets.MODELS)
def test_texts_reach_every_family_of_backbones_alike_in_training_and_when_served(family, tmp_path):
    from pipelines.contract import trained_text_contract

    name = family if family == "minilm_l6" else str(tiny_text_presets.write(family, tmp_path / family))
    preprocess = load_backbone(name).preprocess
    preprocess = dataclasses.replace(preprocess, sequence_length=64)
    trained = trained_text_contract(preprocess)
    assert differences(trained, served_text(preprocess)) == []
    assert trained["longest"] == 64 and trained["ids"][: len(preprocess.start)] == list(preprocess.start)
    shorter = served_text(dataclasses.replace(preprocess, sequence_length=12))
    assert "most tokens of a text: 64 in training, 12 when served" in differences(trained, shorter)
    if family == "minilm_l6":  # an uncased BERT
        assert trained["cased"] is False
        cased = {**trained, "cased": True}
        assert differences(trained, cased) == ["upper and lower case are told apart: no in training, yes when served"]


def test_sounds_reach_the_encoder_alike_and_a_wrong_sample_rate_is_named(tmp_path):
    import tensorflow as tf

    from models.backbone import AudioPreprocess
    from models.sound_windows import read_windows_of_many
    from pipelines.contract import trained_sound_contract
    from serving.contract import sound_contract, sound_probe

    def served(preprocess):
        (windows, masks), _, _ = read_windows_of_many(tf.constant([sound_probe()]), preprocess)
        return sound_contract(windows[0], masks[0], 16_000)  # what the encoder takes them for

    preprocess = AudioPreprocess()
    trained = trained_sound_contract(preprocess)
    assert differences(trained, served(preprocess)) == []
    assert trained["samples"] == 3200 and trained["pitch_hz"] == pytest.approx(500, abs=10)
    assert trained["level"] == pytest.approx([0.375 / 2**0.5], rel=0.01)  # the mean of 0.5 and 0.25
    wrong = differences(trained, served(dataclasses.replace(preprocess, sample_rate_hz=8_000)))
    assert any("samples of the probe" in line and "3200 in training, 1600 when served" in line for line in wrong)
    assert any(line.startswith("pitch of the probe") for line in wrong)
    file = tmp_path / DETAILS_FILE
    file.parent.mkdir()
    loud = served(dataclasses.replace(preprocess, normalise=True))
    file.write_text(json.dumps({"input_contract": loud}))
    with pytest.raises(CheckFailed, match="loudness of the probe"):
        check_contract(tmp_path, trained)


def test_a_swapped_channel_order_at_serving_is_named(tmp_path):
    preprocess = load_backbone("efficientnet_lite0").preprocess
    trained = served_image(preprocess)
    file = tmp_path / DETAILS_FILE
    file.parent.mkdir()
    file.write_text(json.dumps({"input_contract": served_image(dataclasses.replace(preprocess, channel_order="bgr"))}))
    with pytest.raises(CheckFailed, match="otherwise than in training: red and blue are swapped; means of the red"):
        check_contract(tmp_path, trained)
    for change, words in (
        ({"mean": (0.0,) * 3, "deviation": (255.0,) * 3}, r"black and white: \[-0.992, 1.000\] in training, \[0"),
        ({"image_size": (96, 96)}, r"size of the picture: \[224, 224\] in training, \[96, 96\] when served"),
    ):
        other = served_image(dataclasses.replace(preprocess, **change))
        file.write_text(json.dumps({"input_contract": other}))
        with pytest.raises(CheckFailed, match=words):
            check_contract(tmp_path, trained)
    check_contract(tmp_path, other)  # equal
    check_contract(tmp_path, None)  # nobody noted what training saw
