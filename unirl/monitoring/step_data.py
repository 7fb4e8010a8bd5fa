"""What one finished step hands to the metrics, the journal, the pair view and the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unirl.monitoring.phases import Activity, Block
from unirl.types import QuarantinedRequest, WeightedGroup


@dataclass(frozen=True, slots=True)
class SyncCheck:
    """What came of comparing samplers' own weights with those published."""

    stale: tuple[str, ...] = ()
    """Samplers whose weights differ, or of which none could be compared, by name."""
    fewest_compared: int | None = None
    """Weights compared in the sampler with fewest; None where no sampler was asked, or all of them rested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """One finished step."""

    step: int
    """Counted from 1; 0 is the state before training."""
    groups: tuple[WeightedGroup, ...]
    """Two per pair, both tasks, but for what is quarantined."""
    learner: Mapping[str, float] = field(default_factory=dict)
    """What the learner measured, under full metric names."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""
    overlapped: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase of what ran beside these, in another thread."""
    blocks: Sequence[Block] = ()
    """The driver's blocks, whose seconds `seconds` adds up."""
    activities: Sequence[Activity] = ()
    """What workers did for the step while it was sampled."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Workers replaced since the step before, by pool: rollout, reward."""
    num_kept: int = 0
    """Groups taken from disk, where a run that broke off had left them."""
    weights_checksum: str = ""
    """Checksum of the weights after the update, as published."""
    policy_version: int = 0
    """Updates behind the weights that learned, before the update."""
    quarantined: Sequence[QuarantinedRequest] = ()
    """Requests of the step that could not be sampled."""
    num_pairs: int = 0
    """Pairs of an epoch; 0 when nobody said."""
    sync_check: SyncCheck = field(default_factory=SyncCheck)
    """Of the syncs before the step."""
