"""Chameleon's VQGAN against Meta's own code.

chameleon_vq_golden.safetensors was made once by running `VQModel` and `ImageTokenizer` of facebookresearch/chameleon
(commit dbbe47f; the copies in GAIR-NLP/anole and FoundationVision/Liquid are the same network) on the weights that
tests/vq_checkpoints.py makes for the names and shapes of their state dict, which the file lists: four pictures, their
codes when cropped, their codes when first padded by `expand2square` (Liquid's evaluation/inference_i2t.py) and resized,
and what the cropped codes decode to, before and after Meta's own conversion to 8 bits, which rounds down.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from transformers import ChameleonImageProcessorPil, ChameleonVQVAE

from tests.vq_checkpoints import (
    chameleon_native_config,
    chameleon_weights,
    known_weights,
    noise,
    write_chameleon_vq,
)
from unirl.models.chameleon_vq import META_CONFIG, META_PICKLE, META_SCALE, META_WEIGHTS, ChameleonVq

PICTURES = range(4)


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).with_name("chameleon_vq_golden.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it does not iterate
        return tensors, {name: json.loads(text) for name, text in file.metadata().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chameleon_vq(tmp_path_factory.mktemp("vq") / "anole")


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """Meta's layout, from the names and numbers that Meta's code gave."""
    _, metadata = golden
    folder = tmp_path_factory.mktemp("meta")
    (folder / META_CONFIG).write_text(yaml.safe_dump({"model": {"params": metadata["params"]}}))
    torch.save({"state_dict": known_weights(metadata["shapes"])}, folder / META_PICKLE)
    return ChameleonVq.load(folder)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_codes_are_those_of_the_official_code(golden, official, fit):
    tensors, _ = golden
    vq = dataclasses.replace(official, fit=fit)
    for index, codes in enumerate(vq.encode([tensors[f"image.{index}"].numpy() for index in PICTURES])):
        assert np.array_equal(codes, tensors[f"{fit}.codes.{index}"].numpy())
        assert len(np.unique(codes)) > 10


def test_pixels_are_those_of_the_official_code(golden, official):
    tensors, _ = golden
    for index in PICTURES:
        codes = tensors[f"crop.codes.{index}"].numpy()
        assert (official.draw(codes) - tensors[f"pixels.{index}"]).abs().max() < 1e-5
        picture = tensors[f"picture.{index}"].numpy().astype(int)
        difference = official.decode([codes])[0] - picture
        assert difference.min() >= 0
        assert difference.max() <= 1
        assert picture.std() > 50


def test_weights_are_those_of_the_official_state(golden):
    _, metadata = golden
    ours = chameleon_weights(metadata["params"])
    assert {name: list(value.shape) for name, value in ours.items()} == metadata["shapes"]


def test_all_layouts_hold_the_same_tokenizer(golden, official, folder, tmp_path):
    tensors, _ = golden
    image = tensors["image.1"].numpy()
    converted = write_chameleon_vq(tmp_path / "converted", layout="meta-safetensors", more={"loss.x": torch.ones(1)})
    assert not (converted / META_PICKLE).exists()
    for other in (ChameleonVq.load(folder), ChameleonVq.load(converted)):
        assert other.fingerprint == official.fingerprint
        assert np.array_equal(other.encode([image])[0], official.encode([image])[0])


def test_a_bare_tokenizer_folder_is_read(folder, official, tmp_path):
    config = json.loads((folder / "config.json").read_text())["vq_config"]
    written = write_chameleon_vq(tmp_path / "bare", layout="meta-safetensors")
    (written / META_WEIGHTS).rename(written / "model.safetensors")
    (written / META_CONFIG).unlink()
    (written / "config.json").write_text(json.dumps(config | {"model_type": "chameleon_vqgan"}))
    assert ChameleonVq.load(written).fingerprint == official.fingerprint


def test_codes_are_those_of_transformers(golden, official):
    tensors, metadata = golden
    plain = ChameleonVQVAE(chameleon_native_config(metadata["params"])).eval()
    weights = known_weights(metadata["shapes"])
    plain.load_state_dict({name: t for name, t in weights.items() if not name.startswith("decoder.")}, strict=True)
    image = tensors["image.0"].numpy()
    with torch.no_grad():
        codes = plain.encode(META_SCALE.to_network(image)).image_tokens.view(8, 8)
    assert np.array_equal(official.encode([image])[0], codes.numpy())


def test_the_preprocessor_of_a_folder_decides_the_scale(folder, tmp_path):
    processor = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    written = write_chameleon_vq(tmp_path / "with")
    processor.save_pretrained(written)
    image = noise(16, 16)
    ours = ChameleonVq.load(written).scale.to_network(image)
    assert torch.allclose(ours, processor(Image.fromarray(image), return_tensors="pt")["pixel_values"], atol=1e-6)
    assert ChameleonVq.load(written).fingerprint != ChameleonVq.load(folder).fingerprint
    assert ChameleonVq.load(written, scale=META_SCALE).fingerprint == ChameleonVq.load(folder).fingerprint
    white = META_SCALE.to_network(np.full((1, 1, 3), 255, np.uint8))
    assert white.flatten().tolist() == [1, 1, 1]


def test_cropping_drops_the_ends_and_padding_keeps_them(official):
    wide = noise(16, 60)
    ends, middle = wide.copy(), wide.copy()
    ends[:, :14], ends[:, -14:] = 0, 255
    middle[:, 28:32] = 255 - middle[:, 28:32]
    padded = dataclasses.replace(official, fit="pad")
    assert padded.fingerprint != official.fingerprint
    assert np.array_equal(official.encode([ends])[0], official.encode([wide])[0])
    assert not np.array_equal(padded.encode([ends])[0], padded.encode([wide])[0])
    assert not np.array_equal(official.encode([middle])[0], official.encode([wide])[0])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_strip_is_read_in_its_middle_and_makes_no_huge_square(official, fit):
    vq, strip = dataclasses.replace(official, fit=fit), noise(3, 300_000)
    assert np.array_equal(vq.encode([strip])[0], vq.encode([strip[:, 149_988:150_012]])[0])


def test_a_grid_of_another_size_is_refused(official):
    with pytest.raises(ValueError, match=r"expected image codes \[8, 8\]; got \[4, 16\]; reshape one picture's codes"):
        official.decode([np.zeros((4, 16), np.int32)])


def test_a_checkpoint_that_cannot_draw_is_named(tmp_path):
    written = write_chameleon_vq(tmp_path / "c", layout="meta")
    state = torch.load(written / META_PICKLE, weights_only=True)["state_dict"]
    kept = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    torch.save({"state_dict": kept}, written / META_PICKLE)
    with pytest.raises(ValueError, match=r"tokenizer with decoder\.\*; got none, .*; take a conversion for drawing"):
        ChameleonVq.load(written)


class Other:
    """What a training framework might pickle beside the weights."""


def test_a_pickle_is_read_only_if_it_holds_tensors(tmp_path):
    written = write_chameleon_vq(tmp_path / "c", layout="meta")
    whole = (written / META_PICKLE).read_bytes()
    message = (
        r"vqgan\.ckpt: expected a whole PyTorch file with tensors under 'state_dict' .*; got .*; download it again"
    )
    torch.save({"state_dict": {}, "callbacks": Other()}, written / META_PICKLE)
    with pytest.raises(ValueError, match=message):
        ChameleonVq.load(written)
    torch.save({"weights": {}}, written / META_PICKLE)
    with pytest.raises(ValueError, match=message):
        ChameleonVq.load(written)
    (written / META_PICKLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=message):
        ChameleonVq.load(written)
    (written / META_PICKLE).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected vqgan\.safetensors or vqgan\.ckpt .*; got neither; download"
    ):
        ChameleonVq.load(written)


@pytest.mark.parametrize("text", ["model: {params: {n_embed: 3}}", "model: [", "3"])
def test_an_unreadable_description_is_named(tmp_path, text):
    written = write_chameleon_vq(tmp_path / "c", layout="meta")
    (written / META_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"vqgan\.yaml: expected model\.params with n_embed, .*; get it again"):
        ChameleonVq.load(written)


def test_a_description_of_other_weights_is_named(tmp_path):
    written = write_chameleon_vq(tmp_path / "c", layout="meta")
    text = (written / META_CONFIG).read_text()
    (written / META_CONFIG).write_text(text.replace("n_embed: 48", "n_embed: 47"))
    with pytest.raises(ValueError, match=r"shape \(47, 8\) as vqgan\.yaml says; got \(48, 8\); vqgan\.yaml and the"):
        ChameleonVq.load(written)
