"""Janus-Pro's image tokenizer: what the tokenizers of the other families keep holds for it too."""

import numpy as np
import pytest
import torch

from tests.vq_checkpoints import noise
from unirl.config import ModelConfig
from unirl.models.janus_codec import JanusCodec


@pytest.fixture(scope="module")
def codec(janus_folder):
    return JanusCodec.load(ModelConfig(), janus_folder)


def test_codes_and_pictures_have_the_grid_that_was_announced(codec):
    images = [noise(*size, seed) for seed, size in enumerate([(20, 24), (3, 3), (5, 40)])]
    for image, codes, drawn in zip(images, codec.encode(images), codec.decode(codec.encode(images)), strict=True):
        assert codes.shape == codec.grid(image)
        assert drawn.shape == (*(side * codec.pixels_per_code for side in codes.shape), 3)


def test_the_run_around_it_does_not_change_codes_or_pictures(codec):
    images = [noise(20, 20, seed) for seed in range(20)]
    codes = codec.encode(images)
    pictures = codec.decode(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(codec.encode(images), codes)
        assert np.array_equal(codec.decode(codes), pictures)
