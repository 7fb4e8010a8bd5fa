"""Orders to a run that is under way, and its answers: files in RUN/control, so that neither a port nor Ray is needed.

`scale.json` holds the newest order, `scale_answer.json` what became of it. Both are replaced whole.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unirl.monitoring.durable_files import encode_line, write_atomic

State = Literal["joining", "joined", "refused"]
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ScaleOrder:
    """How many rollout workers of each named role a run is to have."""

    id: str
    counts: Mapping[str, int]


def order_scale(run_dir: Path, counts: Mapping[str, int]) -> str:
    """Write the order for the run's driver; returns its id."""
    (run_dir / "control").mkdir(exist_ok=True)
    order = {"v": 1, "id": uuid.uuid4().hex, "time": time.time(), "counts": dict(counts)}
    write_atomic(run_dir / "control" / "scale.json", encode_line(order))
    return str(order["id"])


def forget_orders(run_dir: Path) -> None:
    """Drop the order of an earlier attempt: a resumed run starts with its configured workers."""
    (run_dir / "control" / "scale.json").unlink(missing_ok=True)


def newest_order(run_dir: Path) -> str | None:
    """Id of the newest order; None when there never was one."""
    return _read(run_dir / "control" / "scale.json").get("id")


def read_answer(run_dir: Path, order_id: str) -> dict[str, Any] | None:
    """What the run answers to the order so far; None before it does."""
    answer = _read(run_dir / "control" / "scale_answer.json")
    return answer if answer.get("id") == order_id else None


class ScaleControl:
    """The driver's side: finds new orders, answers them, and notes in the run's events what came of them."""

    def __init__(self, run_dir: Path, event: Callable[[str, str, Mapping[str, object]], None]) -> None:
        """Take orders from when the run's record was opened on, which drops older ones (`forget_orders`).

        Args:
            run_dir: the run directory.
            event: writes a line of events.jsonl, as `RunLog.event` does.
        """
        self._run_dir, self._event = run_dir, event
        self._order: str | None = None
        self._looked = 0.0

    def poll(self) -> ScaleOrder | None:
        """An order not seen before; looks at most twice a second."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return None
        self._looked = time.monotonic()
        found = _read(self._run_dir / "control" / "scale.json")
        if not found or found["id"] == self._order:
            return None
        self._order = found["id"]
        return ScaleOrder(found["id"], found["counts"])

    def answer(self, order: ScaleOrder, state: State, message: str, workers: Mapping[str, int]) -> None:
        """Say what becomes of an order, and how many workers of each role are up."""
        document = {"v": 1, "id": order.id, "time": time.time(), "state": state, "message": message}
        write_atomic(
            self._run_dir / "control" / "scale_answer.json", encode_line(document | {"workers": dict(workers)})
        )
        self._event("scale", message, {"state": state, "workers": dict(workers)})

    def note(self, message: str) -> None:
        """Add to the run's events what went otherwise than wanted with the weights."""
        self._event("weights", message, {})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
