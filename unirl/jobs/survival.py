"""A learner that outlives its ranks: a lost gang starts anew from the last commit and goes through the journal."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from unirl.cluster.gang import LearnerLostError
from unirl.config import RlConfig
from unirl.jobs.parts import Learners, Pairs, Published
from unirl.jobs.rebuild import redo_step
from unirl.jobs.run_dirs import last_step
from unirl.monitoring.run_log import Report, RunLog
from unirl.monitoring.sentinel_table import alert_fields, sentinel_of
from unirl.types import LearnerBatch

log = logging.getLogger(__name__)


class Gang(Learners, Protocol):
    """Ranks that can be started anew."""

    def restart(self) -> None:
        """End what is left of the ranks and start all of them, with the initial weights."""
        ...


def survive(gang: Gang, pairs: Pairs, config: RlConfig, record: RunLog) -> Learners:
    """The gang, watched over if the run keeps a journal to go through."""
    if not config.monitoring.journal or not config.learner.max_restarts:
        return gang
    run_dir = record.run_dir

    def redo(learner: Learners, step: int) -> object:
        return redo_step(learner, run_dir, step, pairs.batch(step - 1), config.algorithm)

    limit = config.learner.max_restarts
    return SurvivingLearner(gang, run_dir / "checkpoints", redo, limit=limit, report=record.event)


class SurvivingLearner:
    """Meets `Learners`. Its weights after a loss are those it had before, to the bit.

    What is needed for that is the last checkpoint, the journal of the steps since, and the newest batch, which is kept
    here until the step has its journal.
    """

    def __init__(
        self, gang: Gang, checkpoints: Path, redo: Callable[[Learners, int], object], *, limit: int, report: Report
    ) -> None:
        """Watch over a gang.

        Args:
            gang: the ranks.
            checkpoints: folder of the run's checkpoints.
            redo: makes the update of a recorded step once more.
            limit: losses after which the run ends.
            report: told of each loss.
        """
        self._gang, self._checkpoints, self._redo = gang, checkpoints, redo
        self._limit, self._report = limit, report
        self._losses, self._told, self._done = 0, 0, 0
        self._newest: tuple[int, LearnerBatch] | None = None
        self._published: tuple[int, str] | None = None

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One or more optimizer updates."""
        metrics = self._survive("update", lambda: self._gang.update(batch, step))
        self._done, self._newest = step, (step, batch)
        lost, self._told = self._losses - self._told, self._losses
        return metrics | ({"learner/num_restarts": float(lost)} if lost else {})

    def publish_weights(self) -> Published:
        """The current weights."""
        published: Published = self._survive("publish", self._gang.publish_weights)
        self._published = self._done, published.manifest.checksum
        return published

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint."""
        self._survive("save", lambda: self._gang.save(folder, step, state))

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint."""
        state = self._survive("restore", lambda: self._gang.restore(folder))
        self._done = state["step"]
        return state

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._survive("export", lambda: self._gang.export(folder))

    def _survive(self, name: str, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except LearnerLostError as loss:
                self._rebuild(name, loss)

    def _rebuild(self, name: str, loss: LearnerLostError) -> None:
        """A gang in the state after the last update that was answered."""
        while True:
            self._losses += 1
            if self._losses > self._limit:
                raise RuntimeError(f"{loss} ({self._losses} losses; learner.max_restarts is {self._limit})") from loss
            log.warning("%s; starting the gang anew", loss)
            started = time.perf_counter()
            try:
                self._gang.restart()
                has_checkpoint = last_step(self._checkpoints.parent) is not None
                saved = self._gang.restore(self._checkpoints)["step"] if has_checkpoint else 0
                for step in range(saved + 1, self._done + 1):
                    if self._newest is not None and self._newest[0] == step:
                        self._gang.update(self._newest[1], step)
                    else:
                        self._redo(self._gang, step)
                self._compare()
            except LearnerLostError as again:
                loss = again
                continue
            seconds = time.perf_counter() - started
            message = f"a learner rank was lost at {name}; the gang is back at step {self._done} after {seconds:.1f} s"
            fields = {"part": "learner", "from_step": saved, "to_step": self._done, "seconds": seconds}
            self._report("restart", message, fields)
            return

    def _compare(self) -> None:
        """Say when the gang came back with other weights than it had."""
        if self._published is None or self._published[0] != self._done:
            return
        found = self._gang.publish_weights().manifest.checksum
        if found != self._published[1]:
            message = f"after a loss step {self._done} has other weights than before: the ranks compute otherwise"
            fields = alert_fields(sentinel_of("other_weights"), self._done)
            self._report("alert", message, fields | {"checksum": found, "recorded": self._published[1]})
