"""The learner's ranks as Ray actors: a gang that starts, updates, publishes and saves together."""

import logging
from pathlib import Path
from typing import Any

import ray

from unirl.cluster.actor_log import open_actor_log
from unirl.cluster.gang import Gang, own_address
from unirl.cluster.placement import Placement
from unirl.cluster.weight_sync import Publication
from unirl.config import RlConfig
from unirl.types import LearnerBatch

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class LearnerRank:
    """One rank. Rank 0 also owns the published weights."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        return own_address()

    def setup(self, config: RlConfig, checkpoint: Path, rank: int, address: tuple[str, int]) -> None:
        """Join the process group and load the weights; blocks until every rank is there."""
        open_actor_log(f"learner-{rank}")
        from unirl.learner.learner import Learner

        self._rank = rank
        self._published: list[Publication] = []
        log.info("joining rank 0 at %s:%d with the weights of %s", *address, checkpoint)
        self._learner = Learner.from_config(config, checkpoint, rank=rank, address=address)
        log.info("rank %d of %d is up", rank, config.learner.num_ranks)

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """This rank's share of the update; the metrics are those of all ranks."""
        return self._learner.update(batch, step)

    def publish(self) -> Publication | None:
        """Gather the weights bucket by bucket; rank 0 puts them into the store and keeps the last two versions."""
        references = []
        for bucket in self._learner.weight_buckets(copy=False):
            if self._rank == 0:
                references.append(ray.put(bucket))
        if self._rank != 0:
            return None
        publication = Publication(self._learner.manifest(), tuple(references))
        self._published = [*self._published[-1:], publication]
        return publication

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """This rank's part of a checkpoint."""
        self._learner.save(folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state saved with it."""
        return self._learner.restore(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._learner.export(folder)


class LearnerGroup:
    """W ranks behind calls that return when all of them are done."""

    def __init__(self, config: RlConfig, checkpoint: Path, placement: Placement) -> None:
        self._gang = Gang(LearnerRank, config.learner, placement, config.cluster.start_timeout_s, config, checkpoint)
        self.save, self.restore, self.export = self._gang.save, self._gang.restore, self._gang.export
        self.close = self._gang.close

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One or more optimizer updates on the batch; the batch goes into the store once for all ranks."""
        return self._gang.all("update", ray.put(batch), step)[0]

    def publish_weights(self) -> Publication:
        """The current weights, ready to be fetched by any worker."""
        return self._gang.all("publish")[0]
