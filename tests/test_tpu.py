"""What a TPU needs, as far as a CPU can show it: one shape for every batch, strings on the host, a clear error."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from models.backbone import load_backbone
from pipelines.data import cached_dataset, dataset, image_loader, load_images
from pipelines.sources import find_images
from pipelines.tokens import token_parts
from tests import tiny_text_presets
from tests.conftest import tiny_backbone


def is_static(batches) -> bool:
    return all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(batches.element_spec))


def test_batches_of_images_have_one_shape_and_no_strings(png_folder):
    splits = load_images(find_images(str(png_folder)))
    load = image_loader(tiny_backbone().preprocess, splits.white_level)
    batches = dataset(splits.train, load, class_count=3, batch_size=10, training=True)  # does not divide the data
    assert is_static(batches)
    assert tf.string not in {spec.dtype for spec in tf.nest.flatten(batches.element_spec)}


def test_batches_of_texts_have_one_shape_and_no_strings(tmp_path):
    backbone = load_backbone(str(tiny_text_presets.write("bert", tmp_path / "bert")))
    preprocess = dataclasses.replace(backbone.preprocess, sequence_length=32)
    texts = ["short", "a text of some more words than that " * 3, "another"] * 9
    table = pa.table({"text": texts, "label": [0, 1, 0] * 9, "weight": np.ones(27, "f4")})
    assert len(token_parts(table, preprocess)) > 1
    ((rows, arrays),) = token_parts(table, preprocess, one_length=True)
    assert {array.shape for array in arrays} == {(27, 32)}
    batches = cached_dataset(table, [arrays], np.zeros(27, int), rows, class_count=2, batch_size=8)
    assert is_static(batches) and all(spec.dtype != tf.string for spec in tf.nest.flatten(batches.element_spec))


@pytest.mark.slow
def test_a_tpu_that_is_not_there_is_one_message(png_folder, tiny_preset, tmp_path):
    words = ["image", "--data", png_folder, "--backbone", tiny_preset, "--out", tmp_path / "run", "--distribute", "tpu"]
    command = [sys.executable, "-m", "pipelines", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "TPU_NAME": ""})
    assert done.returncode == 2, done.stderr
    assert "--distribute tpu: a local TPU cannot be used" in done.stderr and "Traceback" not in done.stderr
