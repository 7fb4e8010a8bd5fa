"""Makes what the next steps need while this one runs."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """Results of `make(step)` for consecutive steps, made ahead in a thread of its own."""

    def __init__(self, make: Callable[[int], Made], first: int, last: int, *, ahead: int = 2) -> None:
        """Start with step `first`; nothing is made beyond step `last`."""
        self.wait_s = 0.0
        """Seconds that the last `take` waited."""
        self._steps = range(first, last + 1)
        self._next = first
        self._made: queue.Queue[tuple[Made | None, Exception | None]] = queue.Queue(ahead)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="prefetch")
        self._thread.start()

    def take(self, step: int) -> Made:
        """The result of the next step, which must be `step`; an error of `make` is raised here."""
        assert step == self._next, f"steps are taken one after the other: expected {self._next}, got {step}"
        started = time.perf_counter()
        made, error = self._made.get()
        self.wait_s = time.perf_counter() - started
        if error is not None:
            raise error
        self._next += 1
        assert made is not None, "make() gives a result"
        return made

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self, make: Callable[[int], Made]) -> None:
        for step in self._steps:
            try:
                item: tuple[Made | None, Exception | None] = make(step), None
            except Exception as error:  # noqa: BLE001 - raised where the step is taken
                item = None, error
            while not self._ended.is_set():
                try:
                    self._made.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._ended.is_set() or item[1] is not None:
                return
