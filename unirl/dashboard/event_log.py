"""What happened in a run: events.jsonl as places of lines, and the few facts that are asked for again and again."""

import secrets
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unirl.dashboard.metric_table import as_number
from unirl.dashboard.shown_pairs import cut_texts
from unirl.monitoring.conditions import Conditions
from unirl.run_files import Record, Tail, parse

NUM_ALERTS = 20
MAX_EVENTS = 1000
"""Events of one answer, newest ones."""
MAX_TEXT = 2000


@dataclass(slots=True)
class _Facts:
    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    conditions: Conditions = field(default_factory=Conditions)
    attempts: dict[int, tuple[float, float]] = field(default_factory=dict)
    scaled: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)


class EventLog:
    """events.jsonl of one run, kept up to date. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `refresh` reads."""
        self.tail = Tail(folder, "events.jsonl")
        self._facts, self._label = _Facts(), secrets.token_hex(4)

    def refresh(self) -> None:
        """Take in what was added since; start again when the file is another one."""
        if self.tail.restarted():
            self._facts, self._label = _Facts(), secrets.token_hex(4)
        for offset, length, record in self.tail.records():
            self._facts.offsets.append(offset)
            self._facts.lengths.append(length)
            self._note(record)

    def _note(self, record: Record) -> None:
        facts, kind = self._facts, record.get("kind")
        attempt, time = record.get("attempt"), as_number(record.get("time"))
        if type(attempt) is int and time is not None:
            facts.attempts[attempt] = (facts.attempts.get(attempt, (time, time))[0], time)
        if kind in ("alert", "alert over", "checkpoint", "resume"):
            facts.conditions.add(cut_texts(record, MAX_TEXT))
        elif kind == "scale" and isinstance(record.get("workers"), dict):
            facts.scaled = {str(role): n for role, n in record["workers"].items() if type(n) is int}
        elif kind in ("restart", "actor") and record.get("state") in (None, "restart"):
            actor = record.get("actor")
            if isinstance(actor, str):
                facts.restarts[actor] = facts.restarts.get(actor, 0) + 1

    @property
    def num_alerts(self) -> dict[str, int]:
        """Conditions that were told: how many are open, how many there were, and a number that changes with any."""
        found = self._facts.conditions
        return {"open": found.num_open, "all": found.num, "changes": found.changes}

    @property
    def alerts(self) -> list[Record]:
        """What told each of them last, gravest and newest first; "over" is the step of its end, None while open."""
        return [dict(c.alert) | {"over": c.over, "told": c.num_told} for c in self._facts.conditions.all[:NUM_ALERTS]]

    @property
    def attempts(self) -> dict[int, tuple[float, float]]:
        """Unix time of the first and the last event of each start."""
        return self._facts.attempts

    @property
    def scaled(self) -> dict[str, int]:
        """Workers by role since they were last scaled; empty when they never were."""
        return self._facts.scaled

    @property
    def restarts(self) -> dict[str, int]:
        """How often each actor was started anew, as far as events name it."""
        return self._facts.restarts

    def since(self, cursor: str | None) -> dict[str, Any]:
        """Events after a cursor of before, or the newest ones; `left_out` says how many earlier ones there are."""
        facts = self._facts
        label, _, row = (cursor or "").partition(".")
        known = label == self._label and row.isascii() and row.isdigit() and len(row) < 12
        start = min(int(row), len(facts.offsets)) if known else 0
        first = max(start, len(facts.offsets) - MAX_EVENTS)
        places = ((facts.offsets[n], facts.lengths[n]) for n in range(first, len(facts.offsets)))
        events = [cut_texts(record, MAX_TEXT) for line in self.tail.lines_at(places) if (record := parse(line))]
        return {
            "cursor": f"{self._label}.{len(facts.offsets)}",
            "reset": cursor is not None and not known,
            "left_out": first - start,
            "events": events,
        }
