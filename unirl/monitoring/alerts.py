"""Alerts in words: the one form in which the terminal, logs and `unirl runs` tell them."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unirl.monitoring.durable_files import read_lines

log = logging.getLogger(__name__)


def alert_line(event: Mapping[str, Any]) -> str:
    """An alert's event as "step N, sentinel: message -> remedy"; what it lacks is left out."""
    step, sentinel, remedy = event.get("step"), event.get("sentinel"), event.get("remedy")
    where = ", ".join([f"step {step}"] * isinstance(step, int) + [str(sentinel)] * bool(sentinel))
    told = f"{where}: {event.get('message')}" if where else str(event.get("message"))
    return f"{told} -> {remedy}" if remedy else told


def count_alerts(events: Iterable[Mapping[str, Any]]) -> str:
    """Alerts among events by sentinel, as "3 (learning_rate_zero 2, far_kl 1)"; empty where there is none."""
    counts = Counter(str(event.get("sentinel", "other")) for event in events if event.get("kind") == "alert")
    told = ", ".join(f"{sentinel} {count}" for sentinel, count in counts.most_common())
    return f"{counts.total()} ({told})" if counts else ""


def warn_of_alerts(run_dir: Path) -> None:
    """Log how many alerts a run has had in all its attempts, if any."""
    file = run_dir / "events.jsonl"
    if counts := count_alerts(read_lines(file)):
        log.warning("alerts: %s, see %s", counts, file)
