"""Fine-tuning's ranks as Ray actors, and the encoders of its pictures as a Ray Data pipeline."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from unirl.cluster.actor_log import open_actor_log, open_heartbeat
from unirl.cluster.gang import Gang, own_address
from unirl.cluster.placement import Placement
from unirl.cluster.plan import check_plan, encoder_plan
from unirl.cluster.sft_worker import SftWorker, TokenSources
from unirl.config import SftConfig
from unirl.data.atomic import DataError
from unirl.data.token_store import Unit, encode_unit
from unirl.models.policy import load_encoder

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class SftRank:
    """One rank."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        return own_address()

    def setup(
        self, config: SftConfig, checkpoint: Path, tokens: TokenSources, rank: int, address: tuple[str, int]
    ) -> None:
        """Join the process group and load the weights; blocks until every rank is there."""
        open_actor_log(f"learner-{rank}")
        self._beat = open_heartbeat(f"learner-{rank}", "learner")
        log.info("joining rank 0 at %s:%d with the weights of %s", *address, checkpoint)
        self._worker = SftWorker(config, checkpoint, tokens, rank, address)
        self._beat.count_passes = lambda: self._worker.num_passes
        self._beat.state = "idle"
        log.info("rank %d of %d is up", rank, config.learner.num_ranks)

    def update(self, step: int) -> dict[str, float]:
        """This rank's share of the update; the metrics are those of all ranks."""
        with self._beat.at("updating"):
            metrics = self._worker.update(step)
        self._beat.num_done += 1
        return metrics

    def evaluate(self) -> dict[str, float]:
        """This rank's share of the evaluation."""
        with self._beat.at("scoring"):
            return self._worker.evaluate()

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """This rank's part of a checkpoint."""
        self._worker.save(folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state saved with it."""
        return self._worker.restore(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._worker.export(folder)


class SftGroup:
    """W ranks behind calls that return when all of them are done."""

    num_passes = 0
    """Of this process, which leaves them to the ranks."""

    def __init__(self, config: SftConfig, checkpoint: Path, tokens: TokenSources, placement: Placement) -> None:
        timeout_s = config.cluster.start_timeout_s
        self._gang = Gang(SftRank, config.learner, placement, timeout_s, config, checkpoint, tokens)
        self.save, self.restore, self.export = self._gang.save, self._gang.restore, self._gang.export
        self.close = self._gang.close

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step; the longest wait for data of any rank."""
        metrics = self._gang.all("update", step)
        return metrics[0] | {"sft/data_wait_s": max(own["sft/data_wait_s"] for own in metrics)}

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over the held-out sequences."""
        return self._gang.all("evaluate")[0]


def encode_in_parallel(units: Sequence[Unit], config: SftConfig, checkpoint: Path, folder: Path) -> Iterator[Path]:
    """Make the shards of all units on the run's Ray; yields the notes of a unit's shards when it is done.

    Raises:
        DataError: a unit cannot be encoded.
        PlacementError: machine or cluster cannot hold the encoders.
    """

    # Settings travel with the class: Ray keeps arguments of a constructor in its store, where a restart may miss them.
    class Encoder:
        """One worker: loads the image tokenizer once, then makes the shards of unit after unit."""

        def __init__(self) -> None:
            self._encode = load_encoder(config, checkpoint)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            (unit,) = batch["item"]
            try:
                notes, error = list(encode_unit(unit, folder, self._encode, config.data.samples_per_shard)), ""
            except (DataError, ValueError) as raised:  # as a row, since Ray would bury it in its own
                notes, error = [], str(raised)
            return {"notes": np.array(["\n".join(map(str, notes))]), "error": np.array([error])}

    workers = config.data.encoders
    present = ray.cluster_resources()
    check_plan(encoder_plan(config), {name: present.get(name, 0.0) for name in ("CPU", "GPU")})
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    done = ray.data.from_items(list(units), override_num_blocks=len(units)).map_batches(
        Encoder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(units))),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus or None,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise DataError(str(row["error"]))
        yield from map(Path, str(row["notes"]).splitlines())
