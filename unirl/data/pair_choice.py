"""Arms of the pairing ablations (PairUni, table 5): some pairs of a set, or its samples beside other partners."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unirl.config import PairPartners, PairsTaken
from unirl.data.atomic import DataError
from unirl.data.pair_store import PairSet
from unirl.types import PairRecord


def choose_pairs(
    pair_set: PairSet, *, take: PairsTaken, partners: PairPartners, max_pairs: int | None, seed: int
) -> tuple[PairRecord, ...]:
    """The pairs that a run trains on.

    Args:
        pair_set: as it was made.
        take: which of its pairs.
        partners: whose prompt a question travels with.
        max_pairs: the first n of those that are taken; None takes all.
        seed: of the new partners.

    Raises:
        DataError: none is left, or a sample without features where partners are to be unlike.
    """
    pairs = tuple(pair for pair in pair_set.pairs if take in ("all", pair.kind, _origin(pair)))[:max_pairs]
    if not pairs:
        raise DataError(
            f"data.take: expected pairs of the kind {take}; got none in the set; make a set with such pairs"
        )
    match partners:
        case "own":
            return pairs
        case "random":
            return unpair(pairs, seed)
        case "unlike":
            return _unlike(pairs, pair_set, seed)


def unpair(pairs: Sequence[PairRecord], seed: int) -> tuple[PairRecord, ...]:
    """The same samples with no side beside its partner: the mixed batches of vanilla GRPO (PairUni eq. 1).

    Each question travels with the prompt of another pair, at similarity 0, since nothing relates them. A single pair
    stays as it is.
    """
    order = _mixed(pairs, seed)
    return tuple(
        replace(pair, kind="retrieved", similarity=0.0, generation=other.generation)
        for pair, other in zip(order, [*order[1:], *order[:1]], strict=True)
    )


def _unlike(pairs: Sequence[PairRecord], pair_set: PairSet, seed: int) -> tuple[PairRecord, ...]:
    """Each question, in an order mixed by the seed, with the prompt left whose image is least like its own."""
    order = _mixed(pairs, seed)
    vectors = {
        id: row
        for task in ("understanding", "generation")
        for id, row in zip(pair_set.certificate.get(f"{task}_ids", ()), pair_set.features.get(task, ()), strict=True)
    }
    try:  # one image stands behind both sides of an aligned pair, under the id of the side that was given
        asked, drawn = (
            np.stack([vectors[one] if one in vectors else vectors[other] for one, other in sides])
            for sides in (
                [(pair.understanding.id, pair.generation.id) for pair in order],
                [(pair.generation.id, pair.understanding.id) for pair in order],
            )
        )
    except KeyError as error:
        raise DataError(
            f"data.partners: expected features of every sample; got none for {error}; make the set again"
        ) from None
    found: list[PairRecord] = []
    taken = np.zeros(len(order), bool)
    for pair, vector in zip(order, asked, strict=True):
        similarity = np.where(taken, np.inf, drawn @ vector)
        place = int(similarity.argmin())
        taken[place] = True
        least = float(np.clip(similarity[place], -1, 1))
        found.append(replace(pair, kind="retrieved", similarity=least, generation=order[place].generation))
    return tuple(found)


def _origin(pair: PairRecord) -> str:
    """The side of an aligned pair that was given; its partner was written by the teacher under its id."""
    if pair.kind != "aligned":
        return ""
    given = pair.generation.id == f"{pair.understanding.id}/prompt"
    return "from_understanding" if given else "from_generation"


def _mixed(pairs: Sequence[PairRecord], seed: int) -> list[PairRecord]:
    def key(pair: PairRecord) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/unpair/{pair.pair_id}".encode(), digest_size=8).digest(), pair.pair_id

    return sorted(pairs, key=key)
