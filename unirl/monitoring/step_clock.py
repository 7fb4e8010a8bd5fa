"""Seconds of each phase of a step, and which phase is running."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepClock:
    """Collects seconds by phase until they are taken; several blocks of one name add up."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self.current = "start"
        """Phase that is running, or ran last."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under this name."""
        self.current, started = name, self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
