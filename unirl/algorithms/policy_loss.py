"""The token-wise loss of a micro-batch: clipped surrogate and KL, shared by all objectives.

Shapes: B trajectories of a micro-batch, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unirl.algorithms.choices import require_choice
from unirl.algorithms.losses import KlEstimator, clipped_surrogate, kl_estimates, masked_sum, surrogate_sums

LOG_RATIO_CAP = 20.0
"""Nats. A token beyond it (e^20) is held there, loses its gradient and is counted, instead of overflowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRule:
    """Constants of the token-wise loss."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; in (0, 1]."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; above 0."""
    kl_beta: float = 0.0
    """Weight of the KL to the reference; 0 leaves it out."""
    kl_estimator: KlEstimator = "k3"

    def __post_init__(self) -> None:
        """Refuse constants under which the loss would teach something else."""
        if not (0 < self.clip_low <= 1 and 0 < self.clip_high < float("inf") and 0 <= self.kl_beta < float("inf")):
            raise ValueError(
                f"expected 0 < clip_low <= 1, clip_high > 0 and kl_beta >= 0, got {self}: the paper's lineage uses "
                "0.2, 0.2 and 0."
            )
        require_choice("kl_estimator", self.kl_estimator, KlEstimator)


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    scale: Float[Tensor, " B"] | Float[Tensor, "B T"],
    rule: LossRule,
    ref_logprobs: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Loss to minimise over a micro-batch, and its metrics as detached float64 sums (see `losses.mean_metrics`).

    loss = sum over counted tokens of scale * (-L_clip(ratio, A) + beta KL), which is minus J of eq. 1, 2 or 4
    according to where `advantages` and `scale` come from. `scale` rests on counts of the whole batch, so the losses of
    micro-batches and ranks add up to the loss of the batch: sum gradients over ranks, do not average them.
    Rows with advantage 0 may be left out when kl_beta is 0. A micro-batch of padding alone gives 0 with a zero
    gradient.

    Args:
        logprobs: of the policy being trained, nats, with gradient.
        old_logprobs: of the policy that sampled, under the same scoring mode.
        advantages: pair weight already applied.
        loss_mask: true where the loss counts; values elsewhere may be anything, NaN included.
        scale: from `losses.token_scales`; [B, T] when positions have weights of their own.
        rule: clip and KL constants.
        ref_logprobs: of the reference policy; needed when kl_beta > 0, reported when given.

    Raises:
        ValueError: a value that is not finite where the loss counts, or kl_beta > 0 without a reference.
    """
    if rule.kl_beta > 0 and ref_logprobs is None:
        raise ValueError(
            f"expected ref_logprobs for kl_beta={rule.kl_beta}, got None: pass old_logprobs or the initial policy's."
        )
    advantages = advantages.to(logprobs.dtype)
    weights = (scale if scale.ndim == 2 else scale[:, None]).to(logprobs.dtype)
    counted = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages[:, None], "scale": weights}
    _check_finite(loss_mask, counted if ref_logprobs is None else counted | {"ref_logprobs": ref_logprobs})
    raw = torch.where(loss_mask, logprobs - old_logprobs.detach(), 0.0)
    log_ratio = raw.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP)
    per_token = -clipped_surrogate(log_ratio.exp(), advantages, rule.clip_low, rule.clip_high)
    sums = surrogate_sums(log_ratio, advantages, loss_mask, rule.clip_low, rule.clip_high)
    sums["capped"] = (raw.detach().abs() > LOG_RATIO_CAP).sum().double()
    if ref_logprobs is not None:
        difference = torch.where(loss_mask, logprobs - ref_logprobs.detach(), 0.0)
        kl = kl_estimates(difference, rule.kl_estimator)
        sums["kl_ref"] = masked_sum(kl, loss_mask)
        per_token = per_token + rule.kl_beta * kl if rule.kl_beta > 0 else per_token
    loss = torch.where(loss_mask, per_token * weights, 0.0).sum()
    sums["loss"] = loss.detach().double()
    return loss, sums


def _check_finite(loss_mask: Tensor, counted: Mapping[str, Tensor]) -> None:
    for name, values in counted.items():
        bad = loss_mask & ~values.isfinite()
        if bad.any():
            row, position = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"expected finite {name} where the loss counts, got "
                f"{values.expand_as(loss_mask)[row, position].item()} at row {row}, position {position} "
                f"({int(bad.sum())} in all): a model or reward diverged; look at this row before going on."
            )
