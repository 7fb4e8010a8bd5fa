"""The policy's weights out of the engine, bucket by bucket, whatever the ZeRO stage."""

from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor, nn

from unirl.models.named_arrays import slice_checksum, to_array, to_tensor
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
        self._slices: list[str] = []
        self._digest = blake3()
        self._complete = False

    def buckets(self, bucket_bytes: int = BUCKET_BYTES, *, copy: bool = True) -> Iterator[Bucket]:
        """Names and arrays in the manifest's order; bfloat16 as uint16 of the same shape.

        Args:
            bucket_bytes: gathered at a time, unless one parameter is larger.
            copy: False may lend the weights themselves, to be read before the next bucket is taken.
        """
        import deepspeed

        parameters = list(self._module.named_parameters())
        for part in _parts(parameters, bucket_bytes):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in part], modifier_rank=None):
                yield self._take(part, copy)
        persistent = self._module.state_dict(keep_vars=True).keys()
        yield self._take([(name, buffer) for name, buffer in self._module.named_buffers() if name in persistent], copy)
        self._complete = True

    def _take(self, named: Sequence[tuple[str, Tensor]], copy: bool) -> Bucket:
        bucket: Bucket = []
        for name, tensor in named if self._holds_arrays else ():
            # Kept arrays are copies, since the next update changes the tensor in place.
            array = to_array(tensor.detach().to("cpu", copy=copy))
            self._specs.append(
                TensorSpec(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            )
            self._slices.append(slice_checksum(to_tensor(array)))
            self._digest.update(name.encode())
            self._digest.update(array.reshape(-1).view(np.uint8).data)
            bucket.append((name, array))
        return bucket

    def manifest(self) -> WeightsManifest:
        """Names, shapes and checksum of what the buckets held."""
        assert self._complete, "manifest() needs the buckets to be taken first, all of them"
        return WeightsManifest(
            policy_version=self._version,
            tensors=tuple(self._specs),
            checksum=self._digest.hexdigest(),
            slices=tuple(self._slices),
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
