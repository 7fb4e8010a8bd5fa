"""Step lists with a picture for each step (UnifiedVisual section 3.1.3, appendix G.6)."""

import random
from collections.abc import Sequence
from dataclasses import replace

from unirl.lab.subsets.arrangements import colors_exchanged, sketch
from unirl.lab.subsets.lesson import Builder, Lesson, as_asked
from unirl.lab.subsets.wording import numbered, wording
from unirl.lab.world import (
    COLORS,
    OPPOSITE,
    SHAPES,
    Item,
    Spec,
    make_spec,
)


def _steps(rng: random.Random, goal: str, steps: Sequence[tuple[str, Spec]], key: Spec | None = None) -> Lesson:
    texts, drawings = numbered([text for text, _ in steps]), [as_asked(sketch(rng, spec)) for _, spec in steps]
    reply = tuple(part for step in zip(texts, drawings, strict=True) for part in step)
    return Lesson(key=key or steps[-1][1], prompt=(f"how to build {goal} ?",), reply=reply)


def _crowd(item: Item, number: int) -> Spec:
    return Spec(category="counting" if number > 1 else "colors", items=(item,) * number)


def _grow(rng: random.Random) -> Lesson:
    item, number = Item(shape=rng.choice(SHAPES), color=rng.choice(COLORS)), rng.randint(2, 4)
    first, *more = (_crowd(item, n) for n in range(1, number + 1))
    steps = [(f"draw {wording(first)}", first), *(("add one more", spec) for spec in more)]
    return _steps(rng, wording(more[-1]), steps)


def _build_and_recolor(rng: random.Random) -> Lesson:
    color, other = rng.sample(COLORS, 2)
    shape, number = rng.choice(SHAPES), rng.randint(2, 4)
    before, after = (_crowd(Item(shape=shape, color=c), number) for c in (color, other))
    steps = [(f"draw {wording(before)}", before), (f"change the color to {other}", after)]
    return _steps(rng, f"{wording(before)} and then change the color to {other}", steps)


def _build_pair(rng: random.Random) -> Lesson:
    spec = make_spec(rng, "color_attr")
    one, other = (_crowd(item, 1) for item in spec.items)
    return _steps(rng, wording(spec), [(f"draw {wording(one)}", one), (f"add {wording(other)}", spec)])


def _build_and_swap_colors(rng: random.Random) -> Lesson:
    before = make_spec(rng, "color_attr")
    after = replace(before, items=colors_exchanged(*before.items))
    steps = [(f"draw {wording(before)}", before), ("swap the colors", after)]
    return _steps(rng, f"{wording(before)} and then swap the colors", steps)


def _build_and_swap_places(rng: random.Random) -> Lesson:
    before = make_spec(rng, "color_attr")
    before = replace(before, category="position", relation=rng.choice(tuple(OPPOSITE)))
    assert before.relation, "a position has a relation"
    after = replace(before, relation=OPPOSITE[before.relation])
    key = replace(after, items=(after.items[0], Item(shape=after.items[1].shape)))
    steps = [(f"draw {wording(before)}", before), ("swap the places", after)]
    return _steps(rng, f"{wording(before)} and then swap the places", steps, key)


KINDS: dict[str, Builder] = {
    "grow": _grow,
    "recolor": _build_and_recolor,
    "pair": _build_pair,
    "swap_colors": _build_and_swap_colors,
    "swap_places": _build_and_swap_places,
}
