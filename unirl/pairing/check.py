"""Proofs that a clustering and a matching are what they claim to be. Shares no code with the rooms that made them.

Each function gives a list of plain sentences, empty when the claim holds. Every pair and every cluster is checked in
time proportional to the number of images. That no better pair was passed over is checked against all cross pairs, in
blocks, so memory stays linear; `gen_rows` restricts it to some generation images, each a complete proof of its own.
Shapes: G generation images, U understanding images, N images of both, D feature dimensions.
"""

import math

import numpy as np
from jaxtyping import Float32, Int64

from unirl.pairing.certificate import Clustering, Matching

SCORE_TOLERANCE = 1e-9
MEDOID_TIE = 1e-6
ROWS_AT_A_TIME = 256


def clustering_faults(features: Float32[np.ndarray, "N D"], clustering: Clustering) -> list[str]:
    """What is wrong with a clustering: an empty cluster, split duplicates, or a medoid that is not central.

    The mean of each cluster is computed anew. The medoid must be the lowest row among those whose inner product with
    the mean is within 1e-6 of the largest. Whether another partition would be more compact is not judged.
    """
    medoids, assignment = clustering.medoids, clustering.assignment
    if assignment.shape != (len(features),):
        return [f"{len(features)} images but {assignment.shape[0]} assignments"]
    if sorted(set(assignment.tolist())) != list(range(len(medoids))):
        return [f"assignments do not fill clusters 0..{len(medoids) - 1}"]
    faults: list[str] = []
    cluster_of: dict[bytes, int] = {}
    for row, (vector, cluster) in enumerate(zip(features, assignment.tolist(), strict=True)):
        if cluster_of.setdefault((vector + 0.0).tobytes(), cluster) != cluster:
            faults.append(f"image {row} equals an image of cluster {cluster_of[(vector + 0.0).tobytes()]}")
    by_cluster: list[list[int]] = [[] for _ in range(len(medoids))]
    for row, cluster in enumerate(assignment.tolist()):
        by_cluster[int(cluster)].append(row)
    for cluster, rows in enumerate(by_cluster):
        vectors = features[rows].astype(np.float64)
        scores = vectors @ vectors.mean(axis=0)
        near = [row for row, score in zip(rows, scores, strict=True) if score >= scores.max() - MEDOID_TIE]
        # A score on the edge of the tie may fall either way.
        edge = [r for r, s in zip(rows, scores, strict=True) if abs(s - scores.max() + MEDOID_TIE) <= SCORE_TOLERANCE]
        if int(medoids[cluster]) not in {near[0], *edge}:
            faults.append(f"cluster {cluster}: medoid {int(medoids[cluster])} is not its most central image {near[0]}")
    return faults


def matching_faults(
    gen_features: Float32[np.ndarray, "G D"],
    und_features: Float32[np.ndarray, "U D"],
    matching: Matching,
    gen_rows: Int64[np.ndarray, " R"] | None = None,
) -> list[str]:
    """What is wrong with a matching: a bad pair, an image used twice, the wrong order, or a better pair passed over.

    A pair (g, u) above the threshold is passed over when g and u both would rather have each other. Under
    `similarity` an image prefers the higher similarity, then the lower (g, u). Under `input` a generation image does
    so too, and an understanding image prefers the lower g. A matching without such a pair is the only one, so an
    empty list (with all rows) proves equality with the greedy result.

    Args:
        gen_features: the rows that were matched.
        und_features: the rows that were matched.
        matching: the claim.
        gen_rows: generation images to check for better pairs; None checks all, at G x U x D operations.
    """
    faults = _pair_faults(gen_features, und_features, matching)
    if faults:
        return faults
    partner_of_gen = dict(zip(matching.gen_index.tolist(), matching.und_index.tolist(), strict=True))
    partner_of_und = {und: gen for gen, und in partner_of_gen.items()}
    gen_bar = np.full(len(gen_features), matching.threshold)
    gen_bar[matching.gen_index] = matching.similarity
    und_bar = np.full(len(und_features), matching.threshold)
    if matching.order == "similarity":
        und_bar[matching.und_index] = matching.similarity
    und64 = und_features.astype(np.float64)
    rows = np.arange(len(gen_features)) if gen_rows is None else gen_rows
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        block = rows[start : start + ROWS_AT_A_TIME]
        rough = gen_features[block].astype(np.float64) @ und64.T
        suspects = rough >= np.maximum(gen_bar[block, None], und_bar[None]) - SCORE_TOLERANCE
        for offset, und in np.argwhere(suspects).tolist():
            gen = int(block[offset])
            similarity = _similarity(gen_features[gen], und_features[und])
            if similarity < matching.threshold or partner_of_gen.get(gen) == und:
                continue
            gen_has = partner_of_gen.get(gen)
            gen_wants = gen_has is None or (-similarity, und) < (-gen_bar[gen], gen_has)
            und_has = partner_of_und.get(und)
            if matching.order == "similarity":
                und_wants = und_has is None or (-similarity, gen) < (-und_bar[und], und_has)
            else:
                und_wants = und_has is None or gen < und_has
            if gen_wants and und_wants:
                faults.append(f"generation {gen} and understanding {und} ({similarity:.6f}) were passed over")
    return faults


def _pair_faults(gen_features: np.ndarray, und_features: np.ndarray, matching: Matching) -> list[str]:
    gen, und, similarity = (x.tolist() for x in (matching.gen_index, matching.und_index, matching.similarity))
    faults: list[str] = []
    for name, used, count in (("generation", gen, len(gen_features)), ("understanding", und, len(und_features))):
        if len(set(used)) != len(used):
            faults.append(f"{name} image used twice")
        if any(not 0 <= row < count for row in used):
            return [*faults, f"{name} row outside 0..{count - 1}"]
    for g, u, s in zip(gen, und, similarity, strict=True):
        true = _similarity(gen_features[g], und_features[u])
        if s != true:
            faults.append(f"pair ({g}, {u}) claims similarity {s}, it is {true}")
        if true < matching.threshold:
            faults.append(f"pair ({g}, {u}) has similarity {true}, below {matching.threshold}")
    made = [(-s, g, u) for g, u, s in zip(gen, und, similarity, strict=True)]
    if (made if matching.order == "similarity" else gen) != sorted(made if matching.order == "similarity" else gen):
        faults.append(f"pairs are not in the order {matching.order}")
    return faults


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
