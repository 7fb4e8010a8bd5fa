"""What an image tokenizer offers, whatever its network, and what the tokenizers of several families share.

A tokenizer handles one picture a pass: in a larger batch the same picture's latents differ by rounding, so that a code
near the border of its cell could depend on the company. It also bounds memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unirl.models.checkpoint import StoredTensors, copy_into, read_json

CODEBOOK = "quantize.embedding.weight"
"""Name of the codebook in every layout, after the layout's prefix."""


class ImageCodec(Protocol):
    """Pictures <-> grids of image codes, by one checkpoint's VQ."""

    @property
    def num_codes(self) -> int:
        """Size of the codebook; codes count from 0."""
        ...

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights and of every setting that decides codes; the same for every layout of a file."""
        ...

    def grid(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Rows and columns of codes that an RGB picture [height, width, 3] will give.

        Raises:
            ValueError: not a picture.
        """
        ...

    def encode(self, images: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
        """Codes int32 [rows, columns] of RGB pictures [height, width, 3] of any sizes, none depending on the others.

        Raises:
            ValueError: one is no picture.
        """
        ...

    def decode(self, codes: Iterable[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """RGB pictures [height, width, 3] of codes [rows, columns] each.

        Raises:
            ValueError: a grid that this tokenizer never gives, or a code outside the codebook.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourScale:
    """How a colour of 0..255 enters the network and leaves it: x = (colour * factor - mean) / std, per channel."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, folder: Path) -> "ColourScale":
        """The scale of the checkpoint's preprocessor; where it has none or leaves a number out, this one's."""
        own = read_preprocessor(folder)
        return ColourScale(
            factor=own.get("rescale_factor", self.factor),
            mean=_three(own.get("image_mean"), self.mean),
            std=_three(own.get("image_std"), self.std),
        )

    def to_network(self, image: NDArray[np.uint8]) -> Tensor:
        """Input float32 [1, 3, height, width] of a picture [height, width, 3]."""
        scaled = (image.astype(np.float64) * self.factor - self.mean) / self.std
        return torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1)[None]

    def to_picture(self, pixels: Tensor) -> NDArray[np.uint8]:
        """Picture [height, width, 3] of an output [3, height, width], each colour the nearest."""
        colours = (pixels.permute(1, 2, 0).double().cpu().numpy() * self.std + self.mean) / self.factor
        return colours.round().clip(0, 255).astype(np.uint8)


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """What the folder says about reading pictures, in either form that Transformers writes; {} if nothing."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor", {})
    return {}


def check_image(image: NDArray[np.uint8]) -> None:
    """Check that an array is a picture.

    Raises:
        ValueError: it is not uint8 [height, width, 3] with at least one pixel.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"image: expected RGB uint8 [height, width, 3] of at least one pixel; got {image.dtype} "
            f"{list(image.shape)}; convert it to RGB, or drop the sample"
        )


def middle(image: NDArray[np.uint8], largest_ratio: int) -> NDArray[np.uint8]:
    """The picture, of one longer than `largest_ratio` to 1 the middle."""
    height, width = image.shape[:2]
    longest = largest_ratio * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])


def check_codes(codes: NDArray[np.int32], num_codes: int, grid: tuple[int, int] | None = None) -> None:
    """Check the codes of one picture.

    Args:
        codes: integers [rows, columns].
        num_codes: size of the codebook.
        grid: rows and columns, where a tokenizer has one grid only.

    Raises:
        ValueError: another grid, no codes, or a code outside the codebook.
    """
    if codes.ndim != 2 or not codes.size or (grid is not None and codes.shape != grid):
        wanted = "[rows, columns], at least one" if grid is None else str(list(grid))
        raise ValueError(
            f"decode: expected image codes {wanted}; got {list(codes.shape)}; reshape one picture's codes row by row"
        )
    if not 0 <= codes.min() <= codes.max() < num_codes:
        wrong = next(int(x) for x in (codes.min(), codes.max()) if not 0 <= x < num_codes)
        raise ValueError(
            f"decode: expected image codes in 0..{num_codes - 1}; got {wrong}; subtract the id of the first code"
        )


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast and no TF32 in here: codes must not depend on how the surrounding run computes."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def codebook_prefix(stored: StoredTensors) -> str:
    """What stands before the names of the image tokenizer in a checkpoint, e.g. "model.vqmodel.".

    Raises:
        ValueError: the checkpoint holds no image tokenizer.
    """
    found = [name.removesuffix(CODEBOOK) for name in stored.shapes if name.endswith(CODEBOOK)]
    if len(found) != 1:
        raise ValueError(
            f"{stored.folder}: expected one image tokenizer, that is one tensor ...{CODEBOOK}; got {len(found)}; point "
            "at a checkpoint that holds its VQ, or at the folder of the VQ"
        )
    return found[0]


def fill(
    module: nn.Module,
    names: Mapping[str, str],
    read: Callable[[set[str]], Iterable[tuple[str, Tensor]]],
) -> str:
    """Copy stored weights into a module built on the meta device, freeze it, and return the hex sha256 of its weights.

    Args:
        module: left on the CPU in float32 and in evaluation mode.
        names: stored name -> name in the module; stored shapes were checked, but for axes of length 1.
        read: name and tensor of each wanted stored name.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    module.to_empty(device="cpu").eval().requires_grad_(requires_grad=False)
    targets = module.state_dict()
    for name, value in read(set(names)):
        copy_into(targets, names[name], value.reshape(targets[names[name]].shape))
    digest = hashlib.sha256()
    for name in sorted(names.values()):
        digest.update(f"{name} {list(targets[name].shape)}\n".encode())
        digest.update(targets[name].numpy())
    return digest.hexdigest()


def refuse_area(area: tuple[int, int] | None, family: str) -> None:
    """Check that no area is asked for of a family whose pictures have one size.

    Raises:
        ValueError: one is.
    """
    if area is not None:
        raise ValueError(
            f"model.image_pixels: expected null, since pictures of {family} have the checkpoint's own size; got "
            f"{list(area)}; leave it out"
        )


def fingerprint_of(*parts: object) -> str:
    """Hex sha256 of plain values and frozen dataclasses."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _three(own: float | list[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if own is None:
        return default
    return tuple(float(x) for x in own) if isinstance(own, list) else (float(own),) * 3
