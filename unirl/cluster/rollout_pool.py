"""Units of work streamed to rollout workers: lost ones given to others, poison named, weights kept current.

Requests are cut into units, and their tokens seeded, by the requests alone: the number of workers, which may change on
the way, changes no token.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from unirl.cluster.placement import Placement
from unirl.cluster.rollout_workers import SERVES, Control, RolloutWorkers, Worker
from unirl.cluster.weight_broadcast import WeightBroadcast
from unirl.cluster.weight_sync import Publication, WeightStore
from unirl.config import RlConfig, SamplingConfig
from unirl.models.named_arrays import compare
from unirl.monitoring.phases import Activity
from unirl.monitoring.run_log import Report
from unirl.monitoring.step_data import SyncCheck
from unirl.rollout.completions import num_sampled
from unirl.rollout.units import units_of_work
from unirl.types import QuarantinedRequest, RolloutGroup, RolloutRequest, Task, WeightsManifest

log = logging.getLogger(__name__)

TICK_S = 1.0
MAX_FAILURES_IN_A_ROW = 2
"""A worker that fails so many units one after the other is replaced: it may be the one that is broken."""
HOPELESS = 4
"""So many quarantined requests before the first answer end the run."""


@dataclass(slots=True, eq=False)
class _Unit:
    requests: list[RolloutRequest]
    sampling: SamplingConfig
    attempts: int = 0
    reference: "ray.ObjectRef | None" = None
    waits_since: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        names = [request.request_id for request in self.requests]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


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


@dataclass(slots=True, frozen=True)
class _Handed:
    """A unit that a worker has."""

    worker: Worker
    unit: _Unit
    times: "ray.ObjectRef"
    """What the worker will say of the seconds that it took."""
    begin: float = field(default_factory=time.perf_counter)


class RolloutPool:
    """n text, m image and k two-task workers behind one `sample` call.

    One thread samples. Meanwhile another may call `load_weights(..., wait=False)` and `close`, and nothing else.
    """

    oldest_version: int | None
    """Groups sampled under older weights are refused and sampled again; None refuses all but the published ones."""

    def __init__(
        self,
        config: RlConfig,
        checkpoint: Path,
        placement: Placement | None,
        *,
        control: Control | None = None,
        in_flight_updates: bool = False,
        report: Report | None = None,
    ) -> None:
        """Start the configured workers; `starting` says when they are up.

        Args:
            config: all settings.
            checkpoint: folder of the weights to start from.
            placement: where colocated workers sit; None lets Ray choose.
            control: orders to change the number of workers.
            in_flight_updates: workers take over new weights in the middle of a unit.
            report: told of workers that are up, down or started anew.
        """
        self._config, self._control = config, control
        self._publication: Publication | None = None
        self._store = cast("ActorHandle", WeightStore.remote()) if in_flight_updates else None
        self._workers = RolloutWorkers(config, checkpoint, placement, control, self._store, report)
        self._broadcast = WeightBroadcast(config) if config.cluster.weight_transport == "broadcast" else None
        self.starting, self.scale, self.take_restarts = (
            self._workers.starting,
            self._workers.scale,
            self._workers.take_restarts,
        )
        self.oldest_version = None
        self._closed = False
        self.references = GroupReferences()
        self._busy: dict[ray.ObjectRef, _Handed] = {}
        self._activities: list[Activity] = []
        self._quarantined: list[QuarantinedRequest] = []
        self._failed: list[QuarantinedRequest] = []
        self._asked: dict[ray.ObjectRef, tuple[str, WeightsManifest]] = {}

    def tell_up(self) -> None:
        """Note that the first workers are up; whoever waited for them knows."""
        for worker in self._workers.up:
            self._workers.tell(worker, "up")

    def load_weights(self, publication: Publication, *, wait: bool = True) -> None:
        """Bring every worker to the published version; a worker that dies here is replaced.

        Args:
            publication: what the learner published.
            wait: return when all have it; else at once, and each gets it before its next unit, or, with in-flight
                updates, in the middle of one.

        Raises:
            ValueError: a sampler refused the manifest.
        """
        self._publication = self._workers.publication = publication
        if self._store is not None:
            self._store.publish.remote(publication)
        if not wait:
            return
        if self._broadcast is not None and publication.source is not None:
            problems = self._broadcast.send(publication, self._workers.up)
            if problems:
                self._note(f"weights {publication.policy_version} were not broadcast to all: {'; '.join(problems)}")
        self._load(publication, [worker for worker in self._workers.up if worker.sent != publication.identity])
        for worker in self._workers.up:
            self._ask(worker, publication)

    def _load(self, publication: Publication, lacking: Sequence[Worker]) -> None:
        """Have workers fetch the publication, and wait until they have it."""
        pending = {worker.handle.load_weights.remote(publication): worker for worker in lacking}
        for reference, worker in pending.items():
            worker.sent = publication.identity
            try:
                version = ray.get(reference, timeout=self._config.rollout.timeout_s)
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise error.cause from None
                self._workers.replace(worker, f"did not load weights ({error.cause})")
            except (RayActorError, GetTimeoutError) as error:
                self._workers.replace(worker, f"did not load weights ({type(error).__name__})")
            else:
                assert version == publication.policy_version, f"{worker.name} reports weights {version}"

    def _note(self, message: str) -> None:
        log.warning("%s", message)
        if self._control is not None:
            self._control.note(message)

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterator[RolloutGroup]:
        """Groups as their units finish, in no fixed order; every request is answered exactly once.

        A unit that failed `rollout.max_attempts` times is cut into its requests; one that fails as often again, alone,
        is quarantined: it gets no group, and `take_quarantined` names it.

        Raises:
            ValueError: a request that no sampler can serve, such as too long a prompt.
            RuntimeError: no worker is left for a task, or requests fail and none is answered.
        """
        todo = deque(self._units(requests, sampling))
        self._failed, answered = [], False
        self._workers.start_missing()
        try:
            while todo or self._busy:
                if self._closed:
                    raise RuntimeError("rollout: the run ends; what was being sampled is given up")
                self._workers.tick(self._idle())
                self._check_served({unit.requests[0].task for unit in todo})
                self._hand_out(todo)
                for groups in self._finished(todo):
                    answered = answered or bool(groups)
                    yield from groups
                self._give_up_overdue(todo)
                none_left = not (todo or self._busy) and len(self._failed) == len(requests) > 1
                if not answered and (len(self._failed) >= HOPELESS or none_left):
                    raise RuntimeError(
                        f"rollout: expected answers; got none, and {len(self._failed)} requests that failed; first "
                        f"{self._failed[0].request_id}, {self._failed[0].attempts} times; last error: "
                        f"{self._failed[-1].error}; look at the worker's log, or raise rollout.max_attempts"
                    )
        finally:
            self._busy.clear()
        if self._workers.are_colocated:
            # Until they are back at work the learner may have the GPUs that they share.
            resting: list[ray.ObjectRef] = [worker.handle.rest.remote() for worker in self._workers.up]
            ray.wait(resting, num_returns=len(resting), timeout=self._config.rollout.timeout_s)

    def _units(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[_Unit]:
        """Units of work; only where rollouts need not be deterministic do they depend on the number of workers."""
        size = self._config.rollout.sequences_per_unit
        if not self._config.rollout.deterministic:
            size = min(size, -(-sum(len(r.seeds) for r in requests) // max(1, len(self._workers.all))))
        return [_Unit(unit, sampling) for unit in units_of_work(requests, size)]

    def _check_served(self, tasks: set[Task]) -> None:
        served = {task for worker in self._workers.all for task in SERVES[worker.role]}
        if missing := tasks - served:
            raise RuntimeError(
                f"rollout: expected a worker for {sorted(missing)}; got {[w.name for w in self._workers.all]}; set "
                "rollout.text, rollout.image or rollout.both num_workers, and see the logs of workers that ended"
            )

    def _hand_out(self, todo: deque[_Unit]) -> None:
        for worker in self._idle():
            unit = next((u for u in todo if u.requests[0].task in SERVES[worker.role]), None)
            if unit is None:
                continue
            todo.remove(unit)
            unit.reference = unit.reference or ray.put(unit.requests)
            publication = self._publication
            if publication is not None and publication.identity == worker.sent:
                publication = None
            sample = cast("Any", worker.handle).sample
            reference, times = sample.remote(unit.reference, unit.sampling, publication)
            if publication is not None:
                worker.sent = publication.identity
                self._ask(worker, publication)
            self._busy[reference] = _Handed(worker, unit, times)

    def _idle(self) -> list[Worker]:
        busy = {id(handed.worker) for handed in self._busy.values()}
        return [worker for worker in self._workers.up if id(worker) not in busy]

    def _finished(self, todo: deque[_Unit]) -> Iterator[list[RolloutGroup]]:
        """Groups of each unit that is done; waits for one, or for a worker that comes up, or until the next tick."""
        awaited = [*self._busy, *self._workers.coming]
        if not awaited:
            return
        done, _ = ray.wait(awaited, num_returns=1, timeout=TICK_S)
        for reference in done:
            if reference in self._busy:
                yield self._collect(reference, self._busy.pop(reference), todo)

    def _collect(self, reference: "ray.ObjectRef", handed: _Handed, todo: deque[_Unit]) -> list[RolloutGroup]:
        worker, unit = handed.worker, handed.unit
        try:
            groups, seconds = ray.get([reference, handed.times])
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                # The requests themselves are at fault: another try would say the same.
                raise error.cause from None
            worker.failures += 1
            worker.sent = None
            if worker.failures >= MAX_FAILURES_IN_A_ROW:
                self._workers.replace(worker, f"failed {worker.failures} units in a row")
            self._requeue(unit, todo, error.cause)
            return []
        except RayActorError as error:
            self._workers.replace(worker, "died")
            self._requeue(unit, todo, error)
            return []
        except RayError as error:  # the answer was lost with the node that held it
            self._requeue(unit, todo, error)
            return []
        worker.failures = 0
        self._note_activity(handed, groups, seconds)
        if not self._is_current(groups, worker, unit, todo):
            return []
        self.references.remember(reference, groups)
        return groups

    def _note_activity(self, handed: _Handed, groups: Sequence[RolloutGroup], seconds: dict[str, float]) -> None:
        tokens, images = num_sampled(groups)
        self._activities.append(
            Activity(
                role=f"rollout.{handed.worker.role}",
                begin=handed.begin,
                end=time.perf_counter(),
                seconds=seconds,
                waited_s=handed.begin - handed.unit.waits_since,
                num_requests=len(handed.unit.requests),
                num_tokens=tokens,
                num_images=images,
            )
        )

    def take_activities(self) -> list[Activity]:
        """The units that workers sampled since the last call."""
        activities, self._activities = self._activities, []
        return activities

    def _is_current(self, groups: Sequence[RolloutGroup], worker: Worker, unit: _Unit, todo: deque[_Unit]) -> bool:
        """Whether the weights that sampled are new enough; if not, the unit is on its way again."""
        if self._publication is None:
            return True
        version = min(t.policy_version for group in groups for t in group.trajectories)
        if worker.sent is not None and version < worker.sent[0]:
            stale = f"sampled with weights {version} instead of {worker.sent[0]}"
            self._workers.replace(worker, stale)
            self._requeue(unit, todo, RuntimeError(stale))
            return False
        oldest = self._publication.policy_version if self.oldest_version is None else self.oldest_version
        if version < oldest:
            # Newer weights are wanted than when the unit was handed out, which is nobody's fault.
            log.info("unit %s was sampled with weights %d; expected %d or newer, sampled again", unit, version, oldest)
            unit.waits_since = time.perf_counter()
            todo.appendleft(unit)
        return version >= oldest

    def _requeue(self, unit: _Unit, todo: deque[_Unit], error: BaseException) -> None:
        unit.attempts += 1
        unit.waits_since = time.perf_counter()
        if unit.attempts < self._config.rollout.max_attempts:
            log.warning("unit %s failed (%s), requeued", unit, error)
            todo.appendleft(unit)
        elif len(unit.requests) > 1:
            log.warning("unit %s failed %d times (%s); its requests are tried alone", unit, unit.attempts, error)
            todo.extendleft(_Unit([request], unit.sampling) for request in reversed(unit.requests))
        else:
            (request,) = unit.requests
            log.warning("request %s failed %d times (%s); quarantined", unit, unit.attempts, error)
            self._failed.append(
                QuarantinedRequest(
                    request_id=request.request_id,
                    pair_id=request.pair_id,
                    task=request.task,
                    num_completions=len(request.seeds),
                    attempts=unit.attempts,
                    error=f"{type(error).__name__}: {error}",
                )
            )
            self._quarantined.append(self._failed[-1])

    def _give_up_overdue(self, todo: deque[_Unit]) -> None:
        limit_s = self._config.rollout.timeout_s
        now = time.perf_counter()
        for reference in [r for r, handed in self._busy.items() if now - handed.begin > limit_s]:
            handed = self._busy.pop(reference)
            self._workers.replace(handed.worker, "hung")
            self._requeue(handed.unit, todo, TimeoutError(f"no answer within {limit_s:g} s (rollout.timeout_s)"))

    def _ask(self, worker: Worker, publication: Publication) -> None:
        """Have a worker look at its own weights, once it has those of the publication, for `take_sync_check`.

        The publication itself is not kept: its buckets would stay in the object store.
        """
        self._asked[worker.handle.weight_slices.remote()] = worker.name, publication.manifest

    def take_sync_check(self) -> SyncCheck:
        """What workers, asked for their own weights, have answered since the last call."""
        done = ray.wait([*self._asked], num_returns=len(self._asked), timeout=0)[0] if self._asked else []
        stale, compared = set[str](), list[int]()
        for reference in done:
            name, manifest = self._asked.pop(reference)
            try:
                identity, held = ray.get(reference)
            except RayTaskError:
                log.warning("%s: its weights could not be compared with the published ones", name, exc_info=True)
                stale.add(name)
                continue
            except RayError:
                continue  # the worker is gone, and replaced
            if identity is None or identity[0] < manifest.policy_version:
                stale.add(name)
            elif held is not None and identity == (manifest.policy_version, manifest.checksum):
                found = compare(manifest, held)
                compared.append(found.num_compared)
                if found.is_stale:
                    stale.add(name)
        return SyncCheck(tuple(sorted(stale)), min(compared, default=None))

    def take_quarantined(self) -> list[QuarantinedRequest]:
        """Requests that got no group, since the last call."""
        quarantined, self._quarantined = self._quarantined, []
        return quarantined

    def close(self) -> None:
        """End every worker; a thread that is sampling gets an error."""
        self._closed = True
        self._workers.close()
        if self._store is not None:
            ray.kill(self._store)
