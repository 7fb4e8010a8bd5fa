"""Rollout workers as Ray actors: units of work streamed to them, dead and hung ones replaced, weights kept current.

The number of workers may change while a run goes on. Requests are cut into units, and their tokens seeded, by the
requests alone, so that it changes no token.
"""

import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from unirl.cluster.placement import Placement
from unirl.cluster.plan import cluster_address
from unirl.cluster.rollout_worker import RolloutWorker
from unirl.cluster.weight_sync import Identity, Publication, WeightStore
from unirl.cluster.weight_transport import Membership
from unirl.config import RlConfig, SamplingConfig, WorkersConfig
from unirl.monitoring.control import ScaleOrder, State
from unirl.rollout.units import units_of_work
from unirl.types import QuarantinedRequest, RolloutGroup, RolloutRequest, Task

log = logging.getLogger(__name__)

SERVES: dict[str, tuple[Task, ...]] = {
    "text": ("understanding",),
    "image": ("generation",),
    "both": ("understanding", "generation"),
}
TICK_S = 1.0
MAX_FAILURES_IN_A_ROW = 2
"""A worker that fails so many units one after the other is replaced: it may be the one that is broken."""
HOPELESS = 4
"""So many quarantined requests before the first answer end the run."""


class Control(Protocol):
    """Where orders to change the number of workers come from."""

    def poll(self) -> ScaleOrder | None:
        """An order not seen before."""
        ...

    def answer(self, order: ScaleOrder, state: State, message: str, workers: Mapping[str, int]) -> None:
        """Say what becomes of it, and how many workers of each role are up."""
        ...

    def note(self, message: str) -> None:
        """Add to the run's events what went otherwise than wanted with the weights."""
        ...


@dataclass(slots=True, eq=False)
class _Worker:
    role: str
    index: int
    handle: ActorHandle
    coming: "ray.ObjectRef | None"
    """Answered once it is up; None from then on."""
    started: float
    is_extra: bool = False
    """Asked for while the run went on."""
    starts: int = 1
    """Times it was started, of which the last counts."""
    sent: Identity | None = None
    """The weights that it was last sent."""
    failures: int = 0
    """Units that failed one after the other."""

    @property
    def name(self) -> str:
        return f"rollout.{self.role} {self.index}"


@dataclass(slots=True, eq=False)
class _Unit:
    requests: list[RolloutRequest]
    sampling: SamplingConfig
    attempts: int = 0
    reference: "ray.ObjectRef | None" = None

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


class RolloutPool:
    """n text, m image and k two-task workers behind one `sample` call.

    One thread samples. Meanwhile another may call `load_weights(..., wait=False)` and nothing else.
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
    ) -> None:
        """Start the configured workers; `starting` says when they are up.

        Args:
            config: all settings.
            checkpoint: folder of the weights to start from.
            placement: where colocated workers sit; None lets Ray choose.
            control: orders to change the number of workers.
            in_flight_updates: workers take over new weights in the middle of a unit.
        """
        self._config, self._checkpoint, self._placement, self._control = config, checkpoint, placement, control
        self._publication: Publication | None = None
        self._store = cast("ActorHandle", WeightStore.remote()) if in_flight_updates else None
        self.oldest_version = None
        self.references = GroupReferences()
        self._quarantined: list[QuarantinedRequest] = []
        self._failed: list[QuarantinedRequest] = []
        self._restarts = 0
        self._members: list[ActorHandle] = []
        self._group_key = ""
        self._order: ScaleOrder | None = None
        self._busy: dict[ray.ObjectRef, tuple[_Worker, _Unit, float]] = {}
        self._wanted: dict[str, int] = {role: getattr(config.rollout, role).num_workers for role in SERVES}
        self._workers: list[_Worker] = []
        for role, count in self._wanted.items():
            self._workers += [self._start(role, len(self._workers) + index) for index in range(count)]
        for worker in self._workers:
            # Whoever waits for the first workers does so through `starting`; their calls queue up meanwhile.
            worker.coming = None

    def _start(self, role: str, index: int, *, is_extra: bool = False) -> _Worker:
        workers: WorkersConfig = getattr(self._config.rollout, role)
        options: dict[str, object] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus}
        if self._placement is not None and (strategy := self._placement.for_rollout(index)) is not None:
            options["scheduling_strategy"] = strategy
        arguments = (self._config.model, self._checkpoint, self._config.rollout, role, f"{role}-{index}")
        handle = cast("ActorHandle", RolloutWorker.options(**options).remote(*arguments, rests=self._colocated))
        if self._store is not None:
            handle.watch.remote(self._store)
        publication = self._publication
        coming = handle.ready.remote() if publication is None else handle.load_weights.remote(publication)
        sent = None if publication is None else publication.identity
        return _Worker(role, index, handle, coming, time.monotonic(), is_extra, sent=sent)

    def starting(self) -> dict[str, "ray.ObjectRef"]:
        """What each worker answers once it is up, by its name."""
        return {worker.name: worker.handle.ready.remote() for worker in self._workers}

    def load_weights(self, publication: Publication, *, wait: bool = True) -> None:
        """Bring every worker to the published version; a worker that dies here is replaced.

        Args:
            publication: what the learner published.
            wait: return when all have it; else at once, and each gets it before its next unit, or, with in-flight
                updates, in the middle of one.

        Raises:
            ValueError: a sampler refused the manifest.
        """
        self._publication = publication
        if self._store is not None:
            self._store.publish.remote(publication)
        if not wait:
            return
        if publication.source is not None and self._config.cluster.weight_transport == "broadcast":
            self._broadcast(publication, publication.source)
        waiting = [w for w in self._workers if w.coming is None and w.sent != publication.identity]
        pending = {w.handle.load_weights.remote(publication): w for w in waiting}
        for reference, worker in pending.items():
            worker.sent = publication.identity
            try:
                version = ray.get(reference, timeout=self._config.rollout.timeout_s)
            except (RayActorError, GetTimeoutError) as error:
                self._replace(worker, f"did not load weights ({type(error).__name__})")
                continue
            except RayTaskError as error:
                raise error.cause from None
            assert version == publication.policy_version, f"{worker.name} reports weights {version}"

    def _broadcast(self, publication: Publication, source: ActorHandle) -> None:
        """Rank 0 sends to all workers at once. Those that it does not reach are left to fetch them."""
        workers = [worker for worker in self._workers if worker.coming is None]
        members = [source, *(worker.handle for worker in workers)]
        timeout_s = self._config.cluster.broadcast_timeout_s
        problems: list[str] = []
        try:
            if members != self._members:
                self._members, self._group_key = members, uuid.uuid4().hex
            host, port = ray.get(source.open_store.remote(), timeout=timeout_s)
            place = Membership(
                key=self._group_key,
                host=host,
                port=port,
                rank=0,
                size=len(members),
                backend="nccl" if self._has_gpus() else "gloo",
                timeout_s=timeout_s,
            )
            calls = {source.broadcast.remote(place): "learner rank 0"}
            for rank, worker in enumerate(workers, start=1):
                calls[worker.handle.receive_weights.remote(publication, replace(place, rank=rank))] = worker.name
            # Members give each other up by themselves; three times for joining, a part, and loading.
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=3 * timeout_s)
            for (reference, name), worker in zip(calls.items(), [None, *workers], strict=True):
                problem = _why_not(reference) if reference in done else "did not answer"
                if problem:
                    problems.append(f"{name}: {problem}")
                elif worker is not None:
                    worker.sent = publication.identity
        except (RayError, GetTimeoutError) as error:
            problems.append(f"learner rank 0: {error}")
        if problems:
            self._members = []
            message = f"weights {publication.policy_version} were not broadcast to all ({'; '.join(problems)})"
            log.warning("%s; who lacks them fetches them", message)
            if self._control is not None:
                self._control.note(message)

    def _has_gpus(self) -> bool:
        workers = [getattr(self._config.rollout, worker.role) for worker in self._workers]
        return self._config.learner.num_gpus > 0 and all(own.num_gpus > 0 for own in workers)

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
        self._start_missing()
        try:
            while todo or self._busy:
                self._tick()
                self._check_served({unit.requests[0].task for unit in todo})
                self._hand_out(todo)
                for groups in self._finished(todo):
                    answered = answered or bool(groups)
                    yield from groups
                self._give_up_overdue(todo)
                if self._failed and not answered and (len(self._failed) >= HOPELESS or not (todo or self._busy)):
                    raise RuntimeError(
                        f"rollout: expected answers; got none, and {len(self._failed)} requests that failed; first "
                        f"{self._failed[0].request_id}, {self._failed[0].attempts} times; last error: "
                        f"{self._failed[-1].error}; look at the worker's log, or raise rollout.max_attempts"
                    )
        finally:
            self._busy.clear()
        if self._colocated:
            # Until they are back at work the learner may have the GPUs that they share.
            resting: list[ray.ObjectRef] = [worker.handle.rest.remote() for worker in self._workers]
            ray.wait(resting, num_returns=len(resting), timeout=self._config.rollout.timeout_s)

    def _units(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[_Unit]:
        """Units of work; only where rollouts need not be deterministic do they depend on the number of workers."""
        size = self._config.rollout.sequences_per_unit
        if not self._config.rollout.deterministic:
            size = min(size, -(-sum(len(r.seeds) for r in requests) // max(1, len(self._workers))))
        return [_Unit(unit, sampling) for unit in units_of_work(requests, size)]

    def _check_served(self, tasks: set[Task]) -> None:
        served = {task for worker in self._workers for task in SERVES[worker.role]}
        if missing := tasks - served:
            raise RuntimeError(
                f"rollout: expected a worker for {sorted(missing)}; got {[w.name for w in self._workers]}; set "
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
            reference = worker.handle.sample.remote(unit.reference, unit.sampling, publication)
            if publication is not None:
                worker.sent = publication.identity
            self._busy[reference] = (worker, unit, time.monotonic())

    def _idle(self) -> list[_Worker]:
        busy = {id(worker) for worker, _, _ in self._busy.values()}
        return [worker for worker in self._workers if worker.coming is None and id(worker) not in busy]

    def _finished(self, todo: deque[_Unit]) -> Iterator[list[RolloutGroup]]:
        """Groups of each unit that is done; waits for one, or for a worker that comes up, or until the next tick."""
        coming = [worker.coming for worker in self._workers if worker.coming is not None]
        if not (self._busy or coming):
            return
        done, _ = ray.wait([*self._busy, *coming], num_returns=1, timeout=TICK_S)
        for reference in done:
            if reference in self._busy:
                worker, unit, _ = self._busy.pop(reference)
                yield self._collect(reference, worker, unit, todo)

    def _collect(
        self, reference: "ray.ObjectRef", worker: _Worker, unit: _Unit, todo: deque[_Unit]
    ) -> list[RolloutGroup]:
        try:
            groups = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                # The requests themselves are at fault: another try would say the same.
                raise error.cause from None
            worker.failures += 1
            worker.sent = None
            if worker.failures >= MAX_FAILURES_IN_A_ROW:
                self._replace(worker, f"failed {worker.failures} units in a row")
            self._requeue(unit, todo, error.cause)
            return []
        except RayActorError as error:
            self._replace(worker, "died")
            self._requeue(unit, todo, error)
            return []
        except RayError as error:  # the answer was lost with the node that held it
            self._requeue(unit, todo, error)
            return []
        worker.failures = 0
        if not self._is_current(groups, worker, unit, todo):
            return []
        self.references.remember(reference, groups)
        return groups

    def _is_current(self, groups: Sequence[RolloutGroup], worker: _Worker, unit: _Unit, todo: deque[_Unit]) -> bool:
        """Whether the weights that sampled are new enough; if not, the unit is on its way again."""
        if self._publication is None:
            return True
        version = min(t.policy_version for group in groups for t in group.trajectories)
        if worker.sent is not None and version < worker.sent[0]:
            stale = f"sampled with weights {version} instead of {worker.sent[0]}"
            self._replace(worker, stale)
            self._requeue(unit, todo, RuntimeError(stale))
            return False
        oldest = self._publication.policy_version if self.oldest_version is None else self.oldest_version
        if version < oldest:
            # Newer weights are wanted than when the unit was handed out, which is nobody's fault.
            log.info("unit %s was sampled with weights %d; expected %d or newer, sampled again", unit, version, oldest)
            todo.appendleft(unit)
        return version >= oldest

    def _requeue(self, unit: _Unit, todo: deque[_Unit], error: BaseException) -> None:
        unit.attempts += 1
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
        now = time.monotonic()
        for reference in [r for r, (_, _, started) in self._busy.items() if now - started > limit_s]:
            worker, unit, _ = self._busy.pop(reference)
            self._replace(worker, "hung")
            self._requeue(unit, todo, TimeoutError(f"no answer within {limit_s:g} s (rollout.timeout_s)"))

    def _replace(self, worker: _Worker, why: str) -> None:
        log.warning("worker %s %s; starting another", worker.name, why)
        ray.kill(worker.handle)
        self._restarts += 1
        place = self._workers.index(worker)
        self._workers[place] = self._start(worker.role, worker.index)

    def scale(self, counts: Mapping[str, int]) -> None:
        """Have so many workers of each named role from now on.

        New ones start in the background, load the newest weights, and take work once they are up. Those that are too
        many leave when they have no unit, and when others that are up serve their tasks.

        Raises:
            ValueError: why it cannot be done; nothing is changed.
        """
        wanted = {role: counts.get(role, count) for role, count in self._wanted.items()}
        if unknown := sorted(counts.keys() - wanted.keys()) or [r for r, count in wanted.items() if count < 0]:
            raise ValueError(f"scale: expected counts of {', '.join(wanted)}, 0 or more; got {unknown}; correct it")
        if self._colocated:
            raise ValueError(
                "scale: expected workers with places of their own; got cluster.placement=colocated, where they share "
                "the learner's; start the run with cluster.placement=separate"
            )
        served, kept = ({t for r, n in some.items() if n for t in SERVES[r]} for some in (self._wanted, wanted))
        if served - kept:
            raise ValueError(
                f"scale: expected a worker for each task that is sampled; got none for {sorted(served - kept)}; keep "
                "one"
            )
        added = Counter(wanted) - Counter(self._wanted)
        self._check_room(added)
        self._wanted = wanted
        self._start_missing(are_extra=True)

    def _check_room(self, added: Mapping[str, int]) -> None:
        """Refuse what a Ray that was started for this run, and cannot grow, has no room for."""
        if cluster_address(self._config.cluster) is not None:
            return
        workers = {role: getattr(self._config.rollout, role) for role in added}
        free = ray.available_resources()
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed = sum(count * getattr(workers[role], key) for role, count in added.items())
            if needed > free.get(name, 0.0) + 1e-6:
                raise ValueError(
                    f"scale: expected {needed:g} free {name}s for {sum(added.values())} more workers; got "
                    f"{free.get(name, 0.0):g}; ask for fewer, lower {key} of the workers, or start the run with a "
                    f"higher cluster.num_cpus or on a larger cluster"
                )

    def _start_missing(self, *, are_extra: bool = False) -> None:
        for role, count in self._wanted.items():
            for _ in range(count - sum(worker.role == role for worker in self._workers)):
                index = min(set(range(len(self._workers) + 1)) - {worker.index for worker in self._workers})
                self._workers.append(self._start(role, index, is_extra=are_extra))

    def _tick(self) -> None:
        """Take orders, let workers in that are up and out that are too many."""
        order = self._control.poll() if self._control is not None else None
        if order is not None:
            self._obey(order)
        for worker in [worker for worker in self._workers if worker.coming is not None]:
            if problem := self._why_not_up(worker):
                self._give_up(worker, problem)
        coming = [worker for worker in self._workers if worker.coming is not None]
        for worker in [*coming, *reversed(self._idle())]:
            if self._is_surplus(worker):
                log.info("worker %s leaves", worker.name)
                ray.kill(worker.handle)
                self._workers.remove(worker)
        if self._order is not None and self._num_up() == +Counter(self._wanted):
            self._answer("joined", ", ".join(f"rollout.{role} {self._wanted[role]}" for role in self._order.counts))

    def _obey(self, order: ScaleOrder) -> None:
        before, self._order = self._wanted, order
        try:
            self.scale(order.counts)
        except ValueError as error:
            self._answer("refused", str(error))
            return
        changed = [f"rollout.{role} {before[role]} -> {self._wanted[role]}" for role in order.counts]
        self._answer("joining", ", ".join(changed))

    def _answer(self, state: State, message: str) -> None:
        """Tell whoever gave the present order; the last word on it when it is not "joining"."""
        assert self._control is not None
        assert self._order is not None
        self._control.answer(self._order, state, message, self._num_up())
        if state != "joining":
            self._order = None

    def _num_up(self) -> Counter[str]:
        return Counter(worker.role for worker in self._workers if worker.coming is None)

    def _why_not_up(self, worker: _Worker) -> str:
        """Let a worker in that is up; else say why it never will be, or nothing while there is hope."""
        limit_s = self._config.cluster.start_timeout_s
        assert worker.coming is not None
        if ray.wait([worker.coming], timeout=0)[0]:
            try:
                ray.get(worker.coming)
            except RayError as error:
                return f"did not start: {_last_line(error)}"
            worker.coming = None
        elif time.monotonic() - worker.started > limit_s:
            free = ray.available_resources()
            return f"was not up within {limit_s:g} s (cluster.start_timeout_s), with {free} free"
        return ""

    def _give_up(self, worker: _Worker, problem: str) -> None:
        """A worker that was asked for in mid-run is done without; one in place of another is tried again."""
        log.warning("worker %s %s", worker.name, problem)
        ray.kill(worker.handle)
        place = self._workers.index(worker)
        if not worker.is_extra and worker.starts < self._config.rollout.max_attempts:
            self._workers[place] = self._start(worker.role, worker.index)
            self._workers[place].starts = worker.starts + 1
            return
        del self._workers[place]
        if worker.is_extra:
            self._wanted[worker.role] -= 1
            if self._order is not None:
                self._answer("refused", f"{worker.name} {problem}; its log has the rest; going on without it")

    def _is_surplus(self, worker: _Worker) -> bool:
        """Whether its role has too many, and others that are up serve its tasks."""
        others = [other for other in self._workers if other is not worker]
        served = {task for other in others if other.coming is None for task in SERVES[other.role]}
        num_others = sum(other.role == worker.role for other in others)
        return num_others >= self._wanted[worker.role] and served.issuperset(SERVES[worker.role])

    @property
    def _colocated(self) -> bool:
        return self._placement is not None and self._placement.colocated

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    def take_quarantined(self) -> list[QuarantinedRequest]:
        """Requests that got no group, since the last call."""
        quarantined, self._quarantined = self._quarantined, []
        return quarantined

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            ray.kill(worker.handle)
        if self._store is not None:
            ray.kill(self._store)


def _why_not(reference: "ray.ObjectRef") -> str:
    """Why a finished call failed; empty when it did not.

    Raises:
        ValueError: a sampler refused the weights.
    """
    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        return _last_line(error)
    except RayError as error:
        return _last_line(error)
    return ""


def _last_line(error: RayError) -> str:
    """What went wrong; before it stands the traceback of the other process, which is in its log."""
    return str(error).strip().splitlines()[-1].strip()
