"""Rollout workers as Ray actors: units of work streamed to them, dead and hung ones replaced, weights kept current."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from unirl.cluster.actor_log import open_actor_log
from unirl.cluster.placement import Placement
from unirl.cluster.weight_sync import Publication
from unirl.config import ModelConfig, RlConfig, RolloutConfig, SamplingConfig, WorkersConfig
from unirl.rollout.units import units_of_work
from unirl.types import RolloutGroup, RolloutRequest, Task

log = logging.getLogger(__name__)

Role = Literal["text", "image", "both"]
SERVES: dict[Role, tuple[Task, ...]] = {
    "text": ("understanding",),
    "image": ("generation",),
    "both": ("understanding", "generation"),
}
TICK_S = 5.0


@ray.remote(max_restarts=0)
class RolloutWorker:
    """One sampler with its in-process engine."""

    def __init__(self, model: ModelConfig, checkpoint: Path, rollout: RolloutConfig, role: Role, index: int) -> None:
        open_actor_log(f"rollout-{role}-{index}")
        from unirl.rollout.build import build_sampler

        log.info("building a %s sampler for %s of %s", rollout.backend, role, checkpoint)
        self._sampler = build_sampler(model, checkpoint, rollout, role)
        log.info("the sampler is up")

    def ready(self) -> None:
        """Return once the engine is up."""

    def sample(self, unit: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request."""
        return self._sampler.sample(unit, sampling)

    def load_weights(self, publication: Publication) -> int:
        """Take over the published weights; returns their version."""
        self._sampler.load_weights(publication.manifest, publication.tensors())
        return self._sampler.policy_version


@dataclass(slots=True, eq=False)
class _Worker:
    role: Role
    index: int
    handle: ActorHandle


@dataclass(slots=True, eq=False)
class _Unit:
    requests: list[RolloutRequest]
    sampling: SamplingConfig
    attempts: int = 0
    reference: "ray.ObjectRef | None" = None


@dataclass(slots=True)
class GroupReferences:
    """Where each finished group lies in the object store, so that scoring it moves no image a second time."""

    places: dict[str, tuple["ray.ObjectRef", int]] = field(default_factory=dict)

    def remember(self, reference: "ray.ObjectRef", groups: Sequence[RolloutGroup]) -> None:
        """Note the groups of one finished unit."""
        for index, group in enumerate(groups):
            self.places[group.request.request_id] = (reference, index)

    def take(self, group: RolloutGroup) -> tuple["ray.ObjectRef", int]:
        """The group's place; a group from elsewhere is put into the store."""
        place = self.places.pop(group.request.request_id, None)
        return place if place is not None else (ray.put([group]), 0)


class RolloutPool:
    """n text, m image and k two-task workers behind one `sample` call."""

    def __init__(self, config: RlConfig, checkpoint: Path, placement: Placement | None) -> None:
        self._config, self._checkpoint, self._placement = config, checkpoint, placement
        self._publication: Publication | None = None
        self.references = GroupReferences()
        self._restarts = 0
        roles: list[Role] = []
        for role in ("text", "image", "both"):
            roles += [role] * getattr(config.rollout, role).num_workers
        self._workers = [self._start(role, index) for index, role in enumerate(roles)]

    def _start(self, role: Role, index: int) -> _Worker:
        workers: WorkersConfig = getattr(self._config.rollout, role)
        options: dict[str, object] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus}
        if self._placement is not None and (strategy := self._placement.for_rollout(index)) is not None:
            options["scheduling_strategy"] = strategy
        arguments = (self._config.model, self._checkpoint, self._config.rollout, role, index)
        worker = _Worker(role, index, cast("ActorHandle", RolloutWorker.options(**options).remote(*arguments)))
        if self._publication is not None:
            worker.handle.load_weights.remote(self._publication)
        return worker

    def starting(self) -> dict[str, "ray.ObjectRef"]:
        """What each worker answers once it is up, by its name."""
        return {f"rollout.{worker.role} {worker.index}": worker.handle.ready.remote() for worker in self._workers}

    def load_weights(self, publication: Publication) -> None:
        """Bring every worker to the published version; a worker that dies here is replaced.

        Raises:
            ValueError: a sampler refused the manifest.
        """
        self._publication = publication
        pending = {worker.handle.load_weights.remote(publication): worker for worker in self._workers}
        for reference, worker in pending.items():
            try:
                version = ray.get(reference, timeout=self._config.rollout.timeout_s)
            except (RayActorError, GetTimeoutError) as error:
                self._replace(worker, f"did not load weights ({type(error).__name__})")
                continue
            except RayTaskError as error:
                raise error.cause from None
            assert version == publication.policy_version, f"worker {worker.index} reports weights {version}"

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterator[RolloutGroup]:
        """Groups as their units finish, in no fixed order; every request is answered exactly once.

        Raises:
            ValueError: a request that no sampler can serve, such as too long a prompt.
            RuntimeError: a unit failed `rollout.max_attempts` times; names its requests and the last error.
        """
        todo = deque(self._units(requests, sampling))
        self._check_served({unit.requests[0].task for unit in todo})
        idle = list(self._workers)
        busy: dict[ray.ObjectRef, tuple[_Worker, _Unit, float]] = {}
        while todo or busy:
            self._hand_out(todo, idle, busy)
            done, _ = ray.wait(list(busy), num_returns=1, timeout=TICK_S)
            for reference in done:
                worker, unit, _ = busy.pop(reference)
                groups = self._collect(reference, worker, unit, todo)
                idle.append(self._workers[worker.index])
                yield from groups
            for reference in self._overdue(busy):
                worker, unit, _ = busy.pop(reference)
                self._requeue(unit, todo, TimeoutError(f"no answer within {self._config.rollout.timeout_s:g} s"))
                self._replace(worker, "hung")
                idle.append(self._workers[worker.index])

    def _units(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[_Unit]:
        """Units of work; only where rollouts need not be deterministic do they depend on the number of workers."""
        size = self._config.rollout.sequences_per_unit
        if not self._config.rollout.deterministic:
            size = min(size, -(-sum(len(r.seeds) for r in requests) // len(self._workers)))
        return [_Unit(unit, sampling) for unit in units_of_work(requests, size)]

    def _check_served(self, tasks: set[Task]) -> None:
        served = {task for worker in self._workers for task in SERVES[worker.role]}
        if missing := tasks - served:
            raise RuntimeError(
                f"rollout: expected a worker for {sorted(missing)}; got roles {[w.role for w in self._workers]}; set "
                "rollout.text, rollout.image or rollout.both num_workers"
            )

    def _hand_out(self, todo: deque[_Unit], idle: list[_Worker], busy: dict) -> None:
        for worker in list(idle):
            unit = next((u for u in todo if u.requests[0].task in SERVES[worker.role]), None)
            if unit is None:
                continue
            todo.remove(unit)
            idle.remove(worker)
            unit.reference = unit.reference or ray.put(unit.requests)
            reference = worker.handle.sample.remote(unit.reference, unit.sampling)
            busy[reference] = (worker, unit, time.monotonic())

    def _collect(
        self, reference: "ray.ObjectRef", worker: _Worker, unit: _Unit, todo: deque[_Unit]
    ) -> list[RolloutGroup]:
        try:
            groups = ray.get(reference)
        except RayActorError as error:
            self._replace(worker, "died")
            self._requeue(unit, todo, error)
            return []
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                # The requests themselves are at fault: another try would say the same.
                raise error.cause from None
            self._requeue(unit, todo, error.cause)
            return []
        if stale := self._stale_version(groups):
            self._replace(worker, stale)
            self._requeue(unit, todo, RuntimeError(stale))
            return []
        self.references.remember(reference, groups)
        return groups

    def _stale_version(self, groups: Sequence[RolloutGroup]) -> str:
        """What is wrong with the weights that sampled these groups; empty when they are the published ones."""
        if self._publication is None:
            return ""
        wanted = self._publication.policy_version
        versions = {t.policy_version for group in groups for t in group.trajectories} - {wanted}
        return f"sampled with weights {sorted(versions)} instead of {wanted}" if versions else ""

    def _requeue(self, unit: _Unit, todo: deque[_Unit], error: BaseException) -> None:
        unit.attempts += 1
        names = [request.request_id for request in unit.requests]
        if unit.attempts >= self._config.rollout.max_attempts:
            raise RuntimeError(
                f"rollout: unit of {len(names)} requests ({names[0]} ... {names[-1]}) failed {unit.attempts} times; "
                f"last error: {error}; look at the worker's log, or raise rollout.max_attempts"
            ) from error
        log.warning("unit %s ... %s failed (%s), requeued", names[0], names[-1], error)
        todo.appendleft(unit)

    def _overdue(self, busy: dict) -> list["ray.ObjectRef"]:
        limit = time.monotonic() - self._config.rollout.timeout_s
        return [reference for reference, (_, _, started) in busy.items() if started < limit]

    def _replace(self, worker: _Worker, why: str) -> None:
        log.warning("rollout worker %d (%s) %s; starting another", worker.index, worker.role, why)
        ray.kill(worker.handle)
        self._restarts += 1
        self._workers[worker.index] = self._start(worker.role, worker.index)

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            ray.kill(worker.handle)
