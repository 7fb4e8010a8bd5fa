"""Says what a run waits for when nothing happens, and which worker stands still while others go on.

Workers are seen through their heartbeats: what one has done is a sign of life; that its heart beats is none.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from unirl.monitoring.heartbeat import Heartbeat
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.terminal import format_duration
from unirl.run_files import last_beats

log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Times the longest wait that ended well, up to which another of its kind is waited for."""
DRIVER = "driver"
_COUNTS = ("num_done", "num_tokens", "num_images", "num_passes", "policy_version")


@dataclass(frozen=True, slots=True)
class Sign:
    """What is known of one actor at a moment; two are equal if it did nothing in between."""

    role: str
    state: str
    mark: Hashable
    """Another one whenever it did something."""
    process: object = None
    """Another one when another took its place."""
    busy: bool = field(default=True, compare=False)
    silent_s: float = field(default=0.0, compare=False)
    """Seconds without a heartbeat."""


@dataclass(slots=True)
class _Wait:
    sign: Sign
    since: float
    told: bool = False


class Stalls:
    """Tells waits that are too long from those that are not. No thread, no file, no clock."""

    def __init__(self, after_s: float) -> None:
        """Remember how many seconds any wait may take, `monitoring.stall_after_s`."""
        self._after_s = after_s
        self._waits: dict[str, _Wait] = {}
        self._longest: dict[tuple[str, str], float] = {}

    def look(self, signs: Mapping[str, Sign], now: float) -> list[str]:
        """What there is to say; each wait is told once.

        Args:
            signs: of every actor of which something is expected, by name.
            now: seconds by a monotonic clock.
        """
        self._waits = {name: wait for name, wait in self._waits.items() if name in signs}
        said = (self._look(name, sign, now) for name, sign in signs.items())
        return [message for message in said if message]

    def _look(self, name: str, sign: Sign, now: float) -> str:
        wait = self._waits.setdefault(name, _Wait(sign, now))
        kind, waited = (wait.sign.role, wait.sign.state), now - wait.since
        usual = self._longest.get(kind, 0.0)
        if sign != wait.sign:
            if sign.process == wait.sign.process:
                self._longest[kind] = max(waited, usual)
            self._waits[name] = _Wait(sign, now)
        elif wait.told:
            return ""
        elif sign.silent_s > self._after_s:
            wait.told = True
            return f"{name} has written no heartbeat for {format_duration(sign.silent_s)}; it was {sign.state}"
        elif sign.busy and waited > max(self._after_s, PATIENCE * usual):
            wait.told = True
            before = f" (at most {format_duration(usual)} before)" if usual else ""
            took = format_duration(waited) + before
            if name == DRIVER:
                return f"nothing has happened for {took}; waiting for {sign.state}"
            return f"{name} is {sign.state} and has not moved for {took}"
        return ""


class StallWatch:
    """A thread that looks again and again inside the block, and tells `on_stall`."""

    def __init__(
        self,
        run_dir: Path,
        driver: Heartbeat,
        *,
        after_s: float,
        on_stall: Callable[[str], None],
        gone: Collection[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            run_dir: whose heartbeats are read.
            driver: what this process says of itself; its state is the phase that is running.
            after_s: seconds without a sign, `monitoring.stall_after_s`.
            on_stall: called with each message, from the thread.
            gone: names of actors of which nothing is expected any more; may change.
            now: seconds of a monotonic clock.
        """
        self._run_dir, self._driver, self._on_stall, self._gone, self._now = run_dir, driver, on_stall, gone, now
        self._stalls = Stalls(max(after_s, 2 * driver.every_s))
        self._every_s = min(1.0, after_s / 4)
        self._read_at = -math.inf
        self._read: list[dict[str, Any]] = []
        self._beats: dict[str, tuple[object, float | None]] = {}
        """Of each actor the time in its last heartbeat, and when it came; None where it came before this watch."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stall-watch")

    def __enter__(self) -> Self:
        # What an earlier attempt of the run left is no worker of this one until it is written to.
        self._beats = {str(beat["actor"]): (beat.get("time"), None) for beat in last_beats(self._run_dir)}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                if found := self._stalls.look(self.signs(), self._now()):
                    self._on_stall("; ".join(found))
            except OSError as error:  # a full disk ends no watch
                log.warning("stalls: %s", error)

    def signs(self) -> dict[str, Sign]:
        """Signs of the driver, which moves when anyone does, and of each worker."""
        signs = {
            str(beat["actor"]): sign
            for beat in self._heartbeats()
            if beat["actor"] != DRIVER and beat["actor"] not in self._gone and (sign := self._sign(beat)) is not None
        }
        driver = self._driver.line()
        moved = (_mark(driver), *((sign.state, sign.mark) for sign in signs.values()))
        return {DRIVER: Sign(DRIVER, str(driver["state"]), moved)} | signs

    def _heartbeats(self) -> list[dict[str, Any]]:
        """Read as often as they are written."""
        now = self._now()
        if now - self._read_at >= self._driver.every_s:
            self._read_at, self._read = now, last_beats(self._run_dir)
        return self._read

    def _sign(self, beat: Mapping[str, Any]) -> Sign | None:
        name, now = str(beat["actor"]), self._now()
        at, seen = self._beats.get(name, (None, None))
        if at != beat.get("time"):
            seen = now
            self._beats[name] = beat.get("time"), seen
        if seen is None:
            return None
        state = str(beat.get("state"))
        return Sign(str(beat.get("role")), state, _mark(beat), beat.get("pid"), state != "idle", now - seen)


def _mark(beat: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(beat.get(count) for count in _COUNTS)


def stall_watch(record: RunLog, driver: Heartbeat, after_s: float) -> StallWatch:
    """The one of a run, which notes what it finds as an alert."""
    return StallWatch(
        record.run_dir,
        driver,
        after_s=after_s,
        on_stall=lambda message: record.alert("stalled", message),
        gone=record.gone,
    )
