"""Conversations of text and images as ids of one family: what a family must state, and the encoding that follows.

Every family's ids are taken over a joint vocabulary, in which image code c is id `first_code + c`. A family whose text
and codes have heads of their own numbers its codes behind its text ids.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unirl.types import Role, Segment, TokenKind, TokenSequence, Turn

Codes = NDArray[np.int32]
"""Image codes of a picture, [rows, columns], counted from 0."""
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointVocabulary:
    """Which ids are text and which are image codes."""

    size: int
    """V, text ids and codes together."""
    first_code: int
    num_codes: int
    drawable_text: NDArray[np.bool_]
    """[V] true for the text ids that a sampler may draw: words, marks, the begin of an image, the end of an answer; not
    for codes, padding, placeholders and rows of the table without a token."""

    @classmethod
    def around(
        cls, plain: NDArray[np.bool_], *, first_code: int, num_codes: int, drawn: Sequence[int]
    ) -> "JointVocabulary":
        """The vocabulary of which a sampler may draw what is plain text [V], and the special tokens `drawn`."""
        drawable = plain.copy()
        drawable[list(drawn)] = True
        return cls(size=len(plain), first_code=first_code, num_codes=num_codes, drawable_text=drawable)

    @property
    def is_code(self) -> NDArray[np.bool_]:
        """Which ids are image codes, [V]."""
        ids = np.arange(self.size)
        return (ids >= self.first_code) & (ids < self.first_code + self.num_codes)

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """All ids that are no image code, ascending; a head's text logits have this order."""
        return np.flatnonzero(~self.is_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Markup:
    """Ids that stand around what one role says."""

    before: Ids = ()
    after: Ids = ()
    lead: str = ""
    """Goes before a text at the start of the turn."""
    image_lead: str = ""
    """Goes before an image at the start of the turn."""
    image_tail: str = ""
    """Goes before a text that follows an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMarkup:
    """Ids that stand around image codes. Where codes come row by row, `row_end` closes each row."""

    begin: int
    """Makes a sampler draw; scored as text."""
    end: int
    geometry: Callable[[int, int], Ids] = lambda rows, columns: ()
    """Ids between `begin` and the first code, for a picture of so many rows and columns."""
    row_end: int | None = None
    before_end: Ids = ()
    """Ids between the last row and `end`."""

    def tail(self) -> Ids:
        """Ids that follow the last code, or the last row's end."""
        return (*self.before_end, self.end)

    def block(self, codes: Codes, first_code: int) -> tuple[list[int], list[TokenKind]]:
        """Ids and kinds of a whole image."""
        geometry = self.geometry(*codes.shape)
        ids, kinds = [self.begin, *geometry], [TokenKind.BEGIN] + [TokenKind.GEOMETRY] * len(geometry)
        placed = codes.astype(np.int64) + first_code
        for row in placed if self.row_end is not None else placed.reshape(1, -1):
            ids += row.tolist()
            kinds += [TokenKind.CODE] * len(row)
            if self.row_end is not None:
                ids.append(self.row_end)
                kinds.append(TokenKind.ROW_END)
        ids += self.tail()
        kinds += [TokenKind.ROW_END] * len(self.before_end) + [TokenKind.END]
        return ids, kinds

    def length(self, rows: int, columns: int) -> int:
        """Tokens of a whole image of so many rows and columns of codes."""
        row_ends = rows if self.row_end is not None else 0
        return 1 + len(self.geometry(rows, columns)) + rows * columns + row_ends + len(self.tail())


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLayout:
    """How a family writes a conversation; everything that decides its ids but the tokenizer."""

    vocabulary: JointVocabulary
    image: ImageMarkup
    start: Ids
    """Before the first turn; once, whatever it says."""
    turns: dict[Role, Markup]
    end: int
    """Ends an answer; the last of what stands behind an assistant's turn."""
    encode_text: Callable[[str], list[int]]
    """Ids of a text, without anything before or behind it."""
    decode_text: Callable[[Sequence[int]], str]
    """Text of ids, without special tokens."""
    plain: NDArray[np.bool_]
    """[V] true for the ids that a text of the data may hold; false for codes and every special token."""
    placeholders: Ids = ()
    """Ids that stand for an image that is seen by its pixels, its marks included; empty where images are seen as codes.
    Only what the user shows is seen so."""
    placeholder: int | None = None
    """The id among `placeholders` in whose place a feature goes."""
    fit: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image: image
    """Makes a large picture that is seen by its pixels as small as the model looks at it; the input stays the same."""
    system: str = ""
    """What the system says in conversations that have no system turn of their own; empty for nothing."""
    system_for_images: bool = False
    """Whether it says so only where the user shows an image, and not where words alone ask for a picture."""
    fingerprint: str
    """Changes when ids would: a digest of the tokenizer and of the family's template."""

    @property
    def written(self) -> frozenset[int]:
        """Ids that the layout itself writes around texts and codes."""
        marks = [self.start, self.placeholders, self.image.tail(), (self.image.begin, self.end)]
        marks += [ids for markup in self.turns.values() for ids in (markup.before, markup.after)]
        marks += [self.image.geometry(1, 1), () if self.image.row_end is None else (self.image.row_end,)]
        return frozenset(id for ids in marks for id in ids)

    @property
    def sees_pixels(self) -> bool:
        """Whether the user's images enter by their pixels rather than as codes."""
        return bool(self.placeholders)

    def images_to_code(self, turns: Iterable[Turn]) -> list[NDArray[np.uint8]]:
        """The images of a conversation that are needed as codes, in their order."""
        return [image for turn in turns if not self._by_pixels(turn) for image in turn.images]

    def encode(
        self, turns: Sequence[Turn], codes: Sequence[Codes], *, id: str = "prompt", subset: str = ""
    ) -> TokenSequence:
        """The ids of a conversation. After a user's turn at the end, the assistant's begins.

        Text is tokenised stretch by stretch, never across the border of a turn, an image or a mark, so that a prompt's
        ids do not depend on what is answered.

        Args:
            turns: as of an `InterleavedSample`, or without the assistant's last turn, to be answered.
            codes: of `images_to_code(turns)`, in their order.
            id: name of the sample.
            subset: where it belongs.

        Raises:
            ValueError: a text holds a special token of the family or a word that its vocabulary lacks, the codes are
                not as many as the images, or a grid holds what is no code.
        """
        writer, left = _Writer(), list(codes)
        writer.add(self.start, in_loss=False)
        for turn in self._with_system(turns):
            self._write_turn(writer, turn, left, owner=id)
        if turns[-1].role != "assistant":
            writer.add(self.turns["assistant"].before, in_loss=False)
        if left:
            raise ValueError(
                f"sequence {id}: expected {len(codes) - len(left)} images in codes; got {len(codes)}; encode what "
                "images_to_code() gives"
            )
        return writer.sequence(id, subset)

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        shown = any(turn.images for turn in turns if turn.role == "user")
        if turns[0].role == "system" or not self.system or (self.system_for_images and not shown):
            return turns
        return (Turn(role="system", segments=(Segment(text=self.system),)), *turns)

    def _by_pixels(self, turn: Turn) -> bool:
        return self.sees_pixels and turn.role == "user"

    def _write_turn(self, writer: "_Writer", turn: Turn, codes: list[Codes], *, owner: str) -> None:
        markup = self.turns[turn.role]
        writer.add(markup.before, in_loss=False)
        for place, segment in enumerate(turn.segments):
            after_image = place > 0 and turn.segments[place - 1].image is not None
            if segment.text is not None:
                lead = markup.image_tail if after_image else markup.lead if place == 0 else ""
                writer.add(self._plain_ids(lead + segment.text, owner), in_loss=segment.in_loss)
                continue
            if place == 0 and markup.image_lead:
                writer.add(self.encode_text(markup.image_lead), in_loss=False)
            if self._by_pixels(turn):
                assert segment.image is not None, "a segment is a text or an image"
                writer.add_pixels(self.placeholders, self.placeholder, self.fit(segment.image))
            else:
                writer.add_image(*self._block(codes, owner), in_loss=segment.in_loss)
        writer.add(markup.after, in_loss=turn.segments[-1].in_loss)

    def _block(self, codes: list[Codes], owner: str) -> tuple[list[int], list[TokenKind]]:
        """Ids and kinds of the next image, whose codes are taken from the front."""
        if not codes:
            raise ValueError(
                f"sequence {owner}: expected codes of every image that is not seen by its pixels; got too few; encode "
                "what images_to_code() gives"
            )
        grid, vocabulary = codes.pop(0), self.vocabulary
        if grid.ndim != 2 or grid.size == 0 or not 0 <= grid.min() <= grid.max() < vocabulary.num_codes:
            span = f" of {grid.min()}..{grid.max()}" if grid.size else ""
            raise ValueError(
                f"sequence {owner}: expected image codes [rows, columns] in 0..{vocabulary.num_codes - 1}; got shape "
                f"{grid.shape}{span}; encode the image with the family's own tokenizer, codes counted from 0"
            )
        return self.image.block(grid, vocabulary.first_code)

    def _plain_ids(self, text: str, owner: str) -> list[int]:
        try:
            ids = self.encode_text(text)
        except ValueError as error:
            raise ValueError(f"sequence {owner}: {error}") from error
        special = [id for id in ids if not self.plain[id]]
        if special:
            raise ValueError(
                f"sequence {owner}: expected plain text; got {text[:80]!r}, in which ids {special[:5]} are special "
                "tokens of the model; remove them from the data"
            )
        return ids


class _Writer:
    def __init__(self) -> None:
        self._ids: list[int] = []
        self._kinds: list[int] = []
        self._in_loss: list[bool] = []
        self._pixels: list[NDArray[np.uint8]] = []

    def add(self, ids: Sequence[int], *, in_loss: bool) -> None:
        self._extend(ids, [TokenKind.TEXT] * len(ids), in_loss)

    def add_image(self, ids: Sequence[int], kinds: Sequence[TokenKind], *, in_loss: bool) -> None:
        self._extend(ids, kinds, in_loss)

    def add_pixels(self, ids: Sequence[int], placeholder: int | None, image: NDArray[np.uint8]) -> None:
        self._extend(ids, [TokenKind.PLACEHOLDER if i == placeholder else TokenKind.TEXT for i in ids], False)
        self._pixels.append(image)

    def _extend(self, ids: Sequence[int], kinds: Sequence[TokenKind], in_loss: bool) -> None:
        self._ids += ids
        self._kinds += kinds
        self._in_loss += [in_loss] * len(ids)

    def sequence(self, id: str, subset: str) -> TokenSequence:
        return TokenSequence(
            id=id,
            subset=subset,
            ids=np.array(self._ids, np.int32),
            kinds=np.array(self._kinds, np.uint8),
            in_loss=np.array(self._in_loss, np.bool_),
            pixels=tuple(self._pixels),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Documents one behind the other, on the device of the model."""

    ids: Tensor
    """int64 [T] over the joint vocabulary."""
    lengths: tuple[int, ...]
    """Tokens of each document."""
    pixels: tuple[NDArray[np.uint8], ...] = ()
    """Images of the placeholders among `ids`, in their order."""


Part = Literal["text", "image", "both"]


class InterleavedPolicy(Protocol):
    """What a family offers to fine-tuning on conversations. V is the joint vocabulary, H the trunk's width."""

    @property
    def module(self) -> nn.Module:
        """Parameters under the checkpoint's own names; frozen parts have requires_grad False."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight that is exported; tied ones once."""
        ...

    @property
    def layout(self) -> ChatLayout:
        """How it writes a conversation."""
        ...

    def hidden_states_of(self, row: PackedRow) -> Tensor:
        """Last hidden states [T, H]; a document sees itself alone."""
        ...

    def logits(self, hidden: Tensor, part: Part) -> Tensor:
        """Logits [N, C] of hidden states [N, H]: over codes, over `JointVocabulary.text_ids`, or over V."""
        ...

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write a checkpoint folder in the family's public layout with these weights."""
        ...
