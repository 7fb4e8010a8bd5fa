"""What a reward must offer, the one place that lists the rewards, and their weighted sum."""

import inspect
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from unirl.config import RewardConfig
from unirl.types import RewardScores, RolloutGroup, ScoredGroup


class Reward(Protocol):
    """Scores the completions of one request. May raise: the caller retries, then masks the group and says why."""

    def score(self, group: RolloutGroup) -> RewardScores:
        """One value per trajectory; what cannot be judged is marked so, never scored 0."""
        ...


def build_reward(name: str, config: RewardConfig) -> Reward:
    """The reward called `name`.

    Raises:
        ValueError: no reward has this name, or its options do not fit.
    """
    match name:
        case "accuracy":
            from unirl.rewards.accuracy import AccuracyReward as Chosen
        case "hpsv2":
            from unirl.rewards.hpsv2 import Hpsv2Reward as Chosen
        case "lab_verifier":
            from unirl.rewards.lab_verifier import LabVerifierReward as Chosen
        case _:
            raise ValueError(
                f"rewards: expected a name of accuracy, hpsv2, lab_verifier; got {name!r}; correct the name, or add a "
                "case to unirl/rewards/reward.py:build_reward"
            )
    known = inspect.signature(Chosen).parameters
    required = {option for option, parameter in known.items() if parameter.default is inspect.Parameter.empty}
    if wrong := (config.options.keys() - known.keys()) | (required - config.options.keys()):
        raise ValueError(
            f"rewards.*.{name}.options: expected {', '.join(known) or 'no option'}, of which required: "
            f"{', '.join(sorted(required)) or 'none'}; got {sorted(config.options)}; correct {', '.join(sorted(wrong))}"
        )
    return Chosen(**config.options)


def combine(group: RolloutGroup, components: Mapping[str, RewardScores], weights: Mapping[str, float]) -> ScoredGroup:
    """Weighted sum of the components; a trajectory counts as judged when every component judged it."""
    size = len(group.trajectories)
    judged = np.ones(size, dtype=np.bool_)
    total = np.zeros(size, dtype=np.float32)
    for name, scores in components.items():
        judged &= scores.judged
        total += np.float32(weights[name]) * np.where(scores.judged, scores.values, 0.0).astype(np.float32)
    rewards = np.where(judged, total, 0.0).astype(np.float32)
    return ScoredGroup(group=group, rewards=rewards, judged=judged, components=dict(components))
