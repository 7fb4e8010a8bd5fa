"""The pair source as one actor: it holds the pair set, hands out each step's batch once, and keeps the ledger."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from unirl.cluster.actor_log import open_actor_log
from unirl.data.pair_source import PairSource, StepResult
from unirl.types import PairRecord


@ray.remote(max_restarts=0, num_cpus=0)
class PairingActor:
    """Owns the pair source."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        open_actor_log("pairing")
        self._source = PairSource.open(folder, **settings)

    def lease(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of this step, handed out once."""
        return self._source.lease(step)

    def record(self, step: int, results: Sequence[StepResult]) -> None:
        """Note what each pair earned."""
        self._source.record(step, results)

    def state(self) -> dict[str, Any]:
        """Ledger and finished steps."""
        return self._source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._source.restore(state)


class PairingService:
    """The driver's side of the actor."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start the actor; `settings` are those of `PairSource.open`."""
        self._actor: Any = PairingActor.remote(folder, settings)

    def lease(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of this step."""
        return _answer(self._actor.lease.remote(step))

    def record(self, step: int, results: Sequence[StepResult]) -> None:
        """Note what each pair earned."""
        _answer(self._actor.record.remote(step, list(results)))

    def state(self) -> dict[str, Any]:
        """Ledger and leases, for a checkpoint."""
        return _answer(self._actor.state.remote())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        _answer(self._actor.restore.remote(state))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def _answer(reference: "ray.ObjectRef") -> Any:
    """What the actor returned, or the error as it was raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
