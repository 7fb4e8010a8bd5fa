"""Samples of text and images -> token sequences of a family, images through its image tokenizer."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unirl.config_rules import ConfigError, Problem
from unirl.models.image_codec import ImageCodec
from unirl.models.interleaved import ChatLayout, Codes
from unirl.types import InterleavedSample, TokenSequence, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationEncoder:
    """What turns samples into sequences of at most `max_length` tokens, none of which cuts an image."""

    layout: ChatLayout
    codec: ImageCodec
    max_length: int
    too_long: Literal["split", "reject"] = "split"
    learns_all: bool = False
    """Whether the loss asks for no marks (`loss.targets=all`), so that a sample without any is a sample too."""

    def __post_init__(self) -> None:
        rows, columns = self.codec.grid(np.zeros((1, 1, 3), np.uint8))
        length = self.layout.image.length(rows, columns)
        if length >= self.max_length:
            rule = f"must leave room for one image, which takes {length} tokens ({rows} x {columns} codes)"
            fix = f"raise it above {length}, or lower model.image_pixels where the family takes pictures of any size"
            raise ConfigError([Problem("data.max_length", self.max_length, rule, fix)])

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when the sequences of a sample would."""
        facts = [self.layout.fingerprint, self.codec.fingerprint, self.max_length, self.too_long]
        facts += ["learns all"] if self.learns_all else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __call__(self, sample: InterleavedSample) -> list[TokenSequence]:
        """The sequences of a sample; those in which nothing is to be learned are left out.

        Raises:
            ValueError: nothing is marked as to be learned, a text holds a special token or an unknown word, or the
                sample is too long and cannot be split.
        """
        if not self.learns_all and not any(segment.in_loss for turn in sample.turns for segment in turn.segments):
            raise ValueError(
                f"sequence {sample.id}: expected something to learn; got no segment that counts in the loss; drop the "
                "sample, mark the answer, or set loss.targets=all"
            )
        codes = self.codec.encode(self.layout.images_to_code(sample.turns))
        whole = self.layout.encode(sample.turns, codes, id=sample.id, subset=sample.subset)
        if len(whole.ids) <= self.max_length:
            return [whole]
        if self.too_long == "reject":
            raise ValueError(self._too_long(sample.id, len(whole.ids)))
        return [part for part in self._split(sample, codes) if self.learns_all or part.in_loss.any()]

    def _split(self, sample: InterleavedSample, codes: list[Codes]) -> Iterator[TokenSequence]:
        """As few sequences of whole exchanges as hold the sample, in its order; the system's turn opens each."""
        system = [turn for turn in sample.turns if turn.role == "system"]
        turns = [turn for turn in sample.turns if turn.role != "system"]
        exchanges = [turns[start : start + 2] for start in range(0, len(turns), 2)]
        left = iter(codes)
        system_codes = self._take(system, left)
        number, held, held_codes, current = 1, list[Turn](), list[Codes](), None
        for exchange in exchanges:
            own = self._take(exchange, left)
            longer = self._encode(sample, number, [*system, *held, *exchange], [*system_codes, *held_codes, *own])
            if len(longer.ids) > self.max_length and current is not None:
                yield current
                number, held, held_codes = number + 1, [], []
                longer = self._encode(sample, number, [*system, *exchange], [*system_codes, *own])
            if len(longer.ids) > self.max_length:
                raise ValueError(self._too_long(f"{sample.id}, one exchange of it", len(longer.ids)))
            held, held_codes, current = [*held, *exchange], [*held_codes, *own], longer
        if current is not None:
            yield current

    def _take(self, turns: Sequence[Turn], codes: Iterator[Codes]) -> list[Codes]:
        return [next(codes) for _ in self.layout.images_to_code(turns)]

    def _encode(
        self, sample: InterleavedSample, number: int, turns: Sequence[Turn], codes: Sequence[Codes]
    ) -> TokenSequence:
        return self.layout.encode(turns, codes, id=f"{sample.id}#{number}", subset=sample.subset)

    def _too_long(self, what: str, length: int) -> str:
        return (
            f"sequence {what}: expected at most data.max_length {self.max_length} tokens; got {length}; raise it, or "
            "shorten the sample"
        )
