"""Truncated importance weights, for tokens that older weights sampled.

Shapes: B trajectories of a micro-batch, T tokens.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def truncated_importance(
    logprobs: Float[Tensor, "B T"], sampled_logprobs: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"], cap: float
) -> Float[Tensor, "B T"]:
    """min(p / q, cap) of each counted token, without gradient; 1 elsewhere.

    The loss of a batch that older weights sampled is sum w * L_clip(p' / p), with p before the update and p' the policy
    that is trained: off-policy by w, clipped around p (truncated importance sampling, Ionides 2008; decoupled PPO,
    Hilton et al. 2022).

    Args:
        logprobs: of the policy before the update, log p, nats.
        sampled_logprobs: of the weights that sampled, log q, nats.
        loss_mask: true where the loss counts.
        cap: at least 1.

    Raises:
        ValueError: a cap below 1, which would shrink tokens that nothing is wrong with.
    """
    if not 1 <= cap < math.inf:
        raise ValueError(f"expected an importance cap of at least 1, got {cap}: 2 is usual.")
    log_ratio = torch.where(loss_mask, logprobs.detach() - sampled_logprobs, 0.0)
    return log_ratio.exp().clamp(max=cap)
