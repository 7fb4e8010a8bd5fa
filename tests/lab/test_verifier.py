import random
from dataclasses import replace

import numpy as np
import pytest

from unirl.lab.verifier import detect, parse_caption, verify
from unirl.lab.world import (
    CATEGORIES,
    COLORS,
    RELATIONS,
    SHAPES,
    Item,
    PlacedObject,
    Scene,
    Spec,
    caption,
    make_spec,
    render,
    sample_scene,
)

BLANK = np.full((20, 20, 3), 235, np.uint8)
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(0)
    return [sample_scene(rng, CATEGORIES[i % 6]) for i in range(300)]


def draw(*objects):
    """Objects given as (shape, color), one per corner."""
    placed = tuple(
        PlacedObject(shape=s, color=c, row=row, column=column)
        for (s, c), (row, column) in zip(objects, CORNERS, strict=False)
    )
    return render(Scene(spec=Spec(category="single_object", items=(Item(shape="square"),)), objects=placed))


def scores(specs, images):
    verdicts = [verify(spec, image) for spec, image in zip(specs, images, strict=True)]
    return np.mean([v.partial for v in verdicts]), np.mean([v.exact for v in verdicts])


def all_specs():
    """Every caption of the world."""
    bare = [Item(shape=s) for s in SHAPES]
    colored = [Item(shape=s, color=c) for s in SHAPES for c in COLORS]
    yield from (Spec(category="single_object", items=(item,)) for item in bare)
    yield from (Spec(category="colors", items=(item,)) for item in colored)
    yield from (Spec(category="counting", items=(item,) * n) for item in bare + colored for n in (2, 3, 4))
    for first in bare + colored:
        for second in bare + colored:
            if first.shape == second.shape:
                continue
            if first.color is None:
                yield Spec(category="two_object", items=(first, second))
            if second.color is None:
                yield from (Spec(category="position", items=(first, second), relation=r) for r in RELATIONS)
            if first.color and second.color and first.color != second.color:
                yield Spec(category="color_attr", items=(first, second))


def test_every_caption_parses_back_to_its_spec():
    specs = list(all_specs())
    assert len({caption(spec) for spec in specs}) == len(specs) == 524
    for spec in specs:
        assert parse_caption(caption(spec)) == spec


def test_the_world_makes_only_parseable_captions():
    rng = random.Random(1)
    known = set(all_specs())
    assert {make_spec(rng, rng.choice(CATEGORIES)) for _ in range(30_000)} == known


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of",
        "a photo of a dog",
        "a circle",
        "a photo of a photo of a circle",
        "A photo of a circle",
        "a photo of a circle ",
        "a photo of one circle",
        "a photo of two circle",
        "a photo of a purple circle",
        "a photo of a circle and a circle",
        "a photo of a red circle and a square",
        "a photo of a red circle and a red square",
        "a photo of a circle left of a red square",
        "a photo of a circle near a square",
        "a photo of a circle and a square and a cross",
        "a photo of five circles",
    ],
)
def test_other_prompts_are_refused_with_the_prompt_in_the_message(prompt):
    with pytest.raises(ValueError, match=r"expected a lab caption.*choose another reward") as caught:
        parse_caption(prompt)
    assert repr(prompt) in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        None,
        [[1]],
        BLANK.astype(np.float32),
        BLANK[:, :, 0],
        BLANK[:10],
        np.zeros((384, 384, 3), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
        BLANK.transpose(2, 0, 1),
    ],
)
def test_a_malformed_image_is_an_error_and_never_a_zero(image):
    with pytest.raises(ValueError, match="expected a lab image"):
        verify(parse_caption("a photo of a circle"), image)


def test_drawn_scenes_are_exact(scenes):
    assert scores([s.spec for s in scenes], [render(s) for s in scenes]) == (1.0, 1.0)


def attack_blank(scene, rng):
    return BLANK


def attack_noise(scene, rng):
    return rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)


def attack_one_colour(scene, rng):
    return np.full((20, 20, 3), (214, 39, 40), np.uint8)


def attack_off_palette(scene, rng):
    image = render(scene)
    painted = (image != 235).any(-1)
    image[painted] = (150, 40, 200)
    return image


def attack_blur(scene, rng):
    image = np.pad(render(scene).astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    return np.mean([image[y : y + 20, x : x + 20] for y in range(3) for x in range(3)], 0).astype(np.uint8)


def attack_pixel_noise(scene, rng):
    return np.clip(render(scene) + rng.normal(0, 40, (20, 20, 3)), 0, 255).astype(np.uint8)


def attack_checkerboard(scene, rng):
    image = BLANK.copy()
    image[::2, ::2] = (214, 39, 40)
    return image


def attack_missing_object(scene, rng):
    return render(replace(scene, objects=scene.objects[1:]))


def attack_extra_object(scene, rng):
    free = next(
        (row, column)
        for row in range(4)
        for column in range(4)
        if all(max(abs(row - o.row), abs(column - o.column)) >= 2 for o in scene.objects)
    )
    extra = PlacedObject(shape="cross", color="yellow", row=free[0], column=free[1])
    return render(replace(scene, objects=(*scene.objects, extra)))


def attack_fixed_pair(scene, rng):
    return draw(("circle", "red"), ("square", "blue"))


def attack_one_of_each_shape(scene, rng):
    return draw(*zip(SHAPES, COLORS, strict=True))


@pytest.mark.parametrize(
    ("attack", "max_partial", "max_exact"),
    [
        (attack_blank, 0.0, 0.0),
        (attack_noise, 0.0, 0.0),
        (attack_one_colour, 0.0, 0.0),
        (attack_off_palette, 0.0, 0.0),
        (attack_blur, 0.05, 0.0),
        (attack_pixel_noise, 0.1, 0.0),
        (attack_checkerboard, 0.0, 0.0),
        (attack_missing_object, 0.4, 0.0),
        (attack_fixed_pair, 0.35, 0.05),
        (attack_one_of_each_shape, 0.55, 0.0),
    ],
)
def test_attacks_earn_little(scenes, attack, max_partial, max_exact):
    rng = np.random.default_rng(0)
    partial, exact = scores([s.spec for s in scenes], [attack(s, rng) for s in scenes])
    assert partial <= max_partial
    assert exact <= max_exact


def test_an_extra_object_is_never_exact(scenes):
    small = [scene for scene in scenes if len(scene.objects) <= 2]
    extra = [attack_extra_object(scene, None) for scene in small if free_cell(scene)]
    partial, exact = scores([scene.spec for scene in small if free_cell(scene)], extra)
    assert exact == 0
    assert partial < 0.8


def free_cell(scene):
    return any(
        all(max(abs(row - o.row), abs(column - o.column)) >= 2 for o in scene.objects)
        for row in range(4)
        for column in range(4)
    )


def test_always_four_copies_do_not_pay_on_counting():
    specs = [parse_caption(f"a photo of {n} red circles") for n in ("two", "three", "four")]
    four = draw(*[("circle", "red")] * 4)
    verdicts = [verify(spec, four) for spec in specs]
    assert [v.exact for v in verdicts] == [False, False, True]
    assert [round(v.partial, 3) for v in verdicts] == [0.333, 0.429, 1.0]


def test_two_glued_objects_are_one_unknown_object():
    image = draw(("square", "red"))
    image[:7, 7:14] = image[:7, :7]
    verdict = verify(parse_caption("a photo of two red squares"), image)
    assert [found.shape for found in verdict.detection.objects] == [None]
    assert verdict.partial == 0


def test_a_swapped_relation_halves_the_partial_credit():
    image = draw(("square", "red"), ("circle", "blue"))
    assert verify(parse_caption("a photo of a square left of a circle"), image).exact
    swapped = verify(parse_caption("a photo of a square right of a circle"), image)
    assert (swapped.partial, swapped.exact) == (0.5, False)


def test_swapped_colours_earn_half():
    image = draw(("square", "red"), ("circle", "blue"))
    swapped = verify(parse_caption("a photo of a blue square and a red circle"), image)
    assert (swapped.partial, swapped.exact) == (0.5, False)


def test_junk_pixels_cost_beyond_the_free_ones():
    spec = parse_caption("a photo of a red square")
    image = draw(("square", "red"))
    image[18, :6] = (150, 40, 200)
    assert verify(spec, image).exact
    image[16, :12] = (150, 40, 200)
    verdict = verify(spec, image)
    assert not verdict.exact
    assert verdict.partial == pytest.approx(1 - 12 / 60)
    assert verdict.detection.junk_px == 18


def test_a_damaged_glyph_still_reads_and_a_half_glyph_does_not():
    image = draw(("circle", "green"))
    image[3, 3] = 235
    assert detect(image).objects[0].shape == "circle"
    image[:4, :7] = 235
    assert detect(image).objects[0].shape is None


def test_the_reward_is_the_mean_of_partial_and_exact():
    image = draw(("square", "red"), ("circle", "blue"))
    assert verify(parse_caption("a photo of a square and a circle"), image).reward == 1.0
    assert verify(parse_caption("a photo of a square right of a circle"), image).reward == 0.25
