"""What a step is made of: the four parts a driver talks to, as Ray actors or in this process."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unirl.algorithms.objective import find_objective
from unirl.config import RlConfig, SamplingConfig
from unirl.data.pair_source import PairSource, StepResult
from unirl.monitoring.ahead import AheadFiles
from unirl.monitoring.control import ScaleControl
from unirl.monitoring.phases import Activity
from unirl.monitoring.run_log import Report, RunLog
from unirl.monitoring.step_data import SyncCheck
from unirl.types import (
    LearnerBatch,
    PairRecord,
    QuarantinedRequest,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    WeightsManifest,
)

if TYPE_CHECKING:
    from unirl.cluster.placement import Placement
    from unirl.cluster.reward_pool import RewardPool
    from unirl.cluster.rollout_pool import RolloutPool
    from unirl.jobs.local import LocalRollouts


class Pairs(Protocol):
    """The pairing service: hands each batch out once, counted from 0, and keeps the ledger."""

    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        ...

    def batch(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of a step, without handing them out."""
        ...

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

    oldest_version: int | None
    """Weights below this version may not sample; None asks for the published version exactly."""

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterable[RolloutGroup]:
        """One group per request, in any order; none for a request that is quarantined."""
        ...

    def load_weights(self, publication: Any, *, wait: bool = True) -> None:
        """Bring every sampler to the published weights; without `wait`, before what it is handed next."""
        ...

    def close(self) -> None:
        """End the workers; whoever is sampling is told."""
        ...

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        ...

    def take_sync_check(self) -> SyncCheck:
        """How the samplers' own weights compared with those published, since the last call."""
        ...

    def take_activities(self) -> list[Activity]:
        """What the workers did since the last call."""
        ...

    def take_quarantined(self) -> list[QuarantinedRequest]:
        """Requests that failed for good and have no group, since the last call."""
        ...


class Rewards(Protocol):
    """The reward pool."""

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]:
        """Rewards of every group; failures are masked."""
        ...

    def take_restarts(self) -> int:
        """Workers replaced since the last call."""
        ...

    def take_activities(self) -> list[Activity]:
        """What the workers did since the last call."""
        ...


class Published(Protocol):
    """One version of the weights."""

    @property
    def manifest(self) -> WeightsManifest:
        """What it holds, and its checksum."""
        ...


class Learners(Protocol):
    """The learner group."""

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """Learn from the batch; returns metrics."""
        ...

    def publish_weights(self) -> Published:
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
    ahead: AheadFiles | None = None
    """Where finished rollouts wait for their step to be recorded; None keeps them in memory alone."""
    count_passes: Callable[[], int] = lambda: 0
    """Passes that this process itself made through the model."""


@contextmanager
def open_parts(
    config: RlConfig, checkpoint: Path, pairs: Path, *, local: bool, record: RunLog | None = None
) -> Iterator[Parts]:
    """Start everything a step needs and end it afterwards, whatever happened in between.

    Args:
        config: the run's.
        checkpoint: folder of the initial policy.
        pairs: folder of the pair set.
        local: all in this process.
        record: the run's record, by which parts outlive their processes and take orders; None for a measurement.
    """
    with ExitStack() as stack:
        if local:
            parts = _local_parts(config, checkpoint, pairs, stack, record)
        else:
            _join_ray(config, checkpoint, stack, record.run_dir / "logs" if record else None)
            parts = _actors(config, checkpoint, pairs, stack, record)
        keeps = config.monitoring.journal
        yield replace(parts, ahead=AheadFiles(record.run_dir)) if record is not None and keeps else parts


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


@contextmanager
def open_learner(config: RlConfig, checkpoint: Path) -> Iterator[Learners]:
    """Start the learner alone: one rank in this process, several as actors."""
    with ExitStack() as stack:
        if config.learner.num_ranks == 1:
            from unirl.jobs.local import LocalLearner

            learner = LocalLearner(config, checkpoint)
            stack.callback(learner.close)
            yield learner
            return
        import ray

        from unirl.cluster.learner_group import LearnerGroup
        from unirl.cluster.placement import place
        from unirl.cluster.plan import count_parameters, planned_learner
        from unirl.cluster.runtime import start_ray

        stack.callback(ray.shutdown)
        start_ray(config.cluster, [planned_learner(config, count_parameters(checkpoint))])
        placement = place(replace(config, cluster=replace(config.cluster, placement="separate")))
        stack.callback(placement.release)
        group = LearnerGroup(config, checkpoint, placement)
        stack.callback(group.close)
        yield group


def _local_parts(config: RlConfig, checkpoint: Path, pairs: Path, stack: ExitStack, record: RunLog | None) -> Parts:
    from unirl.jobs.local import LocalLearner

    source = PairSource.open(pairs, **pair_settings(config))
    learner = LocalLearner(config, checkpoint)
    stack.callback(learner.close)
    rollouts, rewards = _local_rollouts(config, checkpoint, stack, _control(record))
    return Parts(source, rollouts, rewards, learner, count_passes=lambda: rollouts.num_passes + learner.num_passes)


def _local_rollouts(
    config: RlConfig, checkpoint: Path, stack: ExitStack, control: ScaleControl | None = None
) -> "tuple[LocalRollouts, Rewards]":
    from unirl.jobs.local import LocalRewards, LocalRollouts

    rewards = LocalRewards(config.rewards)
    stack.callback(rewards.close)
    return LocalRollouts(config, checkpoint, control), rewards


def _actors(config: RlConfig, checkpoint: Path, pairs: Path, stack: ExitStack, record: RunLog | None) -> Parts:
    """All actors start at once; the learner's places are reserved first, since its ranks need them together."""
    from unirl.cluster.learner_group import LearnerGroup
    from unirl.cluster.pairing_service import PairingService
    from unirl.cluster.placement import place
    from unirl.cluster.runtime import wait_until_up
    from unirl.jobs.survival import survive

    placement = place(config)
    stack.callback(placement.release)
    ledger, report = (record.run_dir / "pairing.jsonl", record.event) if record else (None, None)
    rollouts, rewards = _rollout_actors(config, checkpoint, stack, placement, _control(record), report)
    service = PairingService(pairs, pair_settings(config), ledger, report)
    stack.callback(service.close)
    learner = LearnerGroup(config, checkpoint, placement, report)
    stack.callback(learner.close)
    wait_until_up(rollouts.starting() | rewards.starting(), config.cluster.start_timeout_s)
    rollouts.tell_up()
    rewards.tell_up()
    service.tell_up()
    return Parts(service, rollouts, rewards, survive(learner, service, config, record) if record else learner)


def _join_ray(
    config: RlConfig, checkpoint: Path, stack: ExitStack, log_dir: Path | None, *, with_learner: bool = True
) -> None:
    import ray

    from unirl.cluster.plan import actor_plan, count_parameters
    from unirl.cluster.runtime import start_ray

    stack.callback(ray.shutdown)
    plan = actor_plan(config, count_parameters(checkpoint), with_learner=with_learner)
    start_ray(config.cluster, plan, log_dir, heartbeat_s=config.monitoring.heartbeat_s)


def _rollout_actors(
    config: RlConfig,
    checkpoint: Path,
    stack: ExitStack,
    placement: "Placement | None" = None,
    control: ScaleControl | None = None,
    report: Report | None = None,
) -> "tuple[RolloutPool, RewardPool]":
    from unirl.cluster.reward_pool import RewardPool
    from unirl.cluster.rollout_pool import RolloutPool

    rollouts = RolloutPool(
        config,
        checkpoint,
        placement,
        control=control,
        in_flight_updates=config.overlap.in_flight_updates,
        report=report,
    )
    stack.callback(rollouts.close)
    rewards = RewardPool(config.rewards, rollouts.references, report)
    stack.callback(rewards.close)
    return rollouts, rewards


def _control(record: RunLog | None) -> ScaleControl | None:
    return ScaleControl(record.run_dir, record.event) if record else None


def pair_settings(config: RlConfig) -> dict[str, Any]:
    """Arguments of `PairSource.open`."""
    return {
        "pairs_per_step": config.rollout.pairs_per_step,
        "seed": config.train.seed,
        "shuffle": config.data.shuffle,
        "max_pairs": config.data.max_pairs,
        "take": config.data.take,
        "partners": "random" if find_objective(config.algorithm.objective).pools_tasks else config.data.partners,
    }
