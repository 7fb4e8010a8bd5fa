"""Emu3's image tokenizer, on transformers' Emu3VQVAE: pictures of about their own shape within limits of area.

The network is one for video: a still picture enters as `temporal_downsample_factor` equal frames and leaves as the
first of as many.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from unirl.models.checkpoint import read_json, stored_tensors
from unirl.models.image_codec import (
    ColourScale,
    check_codes,
    check_image,
    codebook_prefix,
    exact_float32,
    fill,
    fingerprint_of,
    middle,
    read_preprocessor,
)

MIN_PIXELS, MAX_PIXELS = 512 * 512, 1024 * 1024
LARGEST_RATIO = 5
"""Of the two sides of a picture; the official code refuses longer ones, which are cropped here."""
SCALE = ColourScale(factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
"""The official preprocessor's; transformers' Emu3ImageProcessor() has CLIP's mean and deviation instead."""
OFFICIAL_FIELDS = {
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
}
"""config.json of BAAI/Emu3-VisionTokenizer -> Emu3VQVAEConfig, where they differ."""
SHARED_FIELDS = (
    *("codebook_size", "embed_dim", "in_channels", "out_channels", "temporal_downsample_factor"),
    *("num_res_blocks", "attn_resolutions"),
)
OFFICIAL_NAMES = (
    (r"down_block\.down\.", "down."),
    (r"up_block\.up\.", "up."),
    (r"middle_block\.attn_norm\.", "mid.attn_1.norm."),
    (r"middle_block\.", "mid."),
    (r"attn_norms\.(\d+)\.", r"attn.\1.norm."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", ".proj_out."),
)
"""Parts of transformers' names -> of the official ones, in this order."""
UNUSED = "num_batches_tracked"
"""A counter of batch norm that evaluation never reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emu3Vq:
    """Meets `unirl.models.image_codec.ImageCodec`; `dataclasses.replace` gives other areas with the same weights."""

    module: Any
    """Emu3VQVAE."""
    weights_sha256: str
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    """Area between which a picture is read, pixels; 512 * 512 are 4096 codes in the published tokenizer."""
    scale: ColourScale = SCALE

    def __post_init__(self) -> None:
        least = LARGEST_RATIO * self.pixels_per_code**2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < least:
            raise ValueError(
                f"image area: expected 0 < min_pixels <= max_pixels and max_pixels >= {least}, the area of "
                f"{LARGEST_RATIO} codes; got {self.min_pixels} and {self.max_pixels}; set both, in pixels"
            )

    @classmethod
    def load(cls, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "Emu3Vq":
        """The tokenizer of a folder, on the CPU in float32.

        Args:
            folder: a Transformers checkpoint with model.vqmodel.*, a folder of its Emu3VQVAE, or
                BAAI/Emu3-VisionTokenizer.
            min_pixels: least area of a picture; None takes the folder's preprocessor, else 512 * 512.
            max_pixels: largest area; None takes the folder's preprocessor, else 1024 * 1024.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, truncated or unfit weights, or impossible areas.
        """
        config, stored = _config(folder), stored_tensors(folder)
        with torch.device("meta"):
            module: Any = Emu3VQVAE(config)
        prefix = codebook_prefix(stored)
        official = f"{prefix}encoder.mid.block_1.conv1.weight" in stored.shapes
        names, expected = {}, {}
        for own, value in module.state_dict().items():
            if not own.endswith(UNUSED):
                name = prefix + (official_name(own) if official else own)
                # The official attention projects by convolutions of one pixel.
                projects = official and value.ndim == 2 and not name.endswith("embedding.weight")
                names[name], expected[name] = own, (*value.shape, *((1, 1) if projects else ()))
        stored.check(expected)
        preprocessor = read_preprocessor(folder)
        return cls(
            module=module,
            weights_sha256=fill(module, names, stored.read),
            min_pixels=preprocessor.get("min_pixels", MIN_PIXELS) if min_pixels is None else min_pixels,
            max_pixels=preprocessor.get("max_pixels", MAX_PIXELS) if max_pixels is None else max_pixels,
            scale=SCALE.read(folder),
        )

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.module.config.codebook_size

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.module.spatial_scale_factor

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights and of every setting that decides codes."""
        config = self.module.config
        numbers = (config.temporal_downsample_factor, config.num_attention_heads)
        return fingerprint_of("emu3", self.weights_sha256, numbers, self.min_pixels, self.max_pixels, self.scale)

    def grid(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Rows and columns of codes that an RGB picture [height, width, 3] will give.

        Raises:
            ValueError: not a picture.
        """
        check_image(image)
        height, width = middle(image, LARGEST_RATIO).shape[:2]
        side = self.pixels_per_code
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
        if rows * columns * side**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = math.floor(height / shrink / side), math.floor(width / shrink / side)
        return rows, columns

    def encode(self, images: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
        """Codes int32 [rows, columns] of RGB pictures [height, width, 3] of any sizes, one picture a pass.

        Raises:
            ValueError: one is no picture.
        """
        return [self._encode(image) for image in images]

    def decode(self, codes: Iterable[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """RGB pictures [height, width, 3] of codes [rows, columns] each, one picture a pass.

        Raises:
            ValueError: not a grid, or a code outside the codebook.
        """
        return [self.scale.to_picture(self.draw(own)) for own in codes]

    def draw(self, codes: NDArray[np.int32]) -> Tensor:
        """The network's own output [3, height, width], about -1 to 1, for codes [rows, columns]."""
        check_codes(codes, self.num_codes)
        device = self._device
        with exact_float32(device):
            return self.module.decode(torch.from_numpy(codes.astype(np.int64)).to(device)[None])[0]

    @property
    def _device(self) -> torch.device:
        return self.module.quantize.embedding.weight.device

    def _encode(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        (rows, columns), device = self.grid(image), self._device
        size = columns * self.pixels_per_code, rows * self.pixels_per_code
        read = np.asarray(Image.fromarray(middle(image, LARGEST_RATIO)).resize(size, Image.Resampling.BICUBIC))
        with exact_float32(device):
            pixels = self.scale.to_network(read).to(device)
            (codes,) = self.module.encode(pixels, image_sizes=torch.tensor([read.shape[:2]])).image_tokens
        return codes.int().cpu().numpy()


def official_name(name: str) -> str:
    """The name in BAAI/Emu3-VisionTokenizer of one of Emu3VQVAE's weights."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _config(folder: Path) -> Emu3VQVAEConfig:
    raw = read_json(folder / "config.json")
    match raw.get("model_type"):
        case "emu3":
            return Emu3VQVAEConfig.from_dict(raw.get("vq_config") or {})
        case "emu3_vqgan":
            return Emu3VQVAEConfig.from_dict(raw)
        case "Emu3VisionVQ":
            numbers = {own: raw[name] for name, own in OFFICIAL_FIELDS.items() if name in raw}
            config = Emu3VQVAEConfig(**numbers, **{name: raw[name] for name in SHARED_FIELDS if name in raw})
            config.hidden_size = config.base_channels * config.channel_multiplier[-1]
            return config
        case other:
            raise ValueError(
                f"{folder}: expected a checkpoint of model_type 'emu3', 'emu3_vqgan' or 'Emu3VisionVQ'; got {other!r}; "
                "point at the folder of the image tokenizer"
            )
