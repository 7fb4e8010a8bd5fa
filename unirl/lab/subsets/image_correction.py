"""A wrong picture, what is wrong with it, and the right one (UnifiedVisual section 3.1.1, appendix G.3).

A spoiler turns the right objects into wrong ones and says what is wrong with them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from unirl.lab.subsets.arrangements import Objects, free_corners, places_exchanged
from unirl.lab.subsets.lesson import Builder, Lesson, as_asked
from unirl.lab.subsets.wording import numbered, plain_request, so_draw, wording
from unirl.lab.world import (
    COLORS,
    COUNT_WORDS,
    HELDOUT_CATEGORIES,
    OPPOSITE,
    PLURALS,
    SHAPES,
    Category,
    Item,
    Scene,
    make_scene,
    make_spec,
)

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
    return places_exchanged(scene.objects), [f"the {one.shape} is {seen} the {other.shape} but must be {wanted} it"]


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
    return Lesson(
        key=spec,
        first_try=(plain_request(spec), Scene(spec=spec, objects=wrong)),
        prompt=("the picture is wrong . find the mistakes and draw again .",),
        reply=(" ".join([*numbered(mistakes), so_draw(wording(spec))]), as_asked(scene)),
    )


_SPOILERS: dict[str, tuple[Spoiler, tuple[Category, ...]]] = {
    "color": (_wrong_color, HELDOUT_CATEGORIES),
    "shape": (_wrong_shape, HELDOUT_CATEGORIES),
    "count": (_wrong_count, ("counting",)),
    "place": (_wrong_place, ("position",)),
    "two_mistakes": (_two_wrongs, ("counting", "position", "color_attr")),
}


def _correction_of(spoil: Spoiler, categories: Sequence[Category]) -> Builder:
    return lambda rng: _correction(rng, spoil, categories)


KINDS: dict[str, Builder] = {kind: _correction_of(*how) for kind, how in _SPOILERS.items()}
