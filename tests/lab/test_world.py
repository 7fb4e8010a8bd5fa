import random

import numpy as np
import pytest

from unirl.lab.world import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    GLYPHS,
    PALETTE,
    Item,
    PlacedObject,
    Scene,
    Spec,
    caption,
    describe,
    is_heldout,
    make_question,
    make_spec,
    question_with_choices,
    relation_between,
    render,
    sample_scene,
    scene_relation,
)


def test_equal_seeds_give_equal_scenes_and_questions():
    def draw(seed):
        rng = random.Random(seed)
        return [(scene := sample_scene(rng), make_question(rng, scene)) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)


def test_the_world_has_few_enough_patches_for_its_codebook():
    rng = random.Random(0)
    images = np.stack([render(sample_scene(rng)) for _ in range(3000)])
    patches = images.reshape(-1, 5, 4, 5, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    assert len({patch.tobytes() for patch in patches}) == 65


def test_training_scenes_never_have_a_heldout_caption():
    rng = random.Random(1)
    assert not any(is_heldout(sample_scene(rng).spec) for _ in range(2000))


def test_about_a_fifth_of_the_captions_is_held_out():
    rng = random.Random(2)
    specs = {make_spec(rng, rng.choice(CATEGORIES[1:])) for _ in range(20_000)}
    assert 0.15 < np.mean([is_heldout(spec) for spec in specs]) < 0.27


def test_held_out_single_objects_are_refused():
    with pytest.raises(ValueError, match="never held out"):
        sample_scene(random.Random(0), "single_object", heldout=True)


def test_half_of_the_open_captions_mention_a_colour():
    rng = random.Random(5)
    for category in ("two_object", "counting", "position"):
        mentions = [any(item.color for item in make_spec(rng, category).items) for _ in range(2000)]
        assert 0.45 < np.mean(mentions) < 0.55


def test_objects_keep_a_pixel_apart_and_stay_on_the_canvas():
    rng = random.Random(4)
    for scene in (sample_scene(rng) for _ in range(500)):
        covered = np.zeros((20, 20), int)
        for placed in scene.objects:
            top, left = placed.row * 4, placed.column * 4
            assert top + 7 <= 20
            assert left + 7 <= 20
            covered[max(0, top - 1) : top + 7, max(0, left - 1) : left + 7] += 1
        assert covered.max() == 1


def test_render_paints_glyphs_in_palette_colours():
    scene = Scene(
        spec=Spec(category="single_object", items=(Item(shape="cross"),)),
        objects=(PlacedObject(shape="cross", color="blue", row=1, column=2),),
    )
    image = render(scene)
    painted = (image == PALETTE["blue"]).all(-1)
    assert (painted[4:11, 8:15] == GLYPHS["cross"]).all()
    assert painted.sum() == GLYPHS["cross"].sum()
    assert (image[~painted] == BACKGROUND).all()


def test_captions_read_as_in_geneval():
    red_cross, square = Item(shape="cross", color="red"), Item(shape="square")
    assert caption(Spec(category="counting", items=(red_cross,) * 3)) == "a photo of three red crosses"
    assert caption(Spec(category="two_object", items=(square, red_cross))) == "a photo of a square and a red cross"
    spec = Spec(category="position", items=(red_cross, square), relation="left of")
    assert caption(spec) == "a photo of a red cross left of a square"


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        ((3, 3), (11, 3), "left of"),
        ((11, 7), (3, 3), "right of"),
        ((3, 3), (7, 11), "above"),
        ((3, 11), (3, 3), "below"),
        ((3, 3), (11, 11), None),
        ((3, 3), (6, 3), None),
    ],
)
def test_a_relation_needs_a_dominant_axis(first, second, relation):
    assert relation_between(first, second) == relation


def test_every_question_has_four_choices_and_the_true_answer():
    rng = random.Random(6)
    for _ in range(500):
        scene = sample_scene(rng)
        question = make_question(rng, scene)
        assert len(set(question.choices)) == 4
        subject = scene.objects[question.about]
        match question.asks:
            case "shape":
                assert question.word == subject.shape
            case "color":
                assert question.word == subject.color
            case "count":
                assert question.word == ("one", "two", "three", "four")[len(scene.objects) - 1]
            case "relation":
                assert scene_relation(scene.objects).startswith(question.word)


def test_a_description_names_every_colour():
    rng = random.Random(7)
    for _ in range(200):
        scene = sample_scene(rng)
        assert {placed.color for placed in scene.objects} == {w for w in describe(scene).split() if w in COLORS}


def test_choices_follow_the_question_with_their_letters():
    text = question_with_choices("what color is the square ?", ("red", "blue", "green", "yellow"))
    assert text == "what color is the square ? A red B blue C green D yellow"
