"""Deterministic random CLIP weights and pictures, for HPSv2 tests that no download could feed.

numpy's RandomState and not torch, whose random numbers depend on version and processor.
"""

import zlib
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor

MODEL_NAME = "ViT-S-32-alt"
PROMPTS = (
    "a photo of two red circles",
    "Caf\u00e9 &amp; cr\u00e8me,  a   very detailed oil painting!",
    "word " * 100,
)
SIZES_PX = ((64, 64), (224, 224), (512, 512), (300, 200), (150, 400), (97, 411), (225, 224))
"""Height and width. The original fails on a picture whose longest side is 224 and which is not square."""


def random_state(model_name: str = MODEL_NAME) -> dict[str, Tensor]:
    """Weights of the architecture, uniform with the variance of 1 / fan-in."""
    with torch.device("meta"):
        wanted = open_clip.CLIP(**open_clip.get_model_config(model_name)).state_dict()
    return {name: torch.from_numpy(_random_tensor(name, tuple(spec.shape))) for name, spec in wanted.items()}


def _random_tensor(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    noise = ((rng.random_sample(shape) - 0.5) * 12**0.5).astype(np.float32)
    if name == "logit_scale":
        return np.array(4.6, np.float32)
    if len(shape) >= 2:
        return noise / np.float32(np.prod(shape[1:]) ** 0.5)
    return 0.1 * noise + np.float32(name.endswith("weight"))


def random_images(sizes_px: tuple[tuple[int, int], ...] = SIZES_PX) -> list[NDArray[np.uint8]]:
    """Coarse colour fields with fine noise."""
    images = []
    for index, (height, width) in enumerate(sizes_px):
        rng = np.random.RandomState(index)
        coarse = rng.random_sample((6, 6, 3)) * 200
        field = coarse[np.arange(height)[:, None] * 6 // height, np.arange(width)[None] * 6 // width]
        images.append((field + rng.random_sample((height, width, 3)) * 55).astype(np.uint8))
    return images


def save_checkpoint(path: Path, model_name: str = MODEL_NAME) -> Path:
    """A weights file in the published layout."""
    torch.save({"state_dict": random_state(model_name)}, path)
    return path
