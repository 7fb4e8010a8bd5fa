import random

import pytest

from unirl.lab.subsets.arrangements import scene_of
from unirl.lab.subsets.lesson import (
    Fact,
    Lesson,
    as_asked,
    draw_lesson,
    is_reserved,
    reply_segments,
)
from unirl.lab.world import CATEGORIES, Item, PlacedObject, Spec, is_heldout, make_scene, make_spec

RED_CIRCLE = PlacedObject(shape="circle", color="red", row=0, column=0)
BLUE_SQUARE = PlacedObject(shape="square", color="blue", row=0, column=3)


@pytest.mark.parametrize(
    ("fact", "words", "holds"),
    [
        (Fact(asks="count", word="two"), "two shapes", True),
        (Fact(asks="count", word="one"), "one shape", False),
        (Fact(asks="color", word="blue"), "a blue shape", True),
        (Fact(asks="color", word="green"), "a green shape", False),
        (Fact(asks="shape", word="circle"), "a circle", True),
        (Fact(asks="shape", word="cross"), "a cross", False),
        (Fact(asks="relation", word="left of", shape="circle"), "a circle left of a shape", True),
        (Fact(asks="relation", word="left of", shape="square"), "a square left of a shape", False),
        (Fact(asks="relation", word="left of", shape="cross"), "a cross left of a shape", False),
    ],
)
def test_a_fact_is_said_in_words_and_seen_in_objects(fact, words, holds):
    assert str(fact) == words
    assert fact.holds((RED_CIRCLE, BLUE_SQUARE)) == holds


def test_a_relation_is_a_fact_of_two_different_shapes():
    fact = Fact(asks="relation", word="left of", shape="circle")
    other_circle = PlacedObject(shape="circle", color="blue", row=0, column=3)
    assert not fact.holds((RED_CIRCLE, other_circle))
    assert not fact.holds((RED_CIRCLE,))


def test_a_caption_is_reserved_in_either_order_of_its_items():
    rng = random.Random(0)
    specs = {make_spec(rng, category) for category in CATEGORIES for _ in range(500)}
    assert all(is_reserved(spec) for spec in specs if is_heldout(spec))
    pairs = [spec for spec in specs if spec.category == "color_attr"]
    for spec in pairs:
        assert is_reserved(spec) == is_reserved(Spec(category="color_attr", items=spec.items[::-1]))
    assert any(is_reserved(spec) and not is_heldout(spec) for spec in pairs)


def test_lessons_are_drawn_until_they_fit_their_part():
    def build(rng):
        scene = make_scene(rng, make_spec(rng, "colors"))
        return Lesson(key=scene.spec, prompt=("draw",), reply=(as_asked(scene),))

    rng = random.Random(3)
    assert all(is_heldout(draw_lesson(rng, build, heldout=True).key) for _ in range(20))
    assert not any(is_heldout(draw_lesson(rng, build, heldout=False).key) for _ in range(50))


def test_a_scene_that_shows_a_held_out_caption_makes_a_lesson_held_out():
    green_square = PlacedObject(shape="square", color="green", row=0, column=0)
    shown = scene_of((green_square,))
    assert is_heldout(shown.spec)
    key = Spec(category="single_object", items=(Item(shape="square"),))
    fine = Lesson(key=key, prompt=("draw",), reply=("no",))
    lessons = iter([Lesson(key=key, prompt=(shown,), reply=("no",)), fine])
    assert draw_lesson(random.Random(0), lambda _: next(lessons), heldout=False) is fine


def test_only_the_reply_is_learned():
    lesson = Lesson(key=scene_of((RED_CIRCLE,)).spec, prompt=("draw",), reply=("yes",))
    assert [(segment.text, segment.in_loss) for segment in reply_segments(lesson)] == [("yes", True)]
