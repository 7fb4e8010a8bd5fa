"""Weights from the learner to the samplers through the object store.

A publication is a manifest and one object per bucket of weights. It tolerates workers that join, leave and die: whoever
needs weights fetches the newest publication by itself. Objects live as long as their owner, learner rank 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from unirl.types import WeightsManifest

Bucket = list[tuple[str, NDArray[np.generic]]]


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of the weights. The references sit in a tuple, so that Ray hands them over unresolved."""

    manifest: WeightsManifest
    buckets: tuple["ray.ObjectRef[Bucket]", ...]

    @property
    def policy_version(self) -> int:
        """Updates that made these weights."""
        return self.manifest.policy_version

    def tensors(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Names and read-only arrays in the manifest's order, one bucket in memory at a time."""
        for reference in self.buckets:
            yield from ray.get(reference)


def put_buckets(buckets: Iterable[Bucket]) -> tuple["ray.ObjectRef[Bucket]", ...]:
    """The buckets copied into the object store one by one, empty ones left out; what a rank does, for a measurement."""
    return tuple(ray.put(bucket) for bucket in buckets if bucket)
