"""The policy's weights out of the engine, bucket by bucket, whatever the ZeRO stage."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unirl.models.named_arrays import to_array
from unirl.types import TensorSpec, WeightsManifest

BUCKET_BYTES = 64 * 2**20
"""Gathered at a time; one parameter may be larger."""

Bucket = list[tuple[str, NDArray[np.generic]]]


class WeightExport:
    """One pass over all weights under the checkpoint's names: parameters, tied ones once, then persistent buffers.

    Every rank must go through all buckets, since ZeRO-3 gathers each parameter from all of them.
    """

    def __init__(self, module: nn.Module, *, policy_version: int, holds_arrays: bool) -> None:
        """Prepare the export of a policy's module.

        Args:
            module: the policy's own module, below any wrapper.
            policy_version: updates that made the weights.
            holds_arrays: true on the one rank that receives them; elsewhere the buckets are empty.
        """
        self._module, self._version, self._holds_arrays = module, policy_version, holds_arrays
        self._specs: list[TensorSpec] = []
        self._sha256 = hashlib.sha256()
        self._complete = False

    def buckets(self, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
        """Names and fresh arrays in the manifest's order; bfloat16 as uint16 of the same shape."""
        import deepspeed

        parameters = list(self._module.named_parameters())
        for part in _parts(parameters, bucket_bytes):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in part], modifier_rank=None):
                bucket = self._take(part)
            yield bucket
        persistent = self._module.state_dict(keep_vars=True).keys()
        yield self._take([(name, buffer) for name, buffer in self._module.named_buffers() if name in persistent])
        self._complete = True

    def _take(self, named: Sequence[tuple[str, Tensor]]) -> Bucket:
        bucket: Bucket = []
        for name, tensor in named if self._holds_arrays else ():
            # A copy: the next update changes the tensor in place.
            array = to_array(tensor.detach().to("cpu", copy=True))
            self._specs.append(
                TensorSpec(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            )
            self._sha256.update(name.encode())
            self._sha256.update(array.reshape(-1).view(np.uint8).data)
            bucket.append((name, array))
        return bucket

    def manifest(self) -> WeightsManifest:
        """Names, shapes and checksum of what the buckets held."""
        assert self._complete, "manifest() needs the buckets to be taken first, all of them"
        return WeightsManifest(
            policy_version=self._version, tensors=tuple(self._specs), checksum=self._sha256.hexdigest()
        )


def _parts(named: list[tuple[str, nn.Parameter]], limit: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    part: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        # Under ZeRO-3 a parameter is empty between uses and keeps its true size in ds_numel.
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if part and size + num_bytes > limit:
            yield part
            part, size = [], 0
        part.append((name, parameter))
        size += num_bytes
    if part:
        yield part
