"""Remembers scores by content, so that nothing is judged twice. What could not be judged is never remembered."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.types import RewardScores, RolloutGroup

_LABELS = ("id", "source")
"""Fields of a sample that say where it came from, not what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedScore:
    """Score of one completion."""

    value: float
    details: Mapping[str, float]
    texts: Mapping[str, str | None]


class ScoreCache:
    """The most recently used scores, at most `max_entries` of them; 0 remembers nothing."""

    def __init__(self, max_entries: int) -> None:
        """Start empty."""
        self._max_entries = max_entries
        self._entries: OrderedDict[bytes, CachedScore] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> CachedScore | None:
        """The score under this key, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: bytes, score: CachedScore) -> None:
        """Remember a score and forget the one that was unused for longest."""
        self._entries[key] = score
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def score(
        self, keys: Sequence[bytes], group: RolloutGroup, score: Callable[[RolloutGroup], RewardScores]
    ) -> RewardScores:
        """Scores of a group; only completions that are new, each content once, reach `score`.

        Args:
            keys: one per trajectory, from `content_keys`.
            group: what to judge.
            score: judges a group; each completion on its own, whoever its companions are.
        """
        known = {key: found for key in keys if (found := self.get(key)) is not None}
        first_seen = {key: index for index, key in reversed(list(enumerate(keys))) if key not in known}
        if not first_seen:
            return _assemble(keys, known, "")
        indices = sorted(first_seen.values())
        fresh = score(_subgroup(group, indices))
        for row, index in enumerate(indices):
            if fresh.judged[row]:
                details = {name: float(column[row]) for name, column in fresh.details.items()}
                texts = {name: column[row] for name, column in fresh.texts.items()}
                known[keys[index]] = CachedScore(value=float(fresh.values[row]), details=details, texts=texts)
                self.put(keys[index], known[keys[index]])
        return _assemble(keys, known, fresh.problem)


def content_keys(name: str, options: Mapping[str, Any], group: RolloutGroup) -> list[bytes]:
    """One sha256 per trajectory over all a reward may look at: its name and options, the sample, the completion."""
    shared = hashlib.sha256()
    _add(shared, name)
    _add(shared, json.dumps(options, sort_keys=True, default=str))
    sample = group.request.sample
    for field in fields(sample):
        if field.name not in _LABELS:
            _add(shared, getattr(sample, field.name))
    keys = []
    for trajectory in group.trajectories:
        digest = shared.copy()
        for value in (trajectory.text, trajectory.image, trajectory.finish_reason):
            _add(digest, value)
        keys.append(digest.digest())
    return keys


def _add(digest: Any, value: NDArray[Any] | str | tuple[str, ...] | None) -> None:
    """Mix in a value with its kind and length, so that neighbours cannot run into each other."""
    if isinstance(value, np.ndarray):
        data, label = np.ascontiguousarray(value).tobytes(), f"{value.dtype}{value.shape}"
    else:
        data, label = repr(value).encode(), type(value).__name__
    digest.update(f"{label}:{len(data)}:".encode())
    digest.update(data)


def _subgroup(group: RolloutGroup, indices: Sequence[int]) -> RolloutGroup:
    trajectories = tuple(group.trajectories[index] for index in indices)
    request = replace(group.request, seeds=tuple(trajectory.seed for trajectory in trajectories))
    return RolloutGroup(request=request, trajectories=trajectories)


def _assemble(keys: Sequence[bytes], known: Mapping[bytes, CachedScore], problem: str) -> RewardScores:
    rows = [known.get(key) for key in keys]
    names = dict.fromkeys(name for row in rows if row for name in row.details)
    texts = dict.fromkeys(name for row in rows if row for name in row.texts)
    return RewardScores(
        values=np.array([row.value if row else 0.0 for row in rows], np.float32),
        judged=np.array([row is not None for row in rows]),
        details={
            name: np.array([row.details.get(name, 0.0) if row else 0.0 for row in rows], np.float32) for name in names
        },
        problem=problem,
        texts={name: tuple(row.texts.get(name) if row else None for row in rows) for name in texts},
    )
