"""Greedy one-use matching of generation images with understanding images (PairUni, Algorithm 1, lines 9 to 14).

The similarity of two images is the inner product of their float32 rows, correctly rounded to float64: a value that
depends on no block size, thread or machine, so that ties and the threshold are decided the same way everywhere.
Float32 matrix products only choose candidates, with their rounding bound as margin.
Shapes: G generation images, U understanding images, D feature dimensions.
"""

import heapq
import math
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float32, Int64

from unirl.pairing.certificate import Matching, MatchingOrder
from unirl.pairing.unit_rows import require_unit_rows

BLOCK_ELEMENTS = 2**25
"""Similarities held at a time: 128 MiB in float32."""


def match(
    gen_features: Float32[np.ndarray, "G D"],
    und_features: Float32[np.ndarray, "U D"],
    *,
    threshold: float = 0.6,
    top_n: int = 32,
    order: MatchingOrder = "similarity",
) -> Matching:
    """Pairs of images at least `threshold` similar, each image in at most one.

    `similarity` takes the best pair of all that are left, again and again; ties go to the lowest (generation,
    understanding) row. `input` follows Algorithm 1: generation images in row order, each takes its best understanding
    image that is left; ties go to the lowest row.

    Both are exact for every `top_n`: a generation image whose candidates are all taken gets the next best of those
    left, as the nearest neighbours of Algorithm 1 line 11 are sought among what remains. `top_n` is only how many
    are kept at a time: more memory, fewer renewed searches. Departure from the paper: a generation image takes one
    understanding image, not n, because an image may be used once.

    Args:
        gen_features: L2-normalised.
        und_features: L2-normalised, by the same encoder.
        threshold: least cosine similarity, inclusive; 0.6 is the paper's for ResNet-50.
        top_n: candidates kept per generation image.
        order: see above.

    Raises:
        ValueError: threshold outside [-1, 1], top_n below 1, unknown order, different feature dimensions, or
            features that are not unit rows in float32.
    """
    require_unit_rows(gen_features, "gen_features")
    require_unit_rows(und_features, "und_features")
    if gen_features.shape[1] != und_features.shape[1]:
        raise ValueError(
            f"expected features of one encoder, got {gen_features.shape[1]} and {und_features.shape[1]} dimensions: "
            "embed both sides alike."
        )
    if not -1 <= threshold <= 1 or top_n < 1:
        raise ValueError(
            f"expected a threshold in [-1, 1] and top_n >= 1, got {threshold} and {top_n}: start from 0.6 and 32."
        )
    if order not in get_args(MatchingOrder):
        raise ValueError(f"expected order among {', '.join(get_args(MatchingOrder))}; got {order!r}: set one of them.")
    candidates = _Candidates(gen_features, und_features, threshold, top_n)
    match order:
        case "similarity":
            pairs = _best_pair_first(candidates, len(gen_features))
        case "input":
            pairs = _in_row_order(candidates, len(gen_features))
    return Matching(
        gen_index=np.array([gen for gen, _, _ in pairs], dtype=np.int64),
        und_index=np.array([und for _, und, _ in pairs], dtype=np.int64),
        similarity=np.array([similarity for _, _, similarity in pairs], dtype=np.float64),
        threshold=threshold,
        order=order,
    )


def _best_pair_first(candidates: "_Candidates", num_gen: int) -> list[tuple[int, int, float]]:
    # Each generation image waits with its best free candidate. An entry can only grow stale by losing its
    # understanding image, which lowers it, so the top entry whose image is still free is the best pair of all.
    heap = [(-found[0], gen, found[1]) for gen in range(num_gen) if (found := candidates.best_free(gen))]
    heapq.heapify(heap)
    pairs: list[tuple[int, int, float]] = []
    while heap:
        negated, gen, und = heapq.heappop(heap)
        if candidates.free[und]:
            candidates.free[und] = False
            pairs.append((gen, und, -negated))
        elif found := candidates.best_free(gen):
            heapq.heappush(heap, (-found[0], gen, found[1]))
    return pairs


def _in_row_order(candidates: "_Candidates", num_gen: int) -> list[tuple[int, int, float]]:
    pairs: list[tuple[int, int, float]] = []
    for gen in range(num_gen):
        if found := candidates.best_free(gen):
            candidates.free[found[1]] = False
            pairs.append((gen, found[1], found[0]))
    return pairs


class _Candidates:
    """Best understanding images of each generation image, renewed when all that were kept are taken."""

    def __init__(
        self,
        gen_features: Float32[np.ndarray, "G D"],
        und_features: Float32[np.ndarray, "U D"],
        threshold: float,
        top_n: int,
    ) -> None:
        self._gen, self._und = gen_features, und_features
        self._threshold, self._top_n = threshold, top_n
        self.free: Bool[np.ndarray, " U"] = np.ones(len(und_features), dtype=bool)
        # A float32 inner product of unit rows is off by at most D rounding units of 2^-24 (and 1 % for the norms).
        self._margin = 1.01 * gen_features.shape[1] * 2.0**-24
        self._kept: list[list[tuple[float, int]]] = []
        self._all_kept: list[bool] = []
        block_rows = max(1, BLOCK_ELEMENTS // max(1, len(und_features)))
        for start in range(0, len(gen_features), block_rows):
            rough = gen_features[start : start + block_rows] @ und_features.T
            for offset, row in enumerate(rough):
                kept, all_kept = self._search(start + offset, row)
                self._kept.append(kept)
                self._all_kept.append(all_kept)

    def best_free(self, gen: int) -> tuple[float, int] | None:
        """(similarity, row) of the best understanding image that is free, or None."""
        while True:
            kept = self._kept[gen]
            while kept:
                if self.free[kept[-1][1]]:
                    return kept[-1]
                kept.pop()
            if self._all_kept[gen]:
                return None
            self._kept[gen], self._all_kept[gen] = self._search(gen, self._und @ self._gen[gen])

    def _search(self, gen: int, rough: Float32[np.ndarray, " U"]) -> tuple[list[tuple[float, int]], bool]:
        """The best free candidates, worst first, and whether these are all above the threshold."""
        rough = np.where(self.free, rough, -np.inf)
        lowest = floor = self._threshold - self._margin
        if self._top_n < len(rough):
            # The n best by exact value lie within two margins of the n-th rough value.
            floor = max(floor, float(np.partition(rough, -self._top_n)[-self._top_n]) - 2 * self._margin)
        rows = np.flatnonzero(rough >= floor)
        found = [(similarity, int(row)) for similarity, row in zip(self._exact(gen, rows), rows, strict=True)]
        found = sorted((pair for pair in found if pair[0] >= self._threshold), key=lambda pair: (-pair[0], pair[1]))
        return found[: self._top_n][::-1], floor == lowest and len(found) <= self._top_n

    def _exact(self, gen: int, rows: Int64[np.ndarray, " R"]) -> list[float]:
        # A product of two float32 numbers is exact in float64, and fsum rounds their sum once.
        row = self._gen[gen].astype(np.float64)
        return [math.fsum((row * self._und[und]).tolist()) for und in rows]
