"""Steps computed again from the journal, without sampling or scoring: for a resume, a new gang, and `unirl replay`."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from unirl.config import AlgorithmConfig
from unirl.jobs.parts import Learners
from unirl.learner.batching import build_batch, weigh_groups
from unirl.monitoring.journal import JournalRow, read_step
from unirl.types import (
    PairRecord,
    RewardScores,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    Trajectory,
    WeightedGroup,
)


def rebuild_step(
    run_dir: Path, step: int, pairs: Sequence[PairRecord], algorithm: AlgorithmConfig
) -> tuple[WeightedGroup, ...]:
    """The step's groups as the update saw them; pictures are known by their codes alone.

    Args:
        run_dir: the run.
        step: counted from 1.
        pairs: those of the step.
        algorithm: how rewards become advantages; another one than the run's asks what would have been.

    Raises:
        ValueError: the step has no journal, or the journal is of other pairs.
    """
    return weigh_groups(list(_scored(read_step(run_dir, step), pairs)), pairs, algorithm)


def redo_step(
    learner: Learners, run_dir: Path, step: int, pairs: Sequence[PairRecord], algorithm: AlgorithmConfig
) -> tuple[tuple[WeightedGroup, ...], dict[str, float]]:
    """Make the update of a recorded step once more; returns its groups and what the learner measured.

    Raises:
        ValueError: the step has no journal, or the journal is of other pairs.
    """
    weighted = rebuild_step(run_dir, step, pairs, algorithm)
    return weighted, learner.update(build_batch(weighted, algorithm), step)


def _scored(rows: Sequence[JournalRow], pairs: Sequence[PairRecord]) -> Iterator[ScoredGroup]:
    by_id = {pair.pair_id: pair for pair in pairs}
    for request_id, members in groupby(rows, key=lambda row: row.request_id):
        own = list(members)
        pair = by_id.get(own[0].pair_id)
        sample = None if pair is None else getattr(pair, own[0].task)
        if sample is None or sample.id != own[0].sample_id:
            raise ValueError(
                f"journal: expected the pairs of the step, {', '.join(by_id)}; got pair {own[0].pair_id} with sample "
                f"{own[0].sample_id}; give the pair set that the run was trained on"
            )
        request = RolloutRequest(
            request_id=request_id,
            pair_id=own[0].pair_id,
            task=own[0].task,
            sample=sample,
            seeds=tuple(row.seed for row in own),
        )
        group = RolloutGroup(request=request, trajectories=tuple(map(_trajectory, own)))
        rewards = np.array([row.reward for row in own], np.float32)
        judged = np.array([row.judged for row in own], np.bool_)
        yield ScoredGroup(group=group, rewards=rewards, judged=judged, components=_components(own))


def _components(rows: Sequence[JournalRow]) -> dict[str, RewardScores]:
    scores: dict[str, RewardScores] = {}
    for place, part in enumerate(rows[0].components):
        parts = [row.components[place] for row in rows]
        details = {name: np.array([p.details[name] for p in parts], np.float32) for name in part.details}
        values, judged = np.array([p.value for p in parts], np.float32), np.array([p.judged for p in parts], np.bool_)
        scores[part.name] = RewardScores(values=values, judged=judged, details=details, problem=part.problem)
    return scores


def _trajectory(row: JournalRow) -> Trajectory:
    return Trajectory(
        prompt_ids=row.prompt_ids,
        completion_ids=row.completion_ids,
        loss_mask=row.loss_mask,
        logprobs=row.logprobs,
        modality="image" if row.text is None else "text",
        text=row.text,
        finish_reason=row.finish_reason,
        policy_version=row.policy_version,
        seed=row.seed,
        unmask_step=row.unmask_step,
        version_spans=row.version_spans,
    )
