"""Lessons that end in a picture: UnifiedVisual section 3.1.1 (generation, editing, correction) and 3.1.3 (step lists).

Each builder draws one random lesson of its kind. A rationale ends in "so draw ..." and names the picture that follows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from unirl.lab.lesson import Builder, Drawing, Lesson, by_category, free_corners, in_place, scene_of, sketch
from unirl.lab.riddles import color_clue, item_riddle, make_riddle, shape_clue
from unirl.lab.world import (
    CATEGORIES,
    COLORS,
    COUNT_WORDS,
    OPPOSITE,
    PLURALS,
    SHAPES,
    Category,
    Item,
    PlacedObject,
    Scene,
    Spec,
    caption,
    describe,
    make_scene,
    make_spec,
    phrase,
)

Objects = tuple[PlacedObject, ...]


def _caption_request(spec: Spec) -> str:
    return f"draw : {caption(spec)}"


def _so_draw(words: str) -> str:
    return f"so draw {words} ."


def _plain(rng: random.Random, category: Category) -> Lesson:
    """A caption and its picture, without a rationale."""
    scene = make_scene(rng, make_spec(rng, category))
    drawing = Drawing(scene=scene, wanted=(scene.spec,))
    return Lesson(key=scene.spec, prompt=(_caption_request(scene.spec),), reply=(drawing,))


def _inferred(rng: random.Random, category: Category) -> Lesson:
    """A riddle, the facts that solve it, and the picture."""
    scene = make_scene(rng, make_spec(rng, category))
    spec, riddle = scene.spec, make_riddle(rng, scene.spec)
    rationale = f"{riddle.solution} {_so_draw(phrase(spec.items, spec.relation))}"
    drawing = Drawing(scene=scene, wanted=(spec,))
    return Lesson(key=spec, prompt=(f"draw {riddle.words} .",), reply=(rationale, drawing))


NORMAL = by_category(_plain, CATEGORIES)
IMAGE_GENERATION = by_category(_inferred, CATEGORIES)


# Editing. Every edit leaves no choice about places, so that a result can be judged object by object.


def _edit(objects: Objects, instruction: str, rationale: str, result: Objects, key: Spec | None = None) -> Lesson:
    drawing = in_place(result)
    return Lesson(
        key=key or drawing.scene.spec,
        prompt=(scene_of(objects), f"{instruction} ."),
        reply=(f"{rationale} . {_so_draw(describe(drawing.scene))}", drawing),
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
    result = replace(one, color=other.color), replace(other, color=one.color)
    return _edit(objects, "swap the colors", rationale, result)


def _swap_places(rng: random.Random) -> Lesson:
    scene = make_scene(rng, make_spec(rng, "position"))
    (one, other), relation = scene.objects, scene.spec.relation
    assert relation, "a position has a relation"
    result = _exchanged(scene.objects)
    key = replace(scene.spec, relation=OPPOSITE[relation])
    return _edit(scene.objects, "swap the places", f"the {one.shape} is {relation} the {other.shape}", result, key)


def _exchanged(objects: Objects) -> Objects:
    """Two objects, each at the place of the other."""
    one, other = objects
    return replace(one, row=other.row, column=other.column), replace(other, row=one.row, column=one.column)


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


IMAGE_EDITING: dict[str, Builder] = {
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


# Correction. A spoiler turns the right objects into wrong ones and says what is wrong with them.

Spoiler = Callable[[random.Random, Scene], tuple[Objects, list[str]]]


def _wrong_color(rng: random.Random, scene: Scene, item: Item | None = None) -> tuple[Objects, list[str]]:
    """One mentioned colour is another; counted objects change together."""
    item = item or rng.choice([item for item in scene.spec.items if item.color])
    color = rng.choice([color for color in COLORS if color != item.color])
    wrong = tuple(replace(o, color=color) if o.shape == item.shape else o for o in scene.objects)
    name = PLURALS[item.shape] if scene.spec.category == "counting" else item.shape
    return wrong, [f"the color of the {name} is {color} but must be {item.color}"]


def _wrong_shape(rng: random.Random, scene: Scene) -> tuple[Objects, list[str]]:
    """One shape is another; counted objects change together."""
    item = rng.choice(scene.spec.items)
    shape = rng.choice([shape for shape in SHAPES if shape not in {other.shape for other in scene.spec.items}])
    wrong = tuple(replace(o, shape=shape) if o.shape == item.shape else o for o in scene.objects)
    return wrong, [f"the shape is a {shape} but must be a {item.shape}"]


def _wrong_count(rng: random.Random, scene: Scene) -> tuple[Objects, list[str]]:
    """One object is missing, or one too many where there is room."""
    objects = scene.objects
    options = [objects[:-1]]
    if len(objects) < max(COUNT_WORDS) and (free := free_corners(objects)):
        row, column = rng.choice(free)
        options.append((*objects, replace(objects[0], row=row, column=column)))
    wrong = rng.choice(options)
    return wrong, [f"the number of shapes is {COUNT_WORDS[len(wrong)]} but must be {COUNT_WORDS[len(objects)]}"]


def _wrong_place(_rng: random.Random, scene: Scene) -> tuple[Objects, list[str]]:
    """The two objects have changed places."""
    one, other = scene.spec.items
    assert scene.spec.relation, "only a position can be wrong"
    seen, wanted = OPPOSITE[scene.spec.relation], scene.spec.relation
    return _exchanged(scene.objects), [f"the {one.shape} is {seen} the {other.shape} but must be {wanted} it"]


def _two_wrongs(rng: random.Random, scene: Scene) -> tuple[Objects, list[str]]:
    """A wrong colour and a wrong count or place, or two wrong colours."""
    mentioned = [item for item in scene.spec.items if item.color]
    objects, first = _wrong_color(rng, scene, mentioned[0])
    spoiled = replace(scene, objects=objects)
    match scene.spec.category:
        case "counting":
            wrong, second = _wrong_count(rng, spoiled)
        case "position":
            wrong, second = _wrong_place(rng, spoiled)
        case _:
            wrong, second = _wrong_color(rng, spoiled, mentioned[1])
    return wrong, first + second


def _correction(rng: random.Random, spoil: Spoiler, categories: Sequence[Category]) -> Lesson:
    spec = make_spec(rng, rng.choice(categories))
    while spoil in (_wrong_color, _two_wrongs) and not any(item.color for item in spec.items):
        spec = make_spec(rng, spec.category)
    scene = make_scene(rng, spec)
    wrong, mistakes = spoil(rng, scene)
    listed = " ".join(f"( {n} ) {mistake} ." for n, mistake in enumerate(mistakes, 1))
    return Lesson(
        key=spec,
        first_try=(_caption_request(spec), Scene(spec=spec, objects=wrong)),
        prompt=("the picture is wrong . find the mistakes and draw again .",),
        reply=(f"{listed} {_so_draw(phrase(spec.items, spec.relation))}", Drawing(scene=scene, wanted=(spec,))),
    )


_SPOILERS: dict[str, tuple[Spoiler, tuple[Category, ...]]] = {
    "color": (_wrong_color, ("colors", "counting", "color_attr", "two_object", "position")),
    "shape": (_wrong_shape, ("colors", "counting", "color_attr", "two_object", "position")),
    "count": (_wrong_count, ("counting",)),
    "place": (_wrong_place, ("position",)),
    "two_mistakes": (_two_wrongs, ("counting", "position", "color_attr")),
}


def _correction_of(spoil: Spoiler, categories: Sequence[Category]) -> Builder:
    return lambda rng: _correction(rng, spoil, categories)


IMAGE_CORRECTION: dict[str, Builder] = {kind: _correction_of(*how) for kind, how in _SPOILERS.items()}


# Step lists. Each step's picture is the sketch of the spec that the step leads to.


def _steps(rng: random.Random, goal: str, steps: Sequence[tuple[str, Spec]], key: Spec | None = None) -> Lesson:
    reply: list[str | Drawing] = []
    for number, (text, spec) in enumerate(steps, 1):
        reply += [f"( {number} ) {text} .", sketch(rng, spec)]
    return Lesson(key=key or steps[-1][1], prompt=(f"how to build {goal} ?",), reply=tuple(reply))


def _crowd(item: Item, number: int) -> Spec:
    return Spec(category="counting" if number > 1 else "colors", items=(item,) * number)


def _say(spec: Spec) -> str:
    return phrase(spec.items, spec.relation)


def _grow(rng: random.Random) -> Lesson:
    item, number = Item(shape=rng.choice(SHAPES), color=rng.choice(COLORS)), rng.randint(2, 4)
    first, *more = (_crowd(item, n) for n in range(1, number + 1))
    steps = [(f"draw {_say(first)}", first), *(("add one more", spec) for spec in more)]
    return _steps(rng, _say(more[-1]), steps)


def _build_and_recolor(rng: random.Random) -> Lesson:
    color, other = rng.sample(COLORS, 2)
    shape, number = rng.choice(SHAPES), rng.randint(2, 4)
    before, after = (_crowd(Item(shape=shape, color=c), number) for c in (color, other))
    steps = [(f"draw {_say(before)}", before), (f"change the color to {other}", after)]
    return _steps(rng, f"{_say(before)} and then change the color to {other}", steps)


def _build_pair(rng: random.Random) -> Lesson:
    spec = make_spec(rng, "color_attr")
    one, other = spec.items
    first = Spec(category="colors", items=(one,))
    return _steps(rng, _say(spec), [(f"draw {phrase((one,), None)}", first), (f"add {phrase((other,), None)}", spec)])


def _build_and_swap_colors(rng: random.Random) -> Lesson:
    before = make_spec(rng, "color_attr")
    one, other = before.items
    after = replace(before, items=(replace(one, color=other.color), replace(other, color=one.color)))
    steps = [(f"draw {_say(before)}", before), ("swap the colors", after)]
    return _steps(rng, f"{_say(before)} and then swap the colors", steps)


def _build_and_swap_places(rng: random.Random) -> Lesson:
    before = make_spec(rng, "color_attr")
    before = replace(before, category="position", relation=rng.choice(tuple(OPPOSITE)))
    assert before.relation, "a position has a relation"
    after = replace(before, relation=OPPOSITE[before.relation])
    key = replace(after, items=(after.items[0], Item(shape=after.items[1].shape)))
    steps = [(f"draw {_say(before)}", before), ("swap the places", after)]
    return _steps(rng, f"{_say(before)} and then swap the places", steps, key)


MM_INTERNET: dict[str, Builder] = {
    "grow": _grow,
    "recolor": _build_and_recolor,
    "pair": _build_pair,
    "swap_colors": _build_and_swap_colors,
    "swap_places": _build_and_swap_places,
}
