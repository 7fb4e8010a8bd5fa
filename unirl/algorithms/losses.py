"""Parts of a policy-gradient loss: clipped surrogate, KL estimators, aggregation weights, metrics as sums.

Shapes: B trajectories of a micro-batch, T tokens. Masks are true where the loss counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unirl.algorithms.choices import require_choice

Aggregation = Literal["sequence_mean", "sequence_sum", "token_mean", "constant_length"]
KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTotals:
    """Counts over the whole batch of one update: all micro-batches, all ranks.

    Trajectories that could not be judged are left out of every count; judged ones with advantage 0 are in.
    """

    num_trajectories: Mapping[str, int]
    """Per task."""
    num_tokens: Mapping[str, int]
    """Loss tokens per task."""
    num_pairs: int
    """Pairs that gave the trajectories; only `sequence_sum` of each task reads it."""

    def __post_init__(self) -> None:
        """Refuse counts that no batch can have."""
        if set(self.num_trajectories) != set(self.num_tokens):
            raise ValueError(f"expected the same tasks in both counts, got {self}: count each task in both.")
        if self.num_pairs < 1 or any(n < 0 for n in (*self.num_trajectories.values(), *self.num_tokens.values())):
            raise ValueError(f"expected counts >= 0 and num_pairs >= 1, got {self}: count over all ranks.")


def clipped_surrogate(
    ratio: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], clip_low: float, clip_high: float
) -> Float[Tensor, "B T"]:
    """Each token's min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), to be maximised.

    L_clip of PairGRPO eq. 1. The minimum is pessimistic for both signs: for A < 0 a ratio above 1 + clip_high keeps
    its full penalty, and only a ratio below 1 - clip_low is held.
    """
    spread = advantages[:, None]
    return torch.minimum(ratio * spread, ratio.clamp(1 - clip_low, 1 + clip_high) * spread)


def kl_estimates(log_ratio: Float[Tensor, "B T"], estimator: KlEstimator) -> Float[Tensor, "B T"]:
    """Per-token estimate in nats of KL(policy || reference), from tokens that the policy drew.

    With d = `log_ratio` = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman,
    "Approximating KL divergence"). k1 and k3 have the right mean, k2 and k3 are never negative.
    Differentiating d itself would pull towards nothing (its gradient is zero in expectation), so k1 carries the
    gradient of k2, which is that of the true KL when sampling is on-policy.

    Raises:
        ValueError: unknown estimator.
    """
    require_choice("kl_estimator", estimator, KlEstimator)
    match estimator:
        case "k1":
            half_square = 0.5 * log_ratio.square()
            return half_square + (log_ratio - half_square).detach()
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio


def token_scales(
    num_tokens: Sequence[int],
    tasks: Sequence[str],
    totals: BatchTotals,
    *,
    aggregation: Aggregation = "sequence_mean",
    pooled: bool = False,
    max_lengths: Mapping[str, int] | None = None,
) -> Float[Tensor, " B"]:
    """Weight in float64 of each token of a trajectory; weighted token sums of micro-batches and ranks add up to J.

    With n trajectories and m tokens in the trajectory's task (in all tasks when pooled), P pairs and t tokens in the
    trajectory:

    | aggregation | each task (eq. 2, eq. 4) | pooled (eq. 1) |
    |---|---|---|
    | sequence_mean | 1 / (n t) | 1 / (n t) |
    | sequence_sum, as printed | 1 / P | 1 / n |
    | token_mean (DAPO, T2I-R1) | 1 / m | 1 / m |
    | constant_length (Dr.GRPO) | 1 / (n L) | 1 / (n L) |

    So the tasks' means are added, or there is one mean. Only `sequence_sum` is in the paper; in it an image of 576
    tokens outweighs a short answer.

    Args:
        num_tokens: loss tokens of each trajectory; 0 marks padding and gets weight 0.
        tasks: task of each trajectory, a key of the totals.
        totals: counts over the whole batch, never over the micro-batch.
        aggregation: see the table.
        pooled: whether both tasks share one mean.
        max_lengths: L per task, the most tokens that a completion may have; only for `constant_length`.

    Raises:
        ValueError: unknown name, a task without total or length, totals smaller than the rows at hand, or a
            trajectory longer than L.
    """
    require_choice("token_aggregation", aggregation, Aggregation)
    _check_counts(num_tokens, tasks, totals)

    def denominator(tokens: int, task: str) -> int:
        trajectories = sum(totals.num_trajectories.values()) if pooled else totals.num_trajectories[task]
        match aggregation:
            case "sequence_mean":
                return trajectories * tokens
            case "sequence_sum":
                return trajectories if pooled else totals.num_pairs
            case "token_mean":
                return sum(totals.num_tokens.values()) if pooled else totals.num_tokens[task]
            case "constant_length":
                return trajectories * _max_length(tokens, task, max_lengths)

    scales = [1 / denominator(tokens, task) if tokens else 0.0 for tokens, task in zip(num_tokens, tasks, strict=True)]
    return torch.tensor(scales, dtype=torch.float64)


def masked_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum in float64, without gradient, of the values where the mask is true; whatever lies elsewhere is ignored."""
    return torch.where(mask, values.detach().double(), 0.0).sum()


def surrogate_sums(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> dict[str, Float[Tensor, ""]]:
    """Sums and the token count behind `mean_metrics`; adding them over micro-batches and ranks loses nothing.

    `clipped_low` and `clipped_high` count tokens whose gradient the clip removed.
    """
    log_ratio = log_ratio.detach().double()
    ratio, spread = log_ratio.exp(), advantages[:, None]
    ones = torch.ones_like(ratio)
    return {
        "tokens": masked_sum(ones, mask),
        "ratio": masked_sum(ratio, mask),
        "ratio_squared": masked_sum(ratio.square(), mask),
        "clipped_low": masked_sum(ones, mask & (spread < 0) & (ratio < 1 - clip_low)),
        "clipped_high": masked_sum(ones, mask & (spread > 0) & (ratio > 1 + clip_high)),
        "kl_old": masked_sum(torch.expm1(log_ratio) - log_ratio, mask),
    }


def mean_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means per loss token from the reduced sums: ratio_mean, ratio_std, clip fractions, KL and entropy in nats.

    kl_old_mean estimates KL(old || new) by k3, since the old policy drew the tokens. Sums that were not gathered give
    no mean, and a batch without loss tokens gives an empty result.

    Args:
        sums: `tokens` and any of the sums of `surrogate_sums` and `policy_loss`, or `entropy`, added over
            micro-batches and ranks.
    """
    tokens = sums["tokens"]
    if tokens == 0:
        return {}
    names = {
        "ratio": "ratio_mean",
        "clipped_low": "clip_low_fraction",
        "clipped_high": "clip_high_fraction",
        "capped": "ratio_capped_fraction",
        "kl_old": "kl_old_mean",
        "kl_ref": "kl_ref_mean",
        "entropy": "entropy_mean",
    }
    means = {name: sums[key] / tokens for key, name in names.items() if key in sums}
    if "ratio_squared" in sums:
        means["ratio_std"] = max(0.0, sums["ratio_squared"] / tokens - means["ratio_mean"] ** 2) ** 0.5
    return means


def _check_counts(num_tokens: Sequence[int], tasks: Sequence[str], totals: BatchTotals) -> None:
    for task in set(tasks):
        here = [tokens for tokens, owner in zip(num_tokens, tasks, strict=True) if owner == task and tokens > 0]
        if len(here) > totals.num_trajectories.get(task, 0) or sum(here) > totals.num_tokens.get(task, 0):
            raise ValueError(
                f"expected totals of the whole batch, got {totals} with {len(here)} trajectories and {sum(here)} "
                f"tokens of task {task!r} in one micro-batch: count over all micro-batches and ranks."
            )


def _max_length(tokens: int, task: str, max_lengths: Mapping[str, int] | None) -> int:
    longest = (max_lengths or {}).get(task, 0)
    if tokens > longest:
        raise ValueError(
            f"expected at most max_lengths[{task!r}] tokens for constant_length, got {tokens} with max_lengths="
            f"{max_lengths}: give the most tokens that the sampler may produce for each task."
        )
    return longest
