"""Classifier-free guidance on logits: how two streams become one distribution."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def guided_logits(
    cond: Float[Tensor, "*shape V"], uncond: Float[Tensor, "*shape V"], scale: float
) -> Float[Tensor, "*shape V"]:
    """Logits u + s (c - u) in float32 (float64 stays float64); the gradient runs through both streams.

    s = 1 is the conditional stream itself, bit for bit, and s = 0 the unconditional one. Janus-Pro writes the same s
    (default 5). Lumina-DiMOO writes (1 + w) c - w u, which is this with w = s - 1.
    Independent float noise of the two streams is multiplied by up to |s| + |s - 1|.

    Args:
        cond: logits given the prompt, over V token ids; finite wherever the result is used.
        uncond: logits given the empty prompt.
        scale: guidance s, unitless.

    Raises:
        ValueError: the scale is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite guidance scale, got {scale}: 1 means no guidance, Janus-Pro uses 5.")
    cond = cond.to(torch.promote_types(cond.dtype, torch.float32))
    if scale == 1.0:
        return cond
    uncond = uncond.to(cond.dtype)
    return uncond + scale * (cond - uncond)
