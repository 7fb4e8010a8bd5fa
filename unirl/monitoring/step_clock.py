"""Seconds of each phase of a step, and which phase is running."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unirl.monitoring.phases import Block


class StepClock:
    """Collects seconds by phase until they are taken; several blocks of one name add up."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._blocks: list[Block] = []
        self.taken: list[Block] = []
        """The blocks, in their order, whose seconds were taken last."""
        self.current = "start"
        """Phase that is running, or ran last."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under this name."""
        self.current, started = name, self._now()
        try:
            yield
        finally:
            ended = self._now()
            self._seconds[name] = self._seconds.get(name, 0.0) + ended - started
            self._blocks.append(Block(name, started, ended))

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        self.taken, self._blocks = self._blocks, []
        return seconds
