"""Conversations made up for measurements, and their token store: pictures of noise, words at random, lengths mixed.

A fifth is text alone; the others hold one to three pictures. Texts have a median of 60 words and a long tail, as
answers with reasoning and captions mixed have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unirl.benchmarks.anole_folder import LEAST_WORDS, AnoleSize, word, write_anole
from unirl.cluster.sft_worker import TokenSources, open_mixture
from unirl.config import SftConfig, SourceConfig
from unirl.data.interleaved import write_interleaved
from unirl.data.token_store import check_rejected, encode_unit, finish_store, units_of
from unirl.models.policy import load_encoder
from unirl.types import InterleavedSample, Segment, TokenSequence, Turn

FINGERPRINT = "bench"
TEXT_ONLY = 0.2
MEDIAN_WORDS, SPREAD, MOST_WORDS = 60, 0.8, 400
"""Of a text: log-normal, cut at the last."""
SIDE_PX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A checkpoint, conversations of it, and a run's settings that name both."""

    config: SftConfig
    checkpoint: Path
    tokens: TokenSources
    images: tuple[NDArray[np.uint8], ...]
    """Of the conversations."""

    def sequences(self) -> list[TokenSequence]:
        """Every conversation once, as tokens in memory."""
        return open_mixture(self.tokens.training, self.config.data.sources, self.config).all()


def make_workload(
    folder: Path, config: SftConfig, checkpoint: Path | None, *, size: AnoleSize, num_samples: int
) -> Workload:
    """Conversations and their token store in `folder`, and where no checkpoint is given, a random Anole.

    Raises:
        ValueError: a family that learns no conversations, or one image alone is longer than data.max_length.
    """
    if checkpoint is None:
        checkpoint = write_anole(folder / "anole", size)
        config = replace(config, model=replace(config.model, family="anole", path=str(checkpoint)))
    samples = list(random_samples(num_samples))
    source = folder / "conversations" / "interleaved.parquet"
    source.parent.mkdir()
    write_interleaved(source, samples)
    store, encoder = folder / "tokens", load_encoder(config, checkpoint)
    store.mkdir()
    notes = [
        note
        for unit in units_of(source, 1)
        for note in encode_unit(unit, store, encoder, config.data.samples_per_shard)
    ]
    finish_store(store, notes, FINGERPRINT)
    check_rejected(store, FINGERPRINT, max_rejected_fraction=config.data.max_rejected_fraction)
    return Workload(
        config=replace(config, data=replace(config.data, sources={"made": SourceConfig(path=str(source))})),
        checkpoint=checkpoint,
        tokens=TokenSources(training={"made": (store, FINGERPRINT)}, heldout={}),
        images=tuple(image for sample in samples for turn in sample.turns for image in turn.images),
    )


def random_samples(count: int, seed: int = 0) -> Iterator[InterleavedSample]:
    """So many conversations, always the same."""
    rng = np.random.default_rng(seed)

    def text(*, in_loss: bool) -> Segment:
        length = int(np.clip(rng.lognormal(np.log(MEDIAN_WORDS), SPREAD), 1, MOST_WORDS))
        return Segment(text=" ".join(map(word, rng.integers(0, LEAST_WORDS, length))), in_loss=in_loss)

    def picture(*, in_loss: bool) -> Segment:
        return Segment(image=rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8), in_loss=in_loss)

    for index in range(count):
        shown: Sequence[Segment] = ()
        drawn: Sequence[Segment] = ()
        if rng.random() >= TEXT_ONLY:
            shown = [picture(in_loss=False)] * int(rng.random() < 0.4)
            drawn = [picture(in_loss=True) for _ in range(rng.integers(0 if shown else 1, 3))]
        answer = [segment for image in drawn for segment in (image, text(in_loss=True))]
        turns = (
            Turn(role="user", segments=(text(in_loss=False), *shown)),
            Turn(role="assistant", segments=(text(in_loss=True), *answer)),
        )
        yield InterleavedSample(id=f"made-{index}", turns=turns)
