from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.lumina_checkpoints import random_vq, write_lumina
from unirl.models.lumina_vq import IMAGES_AT_ONCE, WEIGHTS, ImageSizes, LuminaVq

PUBLISHED = ImageSizes(factor=16)
SIDES = st.integers(1, 400) | st.integers(400, 1100) | st.integers(1000, 3000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_lumina(tmp_path_factory.mktemp("lumina") / "small")


@pytest.fixture(scope="module")
def vq(folder):
    return LuminaVq(folder, ImageSizes.load(folder))


@pytest.fixture(scope="module")
def plain(folder):
    return VQModel.from_pretrained(folder / "vqvae", low_cpu_mem_usage=False).eval()


def noise(height, width, seed=0):
    """A picture whose colours change over a few pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1)[:height, :width])


@cache
def crop_list(area, patch):
    """Every size in whole patches of at most the area and at most 4 to 1 that a patch more on each side would break."""
    count = area // patch**2
    pairs = [(rows, columns) for rows in range(1, count + 1) for columns in range(1, count // rows + 1)]
    whole = [(r, c) for r, c in pairs if (r + 1) * (c + 1) > count and max(r, c) <= 4 * min(r, c)]
    return [(r * patch, c * patch) for r, c in whole]


def kept(size, height, width):
    """Share of the picture's area that is left when it covers `size` and the rest is cut off."""
    down, across = Fraction(size[0], height), Fraction(size[1], width)
    return min(down, across) / max(down, across)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES)
def test_an_image_is_read_at_the_size_that_keeps_most_of_it(height, width):
    """Between the areas that is its own, but for part of a code."""
    read, area = PUBLISHED.read_size(height, width), height * width
    if 512**2 <= area <= 1024**2 and max(height, width) <= 4 * min(height, width):
        assert read == (height - height % 16, width - width % 16)
        return
    choices = crop_list(1024**2 if area > 1024**2 else 512**2, 32)
    most = max(kept(size, height, width) for size in choices)
    assert read in [size for size in choices if kept(size, height, width) == most]


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((512, 512), (512, 512)),  # the least area, whole codes
        ((511, 512), (512, 512)),  # below: 16 x 16 patches of 32
        ((1024, 1025), (1024, 1024)),  # above: 32 x 32 patches
        ((1023, 1025), (1008, 1024)),  # below by one pixel: cut to codes
        ((300, 150), (704, 352)),  # 22 x 11 patches, of the list for 256, keep all of 2 to 1
        ((100, 5000), (256, 1024)),  # 50 to 1 is cropped to 8 x 32 patches
        ((6000, 1000), (2048, 512)),  # of the larger list
    ],
)
def test_sizes_by_hand(size, read):
    assert PUBLISHED.read_size(*size) == read


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([2, 4, 8, 16]),
    st.integers(16, 4000),
    st.integers(0, 4000),
    st.integers(1, 160),
    st.floats(0.5, 1.1),
)
def test_no_image_takes_more_tokens_than_the_largest_grid(factor, min_area, more, height, share):
    sizes = ImageSizes(factor=factor, min_area=min_area, max_area=min_area + more)
    width = max(1, int(share * sizes.max_area / height))
    rows, columns = sizes.grid(sizes.read_size(height, width))
    largest = sizes.largest_grid
    assert rows >= 1 <= columns
    assert rows * (columns + 1) <= largest[0] * (largest[1] + 1)


def test_the_largest_grid_is_met_by_an_image():
    assert PUBLISHED.largest_grid == PUBLISHED.grid(PUBLISHED.read_size(2048, 512)) == (128, 32)
    # 8 rows of 3 codes and a newline: more than the 6 x 4 of the crop sizes and than the 10 x 2 of the steepest image.
    tiny = ImageSizes(factor=4, min_area=100, max_area=400)
    assert tiny.largest_grid == tiny.grid(tiny.read_size(33, 12)) == (8, 3)


def test_sizes_come_from_the_checkpoint_or_are_the_published_ones(folder, tmp_path):
    assert ImageSizes.load(folder) == ImageSizes(factor=4, drawn=(8, 12), min_area=144, max_area=576)
    random_vq(8, 16, 0).save_pretrained(tmp_path / "vqvae")
    assert ImageSizes.load(tmp_path) == ImageSizes(factor=16, drawn=(512, 512), min_area=512**2, max_area=1024**2)


def test_encoding_takes_the_nearest_code_of_each_square(vq, plain):
    image = noise(20, 24)
    (codes,) = vq.encode([image])
    pixels = VaeImageProcessor(vae_scale_factor=4, do_normalize=False).preprocess(Image.fromarray(image))
    with torch.no_grad():
        latents, codebook = plain.encode(pixels).latents[0], plain.quantize.embedding.weight.detach()
    assert codes.shape == (5, 6)
    assert codes.dtype == np.int32
    for row in range(5):
        for column in range(6):
            distances = [float((latents[:, row, column] - code).norm()) for code in codebook]
            assert codes[row, column] == int(np.argmin(distances))
    assert len(set(codes.flatten().tolist())) > 5


def as_official(model, codes, factor):
    """As the official code calls the library."""
    shape = (1, *codes.shape, model.config.latent_channels)
    with torch.no_grad():
        sample = model.decode(torch.from_numpy(codes)[None].long(), force_not_quantize=True, shape=shape).sample
    (picture,) = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False).postprocess(
        sample.clip(0, 1), output_type="pil"
    )
    return np.asarray(picture)


@pytest.mark.parametrize("factor", [4, 16])
def test_decoding_equals_the_library_called_as_the_official_code_does(tmp_path, factor):
    random_vq(24, factor, 1).save_pretrained(tmp_path / "vqvae")
    ours = LuminaVq(tmp_path, ImageSizes(factor=factor))
    codes = np.random.default_rng(0).integers(0, 24, (3, 5)).astype(np.int32)
    (picture,) = ours.decode([codes])
    wanted = as_official(VQModel.from_pretrained(tmp_path / "vqvae", low_cpu_mem_usage=False).eval(), codes, factor)
    assert picture.shape == (3 * factor, 5 * factor, 3)
    assert np.array_equal(picture, wanted)
    assert picture.std() > 10


def test_pictures_of_mixed_sizes_together_equal_each_alone(vq):
    images = [noise(*size, seed) for seed, size in enumerate([(20, 24), (12, 12), (20, 24), (70, 9), (5, 90), (3, 3)])]
    together = vq.encode(images)
    for image, codes in zip(images, together, strict=True):
        assert np.array_equal(vq.encode([image])[0], codes)
    assert len({codes.shape for codes in together}) > 2
    for codes, picture in zip(together, vq.decode(together), strict=True):
        # Other company may round a pixel the other way.
        assert np.abs(vq.decode([codes])[0].astype(int) - picture).max() <= 1
        assert picture.shape == (codes.shape[0] * 4, codes.shape[1] * 4, 3)
        assert picture.std() > 10


def test_more_pictures_than_go_through_at_once(vq):
    images = [noise(12, 16, seed) for seed in range(IMAGES_AT_ONCE + 2)]
    passes = []
    hook = vq.load().encoder.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    codes = vq.encode(images)
    hook.remove()
    assert passes == [IMAGES_AT_ONCE, 2]
    assert np.array_equal(codes[-1], vq.encode(images[-1:])[0])
    assert not np.array_equal(codes[0], codes[-1])


def test_of_a_long_image_the_middle_is_read(vq):
    long = noise(16, 160)
    ends, middle = long.copy(), long.copy()
    ends[:, :40], ends[:, -40:] = 0, 255
    middle[:, 76:84] = 255 - middle[:, 76:84]
    (codes,) = vq.encode([long])
    assert np.array_equal(vq.encode([ends])[0], codes)
    assert not np.array_equal(vq.encode([middle])[0], codes)


def test_the_tokenizer_is_read_late_and_never_trained(vq):
    assert not any(parameter.requires_grad for parameter in vq.load().parameters())
    assert not vq.load().training
    assert next(vq.load().parameters()).dtype == torch.float32


def test_missing_weights_are_named_before_anything_is_read(tmp_path):
    folder = write_lumina(tmp_path / "c")
    (folder / "vqvae" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"vqvae: expected {WEIGHTS}, the image tokenizer; got none; download"):
        LuminaVq(folder, ImageSizes.load(folder))
    (folder / "vqvae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vqvae: expected .* with config\.json; got none"):
        ImageSizes.load(folder)


@pytest.mark.parametrize("wrong", [-1, 24, 126356])
def test_a_code_outside_the_codebook_is_refused(vq, wrong):
    codes = np.zeros((2, 2), np.int32)
    codes[1, 0] = wrong
    with pytest.raises(
        ValueError, match=rf"expected image codes in 0\.\.23; got {wrong}; subtract the id of the first"
    ):
        vq.decode([np.zeros((3, 3), np.int32), codes])
