"""What alerts are about: a condition that was told once or often, and is open until an event says that it is over."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unirl.monitoring.sentinel_table import SENTINELS, failure_of

MOST = 100
"""Conditions of either state that are kept; all are counted."""
_GRAVE = {sentinel.name for sentinel in SENTINELS if sentinel.stops}


@dataclass(slots=True)
class Condition:
    """One row of a list of alerts."""

    alert: Mapping[str, Any]
    """The event that told it last."""
    since: int | None
    """First step; None where no event says so."""
    again: bool = False
    """Whether a resume undid the step at which it began: made again, it may not come."""
    num_told: int = 1
    over: int | None = None
    """Step at which it was seen to be over; None while it is open."""

    @property
    def is_open(self) -> bool:
        """Whether nothing says that it is over."""
        return self.over is None

    @property
    def rank(self) -> int:
        """0 ends the run, 1 says that learning has gone wrong, 2 is anything else."""
        if self.alert.get("severity") == "stop":
            return 0
        return 1 if str(self.alert.get("sentinel")) in _GRAVE else 2


class Conditions:
    """Conditions of a run, kept up to date from its events: one a sentinel is open at a time, over all attempts."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take in events; `add` takes in more."""
        self._open: dict[str, Condition] = {}
        self._over: deque[Condition] = deque(maxlen=MOST)
        self._saved = 0
        self.num = 0
        """Conditions so far."""
        self.changes = 0
        """Grows whenever any of them changes."""
        for event in events:
            self.add(event)

    @property
    def num_open(self) -> int:
        """Those that nothing says the end of. An alert that ended the run stays open."""
        return len(self._open)

    @property
    def all(self) -> list[Condition]:
        """Open ones first: what ends the run, then the newest step, in the order told; others follow, newest first."""
        first = sorted(self._open.values(), key=lambda c: (c.rank, -(_step(c.alert) or 0)))
        return first + list(self._over)[::-1]

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event, in the order in which they were written; most are about no condition."""
        kind, name, step = event.get("kind"), _name(event), _step(event)
        if kind == "checkpoint":
            self._saved = step or self._saved
        elif kind == "resume":
            for condition in self._open.values():
                condition.again = condition.since is not None and condition.since > self._saved
        elif kind == "alert":
            self._tell(name or f"alert {self.num}", event)
        elif kind == "alert over" and name:
            self._close(name, step or 0)
        if step is not None:
            for undone in [n for n, c in self._open.items() if c.again and step > (c.since or 0)]:
                self._close(undone, step)

    def _tell(self, name: str, event: Mapping[str, Any]) -> None:
        self.changes += 1
        known = self._open.get(name)
        if known is not None:
            known.alert, known.num_told, known.again = event, known.num_told + 1, False
            return
        since = _step(event, "since")
        self.num += 1
        self._open[name] = Condition(event, _step(event) if since is None else since)
        if len(self._open) > MOST:
            self._close(next(iter(self._open)), 0)

    def _close(self, name: str, step: int) -> None:
        condition = self._open.pop(name, None)
        if condition is not None:
            self.changes += 1
            condition.over = step
            self._over.append(condition)


def _name(event: Mapping[str, Any]) -> str:
    """The sentinel; one that could not look is another condition than what it watches."""
    name = event.get("sentinel")
    if not isinstance(name, str):
        return ""
    failure = failure_of(name)
    return failure if str(event.get("message")).startswith(failure) else name


def _step(event: Mapping[str, Any], name: str = "step") -> int | None:
    step = event.get(name)
    return step if type(step) is int else None
