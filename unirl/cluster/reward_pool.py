"""Reward workers as Ray actors. A reward that fails or dies masks the group it was scoring, and nothing else."""

import itertools
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from unirl.cluster.actor_log import open_actor_log
from unirl.cluster.rollout_pool import TICK_S, GroupReferences
from unirl.config import RewardConfig, RewardsConfig
from unirl.rewards.reward import combine
from unirl.types import TASKS, RewardScores, RolloutGroup, ScoredGroup

log = logging.getLogger(__name__)


@ray.remote(max_restarts=0)
class RewardWorker:
    """One reward with its cache, retries and time limit."""

    def __init__(self, name: str, config: RewardConfig) -> None:
        open_actor_log(f"reward-{name}-{os.getpid()}")
        from unirl.rewards.isolation import IsolatedReward

        self._reward = IsolatedReward(name, config)

    def score(self, groups: list[RolloutGroup], index: int) -> RewardScores:
        """Score one group of a unit; the unit arrives by reference."""
        return self._reward.score(groups[index])


@dataclass(slots=True, eq=False)
class _Call:
    key: tuple[str, str]
    group: RolloutGroup
    place: tuple["ray.ObjectRef", int]
    slot: int
    started: float = 0.0
    attempts: int = 1
    worker: ActorHandle | None = None


@dataclass(slots=True, eq=False)
class _Pending:
    group: RolloutGroup
    components: dict[str, RewardScores] = field(default_factory=dict)


class RewardPool:
    """All rewards of both tasks; k actors each, served in turn."""

    def __init__(self, config: RewardsConfig, references: GroupReferences) -> None:
        self._references = references
        self._configs: dict[tuple[str, str], RewardConfig] = {}
        for task in TASKS:
            for name, reward in config.active(task).items():
                self._configs[(task, name)] = reward
        self._workers: dict[tuple[str, str], list[ActorHandle]] = {
            key: [self._start(key) for _ in range(reward.num_workers)] for key, reward in self._configs.items()
        }
        self._turn = itertools.count()
        self.restarts = 0

    def _start(self, key: tuple[str, str]) -> ActorHandle:
        reward = self._configs[key]
        options = {"num_cpus": reward.num_cpus, "num_gpus": reward.num_gpus}
        return cast("ActorHandle", RewardWorker.options(**options).remote(key[1], reward))

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]:
        """Score groups as they arrive, while later ones are still being sampled; sorted by request id."""
        calls: dict[ray.ObjectRef, _Call] = {}
        pending: dict[str, _Pending] = {}
        for group in groups:
            pending[group.request.request_id] = _Pending(group)
            place = self._references.take(group)
            for key in self._configs:
                if key[0] == group.request.task:
                    self._submit(calls, _Call(key, group, place, next(self._turn)))
        while calls:
            done, _ = ray.wait(list(calls), num_returns=1, timeout=TICK_S)
            for reference in done + self._overdue(calls):
                call = calls.pop(reference)
                scores = self._collect(reference, call, calls, timed_out=reference not in done)
                if scores is not None:
                    pending[call.group.request.request_id].components[call.key[1]] = scores
        weights = {task: {name: c.weight for (t, name), c in self._configs.items() if t == task}
                   for task in TASKS}  # fmt: skip
        scored = [combine(p.group, p.components, weights[p.group.request.task]) for p in pending.values()]
        return sorted(scored, key=lambda s: s.group.request.request_id)

    def _submit(self, calls: dict["ray.ObjectRef", _Call], call: _Call) -> None:
        workers = self._workers[call.key]
        call.slot %= len(workers)
        call.worker, call.started = workers[call.slot], time.monotonic()
        reference, index = call.place
        calls[call.worker.score.remote(reference, index)] = call

    def _overdue(self, calls: dict["ray.ObjectRef", _Call]) -> list["ray.ObjectRef"]:
        """Calls that even the worker's own limit did not end: the worker itself hangs."""
        now = time.monotonic()
        return [reference for reference, call in calls.items() if now - call.started > self._patience_s(call, calls)]

    def _patience_s(self, call: _Call, calls: dict["ray.ObjectRef", _Call]) -> float:
        config = self._configs[call.key]
        queued = sum(other.key == call.key for other in calls.values())
        return 60.0 + config.timeout_s * config.max_attempts * max(1, queued)

    def _collect(
        self, reference: "ray.ObjectRef", call: _Call, calls: dict["ray.ObjectRef", _Call], *, timed_out: bool
    ) -> RewardScores | None:
        """Scores of a finished call; None when it was submitted again."""
        try:
            if not timed_out:
                return ray.get(reference)
            problem = "its worker hung"
        except RayActorError:
            problem = "its worker died"
        except RayTaskError as error:
            raise error.cause from None
        self._replace(call)
        if call.attempts < self._configs[call.key].max_attempts:
            call.attempts += 1
            self._submit(calls, call)
            return None
        size = len(call.group.trajectories)
        log.warning("reward %s: %s on %s; masked", call.key[1], problem, call.group.request.request_id)
        return RewardScores(values=np.zeros(size, np.float32), judged=np.zeros(size, np.bool_), problem=problem)

    def _replace(self, call: _Call) -> None:
        """Start another worker in the call's slot, unless an earlier call of the same worker already did."""
        if self._workers[call.key][call.slot] is not call.worker:
            return
        log.warning("reward worker %s %d is gone; starting another", call.key[1], call.slot)
        ray.kill(self._workers[call.key][call.slot])
        self.restarts += 1
        self._workers[call.key][call.slot] = self._start(call.key)

    def close(self) -> None:
        """End every worker."""
        for handle in itertools.chain.from_iterable(self._workers.values()):
            ray.kill(handle)
