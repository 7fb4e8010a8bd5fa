"""What a step is made of: the four parts a driver talks to, as Ray actors or in this process."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unirl.algorithms.objective import find_objective
from unirl.config import RlConfig, SamplingConfig
from unirl.data.pair_source import PairSource, StepResult
from unirl.types import (
    LearnerBatch,
    PairRecord,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
)

if TYPE_CHECKING:
    from unirl.cluster.placement import Placement
    from unirl.cluster.reward_pool import RewardPool
    from unirl.cluster.rollout_pool import RolloutPool


class Pairs(Protocol):
    """The pairing service: hands each batch out once, counted from 0, and keeps the ledger."""

    def lease(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of a step, handed out once."""
        ...

    def record(self, step: int, results: Sequence[StepResult]) -> None:
        """Note what each side of each pair earned."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        ...


class Rollouts(Protocol):
    """The rollout pool."""

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterable[RolloutGroup]:
        """One group per request, in any order."""
        ...

    def load_weights(self, publication: Any) -> None:
        """Bring every sampler to the published weights."""
        ...

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        ...


class Rewards(Protocol):
    """The reward pool."""

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]:
        """Rewards of every group; failures are masked."""
        ...

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        ...


class Learners(Protocol):
    """The learner group."""

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """Learn from the batch; returns metrics."""
        ...

    def publish_weights(self) -> Any:
        """The current weights, for `load_weights`."""
        ...

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer and `state`."""
        ...

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest checkpoint; returns the `state` saved with it."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step needs, in the order in which a step uses it."""

    pairs: Pairs
    rollouts: Rollouts
    rewards: Rewards
    learner: Learners


@contextmanager
def open_parts(
    config: RlConfig, checkpoint: Path, pairs: Path, *, local: bool, log_dir: Path | None = None
) -> Iterator[Parts]:
    """Start everything a step needs and end it afterwards, whatever happened in between."""
    with ExitStack() as stack:
        if local:
            yield _local_parts(config, checkpoint, pairs, stack)
        else:
            _join_ray(config, checkpoint, stack, log_dir)
            yield _actors(config, checkpoint, pairs, stack)


@contextmanager
def open_judged_rollouts(config: RlConfig, checkpoint: Path, *, local: bool) -> Iterator[tuple[Rollouts, Rewards]]:
    """Start samplers and rewards alone, for a measurement without training."""
    with ExitStack() as stack:
        if local:
            yield _local_rollouts(config, checkpoint, stack)
            return
        from unirl.cluster.runtime import wait_until_up

        _join_ray(config, checkpoint, stack, None, with_learner=False)
        rollouts, rewards = _rollout_actors(config, checkpoint, stack)
        wait_until_up(rollouts.starting() | rewards.starting(), config.cluster.start_timeout_s)
        yield rollouts, rewards


def _local_parts(config: RlConfig, checkpoint: Path, pairs: Path, stack: ExitStack) -> Parts:
    from unirl.jobs.local import LocalLearner

    source = PairSource.open(pairs, **_pair_settings(config))
    learner = LocalLearner(config, checkpoint)
    stack.callback(learner.close)
    return Parts(source, *_local_rollouts(config, checkpoint, stack), learner)


def _local_rollouts(config: RlConfig, checkpoint: Path, stack: ExitStack) -> tuple[Rollouts, Rewards]:
    from unirl.jobs.local import LocalRewards, LocalRollouts

    rewards = LocalRewards(config.rewards)
    stack.callback(rewards.close)
    return LocalRollouts(config, checkpoint), rewards


def _actors(config: RlConfig, checkpoint: Path, pairs: Path, stack: ExitStack) -> Parts:
    """All actors start at once; the learner's places are reserved first, since its ranks need them together."""
    from unirl.cluster.learner_group import LearnerGroup
    from unirl.cluster.pairing_service import PairingService
    from unirl.cluster.placement import place
    from unirl.cluster.runtime import wait_until_up

    placement = place(config)
    stack.callback(placement.release)
    rollouts, rewards = _rollout_actors(config, checkpoint, stack, placement)
    service = PairingService(pairs, _pair_settings(config))
    stack.callback(service.close)
    learner = LearnerGroup(config, checkpoint, placement)
    stack.callback(learner.close)
    wait_until_up(rollouts.starting() | rewards.starting(), config.cluster.start_timeout_s)
    return Parts(service, rollouts, rewards, learner)


def _join_ray(
    config: RlConfig, checkpoint: Path, stack: ExitStack, log_dir: Path | None, *, with_learner: bool = True
) -> None:
    import ray

    from unirl.cluster.plan import actor_plan, count_parameters
    from unirl.cluster.runtime import start_ray

    stack.callback(ray.shutdown)
    plan = actor_plan(config, count_parameters(checkpoint), with_learner=with_learner)
    start_ray(config.cluster, plan, log_dir)


def _rollout_actors(
    config: RlConfig, checkpoint: Path, stack: ExitStack, placement: "Placement | None" = None
) -> "tuple[RolloutPool, RewardPool]":
    from unirl.cluster.reward_pool import RewardPool
    from unirl.cluster.rollout_pool import RolloutPool

    rollouts = RolloutPool(config, checkpoint, placement)
    stack.callback(rollouts.close)
    rewards = RewardPool(config.rewards, rollouts.references)
    stack.callback(rewards.close)
    return rollouts, rewards


def _pair_settings(config: RlConfig) -> dict[str, Any]:
    return {
        "pairs_per_step": config.rollout.pairs_per_step,
        "seed": config.train.seed,
        "shuffle": config.data.shuffle,
        "max_pairs": config.data.max_pairs,
        "take": config.data.take,
        "partners": "random" if find_objective(config.algorithm.objective).pools_tasks else config.data.partners,
    }
