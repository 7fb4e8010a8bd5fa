"""What holds for every image tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vq_checkpoints import noise, write_chameleon_vq, write_emu3_vq
from unirl.models.chameleon_vq import ChameleonVq
from unirl.models.emu3_vq import Emu3Vq
from unirl.models.image_codec import ColourScale, ImageCodec, exact_float32, read_preprocessor

FAMILIES = {"chameleon": (write_chameleon_vq, ChameleonVq.load), "emu3": (write_emu3_vq, Emu3Vq.load)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    write, load = FAMILIES[request.param]
    return write, load, write(tmp_path_factory.mktemp("vq") / request.param)


@pytest.fixture(scope="module")
def codec(family) -> ImageCodec:
    _, load, folder = family
    return load(folder)


def broken(folder, tmp_path, change):
    """A copy of the folder whose tensors were changed."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_codes_and_pictures_have_the_grid_that_was_announced(codec):
    images = [noise(*size, seed) for seed, size in enumerate([(20, 24), (12, 12), (3, 3), (70, 9), (1, 1), (5, 400)])]
    side = codec.pixels_per_code
    for image, codes, picture in zip(images, codec.encode(images), codec.decode(codec.encode(images)), strict=True):
        assert codes.shape == codec.grid(image)
        assert codes.dtype == np.int32
        assert codes.min() >= 0
        assert codes.max() < codec.num_codes == 48
        assert picture.shape == (codes.shape[0] * side, codes.shape[1] * side, 3)
        assert picture.dtype == np.uint8


def test_a_picture_has_the_same_codes_in_any_company(codec):
    images = [noise(17, 19, seed) for seed in range(9)] + [noise(30, 8, 9), noise(17, 19, 0)]
    together = codec.encode(images)
    for image, codes in zip(images, together, strict=True):
        assert np.array_equal(codec.encode([image])[0], codes)
    assert np.array_equal(together[0], together[-1])
    assert not np.array_equal(together[0], together[1])
    assert np.array_equal(codec.decode(together)[3], codec.decode([together[3]])[0])


def test_nothing_gives_nothing(codec):
    assert codec.encode([]) == []
    assert codec.decode([]) == []


def test_the_tokenizer_is_frozen_and_in_float32(codec):
    parameters = list(codec.module.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(p.requires_grad for p in parameters)
    assert not any(module.training for module in codec.module.modules())


def test_the_run_around_it_does_not_change_codes(codec):
    image = noise(20, 20)
    plain = codec.encode([image])[0]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(codec.encode([image])[0], plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    with exact_float32(torch.device("cpu")):
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 0, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
)
def test_what_is_no_picture_is_refused(codec, image):
    for refuse in (codec.grid, lambda image: codec.encode([image])):
        with pytest.raises(ValueError, match=r"expected RGB uint8 \[height, width, 3\] .*; got .*; convert it"):
            refuse(image)


@pytest.mark.parametrize("wrong", [-1, 48, 126356])
def test_a_code_outside_the_codebook_is_refused(codec, wrong):
    codes = codec.encode([noise(16, 16)])[0]
    codes[1, 0] = wrong
    with pytest.raises(
        ValueError, match=rf"expected image codes in 0\.\.47; got {wrong}; subtract the id of the first"
    ):
        codec.decode([codes])


@pytest.mark.parametrize("shape", [(64,), (0, 8), (1, 8, 8)])
def test_another_grid_is_refused(codec, shape):
    with pytest.raises(ValueError, match=r"expected image codes \[.*; got \[.*; reshape one picture's codes"):
        codec.decode([np.zeros(shape, np.int32)])


def test_the_fingerprint_follows_weights_and_settings(family, codec, tmp_path):
    write, load, folder = family
    assert load(folder).fingerprint == codec.fingerprint
    assert len(codec.fingerprint) == 64
    assert load(write(tmp_path / "other", seed=1)).fingerprint != codec.fingerprint
    scale = ColourScale(factor=0.0078, mean=(1.0,) * 3, std=(1.0,) * 3)
    assert dataclasses.replace(codec, scale=scale).fingerprint != codec.fingerprint


def test_weights_in_half_precision_are_widened(family, codec, tmp_path):
    _, load, folder = family
    half = load(broken(folder, tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()}))
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}
    assert half.fingerprint != codec.fingerprint
    assert half.encode([noise(16, 16)])[0].shape == codec.encode([noise(16, 16)])[0].shape


def test_a_file_that_is_cut_short_is_named(family, tmp_path):
    write, load, _ = family
    folder = write(tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file; got \d+ bytes"):
        load(folder)


def test_missing_weights_are_counted_and_named(family, tmp_path):
    _, load, folder = family
    copy = broken(folder, tmp_path, lambda all: {k: v for k, v in all.items() if "conv_out" not in k})
    with pytest.raises(ValueError, match=r"expected \d+ tensors; got a checkpoint without 4 of them, .*conv_out"):
        load(copy)


def test_a_config_of_other_weights_is_named(family, tmp_path):
    _, load, folder = family
    copy = broken(folder, tmp_path, lambda all: {k: v[:24] if "embedding" in k else v for k, v in all.items()})
    with pytest.raises(ValueError, match=r"embedding\.weight of shape \(48, \d\) as config\.json says; got \(24, \d\)"):
        load(copy)


def test_a_weight_that_is_no_number_is_refused(family, tmp_path):
    _, load, folder = family
    copy = broken(folder, tmp_path, lambda all: {k: v * torch.nan if "quant_conv" in k else v for k, v in all.items()})
    with pytest.raises(ValueError, match=r"quant_conv.*: expected finite values; got NaN"):
        load(copy)


def test_a_checkpoint_without_a_tokenizer_is_named(family, tmp_path):
    _, load, folder = family
    copy = broken(folder, tmp_path, lambda all: {"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"expected one image tokenizer.*; got 0; point at a checkpoint that holds"):
        load(copy)


def test_another_family_is_named(family, tmp_path):
    write, load, _ = family
    folder = write(tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"model_type": "llada"}))
    with pytest.raises(ValueError, match=r"expected a checkpoint of model_type .*; got .*'llada'; point at"):
        load(folder)


def test_a_preprocessor_is_read_in_both_forms(tmp_path):
    default = ColourScale(factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert default.read(tmp_path) == default
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}))
    assert default.read(tmp_path) == dataclasses.replace(default, mean=(0.1, 0.2, 0.3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": 0.25, "rescale_factor": 0.0078}))
    assert default.read(tmp_path) == ColourScale(factor=0.0078, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert read_preprocessor(tmp_path / "absent") == {}


def test_colours_survive_the_way_in_and_out():
    image = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    for scale in (
        ColourScale(factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3),
        ColourScale(factor=0.0078, mean=(1.0,) * 3, std=(1.0,) * 3),
    ):
        assert np.array_equal(scale.to_picture(scale.to_network(image)[0]), image)
    loud = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1)
    assert scale.to_picture(loud).tolist() == [[[0, 128, 255]]]
