"""What sentinels want to know of a step beside its curves: what rewards follow, what repeats, what does not fit."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from unirl.monitoring.step_data import StepData
from unirl.types import TASKS, Trajectory, UnderstandingSample, WeightedGroup

ROUNDING = 1e-4
"""Of an advantage: what a sum over a group, or two equal rewards, may differ by."""


def check_metrics(data: StepData) -> Iterator[tuple[str, float]]:
    """Names and values; what the step cannot tell is left out."""
    for task in TASKS:
        groups = [group for group in data.groups if group.scored.group.request.task == task]
        rewards = np.concatenate([group.scored.rewards[group.scored.judged] for group in groups] or [np.zeros(0)])
        if len(rewards):
            yield f"reward/{task}/range", float(np.ptp(rewards))
        means = [g.scored.rewards[g.scored.judged].mean(dtype=np.float64) for g in groups if g.scored.judged.any()]
        if len(means) > 1:
            yield f"reward/{task}/spread", float(np.std(means, ddof=1))
        yield from _coupling(task, groups)
        yield from _cut_off(task, groups)
    if data.groups:
        yield "advantage/disordered_fraction", float(np.mean([is_disordered(group) for group in data.groups]))
        yield "pairs/num_blank_images", len({group.pair.pair_id for group in data.groups if _has_blank(group)})
    drawings = [g.scored.group.trajectories for g in data.groups if g.scored.group.trajectories[0].modality == "image"]
    if several := [group for group in drawings if len(group) > 1]:
        yield "rollout/equal_images_fraction", float(np.mean([_all_equal(group) for group in several]))
    for modality in ("text", "image"):
        drawn = [t for g in data.groups for t in g.scored.group.trajectories if t.modality == modality]
        logprobs = np.concatenate([t.logprobs[t.loss_mask] for t in drawn] or [np.zeros(0, np.float32)])
        if len(logprobs):
            yield f"rollout/surprisal/{modality}", -float(logprobs.mean(dtype=np.float64))
    yield "rollout/num_stale_samplers", len(data.sync_check.stale)
    if data.sync_check.fewest_compared is not None:
        yield "rollout/num_compared_weights", data.sync_check.fewest_compared


def _coupling(task: str, groups: Sequence[WeightedGroup]) -> Iterator[tuple[str, float]]:
    name, measure = ("length", _length) if task == "understanding" else ("brightness", _brightness)
    found = [value for group in groups if (value := _rank_correlation(group, measure)) is not None]
    if found:
        freedom = sum(num - 1 for _, num in found)
        yield f"reward/{task}/{name}_coupling", sum(value * (num - 1) for value, num in found) / freedom
        yield f"reward/{task}/{name}_coupling_freedom", freedom


def _rank_correlation(group: WeightedGroup, measure: Callable[[Trajectory], float | None]) -> tuple[float, int] | None:
    """Spearman's, over the judged completions of a group, and their number; None where nothing varies."""
    trajectories = group.scored.group.trajectories
    values = [measure(t) for t, judged in zip(trajectories, group.scored.judged, strict=True) if judged]
    kept = np.array([value for value in values if value is not None], np.float64)
    rewards = group.scored.rewards[group.scored.judged]
    if len(kept) < len(values) or len(kept) < 3 or np.ptp(kept) == 0 or np.ptp(rewards) == 0:
        return None
    return float(np.corrcoef(ranks(kept), ranks(rewards))[0, 1]), len(kept)


def ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks [N] from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _length(trajectory: Trajectory) -> float:
    return float(trajectory.loss_mask.sum())


def _brightness(trajectory: Trajectory) -> float | None:
    # What a picture is known by its codes alone, from a journal, has no pixels.
    return None if trajectory.image is None else round(float(trajectory.image.mean()), 3)


def _cut_off(task: str, groups: Sequence[WeightedGroup]) -> Iterator[tuple[str, float]]:
    """Mean reward of judged answers that were cut off."""
    rewards = [
        float(group.scored.rewards[index])
        for group in groups
        for index, trajectory in enumerate(group.scored.group.trajectories)
        if trajectory.finish_reason == "length" and group.scored.judged[index]
    ]
    if rewards:
        yield f"reward/{task}/truncated", float(np.mean(rewards))


def is_disordered(group: WeightedGroup) -> bool:
    """Whether advantages do not rise with the rewards of their group, or do not sum to 0, or judge the unjudged."""
    judged = group.scored.judged
    rewards, advantages = group.scored.rewards[judged].astype(np.float64), group.advantages[judged]
    if group.advantages[~judged].any():
        return True
    if len(rewards) < 2:
        return False
    order = np.argsort(rewards, kind="stable")
    steps, rises = np.diff(rewards[order]), np.diff(advantages[order])
    rounding = ROUNDING * max(1.0, float(np.abs(advantages).max()))
    wrong = np.where(steps > 0, rises <= 0, np.abs(rises) > rounding)
    return bool(wrong.any() or abs(advantages.sum()) > rounding * len(advantages))


def _has_blank(group: WeightedGroup) -> bool:
    sample = group.scored.group.request.sample
    return isinstance(sample, UnderstandingSample) and bool((sample.image == sample.image[0, 0]).all())


def _all_equal(trajectories: Sequence[Trajectory]) -> bool:
    first = trajectories[0].completion_ids
    return all(np.array_equal(first, other.completion_ids) for other in trajectories[1:])
