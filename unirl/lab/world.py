"""The drawn world: shapes, specs, captions, scenes, questions, pixels. No model, no tensor, no noise.

A spec says what a caption asks for; a scene is one way to draw it; a description names all it shows.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Category = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
Aspect = Literal["shape", "color", "count", "relation"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
HELDOUT_CATEGORIES: tuple[Category, ...] = CATEGORIES[1:]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
LETTERS = ("A", "B", "C", "D")
COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}

IMAGE_PX = 20
CELL_PX = 4
GRID = IMAGE_PX // CELL_PX
NUM_IMAGE_TOKENS = GRID * GRID
NUM_CODES = 96
"""Image codes of the lab's models, more than the world has patches."""
CODE_DIM = 16
BACKGROUND = (235, 235, 235)
PALETTE = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 200, 20)}
COLORS = tuple(PALETTE)

_BITMAPS = {
    "square": "####### ####### ####### ####### ####### ####### #######",
    "circle": "..###.. .#####. ####### ####### ####### .#####. ..###..",
    "triangle": "...#... ...#... ..###.. ..###.. .#####. .#####. #######",
    # An X: a plus overlaps a circle too much (IoU 0.89) for pixels to tell them apart.
    "cross": "##...## ###.### .#####. ..###.. .#####. ###.### ##...##",
}
GLYPHS: dict[str, NDArray[np.bool_]] = {
    name: np.array([[char == "#" for char in row] for row in rows.split()]) for name, rows in _BITMAPS.items()
}
SHAPES = tuple(GLYPHS)
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
GLYPH_PX = 7

DIRECTIONS = tuple(relation.removesuffix(" of") for relation in RELATIONS)
"""Answers to a question about position."""

_RELATION_MARGIN_PX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing a phrase mentions; color None means that the phrase leaves it open."""

    shape: str
    color: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a caption asks for: every item once, nothing else, and the relation of the first item to the second."""

    category: Category
    items: tuple[Item, ...]
    relation: Relation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedObject:
    """A glyph on the canvas; row and column count cells of CELL_PX pixels to its top left corner."""

    shape: str
    color: str
    row: int
    column: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the glyph's centre in pixels, y down."""
        offset = (GLYPH_PX - 1) / 2
        return self.column * CELL_PX + offset, self.row * CELL_PX + offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A spec and one drawing of it; objects stand in the order of the spec's items."""

    spec: Spec
    objects: tuple[PlacedObject, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A four-way multiple-choice question about one aspect of one object of a scene."""

    text: str
    choices: tuple[str, ...]
    answer_index: int
    asks: Aspect
    about: int
    """Index of the object whose aspect is asked."""

    @property
    def word(self) -> str:
        """The right choice."""
        return self.choices[self.answer_index]

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.answer_index]


def make_spec(rng: random.Random, category: Category) -> Spec:
    """A random spec; half of the two_object, counting and position specs also mention one colour.

    Without those mentions the tiny model never learns to look at colour words.
    """
    first, second = rng.sample(SHAPES, 2)
    color, other_color = rng.sample(COLORS, 2)
    mentioned = color if rng.random() < 0.5 else None
    match category:
        case "single_object":
            return Spec(category=category, items=(Item(shape=first),))
        case "colors":
            return Spec(category=category, items=(Item(shape=first, color=color),))
        case "counting":
            return Spec(category=category, items=(Item(shape=first, color=mentioned),) * rng.randint(2, 4))
        case "two_object":
            return Spec(category=category, items=(Item(shape=first), Item(shape=second, color=mentioned)))
        case "position":
            items = (Item(shape=first, color=mentioned), Item(shape=second))
            return Spec(category=category, items=items, relation=rng.choice(RELATIONS))
        case "color_attr":
            items = (Item(shape=first, color=color), Item(shape=second, color=other_color))
            return Spec(category=category, items=items)


def phrase(items: tuple[Item, ...], relation: Relation | None) -> str:
    """Items and relation in words: "a red circle left of a square", "three crosses", "a circle"."""
    if len(items) > 1 and items[0].shape == items[1].shape:
        words = (COUNT_WORDS[len(items)], items[0].color, PLURALS[items[0].shape])
        return " ".join(word for word in words if word)
    parts = (f"a {item.color} {item.shape}" if item.color else f"a {item.shape}" for item in items)
    return f" {relation or 'and'} ".join(parts)


def caption(spec: Spec) -> str:
    """The spec in words, e.g. "a photo of two red circles"."""
    return f"a photo of {phrase(spec.items, spec.relation)}"


def is_heldout(spec: Spec) -> bool:
    """Whether the caption is reserved for evaluation: md5 of the caption is 0 mod 5, and not a single object."""
    if spec.category == "single_object":
        return False
    digest = hashlib.md5(caption(spec).encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 5 == 0


def relation_between(first: tuple[float, float], second: tuple[float, float]) -> Relation | None:
    """Where the first centre lies from the second; None on an exact diagonal or within 3 px on the dominant axis."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) == abs(dy) or max(abs(dx), abs(dy)) <= _RELATION_MARGIN_PX:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def make_scene(rng: random.Random, spec: Spec) -> Scene:
    """A random drawing of the spec: boxes at least 1 px apart, open colours filled in, the relation satisfied."""
    corners = [(row, column) for row in range(GRID - 1) for column in range(GRID - 1)]
    shared = rng.choice(COLORS)
    fill = [item.color or (shared if spec.category == "counting" else rng.choice(COLORS)) for item in spec.items]
    while True:
        cells = rng.sample(corners, len(spec.items))
        apart = all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2 for i, a in enumerate(cells) for b in cells[:i])
        objects = tuple(
            PlacedObject(shape=item.shape, color=color, row=row, column=column)
            for item, color, (row, column) in zip(spec.items, fill, cells, strict=True)
        )
        if apart and (spec.relation is None or spec.relation == scene_relation(objects)):
            return Scene(spec=spec, objects=objects)


def sample_scene(rng: random.Random, category: Category | None = None, *, heldout: bool = False) -> Scene:
    """A random scene of the training captions, or of the held-out ones.

    Raises:
        ValueError: held-out single objects, of which there are none.
    """
    if heldout and category == "single_object":
        raise ValueError(f"expected a category of {HELDOUT_CATEGORIES}; got single_object; it is never held out")
    pool = HELDOUT_CATEGORIES if heldout else CATEGORIES
    while True:
        spec = make_spec(rng, category or rng.choice(pool))
        if is_heldout(spec) == heldout:
            return make_scene(rng, spec)


def scene_relation(objects: tuple[PlacedObject, ...]) -> Relation | None:
    """The relation of the first object to the second where there are exactly two of different shape, else None."""
    if len(objects) != 2 or objects[0].shape == objects[1].shape:
        return None
    return relation_between(objects[0].centre, objects[1].centre)


def facts(scene: Scene) -> tuple[tuple[Item, ...], Relation | None]:
    """What the picture shows, every colour named."""
    return tuple(Item(shape=o.shape, color=o.color) for o in scene.objects), scene_relation(scene.objects)


def describe(scene: Scene) -> str:
    """The scene in words, every colour and the relation named: the reasoning text of an answer."""
    return phrase(*facts(scene))


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene as RGB pixels [20, 20, 3], no anti-aliasing."""
    image = np.full((IMAGE_PX, IMAGE_PX, 3), BACKGROUND, np.uint8)
    for placed in scene.objects:
        top, left = placed.row * CELL_PX, placed.column * CELL_PX
        image[top : top + GLYPH_PX, left : left + GLYPH_PX][GLYPHS[placed.shape]] = PALETTE[placed.color]
    return image


def make_question(rng: random.Random, scene: Scene) -> Question:
    """The question of the scene's category, its four choices shuffled."""
    text, answer, pool, asks, about = _ask(rng, scene)
    choices = [answer, *rng.sample([choice for choice in pool if choice != answer], 3)]
    rng.shuffle(choices)
    return Question(text=text, choices=tuple(choices), answer_index=choices.index(answer), asks=asks, about=about)


def _ask(rng: random.Random, scene: Scene) -> tuple[str, str, tuple[str, ...], Aspect, int]:
    objects, category = scene.objects, scene.spec.category
    about = rng.randrange(len(objects))
    subject, other = objects[about], objects[1 - about] if len(objects) == 2 else objects[0]
    match category:
        case "single_object":
            return "what shape is shown ?", subject.shape, SHAPES, "shape", about
        case "counting":
            count = COUNT_WORDS[len(objects)]
            return f"how many {PLURALS[subject.shape]} ?", count, tuple(COUNT_WORDS.values()), "count", 0
        case "two_object":
            return f"what shape is with the {other.shape} ?", subject.shape, SHAPES, "shape", about
        case "position":
            text = f"where is the {objects[0].shape} from the {objects[1].shape} ?"
            return text, str(scene.spec.relation).removesuffix(" of"), DIRECTIONS, "relation", 0
    if category == "colors" or rng.random() < 0.5:
        return f"what color is the {subject.shape} ?", subject.color, COLORS, "color", about
    return f"what shape is {subject.color} ?", subject.shape, SHAPES, "shape", about


def question_with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question as the lab's model reads it: "where is ... ? A left B above C right D below"."""
    options = (f"{letter} {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return " ".join((question, *options))
