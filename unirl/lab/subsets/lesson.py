"""A lesson: an interleaved conversation made of words and scenes, and what its pictures must show.

Records, the rule that keeps held-out captions out of training, and how a lesson becomes turns.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from unirl.lab.subsets.arrangements import content, scene_of
from unirl.lab.world import (
    COUNT_WORDS,
    OPPOSITE,
    Aspect,
    Category,
    PlacedObject,
    Scene,
    Spec,
    is_heldout,
    relation_between,
    render,
)
from unirl.types import Segment, Turn


class Seen(Protocol):
    """An object of a scene, or one found in pixels."""

    @property
    def shape(self) -> str | None: ...  # noqa: D102
    @property
    def color(self) -> str: ...  # noqa: D102
    @property
    def centre(self) -> tuple[float, float]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One property that two pictures can share."""

    asks: Aspect
    word: str
    """A count word, a colour, a shape or a relation."""
    shape: str = ""
    """For a relation: the shape that has it to the only other object, of another shape."""

    def __str__(self) -> str:
        """In words: "two shapes", "a red shape", "a circle", "a circle left of a shape"."""
        match self.asks:
            case "count":
                return f"{self.word} shape" + "s" * (self.word != COUNT_WORDS[1])
            case "color":
                return f"a {self.word} shape"
            case "shape":
                return f"a {self.word}"
            case "relation":
                return f"a {self.shape} {self.word} a shape"

    def holds(self, objects: Sequence[Seen]) -> bool:
        """Whether the objects of a picture show it."""
        match self.asks:
            case "count":
                return COUNT_WORDS.get(len(objects)) == self.word
            case "color":
                return self.word in {seen.color for seen in objects}
            case "shape":
                return self.word in {seen.shape for seen in objects}
            case "relation":
                if len(objects) != 2:
                    return False
                one, other = sorted(objects, key=lambda seen: seen.shape != self.shape)
                apart = one.shape == self.shape != other.shape
                return apart and relation_between(one.centre, other.centre) == self.word


Wanted = tuple[Spec, ...] | Scene | Fact
"""What a picture must show: every one of the specs, the very objects at their places, or the fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A picture that is to be made."""

    scene: Scene
    wanted: Wanted


def as_asked(scene: Scene) -> Drawing:
    """The scene, to be judged by its spec alone: places are free."""
    return Drawing(scene=scene, wanted=(scene.spec,))


def in_place(objects: Sequence[PlacedObject]) -> Drawing:
    """These objects, to be judged one by one where they are."""
    scene = scene_of(objects)
    return Drawing(scene=scene, wanted=scene)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One conversation whose last reply is to be learned."""

    key: Spec
    """The caption that decides whether the lesson is held out."""
    prompt: tuple[str | Scene, ...]
    reply: tuple[str | Drawing, ...]
    answer: str | None = None
    """The right letter where the prompt offers choices."""
    first_try: tuple[str, Scene] | None = None
    """An earlier request and the wrong picture that it got."""

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """The pictures of the reply in their order."""
        return tuple(part for part in self.reply if isinstance(part, Drawing))


Builder = Callable[[random.Random], Lesson]
"""Draws a random lesson of one kind, without regard to what is held out."""


def by_category(
    build: Callable[[random.Random, Category], Lesson], categories: Sequence[Category]
) -> dict[str, Builder]:
    """One builder for each category of captions."""

    def of(category: Category) -> Builder:
        return lambda rng: build(rng, category)

    return {category: of(category) for category in categories}


def draw_lesson(rng: random.Random, build: Builder, *, heldout: bool) -> Lesson:
    """The first lesson the builder makes that belongs to the training part, or to the held-out part.

    A training lesson neither asks for nor shows a held-out caption, with all colours named, in either order of its
    items. A held-out lesson is about a held-out caption.
    """
    while True:
        lesson = build(rng)
        if is_heldout(lesson.key) if heldout else not any(is_reserved(spec) for spec in _mentioned(lesson)):
            return lesson


def is_reserved(spec: Spec) -> bool:
    """Whether the caption is held out in this or the other order of its items: "b right of a" for "a left of b"."""
    if len(spec.items) > 2 and len(set(spec.items)) > 1:
        return False  # The world has no caption for more than two kinds.
    mirrored = replace(spec, items=spec.items[::-1], relation=spec.relation and OPPOSITE[spec.relation])
    return is_heldout(spec) or is_heldout(mirrored)


def _mentioned(lesson: Lesson) -> list[Spec]:
    scenes = [part for part in lesson.prompt if isinstance(part, Scene)]
    scenes += [drawing.scene for drawing in lesson.drawings]
    scenes += [lesson.first_try[1]] if lesson.first_try else []
    wanted = [spec for drawing in lesson.drawings if isinstance(drawing.wanted, tuple) for spec in drawing.wanted]
    return [lesson.key, *wanted, *(content(scene.objects) for scene in scenes)]


def prompt_turns(lesson: Lesson) -> tuple[Turn, ...]:
    """What the model reads: nothing of it is learned, a wrong picture of its own neither."""
    prompt = Turn(role="user", segments=tuple(_segment(part) for part in lesson.prompt))
    if lesson.first_try is None:
        return (prompt,)
    request, wrong = lesson.first_try
    first = Turn(role="user", segments=(Segment(text=request),))
    return first, Turn(role="assistant", segments=(Segment(image=render(wrong)),)), prompt


def reply_segments(lesson: Lesson) -> tuple[Segment, ...]:
    """What the model is to say."""
    return tuple(_segment(part.scene if isinstance(part, Drawing) else part, in_loss=True) for part in lesson.reply)


def _segment(part: str | Scene, *, in_loss: bool = False) -> Segment:
    if isinstance(part, str):
        return Segment(text=part, in_loss=in_loss)
    return Segment(image=render(part), in_loss=in_loss)
