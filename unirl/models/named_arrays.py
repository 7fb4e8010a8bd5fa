"""Weights as named numpy arrays, the form in which they travel: bfloat16 as uint16 of the same shape."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from unirl.types import WeightsManifest

SLICE = 64
"""Values of a weight that tell one version from another."""


def to_array(tensor: Tensor) -> NDArray[np.generic]:
    """The tensor's values in host memory; bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    """The array as a tensor that shares its memory; uint16 is bfloat16. Do not write to it."""
    with warnings.catch_warnings():
        # Arrays from an object store are read-only, and torch has no read-only tensors. Nothing else is said in here,
        # and a filter by message costs more than the rest.
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def slice_checksum(values: Tensor) -> str:
    """Eight bytes in hexadecimal over a few values from the middle of a weight, whatever its precision and device."""
    flat = values.detach().reshape(-1)
    start = max(0, (flat.numel() - SLICE) // 2)
    return blake3(flat[start : start + SLICE].float().cpu().numpy().tobytes()).hexdigest(8)


def slice_checksums(held: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Of the tensors that are held whole under these names; those without values, or in another form, are left out."""
    return {
        name: slice_checksum(held[name])
        for name, shape in shapes.items()
        if name in held and not held[name].is_meta and tuple(held[name].shape) == shape
    }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A sampler's weights beside those published, by the checksums of their slices."""

    num_compared: int
    """Weights that both have under one name."""
    differing: tuple[str, ...]
    """Names of those that the sampler holds otherwise."""

    @property
    def is_stale(self) -> bool:
        """Whether the sampler cannot be taken to hold what was published; where nothing was compared it cannot."""
        return bool(self.differing) or not self.num_compared


def compare(manifest: WeightsManifest, held: Mapping[str, str]) -> Comparison:
    """What a sampler holds beside what was published.

    Args:
        manifest: of the publication.
        held: the sampler's own checksums by name, as `slice_checksums` gives them.
    """
    published = {spec.name: own for spec, own in zip(manifest.tensors, manifest.slices, strict=False)}
    both = published.keys() & held.keys()
    return Comparison(len(both), tuple(name for name in held if name in both and held[name] != published[name]))


def checksum(named: Iterable[tuple[str, NDArray[np.generic]]], digest: Any = None) -> str:
    """Digest in hexadecimal over each name (UTF-8) and its bytes, in order.

    Args:
        named: the weights.
        digest: of hashlib's form, fresh; None takes BLAKE3, which nearly keeps up with a copy of the same bytes.
    """
    digest = digest or blake3()
    for name, array in named:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
