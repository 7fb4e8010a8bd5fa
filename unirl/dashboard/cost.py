"""What a run took so far: CPUs and GPUs of its actors by its settings, times the hours of its starts."""

from collections.abc import Mapping
from typing import Any

from unirl.dashboard.metric_table import Attempt, as_number

MOST_BEFORE_S = 6 * 3600.0
"""A start or an end that takes longer is taken for a clock that jumped."""

Settings = Mapping[str, Any]
"""Flat: value by dotted key."""


def planned_workers(settings: Settings) -> dict[str, int]:
    """Workers by role that the settings ask for: learner, rollout.text, reward.accuracy, ..."""
    return {role: count for role, (count, _, _) in _plan(settings).items() if count > 0}


def resources(settings: Settings) -> tuple[float, float]:
    """CPUs and GPUs that the actors hold while the run goes on."""
    plan = _plan(settings).values()
    return sum(n * cpus for n, cpus, _ in plan), sum(n * gpus for n, _, gpus in plan)


def _plan(settings: Settings) -> dict[str, tuple[int, float, float]]:
    """Workers, CPUs of one and GPUs of one by role."""
    groups = {"learner": ("learner", "num_ranks")}
    groups |= {f"rollout.{role}": (f"rollout.{role}", "num_workers") for role in ("text", "image", "both")}
    for key in settings:
        parts = key.split(".")
        if parts[0] == "rewards" and len(parts) > 3 and as_number(settings.get(f"{'.'.join(parts[:3])}.weight")) != 0:
            groups[f"reward.{parts[2]}"] = (".".join(parts[:3]), "num_workers")

    def number(key: str) -> float:
        found = as_number(settings.get(key))
        return found if found is not None and 0 <= found < 1e6 else 0.0

    return {
        role: (int(number(f"{group}.{count}")), number(f"{group}.num_cpus"), number(f"{group}.num_gpus"))
        for role, (group, count) in groups.items()
    }


def spent_s(
    events: Mapping[int, tuple[float, float]], metrics: Mapping[int, Attempt], running_for_s: float = 0.0
) -> float:
    """Seconds that the run was under way.

    Of each start: from its first event to its first line of metrics, from there to the last one with jumps of the clock
    left out, and from there to its last event.

    Args:
        events: Unix time of the first and last event by start.
        metrics: lines of metrics by start.
        running_for_s: seconds since the last sign of a run that still goes on.
    """
    total = running_for_s
    for attempt in events.keys() | metrics.keys():
        written = metrics.get(attempt)
        if written is None:
            total += _plausible(events[attempt][1] - events[attempt][0])
        else:
            first, last = events.get(attempt, (written.first, written.last))
            total += _plausible(written.first - first) + written.seconds + _plausible(last - written.last)
    return total


def _plausible(seconds: float) -> float:
    return seconds if 0 <= seconds <= MOST_BEFORE_S else 0.0
