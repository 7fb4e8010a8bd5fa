"""What one finished step hands to the metrics, the journal, the pair view and the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from unirl.types import PairRecord, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGroup:
    """A scored group with what the algorithm made of its rewards."""

    scored: ScoredGroup
    pair: PairRecord
    pair_weight: float
    """Factor that the advantages of this group already hold."""
    advantages: NDArray[np.float64]
    """[G] group-relative advantages times `pair_weight`; 0 where not judged."""

    def __post_init__(self) -> None:
        request = self.scored.group.request
        if self.pair.pair_id != request.pair_id:
            raise ValueError(
                f"weighted group {request.request_id}: expected its own pair {request.pair_id}; got "
                f"{self.pair.pair_id}; look pairs up by pair_id"
            )
        if self.advantages.shape != self.scored.rewards.shape or not np.isfinite(self.advantages).all():
            raise ValueError(
                f"weighted group {request.request_id}: expected {len(self.scored.rewards)} finite advantages; got "
                f"{self.advantages}; compute them with unirl.algorithms.advantages"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """One finished step."""

    step: int
    """Counted from 1; 0 is the state before training."""
    groups: tuple[WeightedGroup, ...]
    """Two per pair, both tasks."""
    learner: Mapping[str, float] = field(default_factory=dict)
    """What the learner measured, under full metric names."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""
