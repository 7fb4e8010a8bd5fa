"""Weights as named numpy arrays, the form in which they travel: bfloat16 as uint16 of the same shape."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor


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
