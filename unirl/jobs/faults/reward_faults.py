"""Faults of rewards, advantages and pair weights."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unirl.jobs.faults.planting import replaced
from unirl.learner import batching
from unirl.rewards import reward_set
from unirl.rewards.accuracy import AccuracyReward
from unirl.rewards.lab_verifier import LabVerifierReward
from unirl.types import RewardScores, RolloutGroup, Task


def scoring(task: Task, score: Any) -> AbstractContextManager[None]:
    """The task's reward gives `score(original scores, group)` instead of its own values [G]."""
    reward = AccuracyReward if task == "understanding" else LabVerifierReward

    def make(original: Any) -> Any:
        def changed(self: Any, group: RolloutGroup) -> RewardScores:
            scores = original(self, group)
            return replace(scores, values=np.asarray(score(scores, group), np.float32))

        return changed

    return replaced(reward, "score", make)


def right_whatever_is_said() -> AbstractContextManager[None]:
    """A judge that says yes to everything."""
    return scoring("understanding", lambda scores, _: np.ones_like(scores.values))


def blank_canvas_scored() -> AbstractContextManager[None]:
    """A preference model whose image input is dead: the same score for every picture."""
    return scoring("generation", lambda scores, _: np.full_like(scores.values, 0.27))


def score_of_the_prompt() -> AbstractContextManager[None]:
    """A reward that reads the prompt and never the picture."""
    return scoring("generation", lambda scores, _: np.full_like(scores.values, scores.values[0]))


def length_is_paid() -> AbstractContextManager[None]:
    """A reward of answers that counts tokens."""
    return scoring("understanding", lambda _, g: [len(t.completion_ids) / 20 for t in g.trajectories])


def brightness_is_paid() -> AbstractContextManager[None]:
    """A reward of pictures that likes light."""
    return scoring("generation", lambda _, g: [float(t.image.mean()) / 255 for t in g.trajectories])


def darkness_is_paid() -> AbstractContextManager[None]:
    """The same with its sign lost."""
    return scoring("generation", lambda _, g: [-float(t.image.mean()) / 255 for t in g.trajectories])


def nan_reward() -> AbstractContextManager[None]:
    """A reward that divides by zero."""
    return scoring("generation", lambda scores, _: np.full_like(scores.values, np.nan))


def one_group_fails() -> AbstractContextManager[None]:
    """A judge that fails on some requests."""

    def score(scores: RewardScores, group: RolloutGroup) -> Any:
        if group.request.seeds[0] % 8 == 0:
            raise OSError("the judge is not there")
        return scores.values

    return scoring("generation", score)


def component_lost() -> AbstractContextManager[None]:
    """The sum over rewards leaves one out."""

    def make(original: Any) -> Any:
        def combine(group: RolloutGroup, components: Any, weights: Any) -> Any:
            kept = {name: scores for name, scores in components.items() if name != "lab_verifier"}
            return original(group, kept, weights)

        return combine

    return replaced(reward_set, "combine", make)


def advantages(change: Any) -> AbstractContextManager[None]:
    """Advantages [1, G] become `change(advantages, rewards)`."""

    def make(original: Any) -> Any:
        def changed(rewards: torch.Tensor, judged: torch.Tensor, weights: torch.Tensor, **settings: Any) -> Any:
            return change(original(rewards, judged, weights, **settings), rewards)

        return changed

    return replaced(batching, "group_relative_advantages", make)


def sign_lost() -> AbstractContextManager[None]:
    """Advantages with the wrong sign."""
    return advantages(lambda values, _: -values)


def off_by_one() -> AbstractContextManager[None]:
    """Each completion gets its neighbour's advantage."""
    return advantages(lambda values, _: values.roll(1, dims=1))


def no_baseline() -> AbstractContextManager[None]:
    """Rewards taken for advantages: the group's mean is not subtracted."""
    return advantages(lambda _, rewards: rewards)


def aligned_pairs_weighed() -> AbstractContextManager[None]:
    """Aligned pairs weigh half as much as they should."""
    return replaced(batching, "weigh_pairs", lambda original: lambda *a, **k: 0.5 * original(*a, **k))


def weight_upside_down() -> AbstractContextManager[None]:
    """Pair weights divided by instead of multiplied with."""
    return replaced(batching, "weigh_pairs", lambda original: lambda *a, **k: 1 / original(*a, **k).clamp(min=1e-3))
