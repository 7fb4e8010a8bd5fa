"""Lumina-DiMOO's image tokenizer, diffusers' VQModel in the subfolder vqvae: sizes, pictures -> codes -> pictures.

It stays outside the trained weights. Pixels lie in [0, 1] on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unirl.models.checkpoint import opened, read_json
from unirl.models.image_codec import check_codes

FOLDER, WEIGHTS = "vqvae", "diffusion_pytorch_model.safetensors"
IMAGES_AT_ONCE = 32
"""Pictures that go through the tokenizer in one pass."""
LARGEST_RATIO = 4
"""Of the two sides of a question's image; a longer one is cropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSizes:
    """How large pictures are, in pixels.

    The areas are those of the official evaluation; a preprocessor_config.json in the checkpoint overrides them.
    """

    factor: int
    """Side of the square that becomes one code."""
    drawn: tuple[int, int] = (512, 512)
    """Height and width of a picture to draw when nothing else is asked for."""
    min_area: int = 512**2
    max_area: int = 1024**2

    @classmethod
    def load(cls, folder: Path) -> "ImageSizes":
        """Sizes of the checkpoint folder.

        Raises:
            FileNotFoundError: the folder lacks vqvae/config.json.
        """
        factor = 2 ** (len(read_json(folder / FOLDER / "config.json")["block_out_channels"]) - 1)
        own = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
        chosen = {name: own[name] for name in ("min_area", "max_area") if name in own}
        if "drawn" in own:
            chosen["drawn"] = tuple(own["drawn"])
        return cls(factor=factor, **chosen)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes of a picture of `size` (height, width)."""
        return size[0] // self.factor, size[1] // self.factor

    def read_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which an image of a question is read (section "data" of the official evaluation).

        Between the two areas each side is cut to whole codes. Otherwise the size of at most that area whose shape is
        nearest, in steps of two codes. Shapes beyond 4 to 1 are cropped too, which the official code leaves open.
        """
        area, ratio = height * width, max(height, width) / min(height, width)
        if self.min_area <= area <= self.max_area and ratio <= LARGEST_RATIO and min(height, width) >= self.factor:
            return height // self.factor * self.factor, width // self.factor * self.factor
        limit = self.max_area if area > self.max_area else self.min_area
        sizes = self._crop_sizes(limit)
        return max(sizes, key=lambda size: (_shared(size, (height, width)), size[1], size[0]))

    @property
    def largest_grid(self) -> tuple[int, int]:
        """The grid of a question's image that takes most tokens, one newline a row included."""
        grids = [self.grid(size) for size in self._crop_sizes(self.max_area)]
        # Sides that are cut to whole codes lie between the crop sizes: at most the area, at most 4 to 1.
        area, side = self.max_area // self.factor**2, isqrt(self.max_area * LARGEST_RATIO) // self.factor
        grids += [(rows, area // rows) for rows in range(1, min(area, side) + 1)]
        return max(grids, key=lambda grid: grid[0] * (grid[1] + 1))

    def _crop_sizes(self, area: int) -> list[tuple[int, int]]:
        """Sizes in steps of two codes of at most `area`, none of which could grow on both sides."""
        step = 2 * self.factor
        most = max(1, area // step**2)
        return [
            (step * rows, step * columns)
            for columns in range(1, most + 1)
            for rows in range(max(1, most // (columns + 1)), most // columns + 1)
            if max(rows, columns) <= LARGEST_RATIO * min(rows, columns)
        ]


class LuminaVq:
    """Pictures to codes and back, in float32."""

    def __init__(self, folder: Path, sizes: ImageSizes) -> None:
        """Remember the folder; the weights are read when they are first needed, their header now.

        Raises:
            FileNotFoundError: there are no weights in safetensors form.
            ValueError: the file is cut short or corrupt.
        """
        self._folder, self.sizes = folder / FOLDER, sizes
        if not (self._folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{self._folder}: expected {WEIGHTS}, the image tokenizer; got none; download the subfolder with the "
                "checkpoint (pickled weights are never loaded)"
            )
        opened(self._folder / WEIGHTS)
        self.device = torch.device("cpu")
        self._model: Any = None

    def load(self) -> Any:
        """The tokenizer on its device; the folder is not needed afterwards."""
        if self._model is None:
            self._model = self._read()
        return self._model.to(self.device)

    def _read(self) -> Any:
        from diffusers.models.autoencoders.vq_model import VQModel

        try:
            loaded: Any = VQModel.from_pretrained(
                self._folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self._folder}: expected an image tokenizer whose config.json fits its weights; got "
                f"{' '.join(str(error).split())[:200]}; take both files of one checkpoint"
            ) from error
        return loaded.float().eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
        """Codes int32 [rows, columns] of RGB pictures of any sizes, each read at its `read_size`."""
        model = self.load()
        codes: list[NDArray[np.int32] | None] = [None] * len(images)
        read = [_fitted(image, self.sizes.read_size(*image.shape[:2])) for image in images]
        for part in _alike([image.shape for image in read]):
            pixels = torch.from_numpy(np.stack([read[index] for index in part])).to(self.device)
            latents = model.encode(pixels.permute(0, 3, 1, 2).float() / 255).latents
            chosen = model.quantize(latents)[2][2].view(len(part), *latents.shape[2:]).int().cpu().numpy()
            for index, own in zip(part, chosen, strict=True):
                codes[index] = own
        return [own for own in codes if own is not None]

    @torch.no_grad()
    def decode(self, codes: Sequence[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """Pictures [height, width, 3] of codes [rows, columns] each.

        Raises:
            ValueError: a code outside the codebook.
        """
        model = self.load()
        num_codes, width = model.quantize.embedding.weight.shape
        for own in codes:
            check_codes(own, num_codes)
        pictures: list[NDArray[np.uint8] | None] = [None] * len(codes)
        for part in _alike([own.shape for own in codes]):
            grid = torch.from_numpy(np.stack([codes[index] for index in part]).astype(np.int64)).to(self.device)
            drawn = model.decode(grid, force_not_quantize=True, shape=(*grid.shape, width)).sample
            pixels = (drawn.clip(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            for index, own in zip(part, pixels, strict=True):
                pictures[index] = own
        return [own for own in pictures if own is not None]


def _shared(size: tuple[int, int], original: tuple[int, int]) -> float:
    """Share of the original's shape that a crop of `size` keeps, in (0, 1]."""
    scales = size[0] / original[0], size[1] / original[1]
    return min(scales) / max(scales)


def _fitted(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture resized to cover `size` (height, width), its middle kept.

    The official training code crops at random; a prompt must not depend on chance.
    """
    height, width = size
    if image.shape[:2] == size:
        return np.array(image, order="C")
    scale = max(height / image.shape[0], width / image.shape[1])
    covering = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    picture = Image.fromarray(image).resize(covering, Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def _alike(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Places of equal shapes, at most `IMAGES_AT_ONCE` together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return [
        group[start : start + IMAGES_AT_ONCE]
        for group in groups.values()
        for start in range(0, len(group), IMAGES_AT_ONCE)
    ]
