"""The driver's side of a broadcast of weights: who takes part, and who was not reached."""

import uuid
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from unirl.cluster.rollout_workers import Worker, why_failed
from unirl.cluster.weight_sync import Publication
from unirl.cluster.weight_transport import Membership
from unirl.config import RlConfig


class WeightBroadcast:
    """Keeps one group of learner rank 0 and the workers, and builds another when they change or one is lost."""

    def __init__(self, config: RlConfig) -> None:
        """Nothing is started before the first `send`."""
        self._config = config
        self._members: list[ActorHandle] = []
        self._key = ""

    def send(self, publication: Publication, workers: Sequence[Worker]) -> list[str]:
        """Bring the weights to the workers; `sent` is set where that was done.

        Members give each other up after cluster.broadcast_timeout_s.

        Returns:
            What went wrong, by member; empty when all have the weights.
        """
        source, timeout_s = publication.source, self._config.cluster.broadcast_timeout_s
        assert source is not None, "rank 0 keeps what is broadcast"
        members = [source, *(worker.handle for worker in workers)]
        if members != self._members:
            self._members, self._key = members, uuid.uuid4().hex
        try:
            host, port = ray.get(source.open_store.remote(), timeout=timeout_s)
        except RayError as error:
            self._members = []
            return [f"learner rank 0: {error}"]
        place = Membership(
            key=self._key,
            host=host,
            port=port,
            rank=0,
            size=len(members),
            backend="nccl" if self._all_have_gpus(workers) else "gloo",
            timeout_s=timeout_s,
        )
        sending = source.broadcast.remote(place)
        receiving = {
            worker.handle.receive_weights.remote(publication, replace(place, rank=rank)): worker
            for rank, worker in enumerate(workers, start=1)
        }
        # Three times: for joining, for a part, for loading.
        calls: list[ray.ObjectRef] = [sending, *receiving]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=3 * timeout_s)
        problems = {reference: why_failed(reference) if reference in done else "no answer" for reference in calls}
        for reference, worker in receiving.items():
            if not problems[reference]:
                worker.sent = publication.identity
        if any(problems.values()):
            self._members = []
        names = ["learner rank 0", *(worker.name for worker in workers)]
        return [f"{name}: {problem}" for name, problem in zip(names, problems.values(), strict=True) if problem]

    def _all_have_gpus(self, workers: Sequence[Worker]) -> bool:
        each = [self._config.learner, *(getattr(self._config.rollout, worker.role) for worker in workers)]
        return all(own.num_gpus > 0 for own in each)
