"""Results of pairing with all that `check.py` needs, beside the features, to prove them. Plain arrays, no methods."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

MatchingOrder = Literal["similarity", "input"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """A partition of N images and the most central image of each part."""

    medoids: Int64[np.ndarray, " K"]
    """Row of each cluster's medoid."""
    assignment: Int64[np.ndarray, " N"]
    """Cluster of each row, in 0..K-1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """One-use pairs in the order in which they were made."""

    gen_index: Int64[np.ndarray, " P"]
    und_index: Int64[np.ndarray, " P"]
    similarity: Float64[np.ndarray, " P"]
    """Inner product of the two float32 rows, correctly rounded to float64."""
    threshold: float
    order: MatchingOrder
