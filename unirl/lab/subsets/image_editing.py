"""A picture, an instruction that takes understanding, and the edited picture (UnifiedVisual 3.1.1, appendix G.2).

Every edit leaves no choice about places, so that a result can be judged object by object.
"""

import random
from dataclasses import replace
from typing import Literal

from unirl.lab.subsets.arrangements import Objects, colors_exchanged, places_exchanged, scene_of
from unirl.lab.subsets.lesson import Builder, Lesson, in_place
from unirl.lab.subsets.riddles import color_clue, item_riddle, shape_clue
from unirl.lab.subsets.wording import so_draw
from unirl.lab.world import (
    COLORS,
    COUNT_WORDS,
    OPPOSITE,
    PLURALS,
    SHAPES,
    Item,
    PlacedObject,
    Spec,
    describe,
    make_scene,
    make_spec,
)


def _edit(objects: Objects, instruction: str, rationale: str, result: Objects, key: Spec | None = None) -> Lesson:
    drawing = in_place(result)
    return Lesson(
        key=key or drawing.scene.spec,
        prompt=(scene_of(objects), f"{instruction} ."),
        reply=(f"{rationale} . {so_draw(describe(drawing.scene))}", drawing),
    )


def _pair(rng: random.Random) -> Objects:
    """Two objects that differ in shape and colour."""
    return make_scene(rng, make_spec(rng, "color_attr")).objects


def _item(placed: PlacedObject) -> Item:
    return Item(shape=placed.shape, color=placed.color)


def _recolor(rng: random.Random) -> Lesson:
    one, other = objects = _pair(rng)
    color = rng.choice([color for color in COLORS if color not in (one.color, other.color)])
    who, clue = shape_clue(rng, one.shape), color_clue(rng, color)
    rationale = f"{who.solution} {clue.solution} make the {one.shape} {color}"
    return _edit(objects, f"give {who.words} {clue.words}", rationale, (replace(one, color=color), other))


def _reshape(rng: random.Random) -> Lesson:
    one, other = objects = _pair(rng)
    shape = rng.choice([shape for shape in SHAPES if shape not in (one.shape, other.shape)])
    who, what = color_clue(rng, one.color), shape_clue(rng, shape)
    rationale = f"{who.solution} {what.solution} make the {one.shape} a {shape}"
    instruction = f"change the shape in {who.words} to {what.words}"
    return _edit(objects, instruction, rationale, (replace(one, shape=shape), other))


def _remove(rng: random.Random) -> Lesson:
    one, other = objects = _pair(rng)
    who = item_riddle(rng, rng.choice([Item(shape=one.shape), _item(one)]))
    return _edit(objects, f"remove {who.words}", f"{who.solution} remove the {one.color} {one.shape}", (other,))


def _keep(rng: random.Random) -> Lesson:
    one, other = objects = _pair(rng)
    who = color_clue(rng, other.color)
    rationale = f"{who.solution} remove the {one.color} {one.shape}"
    return _edit(objects, f"keep only {who.words}", rationale, (other,))


def _swap_colors(rng: random.Random) -> Lesson:
    one, other = objects = _pair(rng)
    rationale = f"the {one.shape} is {one.color} and the {other.shape} is {other.color}"
    return _edit(objects, "swap the colors", rationale, colors_exchanged(one, other))


def _swap_places(rng: random.Random) -> Lesson:
    scene = make_scene(rng, make_spec(rng, "position"))
    (one, other), relation = scene.objects, scene.spec.relation
    assert relation, "a position has a relation"
    result = places_exchanged(scene.objects)
    key = replace(scene.spec, relation=OPPOSITE[relation])
    return _edit(scene.objects, "swap the places", f"the {one.shape} is {relation} the {other.shape}", result, key)


def _odd(rng: random.Random, aspect: Literal["shape", "color"]) -> tuple[Objects, PlacedObject, str]:
    """Three or four equal objects but for one, that one as it should be, and what is seen."""
    item = Item(shape=rng.choice(SHAPES), color=rng.choice(COLORS))
    like = make_scene(rng, Spec(category="counting", items=(item,) * rng.randint(3, 4))).objects
    first, *rest = like
    if aspect == "color":
        odd = replace(first, color=rng.choice([color for color in COLORS if color != first.color]))
        seen = f"{COUNT_WORDS[len(rest)]} {PLURALS[first.shape]} are {first.color} and one is {odd.color}"
    else:
        odd = replace(first, shape=rng.choice([shape for shape in SHAPES if shape != first.shape]))
        seen = f"{COUNT_WORDS[len(rest)]} shapes are {PLURALS[first.shape]} and one is a {odd.shape}"
    return (odd, *rest), first, seen


def _match_odd(rng: random.Random, aspect: Literal["shape", "color"]) -> Lesson:
    objects, mended, seen = _odd(rng, aspect)
    wanted = mended.color if aspect == "color" else f"a {mended.shape}"
    rationale = f"{seen} . make the {objects[0].color} {objects[0].shape} {wanted}"
    return _edit(objects, f"make the odd {aspect} match", rationale, (mended, *objects[1:]))


def _remove_odd(rng: random.Random) -> Lesson:
    objects, _, seen = _odd(rng, rng.choice(("shape", "color")))
    odd = objects[0]
    return _edit(objects, "remove the odd one", f"{seen} . remove the {odd.color} {odd.shape}", objects[1:])


KINDS: dict[str, Builder] = {
    "recolor": _recolor,
    "reshape": _reshape,
    "remove": _remove,
    "keep": _keep,
    "swap_colors": _swap_colors,
    "swap_places": _swap_places,
    "odd_color": lambda rng: _match_odd(rng, "color"),
    "odd_shape": lambda rng: _match_odd(rng, "shape"),
    "remove_odd": _remove_odd,
}
