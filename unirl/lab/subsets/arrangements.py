"""Arrangements of objects: what they show, where one more fits, and drawings at fixed places."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from unirl.lab.world import COLORS, GRID, Item, PlacedObject, Relation, Scene, Spec

Objects = tuple[PlacedObject, ...]
Colored = TypeVar("Colored", Item, PlacedObject)


def content(objects: Sequence[PlacedObject]) -> Spec:
    """All that the objects are, every colour named, without their arrangement."""
    items = tuple(Item(shape=placed.shape, color=placed.color) for placed in objects)
    if len(items) == 1:
        return Spec(category="colors", items=items)
    return Spec(category="counting" if len(set(items)) == 1 else "color_attr", items=items)


def scene_of(objects: Sequence[PlacedObject]) -> Scene:
    """The scene of these objects, asking for its whole content."""
    return Scene(spec=content(objects), objects=tuple(objects))


def places_exchanged(objects: Objects) -> Objects:
    """Two objects, each at the place of the other."""
    one, other = objects
    return replace(one, row=other.row, column=other.column), replace(other, row=one.row, column=one.column)


def colors_exchanged(one: Colored, other: Colored) -> tuple[Colored, Colored]:
    """Two items or objects, each in the colour of the other."""
    return replace(one, color=other.color), replace(other, color=one.color)


def free_corners(objects: Sequence[PlacedObject]) -> list[tuple[int, int]]:
    """The (row, column) where one more object would keep its distance from these."""
    corners = [(row, column) for row in range(GRID - 1) for column in range(GRID - 1)]
    return [(r, c) for r, c in corners if all(max(abs(r - o.row), abs(c - o.column)) >= 2 for o in objects)]


_SLOTS = ((0, 0), (0, 3), (3, 0), (3, 3))
_PAIR_SLOTS: dict[Relation | None, tuple[tuple[int, int], ...]] = {
    None: ((0, 0), (0, 3)),
    "left of": ((0, 0), (0, 3)),
    "right of": ((0, 3), (0, 0)),
    "above": ((0, 0), (3, 0)),
    "below": ((3, 0), (0, 0)),
}


def sketch(rng: random.Random, spec: Spec) -> Scene:
    """The spec drawn at fixed places, open colours alike: less to decide than in a free drawing."""
    shared = rng.choice(COLORS)
    places = _SLOTS if len(set(spec.items)) == 1 else _PAIR_SLOTS[spec.relation]
    objects = [
        PlacedObject(shape=item.shape, color=item.color or shared, row=row, column=column)
        for item, (row, column) in zip(spec.items, places, strict=False)
    ]
    return Scene(spec=spec, objects=tuple(objects))
