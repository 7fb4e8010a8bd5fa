"""K-means over unit vectors and the most central member of each cluster (PairUni, Algorithm 1, lines 2 to 8).

Exact Lloyd iterations in NumPy stand for the paper's MiniBatchKMeans. One iteration costs 2 N K D operations in
blocks of rows: about 20 s on two CPU cores at N = 107,000, K = 5,000, D = 2048.
Shapes: N images, D feature dimensions, K clusters.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from unirl.pairing.certificate import Clustering
from unirl.pairing.unit_rows import require_unit_rows

TIE_TOLERANCE = 1e-6
"""Inner products nearer than this are equal: in a cluster of two they differ by float32 rounding alone."""

BLOCK_ROWS = 4096


def medoids(features: Float32[np.ndarray, "N D"], num_clusters: int, seed: int) -> Int64[np.ndarray, " K"]:
    """Rows of the K most central images, K = min(num_clusters, distinct rows), ascending, each once.

    Give the joint set of understanding and generation features, understanding rows first or last as you like.

    Raises:
        ValueError: as `cluster`.
    """
    return np.sort(cluster(features, num_clusters, seed).medoids)


def cluster(
    features: Float32[np.ndarray, "N D"], num_clusters: int, seed: int, *, max_iterations: int = 50
) -> Clustering:
    """K-means partition and, per cluster, the member with the largest inner product with the cluster's mean.

    k-means++ seeding, then Lloyd iterations until no row moves. Equal rows always share a cluster, so duplicates
    cannot make two medoids of one picture; a cluster that runs empty takes the row farthest from its own centre.
    Ties (within 1e-6) go to the lowest row. The same seed gives the same result on the same machine; BLAS may round
    a near-tie differently on another.

    Args:
        features: L2-normalised.
        num_clusters: clusters wanted; fewer come back when fewer rows are distinct.
        seed: of the seeding, the only random part.
        max_iterations: Lloyd iterations at most; a run that is cut short is a valid, less compact partition.

    Raises:
        ValueError: no rows, num_clusters below 1, or features that are not unit rows in float32.
    """
    require_unit_rows(features, "features")
    if num_clusters < 1 or max_iterations < 1 or len(features) == 0:
        raise ValueError(
            f"expected num_clusters >= 1, max_iterations >= 1 and at least one row, got {num_clusters}, "
            f"{max_iterations} and {len(features)} rows: choose as many clusters as aligned pairs are wanted."
        )
    first, inverse, counts = _distinct_rows(features)
    if num_clusters >= len(first):
        return Clustering(medoids=first, assignment=inverse)
    points = features[first]
    weights = counts.astype(np.float64)
    centroids = points[_seed_rows(points, weights, num_clusters, seed)].astype(np.float64)
    assignment = np.full(len(points), -1)
    for _ in range(max_iterations):
        moved = _assign(points, centroids)
        if np.array_equal(moved, assignment):
            break
        assignment = moved
        centroids = np.stack(
            [
                weights[members] @ points[members].astype(np.float64) / weights[members].sum()
                for members in _members(assignment, num_clusters)
            ]
        )
    central = [
        _most_central(points, members, centroids[k]) for k, members in enumerate(_members(assignment, num_clusters))
    ]
    return Clustering(medoids=first[central], assignment=assignment[inverse])


def _distinct_rows(
    features: Float32[np.ndarray, "N D"],
) -> tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
    """First row of each distinct vector (ascending), each row's place in that list, and how often it occurs."""
    rows = np.ascontiguousarray(features + 0.0)  # -0.0 becomes 0.0, so that equal rows have equal bytes
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse, counts = np.unique(as_bytes, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first)
    place = np.empty_like(by_first)
    place[by_first] = np.arange(len(by_first))
    return first[by_first], place[inverse], counts[by_first]


def _seed_rows(
    points: Float32[np.ndarray, "M D"], weights: Float64[np.ndarray, " M"], num_clusters: int, seed: int
) -> Int64[np.ndarray, " K"]:
    """K different rows, each drawn in proportion to its squared distance from those before it (k-means++)."""
    generator = np.random.default_rng(seed)
    mass = weights.copy()
    nearest = np.full(len(points), np.inf)
    free = np.ones(len(points), dtype=bool)
    chosen: list[int] = []
    for _ in range(num_clusters):
        # Distances between near-duplicates can all round to 0 before K rows are chosen.
        mass = mass if mass.sum() > 0 else free.astype(np.float64)
        row = int(generator.choice(len(points), p=mass / mass.sum()))
        chosen.append(row)
        free[row] = False
        nearest = np.minimum(nearest, np.maximum(0.0, 2.0 - 2.0 * (points @ points[row])))
        mass = np.where(free, weights * nearest, 0.0)
    return np.array(chosen)


def _assign(points: Float32[np.ndarray, "M D"], centroids: Float64[np.ndarray, "K D"]) -> Int64[np.ndarray, " M"]:
    """Nearest centroid of each row, then one row for each centroid that got none."""
    half_norms = (0.5 * np.einsum("kd,kd->k", centroids, centroids)).astype(np.float32)
    columns = centroids.T.astype(np.float32)
    assignment = np.empty(len(points), dtype=np.int64)
    gaps = np.empty(len(points), dtype=np.float32)
    for start in range(0, len(points), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        half_gaps = half_norms - points[block] @ columns
        assignment[block] = half_gaps.argmin(axis=1)
        gaps[block] = half_gaps.min(axis=1)  # half the squared distance, less the constant 1/2 of a unit row
    sizes = np.bincount(assignment, minlength=len(centroids))
    for empty in np.flatnonzero(sizes == 0):
        row = int(np.where(sizes[assignment] > 1, gaps, -np.inf).argmax())
        sizes[assignment[row]] -= 1
        assignment[row], sizes[empty] = empty, 1
    return assignment


def _members(assignment: Int64[np.ndarray, " M"], num_clusters: int) -> list[Int64[np.ndarray, " _"]]:
    order = np.argsort(assignment, kind="stable")
    return np.split(order, np.searchsorted(assignment[order], np.arange(1, num_clusters)))


def _most_central(
    points: Float32[np.ndarray, "M D"], members: Int64[np.ndarray, " _"], centroid: Float[np.ndarray, " D"]
) -> int:
    scores = points[members].astype(np.float64) @ centroid
    return int(members[np.flatnonzero(scores >= scores.max() - TIE_TOLERANCE)[0]])
