import io

import numpy as np
import pytest
from PIL import Image

from unirl.monitoring.images import encode_webp, thin_images


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_small_pictures_keep_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    assert (decode(encode_webp(image)) == image).all()


@pytest.mark.parametrize(
    ("shape", "expected"), [((384, 384), (256, 256)), ((100, 512), (50, 256)), ((80, 90), (80, 90))]
)
def test_large_pictures_are_made_smaller_in_proportion(shape, expected):
    image = np.full((*shape, 3), 120, np.uint8)
    assert decode(encode_webp(image)).shape[:2] == expected


def test_old_steps_are_thinned_and_the_first_and_newest_stay(tmp_path):
    for step in range(10, 90, 10):
        for index in range(3):
            (tmp_path / f"{step:06d}_p00000_g{index}.webp").write_bytes(b"x" * 100)
    assert thin_images(tmp_path, 2400) == 0
    assert thin_images(tmp_path, 1500) == 9
    left = sorted({int(file.name[:6]) for file in tmp_path.iterdir()})
    assert left == [10, 30, 50, 70, 80]
    thin_images(tmp_path, 0)
    assert sorted({int(file.name[:6]) for file in tmp_path.iterdir()}) == [10, 80]
