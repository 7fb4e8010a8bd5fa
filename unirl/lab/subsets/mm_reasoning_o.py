"""A question about a picture, answered by way of the part that matters (UnifiedVisual 3.1.2, appendix G.7)."""

import random
from typing import Literal

from unirl.lab.subsets.arrangements import free_corners, scene_of
from unirl.lab.subsets.lesson import Builder, Lesson, in_place
from unirl.lab.subsets.wording import concluding, numbered, offer
from unirl.lab.world import (
    COLORS,
    SHAPES,
    PlacedObject,
    Scene,
    make_scene,
    make_spec,
)


def _look_closer(rng: random.Random, asks: Literal["color", "shape"]) -> Lesson:
    """A question about one object: named by its colour or its shape."""
    scene = make_scene(rng, make_spec(rng, "color_attr"))
    about = rng.choice(scene.objects)
    if asks == "color":
        name, question = f"the {about.shape}", f"what color is the {about.shape} ?"
    else:
        name, question = f"the {about.color} shape", f"what shape is {about.color} ?"
    return _cut_out(rng, scene, about, (question, asks), [f"find {name}", f"read its {asks}"])


def _look_beside(rng: random.Random, asks: Literal["color", "shape"]) -> Lesson:
    """A question about the object beside another."""
    scene = make_scene(rng, make_spec(rng, "position"))
    (about, other), relation = scene.objects, scene.spec.relation
    assert relation, "a position has a relation"
    where = f"{relation} the {other.shape}"
    question = f"what color is the shape {where} ?" if asks == "color" else f"what shape is {where} ?"
    steps = [f"find the {other.shape}", f"look {relation} it", f"read the {asks} there"]
    return _cut_out(rng, scene, about, (question, asks), steps)


def _cut_out(
    rng: random.Random,
    scene: Scene,
    about: PlacedObject,
    asked: tuple[str, Literal["color", "shape"]],
    steps: list[str],
) -> Lesson:
    question, asks = asked
    word = about.color if asks == "color" else about.shape
    text, letter = offer(rng, question, word, COLORS if asks == "color" else SHAPES)
    closing = f"it is a {about.color} {about.shape} {concluding(word, letter)}"
    return Lesson(
        key=scene.spec,
        prompt=(_crowded(rng, scene, about), text),
        reply=(" ".join([*numbered(steps), "this part matters :"]), in_place((about,)), closing),
        answer=letter,
    )


def _crowded(rng: random.Random, scene: Scene, about: PlacedObject) -> Scene:
    """The scene, in half the cases with a third object of another shape and colour that leaves the answer clear."""
    if rng.random() < 0.5:
        return scene
    asked, other = about, next(placed for placed in scene.objects if placed is not about)
    shape = rng.choice([shape for shape in SHAPES if shape not in (asked.shape, other.shape)])
    color = rng.choice([color for color in COLORS if color not in (asked.color, other.color)])
    third = [
        PlacedObject(shape=shape, color=color, row=row, column=column) for row, column in free_corners(scene.objects)
    ]
    if scene.spec.relation:  # Nothing else may lie on that side.
        axis = int(scene.spec.relation in ("above", "below"))
        side = asked.centre[axis] - other.centre[axis]
        third = [placed for placed in third if (placed.centre[axis] - other.centre[axis]) * side <= 0]
    return scene_of((*scene.objects, rng.choice(third))) if third else scene


KINDS: dict[str, Builder] = {
    "color": lambda rng: _look_closer(rng, "color"),
    "shape": lambda rng: _look_closer(rng, "shape"),
    "color_beside": lambda rng: _look_beside(rng, "color"),
    "shape_beside": lambda rng: _look_beside(rng, "shape"),
}
