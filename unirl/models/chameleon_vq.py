"""Chameleon's image tokenizer, a VQGAN, as Anole and Liquid use it: square pictures of one size.

Encoder and codebook are transformers' ChameleonVQVAE; the decoder, which transformers leaves out, is here under the
names of Meta's file and of the conversions for drawing (transformers pull request 32013).
"""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

from unirl.models.checkpoint import StoredTensors, read_json, stored_tensors
from unirl.models.image_codec import (
    ColourScale,
    check_codes,
    check_image,
    codebook_prefix,
    exact_float32,
    fill,
    fingerprint_of,
    middle,
)

META_CONFIG, META_PICKLE, META_WEIGHTS = "vqgan.yaml", "vqgan.ckpt", "vqgan.safetensors"
META_FIELDS = {
    "resolution": "resolution",
    "in_channels": "in_channels",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}
"""ddconfig of vqgan.yaml -> ChameleonVQVAEConfig."""
META_SCALE = ColourScale(factor=2 / 255, mean=(1.0,) * 3, std=(1.0,) * 3)
"""-1 to 1, as Meta's code; Transformers' preprocessor for Chameleon has the factor 0.0078."""
PADDING = (122, 116, 104)
"""Colour around a picture that is padded to a square (Liquid, evaluation/inference_i2t.py)."""
LARGEST_RATIO = 8
"""Of the two sides of a picture; of a longer one the middle is read, so that a thin strip makes no huge square."""

Read = Callable[[set[str]], Iterable[tuple[str, Tensor]]]
Fit = Literal["crop", "pad"]


class Decoder(nn.Module):
    """Latents [B, latent, h, w] to pixels [B, 3, h * f, w * f], f = 2 ** (levels - 1)."""

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__()

        def block(width: int, out: int) -> nn.Module:
            return ChameleonVQVAEEncoderResnetBlock(config, width, out)

        def attention(width: int) -> nn.Module:
            return ChameleonVQVAEEncoderAttnBlock(width) if config.attn_type == "vanilla" else nn.Identity()

        multipliers = config.channel_multiplier
        width, side = config.base_channels * multipliers[-1], config.resolution // 2 ** (len(multipliers) - 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": block(width, width), "attn_1": attention(width), "block_2": block(width, width)}
        )
        levels: list[nn.ModuleDict] = []
        for level in reversed(range(len(multipliers))):
            out = config.base_channels * multipliers[level]
            blocks, attentions = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(block(width, out))
                if side in (config.attn_resolutions or ()):
                    attentions.append(attention(out))
                width = out
            parts = nn.ModuleDict({"block": blocks, "attn": attentions})
            if level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
                side *= 2
            levels.insert(0, parts)
        self.up: Any = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        hidden = self.conv_in(latents)
        for part in self.mid.values():
            hidden = part(hidden)
        for level in reversed(self.up):
            for index, block in enumerate(level["block"]):
                hidden = block(hidden)
                if len(level["attn"]):
                    hidden = level["attn"][index](hidden)
            if "upsample" in level:
                hidden = level["upsample"]["conv"](functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return self.conv_out(functional.silu(self.norm_out(hidden)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChameleonVq:
    """Meets `unirl.models.image_codec.ImageCodec`; `dataclasses.replace` gives another fit with the same weights."""

    module: Any
    """ChameleonVQVAE with a decoder."""
    weights_sha256: str
    fit: Fit = "crop"
    scale: ColourScale = META_SCALE

    @classmethod
    def load(cls, folder: Path, *, fit: Fit = "crop", scale: ColourScale | None = None) -> "ChameleonVq":
        """The tokenizer of a folder, on the CPU in float32.

        Args:
            folder: a Transformers checkpoint with the decoder (Anole's conversion), or Meta's vqgan.yaml beside
                vqgan.safetensors or vqgan.ckpt; of the last two the first that is there.
            fit: what becomes of a picture that is not square. "crop": the shorter side is resized, the middle kept
                (Meta's code; Anole, and what Liquid draws). "pad": grey is added (what Liquid is asked about).
            scale: of colours; None takes the folder's preprocessor_config.json, and without one Meta's -1 to 1.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another layout, truncated or unfit weights, no decoder, or a pickle with more than tensors.
        """
        config, described_by = _read_config(folder)
        stored, read = _stored(folder, described_by)
        with torch.device("meta"):
            module: Any = ChameleonVQVAE(config)
            module.decoder = Decoder(config)
        prefix = codebook_prefix(stored)
        if not any(name.startswith(f"{prefix}decoder.") for name in stored.shapes):
            raise ValueError(
                f"{folder}: expected an image tokenizer with {prefix}decoder.*; got none, and without it nothing can "
                "be drawn; take a conversion for drawing, or Meta's tokenizer folder with vqgan.yaml"
            )
        names = {prefix + name: name for name in module.state_dict()}
        stored.check({name: tuple(module.state_dict()[own].shape) for name, own in names.items()}, described_by)
        digest = fill(module, names, read)
        return cls(module=module, weights_sha256=digest, fit=fit, scale=scale or META_SCALE.read(folder))

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.module.config.num_embeddings

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return _pixels_per_code(self.module.config)

    @property
    def size(self) -> int:
        """Height and width of every picture, pixels."""
        return self.module.config.resolution

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights and of every setting that decides codes."""
        return fingerprint_of("chameleon", self.weights_sha256, self.size, self.fit, self.scale)

    def grid(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Rows and columns of codes: the same for every picture."""
        check_image(image)
        return self._grid

    def encode(self, images: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
        """Codes int32 [rows, columns] of RGB pictures [height, width, 3] of any sizes, one picture a pass.

        Raises:
            ValueError: one is no picture.
        """
        return [self._encode(image) for image in images]

    def decode(self, codes: Iterable[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """RGB pictures [size, size, 3] of codes [rows, columns] each, one picture a pass.

        Raises:
            ValueError: another grid, or a code outside the codebook.
        """
        return [self.scale.to_picture(self.draw(own)) for own in codes]

    def draw(self, codes: NDArray[np.int32]) -> Tensor:
        """The network's own output [3, size, size], about -1 to 1, for codes [rows, columns]."""
        check_codes(codes, self.num_codes, self._grid)
        device = self._device
        with exact_float32(device):
            grid = torch.from_numpy(codes.astype(np.int64)).to(device)[None]
            latents = self.module.quantize.embedding(grid).permute(0, 3, 1, 2)
            return self.module.decoder(self.module.post_quant_conv(latents))[0]

    @property
    def _grid(self) -> tuple[int, int]:
        return _grid(self.module.config)

    @property
    def _device(self) -> torch.device:
        return self.module.quantize.embedding.weight.device

    def _encode(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        grid, device = self.grid(image), self._device
        fitted = {"crop": _cropped, "pad": _padded}[self.fit](image, self.size)
        with exact_float32(device):
            codes = self.module.encode(self.scale.to_network(fitted).to(device)).image_tokens
        return codes.view(grid).int().cpu().numpy()


def read_grid(folder: Path) -> tuple[int, int]:
    """Rows and columns of codes of every picture of a folder's tokenizer; no weights are read.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: one of another layout.
    """
    return _grid(_read_config(folder)[0])


def _grid(config: ChameleonVQVAEConfig) -> tuple[int, int]:
    side = config.resolution // _pixels_per_code(config)
    return side, side


def _pixels_per_code(config: ChameleonVQVAEConfig) -> int:
    return 2 ** (len(config.channel_multiplier) - 1)


def _read_config(folder: Path) -> tuple[ChameleonVQVAEConfig, str]:
    """What the tokenizer is, and the file that says so."""
    if (folder / META_CONFIG).is_file():
        return _meta_config(folder), META_CONFIG
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ("chameleon", "chameleon_vqgan"):
        raise ValueError(
            f"{folder}: expected a checkpoint of model_type 'chameleon' with its image tokenizer, or Meta's "
            f"{META_CONFIG}; got model_type {raw.get('model_type')!r}; point at the folder of the tokenizer"
        )
    own = raw.get("vq_config") or {} if raw["model_type"] == "chameleon" else raw
    return ChameleonVQVAEConfig.from_dict(own), "config.json"


def _meta_config(folder: Path) -> ChameleonVQVAEConfig:
    try:
        params = yaml.safe_load((folder / META_CONFIG).read_text(encoding="utf-8"))["model"]["params"]
        numbers = {own: params["ddconfig"][name] for name, own in META_FIELDS.items()}
        config = ChameleonVQVAEConfig(num_embeddings=params["n_embed"], embed_dim=params["embed_dim"], **numbers)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / META_CONFIG}: expected model.params with n_embed, embed_dim and ddconfig "
            f"({', '.join(META_FIELDS)}); got a file that lacks them "
            f"({' '.join(str(error).split())[:200]}); get it again"
        ) from error
    config.attn_type = params["ddconfig"].get("attn_type", "vanilla")
    return config


def _stored(folder: Path, described_by: str) -> tuple[StoredTensors, Read]:
    """The weights of the layout that the file `described_by` belongs to."""
    if described_by == META_CONFIG and not (folder / META_WEIGHTS).is_file():
        tensors = _unpickled(folder / META_PICKLE)
        stored = StoredTensors(folder, {name: tuple(value.shape) for name, value in tensors.items()}, {})
        return stored, lambda names: ((name, tensors[name]) for name in names)
    stored = stored_tensors(folder, folder / META_WEIGHTS if described_by == META_CONFIG else None)
    return stored, stored.read


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors under "state_dict" of a pickle that may hold nothing but tensors and plain values."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent}: expected {META_WEIGHTS} or {META_PICKLE} beside {META_CONFIG}; got neither; download it"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a whole PyTorch file with tensors under 'state_dict' and no other objects; got one that "
            f"does not load ({' '.join(str(error).split())[:200]}); download it again, or save its tensors under the "
            f"same names as {META_WEIGHTS}"
        ) from error


def _cropped(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The shorter side resized to `size`, then the middle (Meta's chameleon/inference/image_tokenizer.py)."""
    picture = Image.fromarray(middle(image, LARGEST_RATIO))
    scale = size / min(picture.size)
    picture = picture.resize((round(scale * picture.width), round(scale * picture.height)), Image.Resampling.LANCZOS)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _padded(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The picture in the middle of a square of `PADDING`, resized (Liquid's evaluation/inference_i2t.py)."""
    image = middle(image, LARGEST_RATIO)
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), PADDING, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))
