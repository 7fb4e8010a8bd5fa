"""From single-task samples to a pair set in memory: completion, features, medoids, matching, certificate."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.algorithms.pair_weight import pair_weight
from unirl.config import PairConfig
from unirl.data.atomic import DataError
from unirl.data.pair_store import PairSet
from unirl.data.records import Rejected, image_key
from unirl.data.teacher import Quadruple, Teacher, complete
from unirl.models.embedder import Embedder
from unirl.pairing.certificate import Clustering, Matching
from unirl.pairing.matching import match
from unirl.pairing.medoids import cluster
from unirl.types import GenerationSample, PairKind, PairRecord, UnderstandingSample

IMAGES_AT_A_TIME = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    kind: PairKind
    similarity: float
    understanding: UnderstandingSample
    generation: GenerationSample


def make_pair_set(
    understanding: Sequence[UnderstandingSample],
    generation: Sequence[GenerationSample],
    *,
    teacher: Teacher | None,
    embed: Embedder,
    config: PairConfig,
) -> PairSet:
    """Pairs of both kinds (PairUni, Algorithm 1): medoids of the completed samples, then matches among the rest.

    An image enters at most one pair, on either side: of equal images only the first sample is kept. A sample that the
    teacher refused cannot be aligned, but may be matched.

    Args:
        understanding: samples with unique ids.
        generation: samples with unique ids; those without an image are left out.
        teacher: completes samples for aligned pairs; None makes retrieved pairs only.
        embed: image encoder.
        config: number of clusters, threshold, candidates, order and seed.

    Raises:
        DataError: no pair could be made.
    """
    (und, gen), rejected = _distinct_images(understanding, generation)
    quadruples, refused = complete([*und, *gen], teacher) if teacher else ([], [])
    rejected += refused
    _log.info("completed %d of %d samples, %d refused", len(quadruples), len(und) + len(gen), len(refused))
    features = _embed([*(s.image for s in und), *(s.image for s in gen if s.image is not None)], embed)
    und_features, gen_features = features[: len(und)], features[len(und) :]

    sides = [*(("understanding", s.id) for s in und), *(("generation", s.id) for s in gen)]
    row_of = {side: row for row, side in enumerate(sides)}
    candidates = np.array([row_of[q.origin, q.origin_id] for q in quadruples], np.int64)
    ids = [quadruple.origin_id for quadruple in quadruples]
    clustering = _cluster(features[candidates], config) if config.selection == "medoids" else _drawn(ids, config)
    aligned = [quadruples[row] for row in clustering.medoids]
    used = set(candidates[clustering.medoids].tolist())
    und_left = np.array([row for row in range(len(und)) if row not in used], np.int64)
    gen_left = np.array([row for row in range(len(gen)) if row + len(und) not in used], np.int64)
    matching = match(
        gen_features[gen_left],
        und_features[und_left],
        threshold=config.threshold,
        top_n=config.top_n,
        order=config.order,
    )
    _log.info("%d aligned and %d retrieved pairs", len(aligned), len(matching.similarity))

    pairs = [_aligned(quadruple) for quadruple in aligned]
    for g, u, similarity in zip(matching.gen_index, matching.und_index, matching.similarity.tolist(), strict=True):
        partners = {"understanding": und[und_left[u]], "generation": gen[gen_left[g]]}
        pairs.append(_Pair(kind="retrieved", similarity=similarity, **partners))
    if not pairs:
        raise DataError(
            f"expected at least one pair; got none from {len(und)} understanding and {len(gen)} generation samples at "
            f"threshold {config.threshold} with teacher {config.teacher!r}; lower the threshold or give more samples"
        )
    records = _number(pairs, config.seed)
    return PairSet(
        pairs=records,
        weights=tuple(pair_weight(record.kind, record.similarity) for record in records),
        settings={name: value for name, value in asdict(config).items() if name != "out"},
        certificate={
            "understanding_ids": [sample.id for sample in und],
            "generation_ids": [sample.id for sample in gen],
            "clustered_rows": candidates.tolist(),
            "medoids": clustering.medoids.tolist(),
            "assignment": clustering.assignment.tolist(),
            **_lists(matching),
        },
        features={"understanding": und_features, "generation": gen_features},
        rejected=tuple(rejected),
    )


def _distinct_images(
    understanding: Sequence[UnderstandingSample], generation: Sequence[GenerationSample]
) -> tuple[tuple[list[UnderstandingSample], list[GenerationSample]], list[Rejected]]:
    """The first sample of every image, and the rest as rejected. The sides take turns, so that both keep a share."""
    owners: dict[str, UnderstandingSample | GenerationSample] = {}
    rejected: list[Rejected] = []
    for row, turn in enumerate(zip_longest(understanding, generation)):
        for sample in turn:
            if sample is None:
                continue
            key = "" if sample.image is None else image_key(sample.image)
            if key and owners.setdefault(key, sample) is sample:
                continue
            stage, found = ("duplicate", f"that of {owners[key].id}") if key else ("reading", "none")
            reason = f"expected an image of its own to pair by; got {found}; give it one, or do without this sample"
            rejected.append(Rejected(source=sample.source, row=row, id=sample.id, stage=stage, reason=reason))
    kept = {id(sample) for sample in owners.values()}
    return ([s for s in understanding if id(s) in kept], [s for s in generation if id(s) in kept]), rejected


def _embed(images: Sequence[NDArray[np.uint8]], embed: Embedder) -> NDArray[np.float32]:
    started = time.monotonic()
    parts = []
    for start in range(0, len(images), IMAGES_AT_A_TIME):
        parts.append(embed(images[start : start + IMAGES_AT_A_TIME]))
        done = min(start + IMAGES_AT_A_TIME, len(images))
        left_s = (time.monotonic() - started) / done * (len(images) - done)
        _log.info("embedded %d of %d images, %.0f s to go", done, len(images), left_s)
    if not parts:
        raise DataError("expected samples to pair; got none after reading; check the two sources")
    return np.concatenate(parts)


def _cluster(features: NDArray[np.float32], config: PairConfig) -> Clustering:
    if not len(features) or not config.num_aligned:
        return Clustering(medoids=np.zeros(0, np.int64), assignment=np.zeros(0, np.int64))
    return cluster(features, config.num_aligned, config.seed)


def _drawn(ids: Sequence[str], config: PairConfig) -> Clustering:
    """As many samples in an order mixed by the seed, of no cluster."""
    rows = sorted(range(len(ids)), key=lambda row: (selection_key(ids[row], config.seed), row))
    return Clustering(medoids=np.array(rows[: config.num_aligned], np.int64), assignment=np.zeros(0, np.int64))


def selection_key(id: str, seed: int) -> bytes:
    """Where a sample stands among those that may be drawn for aligned pairs."""
    return hashlib.sha256(f"{seed}/select/{id}".encode()).digest()


def _aligned(quadruple: Quadruple) -> _Pair:
    return _Pair(
        kind="aligned",
        similarity=1.0,
        understanding=quadruple.understanding,
        generation=quadruple.generation,
    )


def _number(pairs: Sequence[_Pair], seed: int) -> tuple[PairRecord, ...]:
    """Pair records in an order that mixes kinds and similarities, so that the first n are a fair sample."""

    def key(pair: _Pair) -> bytes:
        return hashlib.sha256(f"{seed}/{pair.understanding.id}/{pair.generation.id}".encode()).digest()

    return tuple(
        PairRecord(
            pair_id=f"p{number:05d}",
            kind=pair.kind,
            similarity=pair.similarity,
            understanding=pair.understanding,
            generation=pair.generation,
        )
        for number, pair in enumerate(sorted(pairs, key=key))
    )


def _lists(matching: Matching) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(matching).items()
    }
