"""Which sequences a step learns from: sources by weights and counts, in an order keyed by seed and epoch alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unirl.config import SourceConfig
from unirl.data.atomic import DataError
from unirl.data.token_store import TokenStore
from unirl.types import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    name: str
    store: TokenStore
    rows: NDArray[np.int64]
    """Rows of the store that belong to it."""
    config: SourceConfig

    def epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch: every row as often as any other, give or take one."""
        fixed = self.config.count is not None
        number = self.config.count if fixed else round(self.config.weight * len(self.rows))
        assert number is not None, "a count is fixed"
        whole, part = divmod(number, len(self.rows))
        shuffled = _random(seed, self.name, 0 if fixed else epoch).permutation(self.rows)
        return np.concatenate([np.tile(self.rows, whole), shuffled[:part]])


class Mixture:
    """The steps of a run. Two mixtures of equal stores, settings and seed give equal steps."""

    def __init__(
        self, stores: Mapping[str, TokenStore], sources: Mapping[str, SourceConfig], *, seed: int, samples_per_step: int
    ) -> None:
        """Mix sources.

        Args:
            stores: token store of each source by its name.
            sources: what to take of each.
            seed: of the order.
            samples_per_step: sequences of a step; the last of an epoch may have fewer.

        Raises:
            DataError: a source has none of the subsets that it is asked for.
        """
        self._sources = [_source(name, stores[name], config) for name, config in sorted(sources.items())]
        self._seed, self._size = seed, samples_per_step
        self._order = lru_cache(maxsize=2)(self._make_order)
        empty = [s.name for s in self._sources if s.config.count != 0 and not len(s.epoch(seed, 0))]
        if empty or not any(self.counts().values()):
            raise DataError(
                f"data.sources: expected sequences from every source; got none from {', '.join(empty) or 'anywhere'}; "
                "raise its weight or count, or leave it out"
            )
        self.epoch_size = len(self._make_order(0))
        """Sequences of an epoch."""
        self.steps_per_epoch = -(-self.epoch_size // samples_per_step)

    def step(self, step: int) -> list[TokenSequence]:
        """The sequences of step number `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[place * self._size : (place + 1) * self._size]
        return [self._sources[source].store[int(row)] for source, row in chosen]

    @property
    def most_uses(self) -> int:
        """Times that a sequence may come in an epoch; sources of one store may overlap."""
        uses = Counter[int]()
        for source in self._sources:
            uses[id(source.store)] += -(-len(source.epoch(self._seed, 0)) // len(source.rows))
        return max(uses.values())

    def counts(self) -> dict[str, int]:
        """Sequences of each source in an epoch."""
        return {source.name: len(source.epoch(self._seed, 0)) for source in self._sources}

    def rejected(self) -> dict[str, tuple[int, int, Path]]:
        """Samples that were left out, all samples, and folder of the store of each source, whatever is taken of it."""
        stores = {source.name: source.store for source in self._sources}
        return {name: (store.num_rejected, store.num_samples, store.folder) for name, store in stores.items()}

    def all(self) -> list[TokenSequence]:
        """Every sequence of an epoch by source, unshuffled: what an evaluation scores."""
        rows = [(source, int(row)) for source in self._sources for row in np.sort(source.epoch(self._seed, 0))]
        return [source.store[row] for source, row in rows]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        """[N, 2] source and row, shuffled."""
        parts = [source.epoch(self._seed, epoch) for source in self._sources]
        pairs = np.concatenate([np.stack([np.full_like(rows, i), rows], 1) for i, rows in enumerate(parts)])
        return pairs[_random(self._seed, "order", epoch).permutation(len(pairs))]


def _random(seed: int, name: str, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, *name.encode()])


def _source(name: str, store: TokenStore, config: SourceConfig) -> _Source:
    wanted: Sequence[str] = config.subsets
    rows = np.flatnonzero(np.isin(store.subsets, wanted)) if wanted else np.arange(len(store))
    missing = sorted(set(wanted) - set(store.subsets.tolist()))
    if missing:
        there = ", ".join(sorted({str(subset) for subset in store.subsets}))
        raise DataError(
            f"data.sources.{name}.subsets: expected subsets of {config.path}, which has {there}; got "
            f"{', '.join(missing)}; correct the names"
        )
    return _Source(name=name, store=store, rows=rows, config=config)
