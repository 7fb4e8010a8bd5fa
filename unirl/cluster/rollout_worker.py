"""One sampler as a Ray actor."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from unirl.cluster.actor_log import open_actor_log
from unirl.cluster.weight_sync import Identity, Publication, WeightWatch
from unirl.cluster.weight_transport import BroadcastGroup, Membership
from unirl.config import ModelConfig, RolloutConfig, SamplingConfig
from unirl.rollout.build import Role
from unirl.types import RolloutGroup, RolloutRequest

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class RolloutWorker:
    """One sampler with its in-process engine."""

    def __init__(
        self, model: ModelConfig, checkpoint: Path, rollout: RolloutConfig, role: Role, name: str, *, rests: bool
    ) -> None:
        open_actor_log(f"rollout-{name}")
        from unirl.rollout.build import build_sampler

        self._loaded: Identity | None = None
        self._group: BroadcastGroup | None = None
        log.info("building a %s sampler for %s of %s", rollout.backend, role, checkpoint)
        self._sampler = build_sampler(model, checkpoint, rollout, role, rests=rests)
        log.info("the sampler is up")

    def watch(self, store: Any) -> None:
        """From now on take over newer weights in the middle of a unit, as soon as the store has them."""
        watch = WeightWatch(store, lambda: self._loaded)

        def look() -> None:
            if (publication := watch.look()) is not None:
                self.load_weights(publication)

        self._sampler.between_tokens = look

    def ready(self) -> None:
        """Return once the engine is up."""

    def sample(
        self, unit: Sequence[RolloutRequest], sampling: SamplingConfig, publication: Publication | None
    ) -> list[RolloutGroup]:
        """One group per request, under the weights of the publication, which are loaded if they are not there yet."""
        if publication is not None:
            self.load_weights(publication)
        return self._sampler.sample(unit, sampling)

    def rest(self) -> None:
        """Give the GPU to the learner until the next unit or the next weights."""
        self._sampler.rest()

    def receive_weights(self, publication: Publication, membership: Membership) -> int:
        """Take over the published weights as rank 0 broadcasts them; returns their version.

        Raises:
            RuntimeError: a member of the group is lost; the weights are as before.
        """
        try:
            if self._group is None or self._group.membership != membership:
                self._group = BroadcastGroup(membership)
            named = self._group.receive(publication.manifest)
        except BaseException:
            self._group = None
            raise
        self._sampler.load_weights(publication.manifest, named)
        self._loaded = publication.identity
        return self._sampler.policy_version

    def weight_slices(self) -> tuple[Identity | None, dict[str, str]]:
        """Which weights were loaded last, and checksums of a fixed slice of those that it samples with."""
        return self._loaded, self._sampler.weight_slices()

    def load_weights(self, publication: Publication) -> int:
        """Take over the published weights, unless they are those in use; returns their version."""
        if publication.identity != self._loaded:
            self._sampler.load_weights(publication.manifest, publication.tensors())
            self._loaded = publication.identity
            log.info("weights of version %d are loaded", publication.policy_version)
        return self._sampler.policy_version
