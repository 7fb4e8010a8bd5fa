"""Rewards of a group of samples -> advantages. Nothing here knows tasks, models or losses.

Shapes: N groups (one prompt of one task each), G samples in a group.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unirl.algorithms.choices import require_choice

AdvantageStd = Literal["sample", "population", "none"]

STD_FLOOR = 1e-4
"""Added to the standard deviation, in reward units; keeps a nearly unanimous group from exploding."""


def group_relative_advantages(
    rewards: Float[Tensor, "N G"],
    judged: Bool[Tensor, "N G"],
    pair_weights: Float[Tensor, " N"],
    *,
    std: AdvantageStd = "sample",
) -> Float[Tensor, "N G"]:
    """Rewards centred and scaled within each group, times the weight of the group's pair.

    A = w (r - mean) / (std + 1e-4), over the judged samples of the group (PairGRPO, section 2.2 and eq. 4).
    The floor 1e-4 is not in the paper. A group states no preference, and gets exact zeros, when its judged rewards
    are equal or when fewer than two samples were judged. An unjudged sample gets zero and touches no statistic.

    Args:
        rewards: sum over reward models, unitless; entries that were not judged are ignored and may be NaN.
        judged: true where the reward is a real judgement.
        pair_weights: weight of each group's pair, in [0, 1]; 1 is plain GRPO.
        std: `sample` divides by n - 1, `population` by n; `none` does not scale (Dr.GRPO).

    Raises:
        ValueError: fewer than two samples per group, a judged reward or a weight that is not finite, a weight
            outside [0, 1], or an unknown `std`.
    """
    require_choice("advantage_std", std, AdvantageStd)
    _check(rewards, judged, pair_weights)
    values = torch.where(judged, rewards, 0.0).double()
    count = judged.sum(dim=1, keepdim=True).double()
    centred = torch.where(judged, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    squares = centred.square().sum(dim=1, keepdim=True)
    match std:
        case "sample":
            scaled = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + STD_FLOOR)
        case "population":
            scaled = centred / ((squares / count.clamp(min=1)).sqrt() + STD_FLOOR)
        case "none":
            scaled = centred
    # The mean of equal numbers can differ from them by one rounding, so equality is tested on the rewards themselves.
    highest = torch.where(judged, rewards, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(judged, rewards, torch.inf).amin(dim=1, keepdim=True)
    scaled = torch.where((highest > lowest) & judged, scaled, 0.0)
    return (scaled * pair_weights.double()[:, None]).to(rewards.dtype)


def _check(rewards: Tensor, judged: Tensor, pair_weights: Tensor) -> None:
    if rewards.shape[1] < 2:
        raise ValueError(
            f"expected at least 2 samples per group, got {rewards.shape[1]}: a group of one has no one to be compared "
            "with; raise the number of samples per prompt."
        )
    bad = judged & ~rewards.isfinite()
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"expected finite judged rewards, got {rewards[row, column].item()} at group {row}, sample {column} "
            f"({int(bad.sum())} in all): mark a reward that failed as not judged."
        )
    bad_weight = ~((pair_weights >= 0) & (pair_weights <= 1))
    if bad_weight.any():
        row = int(bad_weight.nonzero()[0])
        raise ValueError(
            f"expected pair weights in [0, 1], got {pair_weights[row].item()} at group {row}: use pair_weight()."
        )
