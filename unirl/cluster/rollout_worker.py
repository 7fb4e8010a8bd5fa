"""One sampler as a Ray actor."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from unirl.cluster.actor_log import open_actor_log, open_heartbeat
from unirl.cluster.weight_sync import Identity, Publication, WeightWatch
from unirl.cluster.weight_transport import BroadcastGroup, Membership
from unirl.config import ModelConfig, RolloutConfig, SamplingConfig
from unirl.monitoring.phases import SAMPLING
from unirl.rollout.build import Role
from unirl.rollout.sampler import NamedArrays
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
        from unirl.rollout.completions import DECODING, num_sampled

        self._decoding, self._num_sampled = DECODING, num_sampled

        def look() -> str | None:
            return "decoding" if DECODING.is_running else None

        self._beat = open_heartbeat(f"rollout-{name}", f"rollout.{role}", look)

        self._loaded: Identity | None = None
        self._num_passes, self._watch = 0, None
        self._beat.count_passes = lambda: self._num_passes
        self._group: BroadcastGroup | None = None
        log.info("building a %s sampler for %s of %s", rollout.backend, role, checkpoint)
        self._sampler = build_sampler(model, checkpoint, rollout, role, rests=rests)
        self._sampler.between_tokens = self._after_pass
        self._beat.state, self._beat.policy_version = "idle", 0
        log.info("the sampler is up")

    def watch(self, store: Any) -> None:
        """From now on take over newer weights in the middle of a unit, as soon as the store has them."""
        self._watch = WeightWatch(store, lambda: self._loaded)

    def _after_pass(self) -> None:
        self._num_passes += 1
        if self._watch is not None and (publication := self._watch.look()) is not None:
            self.load_weights(publication)

    def ready(self) -> None:
        """Return once the engine is up."""

    @ray.method(num_returns=2)
    def sample(
        self, unit: Sequence[RolloutRequest], sampling: SamplingConfig, publication: Publication | None
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """One group per request, under the weights of the publication, which are loaded if they are not there yet.

        With them the seconds of each phase of `unirl.monitoring.phases`.
        """
        started = time.perf_counter()
        if publication is not None:
            self.load_weights(publication)
        loaded, decoded = time.perf_counter(), self._decoding.seconds
        with self._beat.at("sampling", len(unit)):
            groups = self._sampler.sample(unit, sampling)
        tokens, images = self._num_sampled(groups)
        self._beat.num_done += len(groups)
        self._beat.num_tokens += tokens
        self._beat.num_images += images
        decode = self._decoding.seconds - decoded
        sampled = time.perf_counter() - loaded - decode
        return groups, {"sync": loaded - started, SAMPLING[unit[0].task]: sampled, "decode": decode}

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
        self._take_over(publication, named)
        return self._sampler.policy_version

    def weight_slices(self) -> tuple[Identity | None, dict[str, str] | None]:
        """Which weights were loaded last, and checksums of a fixed slice of those that it samples with.

        None in their place while it rests.
        """
        return self._loaded, self._sampler.weight_slices()

    def load_weights(self, publication: Publication) -> int:
        """Take over the published weights, unless they are those in use; returns their version."""
        if publication.identity != self._loaded:
            self._take_over(publication, publication.tensors())
            log.info("weights of version %d are loaded", publication.policy_version)
        return self._sampler.policy_version

    def _take_over(self, publication: Publication, named: NamedArrays) -> None:
        before, self._beat.state = self._beat.state, "loading"
        try:
            self._sampler.load_weights(publication.manifest, named)
        finally:
            self._beat.state = before  # in the middle of a unit it goes on sampling
        self._loaded, self._beat.policy_version = publication.identity, publication.policy_version
