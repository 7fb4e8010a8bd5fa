"""Ctrl-C and SIGTERM: before and after the steps they end the run at once; amid them the first asks to save and end."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

AGAIN_AFTER_S = 0.5
"""A second signal that comes sooner is the same request: Ray and Slurm signal every process of a job, and a command
passes on to those it started."""


class Interrupted(Exception):  # noqa: N818 - it is a request, not an error
    """The run was asked to end; `exit_code` is 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, a signal raises KeyboardInterrupt; from `defer` to `hasten` the first is noted for `check`."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again = self._received is not None
        if again and self._deferred and time.monotonic() - self._received_at < AGAIN_AFTER_S:
            return
        if not again:
            self._received, self._received_at = signum, time.monotonic()
        if again or not self._deferred:
            raise KeyboardInterrupt
        # Not through sys.stderr, which the interrupted code may be in the middle of writing to.
        os.write(2, b"\nfinishing what is under way, then saving; again ends at once\n")

    def defer(self) -> None:
        """From now on the first signal waits for `check`."""
        self._deferred = True

    def hasten(self) -> None:
        """From now on a signal raises KeyboardInterrupt again; one that was noted raises `Interrupted` now."""
        self._deferred = False
        self.check()

    @property
    def received(self) -> bool:
        """Whether a signal came since the block was entered."""
        return self._received is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal came since the block was entered."""
        if self._received is not None:
            raise Interrupted(self._received)

    @property
    def exit_code(self) -> int:
        """Of the process that the first signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self._received or signal.SIGINT)
