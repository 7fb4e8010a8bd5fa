"""The workers of a run from their heartbeats, actors/<id>.jsonl: who is up, what each does, how fast."""

import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unirl.dashboard.metric_table import as_number, plain
from unirl.run_files import Record, Tail, actor_names, last_record

MAX_BEATS = 4000
"""Kept of one actor; beyond, every second one is left out."""
_BEAT_BYTES = 200
MAX_POINTS = 400
"""Of one actor in one answer."""
_RATE_S = 60.0


@dataclass(slots=True)
class _Beats:
    """One entry a heartbeat."""

    times: array = field(default_factory=lambda: array("d"))
    states: array = field(default_factory=lambda: array("B"))
    versions: array = field(default_factory=lambda: array("i"))
    """-1 for none."""
    done: array = field(default_factory=lambda: array("d"))
    tokens: array = field(default_factory=lambda: array("d"))
    images: array = field(default_factory=lambda: array("d"))
    state_names: list[str] = field(default_factory=list)
    restarts: int = 0
    last: Record = field(default_factory=dict)


class _Actor:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self.tail = Tail(folder, f"actors/{name}.jsonl")
        self.beats = _Beats()
        self._fresh = True

    def refresh(self) -> None:
        every = 1
        if self.tail.restarted() or self._fresh:
            # Rotated: what was here lies beside it now. Of a long past some beats are enough.
            self.beats, self._fresh = _Beats(), False
            before = Tail(self._folder, f"actors/{self._name}.1.jsonl")
            every = 1 + (before.unread() + self.tail.unread()) // (_BEAT_BYTES * MAX_BEATS)
            for _, _, record in before.records(every):
                self._add(record)
        for _, _, record in self.tail.records(every):
            self._add(record)
        if every > 1:
            self._add(last_record(self._folder, f"actors/{self._name}.jsonl"))

    def _add(self, record: Record) -> None:
        at, beats = as_number(record.get("time")), self.beats
        if at is None or record == beats.last:
            self.tail.bad_lines += at is None
            return
        before, pid = beats.last.get("pid"), record.get("pid")
        beats.restarts += before is not None and pid is not None and pid != before
        state = _text(record.get("state"))
        if state not in beats.state_names:
            if len(beats.state_names) == 100:
                return
            beats.state_names.append(state)
        version = _version(record)
        beats.times.append(at)
        beats.states.append(beats.state_names.index(state))
        beats.versions.append(-1 if version is None else version)
        for column, name in ((beats.done, "num_done"), (beats.tokens, "num_tokens"), (beats.images, "num_images")):
            column.append(as_number(record.get(name)) or 0.0)
        beats.last = record
        if len(beats.times) > MAX_BEATS:
            for name in ("times", "states", "versions", "done", "tokens", "images"):
                setattr(beats, name, getattr(beats, name)[::2])

    def describe(self, since: float | None, silent_after: float) -> dict[str, Any]:
        """What the page shows of the actor; of its history only what came after `since`."""
        beats, last = self.beats, self.beats.last
        times = np.array(beats.times)
        counted = beats.tokens if any(beats.tokens[-1:]) else beats.done
        rates = _rates(times, np.array(counted))
        rows = np.arange(len(times))[times > (-np.inf if since is None else since)]
        if len(rows) > MAX_POINTS:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]
        shown = zip(rows.tolist(), plain(rates[rows], 4), strict=True)
        age_s = round(max(0.0, time.time() - beats.times[-1]), 1) if beats.times else None
        history = [[round(beats.times[n], 1), beats.state_names[beats.states[n]], _number(beats.versions[n]), rate]
                   for n, rate in shown]  # fmt: skip
        return {
            "actor": self._name,
            "role": _text(last.get("role")),
            "state": _text(last.get("state")),
            "age_s": age_s,
            "silent": age_s is None or age_s > silent_after,
            "policy_version": _version(last),
            "restarts": beats.restarts,
            "tokens_per_s": _recent_rate(times, np.array(beats.tokens)),
            "images_per_s": _recent_rate(times, np.array(beats.images)),
            "queue": as_number(last.get("queue")),
            "memory_mb": as_number(last.get("memory_mb")),
            "node": _text(last.get("node")),
            "history": history,
        }


class Fleet:
    """All heartbeats of one run, kept up to date. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `describe` reads."""
        self._folder = folder
        self._actors: dict[str, _Actor] = {}

    def describe(self, since: float | None, silent_after: float) -> list[dict[str, Any]]:
        """Every actor with what it did after `since`, at most 400 points each.

        Args:
            since: Unix time by the actors' own clocks; None gives all.
            silent_after: seconds without a heartbeat after which an actor is silent.
        """
        for name in actor_names(self._folder):
            if name not in self._actors:
                self._actors[name] = _Actor(self._folder, name)
            self._actors[name].refresh()
        return [actor.describe(since, silent_after) for actor in self._actors.values()]

    @property
    def bad_lines(self) -> int:
        """Heartbeats that could not be read."""
        return sum(actor.tail.bad_lines for actor in self._actors.values())


def _rates(times: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counted per second up to each heartbeat; NaN at the first, and where the count began anew."""
    took, made = np.diff(times), np.diff(counts)
    valid = (took > 0) & (made >= 0)
    rates = np.where(valid, made / np.where(valid, took, 1), np.nan)
    return np.concatenate([[np.nan], rates])[: len(times)]


def _recent_rate(times: np.ndarray, counts: np.ndarray) -> float | None:
    """Per second over the last minute of heartbeats; None where nothing is counted."""
    if len(times) < 2 or not counts[-1]:
        return None
    recent = np.flatnonzero(times >= times[-1] - _RATE_S)
    first = min(int(recent[0]), len(times) - 2)
    took, made = times[-1] - times[first], counts[-1] - counts[first]
    return plain(np.array([made / took]), 4)[0] if took > 0 and made >= 0 else None


def _version(record: Record) -> int | None:
    version = record.get("policy_version")
    return version if type(version) is int and 0 <= version < 1 << 31 else None


def _number(version: int) -> int | None:
    return None if version < 0 else version


def _text(value: object) -> str:
    return value[:80] if isinstance(value, str) else ""
