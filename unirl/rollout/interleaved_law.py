"""What the next id of an interleaved reply is drawn from: the grammar's ids under their modality's own temperature.

Engine, plain sampler and whoever scores a reply share it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unirl.rollout.interleaved_grammar import BatchGrammar


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How the ids of one modality are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable id."""
    top_k: int = 0
    """Only the so many most probable ids; 0 keeps all."""
    top_p: float = 1.0
    """Only the most probable ids that together have this probability; 1 keeps all."""

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {wanted}; got {getattr(self, name)}; correct the value")


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedSampling:
    """How replies are sampled."""

    text: Drawing = field(default_factory=Drawing)
    image: Drawing = field(default_factory=Drawing)
    max_tokens: int | None = None
    """Longest reply in tokens; None takes what the sampler's length leaves after the prompt. No image is begun that
    would not be whole within it, with one token behind it."""
    max_images: int | None = None
    """Most images of a reply, one that the prompt begins included; None sets no limit."""
    grid: tuple[int, int] | None = None
    """Rows and columns of an image's codes; None only where no image can be drawn."""


def drawing_logprobs(
    logits: Tensor, places: Tensor, may_begin: Tensor, grammar: BatchGrammar, drawings: tuple[Drawing, Drawing]
) -> Tensor:
    """Log-probabilities float32 [B, V] of the next id, -inf where it cannot be drawn.

    Where a modality's temperature is 0, only the most probable id is left, with the log-probability that it has at
    temperature 1: what is kept of greedy tokens.

    Args:
        logits: float [B, V] over the joint vocabulary.
        places: int64 [B] in the grammar.
        may_begin: bool [B] whether there is room for an image.
        grammar: on the device of the logits.
        drawings: of text and of images.
    """
    logprobs = logits.float().masked_fill(~grammar.may_follow(places, may_begin), -torch.inf)
    is_code = grammar.draws_code(places)
    for rows, drawing in ((~is_code, drawings[0]), (is_code, drawings[1])):
        if rows.any():
            logprobs[rows] = _drawn(logprobs[rows], drawing)
    return logprobs


def _drawn(logits: Tensor, drawing: Drawing) -> Tensor:
    logits = logits / (drawing.temperature or 1.0)
    if drawing.top_k:
        least = logits.topk(min(drawing.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if drawing.top_p < 1:
        ordered, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        # Kept while those before it have less than top_p, so that the first is always kept.
        dropped = ordered.cumsum(dim=1) - ordered >= drawing.top_p
        logits = logits.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), -torch.inf)
    logprobs = logits.log_softmax(dim=1)
    if drawing.temperature == 0:
        best = logprobs.argmax(dim=1, keepdim=True)
        logprobs = torch.full_like(logprobs, -torch.inf).scatter_(1, best, logprobs.gather(1, best))
    return logprobs
