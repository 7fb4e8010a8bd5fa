"""Requests cut into units of work, by the requests alone, so that tokens do not depend on the workers."""

from collections.abc import Sequence

from unirl.types import TASKS, RolloutRequest


def units_of_work(requests: Sequence[RolloutRequest], num_sequences: int) -> list[list[RolloutRequest]]:
    """Requests of one task each, in their order, at most `num_sequences` completions to a unit (or one request).

    Images come first: they take longest.
    """
    units: list[list[RolloutRequest]] = []
    for task in reversed(TASKS):
        room = 0
        for request in (r for r in requests if r.task == task):
            if room < len(request.seeds):
                units.append([])
                room = num_sequences
            units[-1].append(request)
            room -= len(request.seeds)
    return units
