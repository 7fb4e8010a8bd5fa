"""Scored groups with their pair weights and advantages, as the learner's batch holds them."""

from collections.abc import Sequence

import torch

from unirl.algorithms.advantages import group_relative_advantages
from unirl.algorithms.pair_grpo import weigh_pairs
from unirl.config import AlgorithmConfig
from unirl.monitoring.step_data import WeightedGroup
from unirl.types import PairRecord, ScoredGroup


def weigh_groups(
    scored: Sequence[ScoredGroup], pairs: Sequence[PairRecord], config: AlgorithmConfig
) -> tuple[WeightedGroup, ...]:
    """Each group with its pair, the pair's weight and the advantages of all completions, dropped rows included.

    Raises:
        KeyError: a group of a pair that is not in `pairs`.
    """
    rule = config.pair_weight
    weights = weigh_pairs([p.kind for p in pairs], [p.similarity for p in pairs], objective=config.objective, rule=rule)
    by_id = {pair.pair_id: (pair, weight) for pair, weight in zip(pairs, weights.tolist(), strict=True)}
    return tuple(_weigh(group, *by_id[group.group.request.pair_id], config) for group in scored)


def _weigh(group: ScoredGroup, pair: PairRecord, weight: float, config: AlgorithmConfig) -> WeightedGroup:
    advantages = group_relative_advantages(
        torch.from_numpy(group.rewards.astype("float64"))[None],
        torch.from_numpy(group.judged.copy())[None],
        torch.tensor([weight], dtype=torch.float64),
        std=config.advantage_std,
    )
    return WeightedGroup(scored=group, pair=pair, pair_weight=weight, advantages=advantages[0].numpy())
