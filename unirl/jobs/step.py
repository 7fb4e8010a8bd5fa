"""One step of PairGRPO: sample both sides of each pair, score them, weigh them by similarity, update the one policy.

`sample_step` and `learn_step` are the whole method on one page; a flow (`flow.py`) says which runs when.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product

import numpy as np

from unirl.config import RlConfig, RolloutConfig, SamplingConfig
from unirl.data.pair_source import StepResult
from unirl.jobs.parts import Parts, Published
from unirl.learner.batching import build_batch, weigh_groups
from unirl.monitoring.phases import Activity
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.step_data import StepData, SyncCheck
from unirl.rollout.seeds import sample_seed
from unirl.rollout.units import units_of_work
from unirl.types import (
    TASKS,
    GenerationSample,
    PairRecord,
    QuarantinedRequest,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    Task,
    UnderstandingSample,
    WeightedGroup,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """A step's pairs with everything that was sampled for them, scored."""

    step: int
    pairs: tuple[PairRecord, ...]
    scored: list[ScoredGroup]
    quarantined: Sequence[QuarantinedRequest] = ()
    """What could not be sampled."""
    num_kept: int = 0
    """Groups that were on disk already, sampled before a crash."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Workers replaced meanwhile, by pool."""
    sync_check: SyncCheck = field(default_factory=SyncCheck)
    """Whether samplers took over published weights."""
    activities: Sequence[Activity] = ()
    """What the workers did."""


def sample_step(step: int, parts: Parts, config: RlConfig, clock: StepClock) -> SampledStep:
    """Sample and score. Groups are scored while later ones are still being sampled."""
    with clock.phase("pairs"):
        pairs = parts.pairs.lease(step - 1)
        requests = make_requests(pairs, step, config)
    for pool in (parts.rollouts, parts.rewards):
        pool.take_activities()  # of an evaluation in between
    with clock.phase("rollout"):
        kept = kept_groups(step, requests, parts, config.rollout)
        scored = parts.rewards.score(chain(kept, sample_others(step, requests, kept, parts, config.rollout.sampling)))
        quarantined = parts.rollouts.take_quarantined()
        check_judged(scored, quarantined, config.rewards.max_unjudged_fraction)
    return SampledStep(
        step=step,
        pairs=pairs,
        scored=scored,
        quarantined=quarantined,
        num_kept=len(kept),
        restarts={"rollout": parts.rollouts.take_restarts(), "reward": parts.rewards.take_restarts()},
        activities=[*parts.rollouts.take_activities(), *parts.rewards.take_activities()],
        sync_check=parts.rollouts.take_sync_check(),
    )


def learn_step(sampled: SampledStep, parts: Parts, config: RlConfig, clock: StepClock) -> tuple[StepData, Published]:
    """Weigh, learn, publish; returns what the step did and the new weights."""
    step = sampled.step
    with clock.phase("batch"):
        weighted = weigh_groups(sampled.scored, sampled.pairs, config.algorithm)
        batch = build_batch(weighted, config.algorithm)
    with clock.phase("update"):
        update = parts.learner.update(batch, step)
    with clock.phase("publish"):
        published = parts.learner.publish_weights()
    parts.pairs.record(step - 1, results_of(weighted, sampled.pairs))
    data = StepData(
        step=step,
        groups=weighted,
        learner=update,
        restarts=sampled.restarts,
        activities=sampled.activities,
        quarantined=sampled.quarantined,
        num_kept=sampled.num_kept,
        weights_checksum=published.manifest.checksum,
        num_pairs=parts.pairs.num_pairs(),
        sync_check=sampled.sync_check,
        policy_version=published.manifest.policy_version - config.algorithm.updates_per_step,
    )
    return data, published


def rl_step(step: int, parts: Parts, config: RlConfig, clock: StepClock) -> StepData:
    """One step of PairGRPO, from pairs to new weights in the samplers."""
    data, published = learn_step(sample_step(step, parts, config, clock), parts, config, clock)
    with clock.phase("publish"):
        parts.rollouts.load_weights(published)
    return replace(data, seconds=clock.take_seconds(), blocks=clock.taken)


def kept_groups(
    step: int, requests: Sequence[RolloutRequest], parts: Parts, rollout: RolloutConfig
) -> list[RolloutGroup]:
    """What a run that broke off had sampled of this step.

    Of deterministic rollouts whole units of work alone, so that what is sampled beside them is batched as it would have
    been: last bits depend on the shape of a batch.
    """
    if parts.ahead is None:
        return []
    kept: list[RolloutGroup] = []
    for unit in units_of_work(requests, rollout.sequences_per_unit):
        found = [group for request in unit if (group := parts.ahead.read(step, request))]
        kept += found if len(found) == len(unit) or not rollout.deterministic else []
    return kept


def sample_others(
    step: int,
    requests: Sequence[RolloutRequest],
    kept: Sequence[RolloutGroup],
    parts: Parts,
    sampling: SamplingConfig,
) -> Iterator[RolloutGroup]:
    """The groups that are not kept; each goes to disk before anything is made of it."""
    done = {group.request.request_id for group in kept}
    rest = [request for request in requests if request.request_id not in done]
    for group in parts.rollouts.sample(rest, sampling) if rest else ():
        if parts.ahead is not None:
            parts.ahead.write(step, group)
        yield group


def make_requests(pairs: Sequence[PairRecord], step: int, config: RlConfig) -> list[RolloutRequest]:
    """Both prompts of every pair, with one seed per completion, keyed so that nothing else can change the tokens."""
    requests: list[RolloutRequest] = []
    for pair in pairs:
        sides: tuple[tuple[Task, UnderstandingSample | GenerationSample, int], ...] = (
            ("understanding", pair.understanding, config.rollout.num_understanding),
            ("generation", pair.generation, config.rollout.num_generation),
        )
        for task, sample, count in sides:
            seeds = tuple(sample_seed(config.train.seed, step, pair.pair_id, task, index) for index in range(count))
            name = f"{pair.pair_id}/{task}"
            requests.append(
                RolloutRequest(request_id=name, pair_id=pair.pair_id, task=task, sample=sample, seeds=seeds)
            )
    return requests


def check_judged(scored: Sequence[ScoredGroup], quarantined: Sequence[QuarantinedRequest], limit: float) -> None:
    """Stop when more than a share of a task's completions could not be sampled, or rewards failed on them.

    Raises:
        RuntimeError: names the share, the limit and the first problem.
    """
    for task in TASKS:
        groups = [group for group in scored if group.group.request.task == task]
        lost = [request for request in quarantined if request.task == task]
        num_lost = sum(request.num_completions for request in lost)
        total = num_lost + sum(len(group.judged) for group in groups)
        unjudged = num_lost + sum(int((~group.judged).sum()) for group in groups)
        if unjudged > limit * total:
            problems = chain(
                (f"{request.request_id} could not be sampled: {request.error}" for request in lost),
                (f"{name}: {s.problem}" for g in groups for name, s in g.components.items() if s.problem),
            )
            raise RuntimeError(
                f"rewards: expected at most {limit:.0%} of a step's {task} unjudged (rewards.max_unjudged_fraction); "
                f"got {unjudged} of {total}; first problem: {next(problems, 'none given')}; mend the reward and resume"
            )


def results_of(weighted: Sequence[WeightedGroup], pairs: Sequence[PairRecord]) -> list[StepResult]:
    """What each side of each pair earned, for the pairing service's ledger; nothing where it has no group."""
    rewards = {
        (group.pair.pair_id, group.scored.group.request.task): group.scored.rewards[group.scored.judged]
        for group in weighted
    }
    results: list[StepResult] = []
    for pair, task in product(pairs, TASKS):
        own = rewards.get((pair.pair_id, task), np.zeros(0, np.float32))
        results.append(
            StepResult(
                pair_id=pair.pair_id,
                task=task,
                mean_reward=float(own.mean()) if len(own) else None,
                zero_variance=bool(len(own) and (own == own[0]).all()),
            )
        )
    return results
