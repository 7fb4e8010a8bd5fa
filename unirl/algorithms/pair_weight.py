"""How much a pair counts: its similarity -> the weight of its advantages. Shapes: N pairs."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unirl.algorithms.choices import require_choice
from unirl.types import PairKind

PairWeightRule = Literal["sqrt", "linear", "none"]


def pair_weight(kind: PairKind, similarity: float, rule: PairWeightRule = "sqrt") -> float:
    """Weight w_p in [0, 1] of a pair's advantages (PairGRPO, eq. 3; the other rules are those of table 7).

    An aligned pair has weight 1 whatever its similarity. A retrieved one has sqrt(s), s or 1, with s clipped to
    [0, 1].

    Raises:
        ValueError: unknown kind or rule, or a similarity that is no cosine.
    """
    if not -1.001 <= similarity <= 1.001:
        raise ValueError(
            f"expected a cosine similarity in [-1, 1], got {similarity}: compute it on L2-normalised features."
        )
    require_choice("pair kind", kind, PairKind)
    require_choice("pair_weight", rule, PairWeightRule)
    clipped = min(max(similarity, 0.0), 1.0)
    match rule:
        case "sqrt":
            weight = clipped**0.5
        case "linear":
            weight = clipped
        case "none":
            weight = 1.0
    return 1.0 if kind == "aligned" else weight


def weigh_pairs(
    kinds: Sequence[PairKind], similarities: Sequence[float], rule: PairWeightRule = "sqrt"
) -> Float[Tensor, " N"]:
    """`pair_weight` of N pairs, in float64.

    Raises:
        ValueError: lists of different lengths, or what `pair_weight` refuses.
    """
    weights = [pair_weight(kind, similarity, rule) for kind, similarity in zip(kinds, similarities, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)
