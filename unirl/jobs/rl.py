"""PairGRPO: sample both sides of each pair, score them, weigh them by similarity, update the one policy.

`rl_step` is the whole method on one page. `train` repeats it with evaluation and checkpoints; `main` wires the rooms.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from unirl.config import RlConfig, SamplingConfig
from unirl.data.pair_source import StepResult
from unirl.jobs.interrupts import Interrupted, Interrupts
from unirl.learner.batching import build_batch
from unirl.rollout.seeds import sample_seed
from unirl.types import LearnerBatch, PairRecord, RolloutGroup, RolloutRequest, ScoredGroup

log = logging.getLogger(__name__)


class Pairs(Protocol):
    """The pairing service."""

    def lease(self, step: int) -> tuple[PairRecord, ...]: ...
    def record(self, step: int, results: Sequence[StepResult]) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Rollouts(Protocol):
    """The rollout pool."""

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterable[RolloutGroup]: ...
    def load_weights(self, publication: Any) -> None: ...
    def close(self) -> None: ...


class Rewards(Protocol):
    """The reward pool."""

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]: ...
    def close(self) -> None: ...


class Learners(Protocol):
    """The learner group."""

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]: ...
    def publish_weights(self) -> Any: ...
    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None: ...
    def restore(self, folder: Path) -> dict[str, Any]: ...
    def export(self, folder: Path) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step needs, in the order in which a step uses it."""

    pairs: Pairs
    rollouts: Rollouts
    rewards: Rewards
    learner: Learners


@dataclass(slots=True)
class StepReport:
    """What one step did, for the log."""

    step: int
    pairs: tuple[PairRecord, ...]
    scored: list[ScoredGroup]
    batch: LearnerBatch
    update: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)


def rl_step(step: int, parts: Parts, config: RlConfig, clock: "PhaseClock") -> StepReport:
    """Sample, score, weigh, learn, publish. Rewards score groups while later ones are still being sampled."""
    with clock.phase("pairs"):
        pairs = parts.pairs.lease(step)
        requests = make_requests(pairs, step, config)
    with clock.phase("rollout"):
        groups = parts.rollouts.sample(requests, config.rollout.sampling)
        scored = parts.rewards.score(groups)
    with clock.phase("batch"):
        check_judged(scored, config.rewards.max_unjudged_fraction)
        batch = build_batch(scored, pairs, config.algorithm)
    with clock.phase("update"):
        update = parts.learner.update(batch, step)
    with clock.phase("publish"):
        parts.rollouts.load_weights(parts.learner.publish_weights())
    return StepReport(step, pairs, scored, batch, update, clock.seconds)


def make_requests(pairs: Sequence[PairRecord], step: int, config: RlConfig) -> list[RolloutRequest]:
    """Both prompts of every pair, with one seed per completion, keyed so that nothing else can change the tokens."""
    requests = []
    for pair in pairs:
        for task, sample, count in (
            ("understanding", pair.understanding, config.rollout.num_understanding),
            ("generation", pair.generation, config.rollout.num_generation),
        ):
            seeds = tuple(sample_seed(config.train.seed, step, pair.pair_id, task, index) for index in range(count))
            name = f"{pair.pair_id}/{task}"
            requests.append(
                RolloutRequest(request_id=name, pair_id=pair.pair_id, task=task, sample=sample, seeds=seeds)
            )
    return requests


def check_judged(scored: Sequence[ScoredGroup], limit: float) -> None:
    """Stop when rewards fail on more than a share of the step.

    Raises:
        RuntimeError: names the share, the limit and the first problem.
    """
    total = sum(len(group.judged) for group in scored)
    unjudged = sum(int((~group.judged).sum()) for group in scored)
    if unjudged > limit * total:
        problems = [f"{name}: {scores.problem}" for group in scored for name, scores in group.components.items()
                    if scores.problem]  # fmt: skip
        raise RuntimeError(
            f"rewards: expected at most {limit:.0%} of a step unjudged (rewards.max_unjudged_fraction); got {unjudged} of "
            f"{total}; first problem: {problems[0] if problems else 'none given'}; mend the reward and resume"
        )


class PhaseClock:
    """Seconds of each phase of a step, and which phase is running now."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current = "start"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under this name."""
        started, self.current = time.perf_counter(), name
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def restart(self) -> None:
        """Begin the next step."""
        self.seconds = {}
