"""Ctrl-C and SIGTERM: the first asks the loop to save and end, the second ends at once."""

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):  # noqa: N818 - it is a request, not an error
    """The run was asked to end; `exit_code` is 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, notes the first signal for `check` and turns the second into KeyboardInterrupt."""

    def __init__(self) -> None:
        self._received: int | None = None
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
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = signum

    @property
    def received(self) -> bool:
        """Whether a signal came since the block was entered."""
        return self._received is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal came since the block was entered."""
        if self._received is not None:
            raise Interrupted(self._received)
