import re
from collections import Counter

from unirl.lab.subsets import image_editing
from unirl.lab.subsets.arrangements import content
from unirl.lab.verifier import detect, verify
from unirl.lab.world import describe, render


def seen(scene):
    return Counter((found.shape, found.color, found.centre) for found in detect(render(scene)).objects)


def named_at_the_end(text):
    return re.fullmatch(r".*so draw (.*) \.", text)[1]


def test_an_edit_ends_in_words_that_describe_the_result(lessons):
    for _, lesson in lessons(image_editing.KINDS):
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


def test_an_edit_changes_what_it_says_and_nothing_else(lessons):
    assert set(CHANGES) == set(image_editing.KINDS)
    for kind, lesson in lessons(image_editing.KINDS):
        before, after = seen(lesson.prompt[0]), seen(lesson.drawings[0].scene)
        assert ((before - after).total(), (after - before).total()) == CHANGES[kind], kind


def test_an_edit_meets_its_instruction(lessons):
    for kind, lesson in lessons(image_editing.KINDS):
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


def test_the_odd_one_is_really_alone(lessons):
    for kind, lesson in lessons({kind: image_editing.KINDS[kind] for kind in ("odd_color", "odd_shape", "remove_odd")}):
        kinds = Counter(found[:2] for found in seen(lesson.prompt[0]))
        assert sorted(kinds.values())[0] == 1, kind
        assert sorted(kinds.values())[1] >= 2, kind
