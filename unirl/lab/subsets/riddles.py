"""What the world's words have in common with things outside it: indirect ways to ask for a spec.

A riddle never names what it hides; its facts, read in order, name it.
"""

import random
from dataclasses import dataclass

from unirl.lab.subsets.arrangements import colors_exchanged
from unirl.lab.world import COUNT_WORDS, OPPOSITE, PLURALS, Item, Spec, phrase

SHAPE_CLUES: dict[str, tuple[tuple[str, str], ...]] = {
    "square": (
        ("the shape of a window", "a window is a square"),
        ("the shape with four corners", "a square has four corners"),
    ),
    "circle": (
        ("the shape of a wheel", "a wheel is a circle"),
        ("the shape with no corners", "a circle has no corners"),
    ),
    "triangle": (
        ("the shape of a roof", "a roof is a triangle"),
        ("the shape with three corners", "a triangle has three corners"),
    ),
    "cross": (
        ("the shape of a kiss", "a kiss is a cross"),
        ("the shape with four arms", "a cross has four arms"),
    ),
}
"""(clue, fact) by shape."""

COLORED_THINGS = {
    "red": ("blood", "a tomato"),
    "green": ("grass", "a leaf"),
    "blue": ("the sky", "the sea"),
    "yellow": ("the sun", "a banana"),
}

NUMBER_CLUES = {
    2: ("one more than one", "one less than three", "one and one"),
    3: ("one more than two", "one less than four", "two and one"),
    4: ("one more than three", "two and two", "three and one"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Riddle:
    """An indirect description and the facts that solve it."""

    words: str
    facts: tuple[str, ...]

    @property
    def solution(self) -> str:
        """The facts as sentences: "a roof is a triangle . grass is green ."."""
        return " ".join(f"{fact} ." for fact in self.facts)


def color_clue(rng: random.Random, color: str) -> Riddle:
    """A colour by a thing that has it: "the color of grass"."""
    thing = rng.choice(COLORED_THINGS[color])
    return Riddle(words=f"the color of {thing}", facts=(f"{thing} is {color}",))


def shape_clue(rng: random.Random, shape: str) -> Riddle:
    """A shape by what it looks like: "the shape with no corners"."""
    clue, fact = rng.choice(SHAPE_CLUES[shape])
    return Riddle(words=clue, facts=(fact,))


def item_riddle(rng: random.Random, item: Item, *, both: bool = False) -> Riddle:
    """An item with its shape or its colour hidden, or `both`."""
    hide_shape = both or item.color is None or rng.random() < 0.5
    hide_color = item.color is not None and (both or not hide_shape)
    shape = shape_clue(rng, item.shape) if hide_shape else Riddle(words=f"a {item.shape}", facts=())
    if item.color is None:
        return shape
    color = color_clue(rng, item.color) if hide_color else Riddle(words=item.color, facts=())
    return Riddle(words=f"{shape.words} in {color.words}", facts=shape.facts + color.facts)


def make_riddle(rng: random.Random, spec: Spec) -> Riddle:
    """An indirect description of the spec, by one of the ways that suit its category."""
    match spec.category:
        case "single_object" | "colors":
            return item_riddle(rng, spec.items[0], both=rng.random() < 0.5)
        case "counting":
            return _count_riddle(rng, spec)
        case "two_object":
            return _pair_riddle(rng, spec)
    if rng.random() < 0.5:
        return _swapped(spec)
    return _opposite_riddle(rng, spec) if spec.relation else _pair_riddle(rng, spec)


def _count_riddle(rng: random.Random, spec: Spec) -> Riddle:
    item, number = spec.items[0], len(spec.items)
    clue = rng.choice(NUMBER_CLUES[number])
    facts = (f"{clue} is {COUNT_WORDS[number]}",)
    if item.color is None:
        return Riddle(words=f"{PLURALS[item.shape]} , {clue}", facts=facts)
    color = color_clue(rng, item.color)
    return Riddle(words=f"{PLURALS[item.shape]} in {color.words} , {clue}", facts=color.facts + facts)


def _pair_riddle(rng: random.Random, spec: Spec) -> Riddle:
    one, other = (item_riddle(rng, item) for item in spec.items)
    return Riddle(words=f"{one.words} and {other.words}", facts=one.facts + other.facts)


def _opposite_riddle(rng: random.Random, spec: Spec) -> Riddle:
    assert spec.relation, "only a position has an opposite"
    hidden, said = (relation.removesuffix(" of") for relation in (spec.relation, OPPOSITE[spec.relation]))
    pair = _pair_riddle(rng, spec)
    return Riddle(
        words=f"{pair.words} , the first opposite to {said}", facts=(*pair.facts, f"opposite to {said} is {hidden}")
    )


def _swapped(spec: Spec) -> Riddle:
    """The spec before its two items changed places, or their colours."""
    one, other = spec.items
    if spec.relation:
        fact = f"now the {one.shape} is {spec.relation} the {other.shape}"
        return Riddle(words=f"{phrase((other, one), spec.relation)} , then swap the places", facts=(fact,))
    before = colors_exchanged(one, other)
    facts = (f"now the {one.shape} is {one.color}", f"the {other.shape} is {other.color}")
    return Riddle(words=f"{phrase(before, None)} , then swap the colors", facts=facts)
