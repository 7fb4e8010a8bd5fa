"""Weights from the learner to the samplers.

A publication is a manifest and the way to the weights: one object per bucket in Ray's object store, or, with another
`cluster.weight_transport`, rank 0, which keeps them. It tolerates workers that join, leave and die: whoever needs
weights fetches the newest publication by itself. Objects belong to the driver, so they outlive the rank that wrote them
and end when nobody holds the publication any more.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from unirl.cluster.weight_transport import SharedWeights
from unirl.types import WeightsManifest

Bucket = list[tuple[str, NDArray[np.generic]]]
Identity = tuple[int, str]
"""Version and checksum: after a learner was brought back, a version may come a second time with other weights."""
LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of the weights. The references sit in a tuple, so that Ray hands them over unresolved."""

    manifest: WeightsManifest
    buckets: tuple["ray.ObjectRef[Bucket]", ...] = ()
    """Empty where the weights stay with rank 0."""
    shared: SharedWeights | None = None
    """Memory that holds them on rank 0's machine."""
    source: ActorHandle | None = None
    """Rank 0, where it keeps them: it broadcasts them, or hands them to who asks."""

    @property
    def policy_version(self) -> int:
        """Updates that made these weights."""
        return self.manifest.policy_version

    @property
    def identity(self) -> Identity:
        """What tells these weights from all others."""
        return self.manifest.policy_version, self.manifest.checksum

    def tensors(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Names and read-only arrays in the manifest's order, one bucket in memory at a time.

        Raises:
            LookupError: rank 0 kept them and has newer ones by now.
            RayActorError: rank 0 kept them and is gone.
        """
        if self.shared is not None and (named := self.shared.named(self.manifest)) is not None:
            yield from named
            return
        buckets = self.buckets if self.source is None else self.source.kept_buckets.remote(self.identity)
        for reference in buckets:
            yield from ray.get(reference)


@ray.remote(num_cpus=0, max_restarts=-1)
class WeightStore:
    """Knows the newest publication, for workers that look for it in the middle of a unit."""

    def __init__(self) -> None:
        self._newest: Publication | None = None

    def publish(self, publication: Publication) -> None:
        """Take a newer publication over."""
        self._newest = publication

    def newest(self, known: Identity | None) -> Publication | None:
        """The newest publication; None when it is the known one, or there is none."""
        return None if self._newest is None or self._newest.identity == known else self._newest


class WeightWatch:
    """A worker's eye on the store: asks now and then, never waits for the answer."""

    def __init__(self, store: Any, known: Callable[[], Identity | None]) -> None:
        self._store, self._known = store, known
        self._question: ray.ObjectRef | None = None
        self._asked = 0.0

    def look(self) -> Publication | None:
        """A newer publication than the one known, if word of it has come."""
        if self._question is None:
            if time.monotonic() - self._asked >= LOOK_EVERY_S:
                self._question, self._asked = self._store.newest.remote(self._known()), time.monotonic()
            return None
        if not ray.wait([self._question], timeout=0)[0]:
            return None
        question, self._question = self._question, None
        try:
            found = ray.get(question)
        except RayActorError:
            return None  # the store is being restarted; the weights come with the next unit at the latest
        return None if found is None or found.identity == self._known() else found


def put_buckets(buckets: Iterable[Bucket]) -> tuple["ray.ObjectRef[Bucket]", ...]:
    """The buckets copied into the object store one by one, empty ones left out; what a rank does, for a measurement."""
    return tuple(ray.put(bucket) for bucket in buckets if bucket)
