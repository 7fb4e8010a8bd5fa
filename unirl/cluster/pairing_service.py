"""The pair source as one actor: it holds the pair set, hands out each step's batch once, and keeps the ledger."""

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from unirl.cluster.actor_log import open_actor_log, open_heartbeat, report_actor
from unirl.data.pair_source import PairSource, StepResult
from unirl.monitoring.durable_files import JsonLines, encode_line, write_atomic
from unirl.monitoring.run_log import Report
from unirl.types import PairRecord

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""For an answer, which takes milliseconds, or the time to read the pair set when the service has just started."""
MAX_TRIES = 3


@ray.remote(max_restarts=0, num_cpus=0)
class PairingActor:
    """Owns the pair source, and writes each finished step to the ledger before it answers."""

    def __init__(self, folder: Path, settings: dict[str, Any], ledger: Path | None, leased: Sequence[int]) -> None:
        open_actor_log("pairing")
        self._beat = open_heartbeat("pairing", "pairing")
        self._source = PairSource.open(folder, **settings)
        self._ledger: JsonLines | None = None
        if ledger is not None:
            read_ledger(ledger, self._source)
            self._ledger = JsonLines(ledger)
        for step in leased:
            if not self._source.is_finished(step):
                self._source.lease(step)
        self._beat.state = "idle"

    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return self._source.num_pairs()

    def batch(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of this step, without handing them out."""
        return self._source.batch(step)

    def lease(self, step: int, *, again: bool) -> tuple[PairRecord, ...]:
        """The pairs of this step, handed out once; a call that is made `again` may have been carried out before."""
        if again and self._source.is_leased(step):
            return self._source.batch(step)
        return self._source.lease(step)

    def record(self, step: int, results: Sequence[StepResult], *, again: bool) -> None:
        """Note what each pair earned; a call that is made `again` may have been carried out before."""
        if again and self._source.is_finished(step):
            return
        self._source.record(step, results)
        self._beat.num_done += 1
        if self._ledger is not None:
            self._ledger.append({"step": step, "results": [asdict(result) for result in results]})

    def state(self) -> dict[str, Any]:
        """Ledger and finished steps."""
        return self._source.state()

    def restore(self, state: dict[str, Any], ledger: Path | None) -> None:
        """Continue from a saved state, with which the ledger begins anew."""
        self._source.restore(state)
        if ledger is not None:
            write_atomic(ledger, encode_line({"state": state}))
            self._ledger = JsonLines(ledger)


class PairingService:
    """The driver's side of the actor. A dead or hung actor is replaced, and the next goes on from the ledger."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], ledger: Path | None = None, report: Report | None = None
    ) -> None:
        """Start the actor.

        Args:
            folder: the pair set.
            settings: those of `PairSource.open`.
            ledger: file that the service continues from when its process dies; begun anew here. None keeps none, and a
                dead service then ends the run.
            report: told of each loss.
        """
        self._arguments, self._ledger = (folder, settings, ledger), ledger
        self._leased: set[int] = set()
        self._num_pairs = 0
        self._replacing, self._report = threading.Lock(), report
        if ledger is not None:
            ledger.unlink(missing_ok=True)
        self._actor: Any = PairingActor.remote(*self._arguments, ())

    def tell_up(self) -> None:
        """Wait until the actor answers, and note that it is up."""
        self.num_pairs()
        report_actor(self._report, "pairing", "pairing", "up")

    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        self._num_pairs = self._num_pairs or self._call("num_pairs")
        return self._num_pairs

    def batch(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of this step, without handing them out."""
        return self._call("batch", step)

    def lease(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of this step."""
        leased = step in self._leased
        # Before the call: whoever replaces the actor meanwhile hands the step out to the next one.
        self._leased.add(step)
        try:
            return self._call("lease", step, marks_repeats=True)
        except RuntimeError:
            if not leased:
                self._leased.discard(step)
            raise

    def record(self, step: int, results: Sequence[StepResult]) -> None:
        """Note what each pair earned."""
        self._call("record", step, list(results), marks_repeats=True)
        self._leased.discard(step)

    def state(self) -> dict[str, Any]:
        """Ledger and finished steps, for a checkpoint."""
        return self._call("state")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self._leased.clear()
        self._call("restore", state, self._ledger)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def _call(self, method: str, *arguments: object, marks_repeats: bool = False) -> Any:
        """What the actor returned, or the error as it was raised there; a lost actor is replaced and asked again."""
        attempt = 0
        while True:
            attempt += 1
            actor, marks = self._actor, {"again": attempt > 1} if marks_repeats else {}
            try:
                return ray.get(getattr(actor, method).remote(*arguments, **marks), timeout=PATIENCE_S)
            except RayTaskError as error:
                raise error.cause from None
            except (RayActorError, GetTimeoutError) as error:
                if self._ledger is None or attempt == MAX_TRIES:
                    raise RuntimeError(
                        f"pairing service: expected an answer to {method}; got {error} {attempt} times; look at "
                        "logs/pairing.log, and resume with --resume"
                    ) from error
                self._replace(actor, error)

    def _replace(self, lost: Any, error: Exception) -> None:
        with self._replacing:
            if self._actor is not lost:
                return  # the other thread was quicker
            log.warning("the pairing service is gone or hangs (%s); starting another from its ledger", error)
            ray.kill(lost)
            started = time.perf_counter()
            self._actor = PairingActor.remote(*self._arguments, sorted(self._leased))
            ray.wait([self._actor.state.remote()], timeout=PATIENCE_S)
            seconds = time.perf_counter() - started
            if self._report is not None:
                message = f"the pairing service was lost; another went on from its ledger after {seconds:.1f} s"
                self._report("restart", message, {"part": "pairing", "seconds": seconds})
                report_actor(self._report, "pairing", "pairing", "restart", str(error))


def read_ledger(path: Path, source: PairSource) -> None:
    """Bring a fresh source to where the ledger ends: a saved state, then every step recorded since.

    A line that a kill tore was never answered for, and is left out.

    Raises:
        DataError: the ledger is of other pairs.
    """
    if not path.exists():
        return
    text = path.read_bytes()
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "state" in record:
            source.restore(record["state"])
            continue
        source.lease(record["step"])
        source.record(record["step"], [StepResult(**result) for result in record["results"]])
