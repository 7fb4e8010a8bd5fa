import random

from unirl.lab.subsets.arrangements import colors_exchanged, content, free_corners, places_exchanged, sketch
from unirl.lab.verifier import verify
from unirl.lab.world import CATEGORIES, Item, PlacedObject, Spec, make_scene, make_spec, render

RED_CIRCLE = PlacedObject(shape="circle", color="red", row=0, column=0)
BLUE_SQUARE = PlacedObject(shape="square", color="blue", row=0, column=3)


def test_the_content_of_a_picture_is_a_spec_that_it_meets():
    rng = random.Random(1)
    for _ in range(100):
        scene = make_scene(rng, make_spec(rng, rng.choice(CATEGORIES)))
        assert verify(content(scene.objects), render(scene)).exact


def test_a_sketch_shows_its_spec_and_grows_without_moving():
    rng = random.Random(2)
    for _ in range(100):
        spec = make_spec(rng, rng.choice(CATEGORIES))
        assert verify(spec, render(sketch(rng, spec))).exact
    item = Item(shape="cross", color="red")
    two, three = (sketch(rng, Spec(category="counting", items=(item,) * n)).objects for n in (2, 3))
    assert three[:2] == two


def test_an_object_more_keeps_its_distance():
    assert set(free_corners((RED_CIRCLE, BLUE_SQUARE))) == {(row, column) for row in (2, 3) for column in range(4)}


def test_two_objects_exchange_places_or_colours():
    circle, square = places_exchanged((RED_CIRCLE, BLUE_SQUARE))
    assert ((circle.column, circle.color), (square.column, square.color)) == ((3, "red"), (0, "blue"))
    circle, square = colors_exchanged(RED_CIRCLE, BLUE_SQUARE)
    assert ((circle.column, circle.color), (square.column, square.color)) == ((0, "blue"), (3, "red"))
