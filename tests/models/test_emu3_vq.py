"""Emu3's image tokenizer against the official code.

emu3_vq_golden.safetensors was made once by running `Emu3VisionVQModel` and `Emu3VisionVQImageProcessor` of
baaivision/Emu3 (commit f6ea9aa, emu3/tokenizer) on the weights that tests/vq_checkpoints.py makes for the names and
shapes of their state dict, which the file lists, with pictures of 144 to 400 pixels and one code for 2 x 2: four
pictures, their codes, and what these decode to, before and after the processor's own conversion to 8 bits, which rounds
down. `resized` holds height, width, and what the official `smart_resize` makes of them with its own limits.
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Emu3VQVAE

from tests.vq_checkpoints import EMU3_GAIN, known_weights, noise, write_emu3_vq
from unirl.models.emu3_vq import MAX_PIXELS, MIN_PIXELS, Emu3Vq, official_name

PICTURES = range(4)
PUBLISHED = SimpleNamespace(spatial_scale_factor=8)
"""What sizes need of the published network."""
AREAS = {"min_pixels": 144, "max_pixels": 400}


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).with_name("emu3_vq_golden.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it does not iterate
        return tensors, {name: json.loads(text) for name, text in file.metadata().items()}


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """The official layout, from the names and numbers that the official code gave."""
    _, metadata = golden
    folder = tmp_path_factory.mktemp("official")
    (folder / "config.json").write_text(json.dumps(metadata["config"]))
    save_file(known_weights(metadata["shapes"], gain=EMU3_GAIN), folder / "model.safetensors")
    return Emu3Vq.load(folder, **AREAS)


def test_codes_are_those_of_the_official_code(golden, official):
    tensors, _ = golden
    for index, codes in enumerate(official.encode([tensors[f"image.{index}"].numpy() for index in PICTURES])):
        assert np.array_equal(codes, tensors[f"codes.{index}"].numpy())
        assert len(np.unique(codes)) > 10


def test_pixels_are_those_of_the_official_code(golden, official):
    tensors, _ = golden
    for index in PICTURES:
        codes = tensors[f"codes.{index}"].numpy()
        assert (official.draw(codes) - tensors[f"pixels.{index}"]).abs().max() < 1e-5
        picture = tensors[f"picture.{index}"].numpy().astype(int)
        difference = official.decode([codes])[0] - picture
        assert difference.min() >= 0
        assert difference.max() <= 1
        assert picture.std() > 20


def test_names_are_those_of_the_official_state(golden, official):
    _, metadata = golden
    ours = {official_name(name): value for name, value in official.module.state_dict().items()}
    assert ours.keys() == metadata["shapes"].keys()
    assert {name: math.prod(value.shape) for name, value in ours.items()} == {
        name: math.prod(shape) for name, shape in metadata["shapes"].items()
    }


@pytest.mark.parametrize("layout", ["official", "standalone", "transformers"])
def test_all_layouts_hold_the_same_tokenizer(official, tmp_path, layout):
    vq = Emu3Vq.load(write_emu3_vq(tmp_path / layout, layout=layout, **AREAS))
    image = noise(20, 16)
    assert vq.fingerprint == official.fingerprint
    assert np.array_equal(vq.encode([image])[0], official.encode([image])[0])


def test_codes_are_those_of_transformers(official, tmp_path):
    folder = write_emu3_vq(tmp_path / "vq", layout="standalone")
    plain = Emu3VQVAE.from_pretrained(folder).eval()
    image = noise(14, 18)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        codes = plain.encode(pixels, image_sizes=torch.tensor([[14, 18]])).image_tokens[0].numpy()
        drawn = plain.decode(torch.from_numpy(codes)[None])[0]
    assert np.array_equal(official.encode([image])[0], codes)
    assert torch.allclose(official.draw(codes), drawn, atol=1e-6)


def test_sizes_are_those_of_the_official_code(golden):
    tensors, _ = golden
    published = Emu3Vq(module=PUBLISHED, weights_sha256="")
    for height, width, rows, columns in tensors["resized"].tolist():
        image = np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))
        assert published.grid(image) == (rows // 8, columns // 8)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(320, 300_000), st.integers(0, 300_000))
def test_any_picture_keeps_within_the_largest_area(height, width, min_pixels, more):
    """Also where rounding up to the least area would pass it, which the official rule allows."""
    vq = Emu3Vq(module=PUBLISHED, weights_sha256="", min_pixels=min_pixels, max_pixels=min_pixels + more)
    rows, columns = vq.grid(np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3)))
    assert rows >= 1
    assert columns >= 1
    assert rows * columns * 64 <= vq.max_pixels


def test_areas_come_from_the_caller_or_the_checkpoint_or_are_the_published_ones(tmp_path):
    folder = write_emu3_vq(tmp_path / "vq", min_pixels=200, max_pixels=300)
    vq = Emu3Vq.load(folder)
    assert (vq.min_pixels, vq.max_pixels) == (200, 300)
    smaller = Emu3Vq.load(folder, max_pixels=250)
    assert (smaller.min_pixels, smaller.max_pixels) == (200, 250)
    assert smaller.fingerprint != vq.fingerprint
    (folder / "preprocessor_config.json").unlink()
    bare = Emu3Vq.load(folder)
    assert (bare.min_pixels, bare.max_pixels) == (MIN_PIXELS, MAX_PIXELS)
    assert bare.scale.mean == bare.scale.std == (0.5,) * 3


@pytest.mark.parametrize("areas", [(0, 100), (200, 100), (10, 19)])
def test_impossible_areas_are_refused(official, areas):
    with pytest.raises(
        ValueError, match=r"expected 0 < min_pixels <= max_pixels and max_pixels >= 20, .*; got \d+ and"
    ):
        dataclasses.replace(official, min_pixels=areas[0], max_pixels=areas[1])


def test_a_long_picture_is_read_in_its_middle(official):
    long = noise(10, 200)
    ends = long.copy()
    ends[:, :70], ends[:, -70:] = 0, 255
    assert official.grid(long) == official.grid(noise(10, 50))
    assert np.array_equal(official.encode([ends])[0], official.encode([long])[0])


def test_any_grid_can_be_drawn(official):
    for shape in [(1, 1), (3, 7), (9, 2)]:
        assert official.decode([np.full(shape, 5, np.int32)])[0].shape == (shape[0] * 2, shape[1] * 2, 3)
