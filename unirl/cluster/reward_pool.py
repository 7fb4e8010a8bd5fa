"""Reward workers as Ray actors. A reward that fails or dies masks the group it was scoring, and nothing else."""

import itertools
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray.actor import ActorHandle, exit_actor
from ray.exceptions import RayActorError, RayTaskError

from unirl.cluster.actor_log import open_actor_log, open_heartbeat, report_actor
from unirl.cluster.rollout_pool import TICK_S, GroupReferences
from unirl.config import RewardConfig, RewardsConfig
from unirl.monitoring.phases import Activity
from unirl.monitoring.run_log import Report
from unirl.rewards.isolation import MAX_HUNG
from unirl.rewards.reward import combine
from unirl.types import TASKS, RewardScores, RolloutGroup, ScoredGroup, Task

log = logging.getLogger(__name__)


MARGIN_S = 60.0
"""Beyond a reward's own limits: what starting a worker and moving a group may take."""

Key = tuple[Task, str]
"""Task and reward name."""


@ray.remote(max_restarts=0)
class RewardWorker:
    """One reward with its cache, retries and time limit."""

    def __init__(self, name: str, config: RewardConfig, actor: str) -> None:
        open_actor_log(actor)
        self._beat = open_heartbeat(actor, f"reward.{name}")
        from unirl.rewards.isolation import IsolatedReward

        self._reward = IsolatedReward(name, config)
        self._beat.state = "idle"
        log.info("the reward %s is up", name)

    def ready(self) -> None:
        """Return once the reward is built."""

    @ray.method(num_returns=2)
    def score(self, groups: list[RolloutGroup], index: int) -> tuple[RewardScores, float]:
        """Score one group of a unit, which arrives by reference; also the seconds that it took."""
        if self._reward.num_hung >= MAX_HUNG:
            # Threads stuck outside Python cannot be ended; the process can, and the pool then starts another.
            exit_actor()
        started = time.perf_counter()
        with self._beat.at("scoring"):
            scores = self._reward.score(groups[index])
        self._beat.num_done += len(scores.values)
        return scores, time.perf_counter() - started


@dataclass(slots=True, eq=False)
class _Call:
    key: Key
    group: RolloutGroup
    place: tuple["ray.ObjectRef", int]
    worker: ActorHandle
    attempts: int = 1
    times: "ray.ObjectRef | None" = None
    """What the worker will say of the seconds that it took."""
    submitted: float = 0.0


class RewardPool:
    """All rewards of both tasks; k actors each, served in turn. A worker scores its calls in the order they came."""

    def __init__(self, config: RewardsConfig, references: GroupReferences, report: Report | None = None) -> None:
        """Start the configured workers; `starting` says when they are up.

        Args:
            config: the run's.
            references: where each group lies.
            report: told of workers that are up or started anew.
        """
        self._references, self._report = references, report
        self._configs: dict[Key, RewardConfig] = {
            (task, name): reward for task in TASKS for name, reward in config.active(task).items()
        }
        self._workers: dict[Key, list[ActorHandle]] = {
            key: [self._start(key, slot) for slot in range(reward.num_workers)] for key, reward in self._configs.items()
        }
        self._weights = {task: {n: c.weight for (t, n), c in self._configs.items() if t == task} for task in TASKS}
        self._turn = itertools.count()
        self._progress: dict[ActorHandle, float] = {}
        """When each worker last began or finished a call."""
        self._restarts = 0
        self._activities: list[Activity] = []
        self._free: dict[ActorHandle, float] = {}
        """When each worker was done with its last call, as far as the driver can tell."""

    def _start(self, key: Key, slot: int) -> ActorHandle:
        reward = self._configs[key]
        options = {"num_cpus": reward.num_cpus, "num_gpus": reward.num_gpus}
        actor = self._actor_of(key, slot)
        return cast("ActorHandle", RewardWorker.options(**options).remote(key[1], reward, actor))

    def _actor_of(self, key: Key, slot: int) -> str:
        """Name of a worker; rewards of one name for both tasks are numbered through."""
        before = itertools.takewhile(lambda other: other != key, self._configs)
        return f"reward-{key[1]}-{slot + sum(self._configs[k].num_workers for k in before if k[1] == key[1])}"

    def starting(self) -> dict[str, "ray.ObjectRef"]:
        """What each worker answers once it is up, by its name."""
        return {
            f"reward.{key[1]} {slot}": handle.ready.remote()
            for key, handles in self._workers.items()
            for slot, handle in enumerate(handles)
        }

    def tell_up(self) -> None:
        """Note that the first workers are up; whoever waited for them knows."""
        for key, handles in self._workers.items():
            for slot in range(len(handles)):
                report_actor(self._report, self._actor_of(key, slot), f"reward.{key[1]}", "up")

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]:
        """Score groups as they arrive, while later ones are still being sampled; sorted by request id."""
        calls: dict[ray.ObjectRef, _Call] = {}
        found: dict[str, tuple[RolloutGroup, dict[str, RewardScores]]] = {}
        for group in groups:
            found[group.request.request_id] = (group, {})
            place = self._references.take(group)
            for key, workers in self._workers.items():
                if key[0] == group.request.task:
                    self._submit(calls, _Call(key, group, place, workers[next(self._turn) % len(workers)]))
            self._collect(calls, found, wait_s=0.0)
        while calls:
            self._collect(calls, found, wait_s=TICK_S)
        scored = [combine(group, parts, self._weights[group.request.task]) for group, parts in found.values()]
        return sorted(scored, key=lambda s: s.group.request.request_id)

    def _submit(self, calls: dict["ray.ObjectRef", _Call], call: _Call) -> None:
        if not any(other.worker is call.worker for other in calls.values()):
            self._progress[call.worker] = time.monotonic()
        reference, index = call.place
        scores, call.times = cast("Any", call.worker).score.remote(reference, index)
        call.submitted = time.perf_counter()
        calls[scores] = call

    def _collect(
        self,
        calls: dict["ray.ObjectRef", _Call],
        found: dict[str, tuple[RolloutGroup, dict[str, RewardScores]]],
        *,
        wait_s: float,
    ) -> None:
        """Take in what is finished, then replace workers that died or hang and give their calls to others."""
        done, _ = ray.wait(list(calls), num_returns=1 if wait_s else len(calls), timeout=wait_s)
        lost: dict[ActorHandle, str] = {}
        for reference in done:
            call = calls[reference]
            try:
                scores, seconds = ray.get(cast("Any", [reference, call.times]))
            except RayActorError:
                lost[call.worker] = "its worker died"
                continue
            except RayTaskError as error:
                raise error.cause from None
            del calls[reference]
            self._progress[call.worker] = time.monotonic()
            self._note_activity(call, seconds)
            found[call.group.request.request_id][1][call.key[1]] = scores
        for worker, problem in (self._hung(calls, set(done)) | lost).items():
            self._give_to_another(worker, problem, calls, found)

    def _note_activity(self, call: _Call, seconds: float) -> None:
        # A worker takes its calls one after the other, in the order in which they are collected.
        begin = max(call.submitted, self._free.get(call.worker, 0.0))
        end = time.perf_counter()
        self._free[call.worker] = min(begin + seconds, end)
        self._activities.append(
            Activity(
                role=f"reward.{call.key[1]}",
                begin=begin,
                end=end,
                seconds={"reward": seconds},
                waited_s=begin - call.submitted,
            )
        )

    def take_activities(self) -> list[Activity]:
        """The groups that workers scored since the last call."""
        activities, self._activities = self._activities, []
        return activities

    def _hung(self, calls: dict["ray.ObjectRef", _Call], done: set["ray.ObjectRef"]) -> dict[ActorHandle, str]:
        """Workers whose present call outlasts even the worker's own limits."""
        present: dict[ActorHandle, tuple[ray.ObjectRef, _Call]] = {}
        for reference, call in calls.items():
            present.setdefault(call.worker, (reference, call))
        now, hung = time.monotonic(), {}
        for worker, (reference, call) in present.items():
            config = self._configs[call.key]
            patience_s = MARGIN_S + config.timeout_s * config.max_attempts
            late = now - self._progress[worker] > patience_s and reference not in done
            if late and not ray.wait([reference], timeout=0)[0]:
                hung[worker] = "its worker hung"
        return hung

    def _give_to_another(
        self,
        worker: ActorHandle,
        problem: str,
        calls: dict["ray.ObjectRef", _Call],
        found: dict[str, tuple[RolloutGroup, dict[str, RewardScores]]],
    ) -> None:
        """Replace a worker. Only the call it was at counts a try; when its tries are used up, its group is masked."""
        theirs = [(reference, call) for reference, call in calls.items() if call.worker is worker]
        another = self._replace(theirs[0][1].key, worker)
        for number, (reference, call) in enumerate(theirs):
            del calls[reference]
            call.worker = another
            call.attempts += number == 0
            if call.attempts <= self._configs[call.key].max_attempts:
                self._submit(calls, call)
                continue
            size = len(call.group.trajectories)
            log.warning("reward %s: %s on %s; masked", call.key[1], problem, call.group.request.request_id)
            masked = RewardScores(values=np.zeros(size, np.float32), judged=np.zeros(size, np.bool_), problem=problem)
            found[call.group.request.request_id][1][call.key[1]] = masked

    def _replace(self, key: Key, worker: ActorHandle) -> ActorHandle:
        log.warning("a worker of reward %s is gone or hangs; starting another", key[1])
        ray.kill(worker)
        self._restarts += 1
        self._progress.pop(worker, None)
        slot = next(index for index, handle in enumerate(self._workers[key]) if handle is worker)
        self._free.pop(worker, None)
        self._workers[key][slot] = self._start(key, slot)
        report_actor(self._report, self._actor_of(key, slot), f"reward.{key[1]}", "restart")
        return self._workers[key][slot]

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    def close(self) -> None:
        """End every worker."""
        for handle in itertools.chain.from_iterable(self._workers.values()):
            ray.kill(handle)
