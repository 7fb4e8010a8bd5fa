"""Masked diffusion: how many masked cells each step reveals, which ones, and with which values.

Images follow the cosine schedule of MaskGIT (eq. 3), text the linear one of LLaDA, both in the official form of
Lumina-DiMOO. Shapes: N masked cells of one row, V token ids.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cosine_reveals(num_cells: int, num_steps: int) -> list[int]:
    """Cells of an image that each step reveals; they add up to `num_cells`.

    After step s of K, floor(N cos(pi/2 (s + 1) / K)) cells stay masked, at least 1 before the last step and 0 after it,
    and every step reveals at least one.

    Raises:
        ValueError: fewer than one step, or more steps than cells.
    """
    _check_steps(num_cells, num_steps)
    reveals: list[int] = []
    left = num_cells
    for step in range(num_steps):
        # In float32, as the official code: at exact halves float64 would round the other way.
        share = torch.cos(torch.tensor(0.5 * math.pi) * torch.tensor((step + 1) / num_steps))
        kept = max(1, int((share * num_cells).floor())) if step < num_steps - 1 else 0
        kept = min(kept, left - 1)
        reveals.append(left - kept)
        left = kept
    return reveals


def linear_reveals(num_cells: int, num_steps: int) -> list[int]:
    """Cells of a block of text that each step reveals: equally many, the first steps one more.

    Raises:
        ValueError: fewer than one step, or more steps than cells.
    """
    _check_steps(num_cells, num_steps)
    base, more = divmod(num_cells, num_steps)
    return [base + (step < more) for step in range(num_steps)]


def draw_values(
    logits: Float[Tensor, "N V"],
    temperature: float,
    noise: Float[Tensor, "N V"],
    allowed: Bool[Tensor, " V"] | None = None,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """A value for each cell from softmax(logits / temperature), and the log-probability it has at temperature 1.

    The second is the cell's confidence, in nats; the official code ranks by it too, whatever the temperature.

    Args:
        logits: finite where allowed.
        temperature: 0 takes the most likely value.
        noise: standard Gumbel.
        allowed: ids that may be drawn; None means all.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    values = (logits / temperature + noise if temperature else logits).argmax(dim=1)
    confidence = logits.double().log_softmax(dim=1).gather(1, values[:, None])[:, 0]
    return values, confidence


def most_confident(scores: Float[Tensor, " N"], count: int) -> Int[Tensor, " count"]:
    """Places of the `count` highest scores, the first of equal ones first."""
    return scores.sort(descending=True, stable=True).indices[:count]


def _check_steps(num_cells: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_cells:
        raise ValueError(
            f"expected 1 to {num_cells} steps for {num_cells} masked cells; got {num_steps}: a step reveals one or more"
        )
