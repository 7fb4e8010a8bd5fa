"""Cross-entropy restricted to one modality: text targets over text ids only, visual targets over image codes only.

UnifiedVisual appendix A. Letters: N targets, V ids of the joint vocabulary, C ids of one modality.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]


def masked_cross_entropy(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], is_code: Bool[Tensor, " V"], allowed: Bool[Tensor, " V"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Nats of each target among the allowed ids of its own modality, and whether it is the likeliest of them.

    The reference form: the logits of the other modality become -inf.

    Args:
        logits: over the joint vocabulary.
        targets: ids of the joint vocabulary.
        is_code: which ids are image codes.
        allowed: which ids compete at all.
    """
    kept = (is_code == is_code[targets][:, None]) & allowed
    restricted = logits.float().masked_fill(~kept, -torch.inf)
    nats = functional.cross_entropy(restricted, targets.long(), reduction="none")
    return nats, _likeliest(restricted) == targets


def sliced_cross_entropy(
    hidden: Float[Tensor, "N H"],
    targets: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    allowed: Bool[Tensor, " C"] | None = None,
    *,
    num_parts: int = 1,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The same for targets of one modality, from a head that yields the logits of that modality alone.

    Logits of one part exist at a time; those of several parts are computed anew in the backward pass.

    Args:
        hidden: states that predict the targets; may be none.
        targets: places of the targets among the modality's ids.
        head: hidden [n, H] -> logits [n, C]; called once a part whatever it holds, so that ranks stay in step.
        allowed: which of the modality's ids compete; None lets all.
        num_parts: in how many parts the targets are taken.
    """

    def part(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows).float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return functional.cross_entropy(logits, wanted.long(), reduction="none"), _likeliest(logits) == wanted

    if num_parts == 1:
        return part(hidden, targets)
    recomputed: Any = checkpoint  # pyright: ignore[reportUnknownVariableType]
    nats: list[Tensor] = []
    hits: list[Tensor] = []
    for rows, wanted in zip(hidden.tensor_split(num_parts), targets.tensor_split(num_parts), strict=True):
        own_nats, own_hits = recomputed(part, rows, wanted, use_reentrant=False)
        nats.append(own_nats)
        hits.append(own_hits)
    return torch.cat(nats), torch.cat(hits)


def _likeliest(logits: Float[Tensor, "N C"]) -> Int[Tensor, " N"]:
    """The first of the largest logits, as argmax, which takes twice as long on a CPU."""
    return logits.detach().max(-1).indices
