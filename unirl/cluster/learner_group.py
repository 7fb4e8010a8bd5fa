"""The learner's ranks as Ray actors: a gang that starts, updates, publishes and saves together."""

import logging
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from unirl.cluster.actor_log import open_actor_log
from unirl.cluster.placement import Placement
from unirl.cluster.weight_sync import Publication
from unirl.config import RlConfig
from unirl.types import LearnerBatch

log = logging.getLogger(__name__)

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class LearnerRank:
    """One rank. Rank 0 also owns the published weights."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen: this node and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

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
        for bucket in self._learner.weight_buckets():
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
        learner = config.learner
        self._ranks: list[Any] = [
            LearnerRank.options(
                num_cpus=learner.num_cpus, num_gpus=learner.num_gpus, scheduling_strategy=placement.for_rank(rank)
            ).remote()
            for rank in range(learner.num_ranks)
        ]
        limit = config.cluster.start_timeout_s
        try:
            address = ray.get(self._ranks[0].address.remote(), timeout=limit)
            calls = [rank.setup.remote(config, checkpoint, index, address) for index, rank in enumerate(self._ranks)]
            ray.get(calls, timeout=limit)
        except GetTimeoutError:
            raise RuntimeError(
                f"learner: expected {learner.num_ranks} ranks to be up within {limit:g} s (cluster.start_timeout_s); "
                "some are not; look at their logs, or allow more time"
            ) from None
        except RayTaskError as error:
            raise error.cause from None

    def _all(self, method: str, *arguments: object) -> list[Any]:
        """Call every rank; the first failure ends the gang, since the others would wait for the lost rank."""
        calls = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        try:
            return ray.get(calls)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self.close()
            raise RuntimeError(
                f"learner: expected every rank to finish {method}; got a dead one ({error}); the last committed "
                "checkpoint is whole: resume with --resume"
            ) from error

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One or more optimizer updates on the batch; the batch goes into the store once for all ranks."""
        return self._all("update", ray.put(batch), step)[0]

    def publish_weights(self) -> Publication:
        """The current weights, ready to be fetched by any worker."""
        return self._all("publish")[0]

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer and `state`."""
        self._all("save", folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state that was saved with it."""
        return self._all("restore", folder)[0]

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder in its public layout."""
        self._all("export", folder)

    def close(self) -> None:
        """End every rank."""
        for rank in self._ranks:
            ray.kill(rank)
