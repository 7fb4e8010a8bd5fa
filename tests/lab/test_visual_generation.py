import random
import re
from collections import Counter

import pytest

from unirl.lab.lesson import content
from unirl.lab.verifier import detect, parse_caption, verify
from unirl.lab.visual_generation import IMAGE_CORRECTION, IMAGE_EDITING, IMAGE_GENERATION, MM_INTERNET, NORMAL
from unirl.lab.world import COUNT_WORDS, PLURALS, describe, render

NUM_EACH = 40


def lessons(builders, num_each=NUM_EACH):
    rng = random.Random(0)
    return [(kind, build(rng)) for kind, build in builders.items() for _ in range(num_each)]


def named_at_the_end(text):
    return re.fullmatch(r".*so draw (.*) \.", text)[1]


def seen(scene):
    return Counter((found.shape, found.color, found.centre) for found in detect(render(scene)).objects)


def test_a_caption_is_answered_with_its_picture_alone():
    for _, lesson in lessons(NORMAL):
        (drawing,) = lesson.reply
        spec = parse_caption(lesson.prompt[0].removeprefix("draw : "))
        assert drawing.wanted == (spec,) == (lesson.key,)
        assert verify(spec, render(drawing.scene)).exact


def test_a_riddle_is_solved_by_naming_what_is_drawn():
    for _, lesson in lessons(IMAGE_GENERATION):
        rationale, drawing = lesson.reply
        spec = parse_caption(f"a photo of {named_at_the_end(rationale)}")
        assert verify(spec, render(drawing.scene)).exact
        assert named_at_the_end(rationale) not in lesson.prompt[0]


def test_an_edit_ends_in_words_that_describe_the_result():
    for _, lesson in lessons(IMAGE_EDITING):
        rationale, drawing = lesson.reply
        assert named_at_the_end(rationale) == describe(drawing.scene)
        assert verify(content(drawing.scene.objects), render(drawing.scene)).exact


CHANGES = {  # Of objects found in the pixels: how many of the old are gone, how many are new.
    "recolor": (1, 1),
    "reshape": (1, 1),
    "remove": (1, 0),
    "keep": (1, 0),
    "swap_colors": (2, 2),
    "swap_places": (2, 2),
    "odd_color": (1, 1),
    "odd_shape": (1, 1),
    "remove_odd": (1, 0),
}


def test_an_edit_changes_what_it_says_and_nothing_else():
    assert set(CHANGES) == set(IMAGE_EDITING)
    for kind, lesson in lessons(IMAGE_EDITING):
        before, after = seen(lesson.prompt[0]), seen(lesson.drawings[0].scene)
        assert ((before - after).total(), (after - before).total()) == CHANGES[kind], kind


def test_an_edit_meets_its_instruction():
    for kind, lesson in lessons(IMAGE_EDITING):
        rationale = lesson.reply[0]
        before, after = seen(lesson.prompt[0]), seen(lesson.drawings[0].scene)
        gone, new = list((before - after).elements()), list((after - before).elements())
        if kind in ("remove", "keep", "remove_odd"):
            assert f"remove the {gone[0][1]} {gone[0][0]}" in rationale
        elif kind == "recolor":
            assert f"make the {gone[0][0]} {new[0][1]}" in rationale
        elif kind == "reshape":
            assert f"make the {gone[0][0]} a {new[0][0]}" in rationale
        elif kind.startswith("swap"):
            assert {shape for shape, _, _ in gone} == {shape for shape, _, _ in new}
            assert {color for _, color, _ in gone} == {color for _, color, _ in new}
            assert {centre for *_, centre in gone} == {centre for *_, centre in new}
        else:
            assert len({found[:2] for found in after}) == 1


def test_the_odd_one_is_really_alone():
    for kind, lesson in lessons({kind: IMAGE_EDITING[kind] for kind in ("odd_color", "odd_shape", "remove_odd")}):
        kinds = Counter(found[:2] for found in seen(lesson.prompt[0]))
        assert sorted(kinds.values())[0] == 1, kind
        assert sorted(kinds.values())[1] >= 2, kind


def test_a_wrong_picture_is_wrong_and_its_correction_right():
    for _, lesson in lessons(IMAGE_CORRECTION):
        request, wrong = lesson.first_try
        spec = parse_caption(request.removeprefix("draw : "))
        rationale, drawing = lesson.reply
        assert not verify(spec, render(wrong)).exact
        assert verify(spec, render(drawing.scene)).exact
        assert f"a photo of {named_at_the_end(rationale)}" in request


def test_each_mistake_is_in_the_wrong_picture_and_mended_in_the_right_one():
    for _, lesson in lessons(IMAGE_CORRECTION):
        wrong, right = (detect(render(scene)).objects for scene in (lesson.first_try[1], lesson.drawings[0].scene))
        texts = re.findall(r"\( \d \) (.*?) \.", lesson.reply[0])
        assert texts
        for text in texts:
            assert_mistake(text, wrong, right)


def assert_mistake(text, wrong, right):
    words = text.split()
    if text.startswith("the color of"):
        name = next(shape for shape, plural in PLURALS.items() if words[4] in (shape, plural))
        assert {o.color for o in wrong if o.shape == name} == {words[6]}
        assert {o.color for o in right if o.shape == name} == {words[-1]}
    elif text.startswith("the shape"):
        assert words[4] in {o.shape for o in wrong} - {o.shape for o in right}
        assert words[-1] in {o.shape for o in right} - {o.shape for o in wrong}
    elif text.startswith("the number"):
        assert (words[5], words[-1]) == (COUNT_WORDS[len(wrong)], COUNT_WORDS[len(right)])
    else:
        name, other = words[1], words[words.index("but") - 1]
        relation = " ".join(words[3 : words.index("the", 2)])
        for objects, said in ((wrong, relation), (right, text.split("must be ")[1].removesuffix(" it"))):
            spec = parse_caption(f"a photo of a {name} {said} a {other}")
            assert spec.relation == said
            centres = {o.shape: o.centre for o in objects}
            axis = int(said in ("above", "below"))
            gap = centres[name][axis] - centres[other][axis]
            assert (gap < 0) == (said in ("left of", "above"))


@pytest.mark.parametrize(("kind", "num_mistakes"), [(kind, 1 + (kind == "two_mistakes")) for kind in IMAGE_CORRECTION])
def test_mistakes_are_numbered(kind, num_mistakes):
    for _, lesson in lessons({kind: IMAGE_CORRECTION[kind]}):
        assert re.findall(r"\( (\d) \)", lesson.reply[0]) == [str(n) for n in range(1, num_mistakes + 1)]


def test_steps_are_numbered_and_lead_to_the_goal():
    for _, lesson in lessons(MM_INTERNET):
        texts, drawings = lesson.reply[::2], lesson.drawings
        assert [text[:5] for text in texts] == [f"( {number} )" for number in range(1, len(drawings) + 1)]
        assert 2 <= len(drawings) <= 4
        for drawing in drawings:
            (spec,) = drawing.wanted
            assert verify(spec, render(drawing.scene)).exact
        assert not verify(drawings[-1].wanted[0], render(drawings[0].scene)).exact


def test_a_step_list_that_grows_keeps_what_is_there():
    for _, lesson in lessons({kind: MM_INTERNET[kind] for kind in ("grow", "pair")}):
        for one, other in zip(lesson.drawings, lesson.drawings[1:], strict=False):
            assert (seen(one.scene) - seen(other.scene)).total() == 0
            assert (seen(other.scene) - seen(one.scene)).total() == 1
