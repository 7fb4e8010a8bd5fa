"""Learner ranks as Ray actors that start, work and end together."""

import logging
import socket
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from unirl.cluster.actor_log import ActorState, report_actor
from unirl.cluster.placement import Placement
from unirl.config import LearnerConfig
from unirl.monitoring.run_log import Report

log = logging.getLogger(__name__)

LAST_WORD_S = 10.0
"""After one rank's error: how long the others may take to show that they are dead, which is then the cause."""


class LearnerLostError(RuntimeError):
    """A rank died or hangs, and the gang was ended; the last committed checkpoint is whole."""


def own_address() -> tuple[str, int]:
    """This node and a free port of it, for rank 0 to listen on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


class Gang:
    """W actors of one class behind calls that return when all of them are done.

    The class has `address()`, which gives `own_address()` where the actor is, and `setup(*arguments, rank, address)`.
    """

    def __init__(
        self,
        actor: Any,
        learner: LearnerConfig,
        placement: Placement,
        timeout_s: float,
        *arguments: object,
        report: Report | None = None,
    ) -> None:
        """Start the actors and wait until all of them are set up; `report` is told of what becomes of them.

        Raises:
            RuntimeError: they are not up within `timeout_s`.
        """
        self._actor, self._learner, self._placement = actor, learner, placement
        self._timeout_s, self._arguments, self._report = timeout_s, arguments, report
        self._starts = 0
        self._ranks: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """End what is left of the ranks, start all of them anew in their places, and wait until they are set up.

        Raises:
            RuntimeError: they are not up in time.
            LearnerLostError: a rank died while it started.
        """
        self.close()
        learner, timeout_s = self._learner, self._timeout_s
        self._ranks = [
            self._actor.options(
                num_cpus=learner.num_cpus, num_gpus=learner.num_gpus, scheduling_strategy=self._placement.for_rank(rank)
            ).remote()
            for rank in range(learner.num_ranks)
        ]
        try:
            address = ray.get(self._ranks[0].address.remote(), timeout=timeout_s)
            calls = [rank.setup.remote(*self._arguments, index, address) for index, rank in enumerate(self._ranks)]
            self._answers(calls, "setup", timeout_s)
        except GetTimeoutError:
            raise RuntimeError(
                f"learner: expected {learner.num_ranks} ranks to be up within {timeout_s:g} s "
                "(cluster.start_timeout_s); some are not; look at their logs, or allow more time"
            ) from None
        except RayActorError as error:
            self._give_up("setup", f"a dead one ({error})", error)
        self._starts += 1
        self._tell("up" if self._starts == 1 else "restart")

    def _tell(self, state: ActorState) -> None:
        for rank in range(len(self._ranks)):
            report_actor(self._report, f"learner-{rank}", "learner", state)

    def all(self, method: str, *arguments: object) -> list[Any]:
        """Call every rank; the first failure ends the gang, since the others would wait for the lost rank.

        Raises:
            LearnerLostError: a rank died, or did not answer within `learner.timeout_s`.
        """
        return self._finish([getattr(rank, method).remote(*arguments) for rank in self._ranks], method)

    def stream(self, method: str) -> list["ray.ObjectRef"]:
        """Objects that rank 0 yields in a method which every rank goes through; they belong to this process.

        Raises:
            RuntimeError: a rank died.
        """
        streams = [getattr(rank, method).remote() for rank in self._ranks]
        self._finish([stream.completed() for stream in streams], method)
        yielded = [list(stream) for stream in streams]
        # An error that a rank raised is the last object of its stream.
        self._finish([objects[-1] for objects in yielded], method)
        return yielded[0]

    def _finish(self, calls: list["ray.ObjectRef"], method: str) -> list[Any]:
        try:
            return self._answers(calls, method, self._learner.timeout_s)
        except GetTimeoutError as error:
            self._give_up(method, f"no answer within {self._learner.timeout_s:g} s (learner.timeout_s)", error)

    def _answers(self, calls: list[Any], method: str, timeout_s: float) -> list[Any]:
        """What every rank returned; the error of one rank may only say that another one is gone."""
        try:
            return ray.get(calls, timeout=timeout_s)
        except RayTaskError as error:
            for call in calls:
                try:
                    ray.get(call, timeout=LAST_WORD_S)
                except RayActorError as dead:
                    self._give_up(method, f"a dead one ({dead})", dead)
                except (RayTaskError, GetTimeoutError):
                    continue
            raise error.cause from None
        except RayActorError as error:
            self._give_up(method, f"a dead one ({error})", error)

    def _give_up(self, method: str, got: str, error: BaseException) -> NoReturn:
        self._tell("down")
        self.close()
        raise LearnerLostError(
            f"learner: expected every rank to finish {method}; got {got}; the last committed checkpoint is whole: "
            "resume with --resume"
        ) from error

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer and `state`."""
        self.all("save", folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint; returns the state that was saved with it."""
        return self.all("restore", folder)[0]

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder in its public layout."""
        self.all("export", folder)

    def close(self) -> None:
        """End every rank."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
