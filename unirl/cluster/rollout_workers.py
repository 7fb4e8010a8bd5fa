"""Which rollout workers there are: started, let in when they are up, replaced, and more or fewer of them on demand."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from unirl.cluster.actor_log import ActorState, report_actor
from unirl.cluster.placement import Placement
from unirl.cluster.plan import cluster_address
from unirl.cluster.rollout_worker import RolloutWorker
from unirl.cluster.weight_sync import Identity, Publication
from unirl.config import RlConfig, WorkersConfig
from unirl.monitoring.control import ScaleOrder, State
from unirl.monitoring.run_log import Report
from unirl.types import Task

log = logging.getLogger(__name__)

SERVES: dict[str, tuple[Task, ...]] = {
    "text": ("understanding",),
    "image": ("generation",),
    "both": ("understanding", "generation"),
}
"""Tasks of each role."""


class Control(Protocol):
    """Where orders to change the number of workers come from, and where the run's events go."""

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
class Worker:
    """One worker and what is known of it."""

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
        """As in messages."""
        return f"rollout.{self.role} {self.index}"

    @property
    def actor(self) -> str:
        """As its files are called; whoever takes its place has the same."""
        return f"rollout-{self.role}-{self.index}"


class RolloutWorkers:
    """The workers of a pool. `all` holds those that are coming too."""

    def __init__(
        self,
        config: RlConfig,
        checkpoint: Path,
        placement: Placement | None,
        control: Control | None,
        store: ActorHandle | None,
        report: Report | None = None,
    ) -> None:
        """Start the configured workers; `starting` says when they are up.

        Args:
            config: all settings.
            checkpoint: folder of the weights to start from.
            placement: where colocated workers sit; None lets Ray choose.
            control: orders to change the number of workers.
            store: where workers look for newer weights in the middle of a unit; None lets them not look.
            report: told of workers that are up, down or started anew.
        """
        self.config, self.checkpoint = config, checkpoint
        self._placement, self._control, self._store, self._report = placement, control, store, report
        self.publication: Publication | None = None
        """What a worker loads before it takes work."""
        self._order: ScaleOrder | None = None
        self._restarts = 0
        self._wanted: dict[str, int] = {role: getattr(config.rollout, role).num_workers for role in SERVES}
        self.all: list[Worker] = []
        for role, count in self._wanted.items():
            self.all += [self._start(role, len(self.all) + index) for index in range(count)]
        for worker in self.all:
            # Whoever waits for the first workers does so through `starting`; their calls queue up meanwhile.
            worker.coming = None

    @property
    def up(self) -> list[Worker]:
        """Those that take work."""
        return [worker for worker in self.all if worker.coming is None]

    @property
    def coming(self) -> list["ray.ObjectRef"]:
        """What the others answer once they are up."""
        return [worker.coming for worker in self.all if worker.coming is not None]

    @property
    def are_colocated(self) -> bool:
        """Whether they share the learner's GPUs."""
        return self._placement is not None and self._placement.colocated

    def starting(self) -> dict[str, "ray.ObjectRef"]:
        """What each worker answers once it is up, by its name."""
        return {worker.name: worker.handle.ready.remote() for worker in self.all}

    def tell(self, worker: Worker, state: ActorState, why: str = "") -> None:
        """Note in the run's events what became of a worker."""
        report_actor(self._report, worker.actor, f"rollout.{worker.role}", state, why)

    def _start(self, role: str, index: int, *, is_extra: bool = False) -> Worker:
        workers: WorkersConfig = getattr(self.config.rollout, role)
        options: dict[str, object] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus}
        if self._placement is not None and (strategy := self._placement.for_rollout(index)) is not None:
            options["scheduling_strategy"] = strategy
        arguments = (self.config.model, self.checkpoint, self.config.rollout, role, f"{role}-{index}")
        handle = cast("ActorHandle", RolloutWorker.options(**options).remote(*arguments, rests=self.are_colocated))
        if self._store is not None:
            handle.watch.remote(self._store)
        publication = self.publication
        coming = handle.ready.remote() if publication is None else handle.load_weights.remote(publication)
        sent = None if publication is None else publication.identity
        return Worker(role, index, handle, coming, time.monotonic(), is_extra, sent=sent)

    def start_missing(self, *, are_extra: bool = False) -> None:
        """Start as many as are wanted and not there, such as those that were given up before."""
        for role, count in self._wanted.items():
            for _ in range(count - sum(worker.role == role for worker in self.all)):
                index = min(set(range(len(self.all) + 1)) - {worker.index for worker in self.all})
                self.all.append(self._start(role, index, is_extra=are_extra))

    def replace(self, worker: Worker, why: str) -> None:
        """End a worker and start another in its place."""
        log.warning("worker %s %s; starting another", worker.name, why)
        ray.kill(worker.handle)
        self.tell(worker, "restart", why)
        self._restarts += 1
        self.all[self.all.index(worker)] = self._start(worker.role, worker.index)

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

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
        if self.are_colocated:
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
        self._check_room(Counter(wanted) - Counter(self._wanted))
        self._wanted = wanted
        self.start_missing(are_extra=True)

    def _check_room(self, added: Mapping[str, int]) -> None:
        """Refuse what a Ray that was started for this run, and cannot grow, has no room for."""
        if cluster_address(self.config.cluster) is not None:
            return
        free = ray.available_resources()
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed = sum(count * getattr(getattr(self.config.rollout, role), key) for role, count in added.items())
            if needed > free.get(name, 0.0) + 1e-6:
                raise ValueError(
                    f"scale: expected {needed:g} free {name}s for {sum(added.values())} more workers; got "
                    f"{free.get(name, 0.0):g}; ask for fewer, lower {key} of the workers, or start the run with a "
                    "higher cluster.num_cpus or on a larger cluster"
                )

    def tick(self, idle: Iterable[Worker]) -> None:
        """Take orders, let workers in that are up, and let those go that are too many and have nothing to do."""
        order = self._control.poll() if self._control is not None else None
        if order is not None:
            self._obey(order)
        coming = [worker for worker in self.all if worker.coming is not None]
        for worker in coming:
            if problem := self._why_not_up(worker):
                self._give_up(worker, problem)
        for worker in [*coming, *idle]:
            if worker in self.all and self._is_surplus(worker):
                log.info("worker %s leaves", worker.name)
                self.tell(worker, "down", "it is one too many")
                ray.kill(worker.handle)
                self.all.remove(worker)
        if self._order is not None and self.num_up() == +Counter(self._wanted):
            self._answer("joined", ", ".join(f"rollout.{role} {self._wanted[role]}" for role in self._order.counts))

    def num_up(self) -> Counter[str]:
        """Workers that take work, by role."""
        return Counter(worker.role for worker in self.up)

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
        self._control.answer(self._order, state, message, self.num_up())
        if state != "joining":
            self._order = None

    def _why_not_up(self, worker: Worker) -> str:
        """Let a worker in that is up; else say why it never will be, or nothing while there is hope."""
        limit_s = self.config.cluster.start_timeout_s
        assert worker.coming is not None
        if ray.wait([worker.coming], timeout=0)[0]:
            if problem := why_failed(worker.coming):
                return f"did not start: {problem}"
            worker.coming = None
            self.tell(worker, "up")
        elif time.monotonic() - worker.started > limit_s:
            free = ray.available_resources()
            return f"was not up within {limit_s:g} s (cluster.start_timeout_s), with {free} free"
        return ""

    def _give_up(self, worker: Worker, problem: str) -> None:
        """A worker that was asked for in mid-run is done without; one in place of another is tried again."""
        log.warning("worker %s %s", worker.name, problem)
        ray.kill(worker.handle)
        place = self.all.index(worker)
        if not worker.is_extra and worker.starts < self.config.rollout.max_attempts:
            self.all[place] = self._start(worker.role, worker.index)
            self.all[place].starts = worker.starts + 1
            self.tell(worker, "restart", problem)
            return
        self.tell(worker, "down", problem)
        del self.all[place]
        if worker.is_extra:
            self._wanted[worker.role] -= 1
            if self._order is not None:
                self._answer("refused", f"{worker.name} {problem}; its log has the rest; going on without it")

    def _is_surplus(self, worker: Worker) -> bool:
        """Whether its role has too many, and others that are up serve its tasks."""
        others = [other for other in self.all if other is not worker]
        served = {task for other in others if other.coming is None for task in SERVES[other.role]}
        num_others = sum(other.role == worker.role for other in others)
        return num_others >= self._wanted[worker.role] and served.issuperset(SERVES[worker.role])

    def close(self) -> None:
        """End every worker."""
        for worker in self.all:
            ray.kill(worker.handle)


def why_failed(reference: "ray.ObjectRef") -> str:
    """Why a finished call failed, in one line; empty when it did not."""
    try:
        ray.get(reference)
    except RayError as error:
        # Before the last line stands the traceback of the other process, which is in its log.
        return str(error).strip().splitlines()[-1].strip()
    return ""
