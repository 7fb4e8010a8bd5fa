"""A line every few seconds about what a process is doing, in a file of its own: RUN/actors/<actor>.jsonl.

Written by a daemon thread that reads a few attributes and nothing else: it draws no random number, and ends with its
process. docs/run_directory.md describes the line.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from unirl.config import MonitoringConfig
from unirl.monitoring.durable_files import JsonLines
from unirl.monitoring.step_clock import StepClock

log = logging.getLogger(__name__)

MAX_BYTES = 5 * 10**6
"""Size at which a file becomes <actor>.1.jsonl, in place of an older one, and a new one begins."""


class Heartbeat:
    """What is known of one actor; whoever works sets the attributes, and the thread writes them down."""

    def __init__(
        self,
        actor: str,
        role: str,
        *,
        folder: Path | None,
        every_s: float,
        look: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Write the first line at once, and one each `every_s` from then on.

        Args:
            actor: name of the file; the one that takes this one's place goes on with it.
            role: such as "rollout.text", "reward.accuracy", "learner" or "driver".
            folder: where the file goes; it is made if its parent exists. None writes nothing.
            every_s: seconds between lines; 0 writes nothing.
            look: a closer word for the state at that moment; None keeps `state`. Called from the thread.
        """
        self.state = "loading"
        self.queue = 0
        """Requests in hand."""
        self.policy_version: int | None = None
        """Of the weights in use; None without any."""
        self.num_done = 0
        """Groups sampled, completions scored, pairs' steps handed out, or updates made, since the process started."""
        self.num_tokens, self.num_images = 0, 0
        self.count_passes: Callable[[], int] = lambda: 0
        """Passes through the model since the process started: the sign of life in a long piece of work."""
        self.every_s = every_s
        self._actor, self._role, self._look = actor, role, look
        self._folder, self._complained = folder, False
        self._file: JsonLines | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if folder is not None and every_s > 0:
            self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
            self._thread.start()

    @contextmanager
    def at(self, state: str, queue: int = 1) -> Iterator[None]:
        """Be in this state inside the block, and idle after it."""
        self.state, self.queue = state, queue
        try:
            yield
        finally:
            self.state, self.queue = "idle", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write a last line and no further one."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def line(self) -> dict[str, object]:
        """What is written now."""
        return {
            "v": 1,
            "time": time.time(),
            "actor": self._actor,
            "role": self._role,
            "state": self._look() or self.state,
            "queue": self.queue,
            "policy_version": self.policy_version,
            "num_done": self.num_done,
            "num_tokens": self.num_tokens,
            "num_images": self.num_images,
            "num_passes": self.count_passes(),
            "memory_mb": _memory_mb(),
            "pid": os.getpid(),
            "node": socket.gethostname(),
        }

    def _run(self) -> None:
        self._beat()
        while not self._ended.wait(self.every_s):
            self._beat()
        self._beat()
        if self._file is not None:
            self._file.close()

    def _beat(self) -> None:
        """A line that cannot be written is left out: no disk is so important that a worker should end for it."""
        assert self._folder is not None
        path = self._folder / f"{self._actor}.jsonl"
        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                self._file = JsonLines(path)
            self._file.append(self.line())
            if path.stat().st_size >= MAX_BYTES:
                path.replace(self._folder / f"{self._actor}.1.jsonl")
                self._file.close()
                self._file = None
        except OSError as error:
            if not self._complained:
                log.warning("heartbeat: lines of %s are left out (%s); the run does not need them", path, error)
            self._complained = True


def driver_heartbeat(run_dir: Path, monitoring: MonitoringConfig, clock: StepClock) -> Heartbeat:
    """The driver's own, whose state is the phase that is running."""
    every_s = monitoring.heartbeat_s
    return Heartbeat("driver", "driver", folder=run_dir / "actors", every_s=every_s, look=lambda: clock.current)


def _memory_mb() -> float:
    """Resident memory of this process in 10^6 bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
