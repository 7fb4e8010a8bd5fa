"""Janus-Pro's image tokenizer as an `ImageCodec`: square pictures of one size, others are padded."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unirl.config import ModelConfig
from unirl.models.checkpoint import stored_tensors
from unirl.models.image_codec import check_codes, check_image, exact_float32, fingerprint_of
from unirl.models.janus_pro import VQ, JanusPro
from unirl.models.named_arrays import checksum, to_array


@dataclass(frozen=True, slots=True, kw_only=True)
class JanusCodec:
    """Meets `unirl.models.image_codec.ImageCodec`."""

    policy: JanusPro
    """Without its trunk."""
    fingerprint: str
    """Hex sha256 of the weights and of every setting that decides codes."""

    @classmethod
    def load(cls, config: ModelConfig, path: Path) -> "JanusCodec":
        """The tokenizer of a checkpoint folder, on the CPU in float32.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: another family, or truncated or unfit weights.
        """
        policy = JanusPro.load(config, path, trunk=False)
        stored = stored_tensors(path)
        names = {name for name in stored.shapes if name.startswith(VQ)}
        weights = checksum(((name, to_array(value)) for name, value in stored.read(names)), hashlib.sha256())
        return cls(policy=policy, fingerprint=fingerprint_of("janus", weights, policy.image_processor.to_dict()))

    @property
    def module(self) -> object:
        """The network."""
        return self.policy.module

    @property
    def num_codes(self) -> int:
        """Size of the codebook; codes count from 0."""
        return self.policy.num_codes

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.policy.image_processor.size["height"] // self._side

    @property
    def _side(self) -> int:
        return round(self.policy.num_image_tokens**0.5)

    def grid(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Rows and columns of codes: the same for every picture."""
        check_image(image)
        return self._side, self._side

    def encode(self, images: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
        """Codes int32 [rows, columns] of RGB pictures [height, width, 3] of any sizes, one picture a pass."""
        with exact_float32(self.policy.device):
            return [self.policy.encode_images([image])[0].reshape(self.grid(image)) for image in images]

    def decode(self, codes: Iterable[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """RGB pictures [size, size, 3] of codes [rows, columns] each.

        Raises:
            ValueError: another grid, or a code outside the codebook.
        """
        pictures = []
        for own in codes:
            check_codes(own, self.num_codes, (self._side, self._side))
            with exact_float32(self.policy.device):
                pictures += self.policy.decode_images([own.ravel()])
        return pictures
