"""Which id may follow which where text and images alternate, and the reading of what was written by these rules.

Text stands between images; the id that begins an image opens a block of fixed length, in which codes may be drawn and
all other ids are given. What comes next follows from the place in that block alone: how many of its ids stand at the
end of a history, 0 in text.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.models.interleaved import ChatLayout
from unirl.types import TokenKind

ANY_CODE = -1
"""Stands in a block for a place where a code is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySegment:
    """A stretch of text or a whole image of a reply; one of the two is set."""

    text_ids: NDArray[np.int32] | None = None
    """[T] ids of a text, without the end of the reply."""
    codes: NDArray[np.int32] | None = None
    """[rows, columns] image codes counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The rules for images of one grid. V ids in all, L ids of an image's block."""

    drawable_text: NDArray[np.bool_]
    """[V] true for the ids that may be drawn in text: begin of an image and end of a reply too."""
    first_code: int
    num_codes: int
    block: tuple[int, ...]
    """Ids of an image [L], `ANY_CODE` in the place of each code; the first begins it, the last ends it."""
    block_kinds: tuple[TokenKind, ...]
    """Kind of each id of the block."""
    grid: tuple[int, int]
    """Rows and columns of codes."""
    end: int
    """Id that ends a reply."""

    @classmethod
    def of(cls, layout: ChatLayout, rows: int, columns: int) -> "Grammar":
        """The grammar of a family for pictures of so many rows and columns of codes.

        Raises:
            ValueError: a side is not positive.
        """
        if min(rows, columns) < 1:
            raise ValueError(f"grid: expected positive rows and columns of image codes; got {rows} x {columns}")
        vocabulary = layout.vocabulary
        ids, kinds = layout.image.block(np.zeros((rows, columns), np.int32), vocabulary.first_code)
        return cls(
            drawable_text=vocabulary.drawable_text,
            first_code=vocabulary.first_code,
            num_codes=vocabulary.num_codes,
            block=tuple(ANY_CODE if kind == TokenKind.CODE else id for id, kind in zip(ids, kinds, strict=True)),
            block_kinds=tuple(kinds),
            grid=(rows, columns),
            end=layout.end,
        )

    @property
    def begin(self) -> int:
        """Id that begins an image."""
        return self.block[0]

    def advance(self, place: int, id: int) -> int:
        """The place behind an id that followed a place."""
        if id == self.begin:
            return 1
        return place + 1 if 0 < place < len(self.block) - 1 and id != self.block[-1] else 0

    def place(self, ids: Iterable[int]) -> int:
        """The place at the end of a history."""
        return functools.reduce(self.advance, ids, 0)

    def open_image(self, ids: Sequence[int], owner: str) -> list[int]:
        """The ids of an image that a history leaves unfinished; none in text.

        Raises:
            ValueError: they are not those of an image of this grid.
        """
        if not (place := self.place(ids)):
            return []
        opened = list(ids[len(ids) - place :])
        if any(not self._fits(wanted, id) for wanted, id in zip(self.block, opened, strict=False)):
            rows, columns = self.grid
            raise ValueError(
                f"{owner}: expected a prompt that ends in text or within an image of {rows} x {columns} codes; got "
                f"ids {opened[:8]} of another; continue it with the grid that it was begun with"
            )
        return opened

    def may_follow(self, place: int, *, may_begin: bool) -> NDArray[np.bool_]:
        """Which ids may come next, [V].

        Args:
            place: of the history.
            may_begin: whether there is room for an image, where the place is in text.
        """
        allowed = np.zeros(len(self.drawable_text), np.bool_)
        wanted = self.block[place]
        if place == 0:
            allowed[:] = self.drawable_text
            allowed[self.begin] &= may_begin
        elif wanted == ANY_CODE:
            allowed[self.first_code : self.first_code + self.num_codes] = True
        else:
            allowed[wanted] = True
        return allowed

    def room(self, num_open: int) -> int:
        """Tokens that an image and what ends a reply still take, of which `num_open` ids are there."""
        return len(self.block) - num_open + 1

    def kinds(self, ids: Iterable[int], place: int = 0) -> NDArray[np.uint8]:
        """`TokenKind` of each id [T] that follows a place."""
        kinds: list[TokenKind] = []
        for id in ids:
            in_text = TokenKind.BEGIN if id == self.begin else TokenKind.TEXT
            kinds.append(self.block_kinds[place] if place else in_text)
            place = self.advance(place, id)
        return np.array(kinds, np.uint8)

    def parse(self, ids: Sequence[int], opened: Sequence[int] = ()) -> tuple[ReplySegment, ...]:
        """Texts and images of a reply, in their order.

        Args:
            ids: what was written.
            opened: ids of an image that the prompt began; they become part of the first.

        Raises:
            ValueError: the ids break the rules, or the last image is not whole.
        """
        return tuple(self._segments([*opened, *ids]))

    def is_well_formed(self, ids: Sequence[int], opened: Sequence[int] = ()) -> bool:
        """Whether `parse` reads these ids to their end."""
        try:
            self.parse(ids, opened)
        except ValueError:
            return False
        return True

    def _segments(self, ids: list[int]) -> Iterator[ReplySegment]:
        at, text = 0, list[int]()
        while at < len(ids):
            if self.end in text[-1:]:
                raise ValueError(f"reply: expected nothing behind its end at {at - 1}; got id {ids[at]}")
            if ids[at] != self.begin:
                if not self.drawable_text[ids[at]]:
                    raise ValueError(f"reply: expected text at {at}; got id {ids[at]}, which may not be drawn there")
                text.append(ids[at])
                at += 1
                continue
            if text:
                yield self._text(text)
                text = []
            image = ids[at : at + len(self.block)]
            if len(image) < len(self.block) or not all(map(self._fits, self.block, image)):
                raise ValueError(f"reply: expected a whole image of {self.grid} codes at {at}; got ids {image[:8]}...")
            codes = [id - self.first_code for id, wanted in zip(image, self.block, strict=True) if wanted == ANY_CODE]
            yield ReplySegment(codes=np.array(codes, np.int32).reshape(self.grid))
            at += len(self.block)
        if text and text != [self.end]:
            yield self._text(text)

    def _text(self, ids: list[int]) -> ReplySegment:
        return ReplySegment(text_ids=np.array(ids[:-1] if ids[-1] == self.end else ids, np.int32))

    def _fits(self, wanted: int, id: int) -> bool:
        return 0 <= id - self.first_code < self.num_codes if wanted == ANY_CODE else id == wanted


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far one reply has come."""

    grammar: Grammar
    max_tokens: int
    max_images: int | None
    place: int = 0
    num_images: int = 0
    num_tokens: int = 0

    @classmethod
    def start(cls, grammar: Grammar, max_tokens: int, max_images: int | None, opened: Sequence[int]) -> "Progress":
        """Before the first token, behind a prompt that leaves these ids of an image unfinished."""
        return cls(
            grammar=grammar, max_tokens=max_tokens, max_images=max_images, place=len(opened), num_images=bool(opened)
        )

    @property
    def may_begin(self) -> bool:
        """Whether one more image is wanted and would be whole, with a token behind it."""
        wanted = self.max_images is None or self.num_images < self.max_images
        return wanted and self.num_tokens + self.grammar.room(0) <= self.max_tokens

    def add(self, id: int) -> None:
        """Go on behind an id."""
        self.place = self.grammar.advance(self.place, id)
        self.num_images += id == self.grammar.begin
        self.num_tokens += 1


class BatchGrammar:
    """The same rules for many histories at once, on a device."""

    def __init__(self, grammar: Grammar, device: torch.device) -> None:
        self._begin, self._last, self._length = grammar.begin, grammar.block[-1], len(grammar.block)
        self._block = torch.tensor(grammar.block, device=device)
        self._text = torch.from_numpy(grammar.drawable_text).to(device)
        self._codes = torch.zeros_like(self._text)
        self._codes[grammar.first_code : grammar.first_code + grammar.num_codes] = True

    def places(self, ids: Tensor) -> Tensor:
        """The place behind each id of histories [..., T], int64 [..., T]."""
        index = torch.arange(1, ids.shape[-1] + 1, device=ids.device).expand(ids.shape)
        begun, ended = (torch.where(ids == mark, index, 0).cummax(-1).values for mark in (self._begin, self._last))
        place = index - begun + 1
        return torch.where((begun > ended) & (place < self._length), place, 0)

    def may_follow(self, places: Tensor, may_begin: Tensor) -> Tensor:
        """Which ids may come next after histories of these places, bool [B, V].

        Args:
            places: int64 [B].
            may_begin: bool [B] whether there is room for an image, where the place is in text.
        """
        wanted, in_text = self._block[places], places == 0
        allowed = torch.where(in_text[:, None], self._text, self._codes & (wanted == ANY_CODE)[:, None])
        allowed[:, self._begin] &= may_begin
        given = (~in_text & (wanted != ANY_CODE)).nonzero()[:, 0]
        allowed[given, wanted[given]] = True
        return allowed

    def draws_code(self, places: Tensor) -> Tensor:
        """Whether a code is drawn next, bool [B]."""
        return self._block[places] == ANY_CODE
