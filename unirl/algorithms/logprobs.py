"""Logits -> log-probabilities of given tokens, under the distribution that a sampler drew from.

The T scored positions may be a left-to-right text, an image's codes or the cells that one unmasking step revealed:
nothing here assumes an order. Shapes: B rows, T positions, V token ids.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from unirl.algorithms.guidance import guided_logits

CHUNK_ELEMENTS = 2**24
"""Logits held in float32 at a time: 64 MiB."""


def token_logprobs(
    logits: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, " V"] | None = None,
    *,
    loss_mask: Bool[Tensor, "B T"] | None = None,
    uncond_logits: Float[Tensor, "B T V"] | None = None,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "B T"]:
    """Log-probability in nats of each token, in float32 (float64 logits stay float64).

    log softmax(l / temperature)[token] over the allowed ids, with l the guided logits when `uncond_logits` are given
    (mode `guided`: the exact behaviour policy of a guided sampler) and `logits` otherwise (mode `conditional`).
    Works through chunks of positions and recomputes them in the backward pass, so that no float32 copy of all logits
    exists at once; values do not depend on the chunk size. Logits that are not contiguous are copied once, in their own
    type.

    Args:
        logits: conditional logits, any float type.
        tokens: ids that were drawn.
        temperature: the sampler's, above 0.
        allowed: ids that the sampler could draw; None means all.
        loss_mask: true where the token counts; elsewhere the result is 0, no gradient flows and nothing is checked.
        uncond_logits: logits of the unconditional stream.
        guidance_scale: guidance s of `guided_logits`; must be 1 without `uncond_logits`.

    Raises:
        ValueError: temperature not above 0, no id allowed, guidance without a second stream, or a counted token
            outside the vocabulary or the allowed ids (the message gives its position).
    """
    _check_law(temperature, allowed, uncond_logits, guidance_scale)
    mask = torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask
    _check_tokens(tokens, mask, logits.shape[-1], allowed)
    tokens = torch.where(mask, tokens, 0).long()
    streams = (logits, logits if uncond_logits is None else uncond_logits)

    def score(cond: Tensor, uncond: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        law = _law_logits(cond, uncond, temperature, guidance_scale, allowed, counted)
        return torch.where(counted, law.gather(1, chosen[:, None])[:, 0] - law.logsumexp(dim=1), 0.0)

    recompute = torch.is_grad_enabled() and any(stream.requires_grad for stream in streams)
    parts: list[Tensor] = [
        checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) if recompute else score(*chunk)
        for chunk in _chunks(*streams, tokens, mask)
    ]  # pyright: ignore[reportUnknownVariableType]
    return torch.cat(parts).view_as(tokens)


@torch.no_grad()
def token_entropies(
    logits: Float[Tensor, "B T V"],
    temperature: float = 1.0,
    allowed: Bool[Tensor, " V"] | None = None,
    *,
    loss_mask: Bool[Tensor, "B T"] | None = None,
    uncond_logits: Float[Tensor, "B T V"] | None = None,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "B T"]:
    """Entropy in nats at each position of the same distribution as `token_logprobs`, without gradient.

    Arguments as there; positions outside `loss_mask` give 0.

    Raises:
        ValueError: temperature not above 0, no id allowed, or guidance without a second stream.
    """
    _check_law(temperature, allowed, uncond_logits, guidance_scale)
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if loss_mask is None else loss_mask
    parts: list[Tensor] = []
    for cond, uncond, counted in _chunks(logits, logits if uncond_logits is None else uncond_logits, mask):
        law = _law_logits(cond, uncond, temperature, guidance_scale, allowed, counted).log_softmax(dim=1)
        # exp(-inf) * -inf is NaN, but an id that cannot be drawn adds nothing.
        entropy = -(law.exp() * law.masked_fill(law == -torch.inf, 0.0)).sum(dim=1)
        parts.append(torch.where(counted, entropy, 0.0))
    return torch.cat(parts).view_as(mask)


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    # split, not slicing: its backward joins the pieces once instead of adding one full-size tensor per piece.
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return zip(*(torch.split(values.flatten(0, 1), rows) for values in (logits, *others)), strict=True)


def _law_logits(
    cond: Tensor, uncond: Tensor, temperature: float, scale: float, allowed: Tensor | None, counted: Tensor
) -> Tensor:
    law = guided_logits(cond, uncond, scale) / temperature
    # Padding can hold NaN (attention over nothing); zeros keep it out of the sum and of the gradient.
    law = law.masked_fill(~counted[:, None], 0.0)
    return law if allowed is None else law.masked_fill(~allowed, -torch.inf)


def _check_law(temperature: float, allowed: Tensor | None, uncond: Tensor | None, scale: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"expected a temperature above 0, got {temperature}: greedy sampling has no log-probability; use 1."
        )
    if allowed is not None and not allowed.any():
        raise ValueError(f"expected at least one allowed token id of {allowed.numel()}, got none: mend the mask.")
    if uncond is None and scale != 1.0:
        raise ValueError(
            f"expected guidance_scale 1 without uncond_logits, got {scale}: pass both streams, or score in "
            "conditional mode."
        )


def _check_tokens(tokens: Tensor, mask: Tensor, vocabulary: int, allowed: Tensor | None) -> None:
    bad = (tokens < 0) | (tokens >= vocabulary)
    if allowed is not None:
        bad |= ~allowed[torch.where(bad, 0, tokens).long()]
    bad &= mask
    if bad.any():
        row, position = (int(i) for i in bad.nonzero()[0])
        choices = vocabulary if allowed is None else int(allowed.sum())
        raise ValueError(
            f"expected tokens among the {choices} ids that the sampler may draw, got id {int(tokens[row, position])} "
            f"at row {row}, position {position} ({int(bad.sum())} in all): score with the sampler's own mask, and "
            "leave padding out by loss_mask."
        )
