"""The learner's ranks as Ray actors: a gang that starts, updates, publishes and saves together."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from unirl.cluster.actor_log import open_actor_log, open_heartbeat
from unirl.cluster.gang import Gang, own_address
from unirl.cluster.placement import Placement
from unirl.cluster.weight_sync import Bucket, Identity, Publication
from unirl.cluster.weight_transport import BroadcastGroup, Membership, SharedMemory, open_store, parts_of
from unirl.config import RlConfig
from unirl.monitoring.run_log import Report
from unirl.types import LearnerBatch, WeightsManifest

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class LearnerRank:
    """One rank."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        return own_address()

    def setup(self, config: RlConfig, checkpoint: Path, rank: int, address: tuple[str, int]) -> None:
        """Join the process group and load the weights; blocks until every rank is there."""
        open_actor_log(f"learner-{rank}")
        self._beat = open_heartbeat(f"learner-{rank}", "learner")
        from unirl.learner.learner import Learner

        self._rank, self._transport = rank, config.cluster.weight_transport
        self._kept: tuple[Identity, WeightsManifest, Bucket]
        self._memory: SharedMemory | None = None
        self._store: Store | None = None
        self._group: BroadcastGroup | None = None
        log.info("joining rank 0 at %s:%d with the weights of %s", *address, checkpoint)
        self._learner = Learner.from_config(config, checkpoint, rank=rank, address=address)
        self._beat.count_passes = lambda: self._learner.num_passes
        self._beat.state, self._beat.policy_version = "idle", 0
        log.info("rank %d of %d is up", rank, config.learner.num_ranks)

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """This rank's share of the update; the metrics are those of all ranks."""
        with self._beat.at("updating"):
            metrics = self._learner.update(batch, step)
        self._beat.num_done += self._learner.policy_version - (self._beat.policy_version or 0)
        self._beat.policy_version = self._learner.policy_version
        self._beat.num_tokens += int(metrics["learner/num_tokens"])
        return metrics

    @ray.method(num_returns="streaming")
    def publish(self) -> Iterator[Bucket | Publication]:
        """Gather the weights bucket by bucket. Rank 0 yields them, or keeps them, as the transport wants it.

        Last comes what is known without the buckets.
        """
        with self._beat.at("publishing"):
            yield from self._publish()

    def _publish(self) -> Iterator[Bucket | Publication]:
        keeps = self._transport != "object_store"
        kept: Bucket = []
        # What is yielded is copied into the store before the next bucket is taken.
        for bucket in self._learner.weight_buckets(copy=keeps):
            if self._rank == 0 and keeps:
                kept += bucket
            elif self._rank == 0:
                yield bucket
        manifest = self._learner.manifest()
        if self._rank == 0 and keeps:
            yield self._keep(manifest, kept)
        else:
            yield Publication(manifest)

    def _keep(self, manifest: WeightsManifest, kept: Bucket) -> Publication:
        shared, before, self._memory = None, self._memory, None
        if self._transport == "shared_memory":
            self._memory = SharedMemory(manifest, kept)
            shared = self._memory.handle
            kept = shared.named(manifest) or kept
        if before is not None:
            before.close()
        source = cast("ActorHandle", ray.get_runtime_context().current_actor)
        published = Publication(manifest, shared=shared, source=source)
        self._kept = (published.identity, manifest, kept)
        return published

    @ray.method(num_returns="streaming")
    def kept_buckets(self, wanted: Identity) -> Iterator[Bucket]:
        """The weights kept here, bucket by bucket through the object store, for who asks.

        Raises:
            LookupError: these are others by now.
        """
        identity, manifest, named = self._kept
        if identity != wanted:
            raise LookupError(
                f"weights: expected those of version {wanted[0]}; got {identity[0]}; ask for the newest ones"
            )
        arrays = dict(named)
        for part in parts_of(manifest):
            yield [(spec.name, arrays[spec.name]) for spec in part]

    def open_store(self) -> tuple[str, int]:
        """Where the members of a broadcast find each other; stays open."""
        if self._store is None:
            self._store_address = own_address()
            self._store = open_store(*self._store_address)
        return self._store_address

    def broadcast(self, membership: Membership) -> None:
        """Send the weights kept here to every other member.

        Raises:
            RuntimeError: a member is lost.
        """
        _, manifest, named = self._kept
        try:
            if self._group is None or self._group.membership != membership:
                self._group = BroadcastGroup(membership, self._store)
            self._group.send(manifest, named)
        except BaseException:
            self._group = None
            raise

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """This rank's part of a checkpoint."""
        with self._beat.at("publishing"):
            self._learner.save(folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state saved with it."""
        with self._beat.at("loading"):
            state = self._learner.restore(folder)
        self._beat.policy_version = self._learner.policy_version
        return state

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._learner.export(folder)


class LearnerGroup:
    """W ranks behind calls that return when all of them are done."""

    def __init__(self, config: RlConfig, checkpoint: Path, placement: Placement, report: Report | None = None) -> None:
        """Start the ranks and wait until they are up.

        Args:
            config: the run's.
            checkpoint: folder of the initial policy.
            placement: where the ranks sit.
            report: told of ranks that are up, down or started anew.
        """
        timeout_s = config.cluster.start_timeout_s
        self._gang = Gang(LearnerRank, config.learner, placement, timeout_s, config, checkpoint, report=report)
        self.save, self.restore, self.export = self._gang.save, self._gang.restore, self._gang.export
        self.restart, self.close = self._gang.restart, self._gang.close

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One or more optimizer updates on the batch; the batch goes into the store once for all ranks."""
        return self._gang.all("update", ray.put(batch), step)[0]

    def publish_weights(self) -> Publication:
        """The current weights, ready to be fetched by any worker.

        Buckets belong to this process, which asked for them: they outlive the rank that made them.
        """
        *buckets, known = self._gang.stream("publish")
        return replace(ray.get(known), buckets=tuple(buckets))
