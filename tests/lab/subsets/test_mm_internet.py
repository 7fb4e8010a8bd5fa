from collections import Counter

from unirl.lab.subsets import mm_internet
from unirl.lab.verifier import detect, verify
from unirl.lab.world import render


def seen(scene):
    return Counter((found.shape, found.color, found.centre) for found in detect(render(scene)).objects)


def test_steps_are_numbered_and_lead_to_the_goal(lessons):
    for _, lesson in lessons(mm_internet.KINDS):
        texts, drawings = lesson.reply[::2], lesson.drawings
        assert [text[:5] for text in texts] == [f"( {number} )" for number in range(1, len(drawings) + 1)]
        assert 2 <= len(drawings) <= 4
        for drawing in drawings:
            (spec,) = drawing.wanted
            assert verify(spec, render(drawing.scene)).exact
        assert not verify(drawings[-1].wanted[0], render(drawings[0].scene)).exact


def test_a_step_list_that_grows_keeps_what_is_there(lessons):
    for _, lesson in lessons({kind: mm_internet.KINDS[kind] for kind in ("grow", "pair")}):
        for one, other in zip(lesson.drawings, lesson.drawings[1:], strict=False):
            assert (seen(one.scene) - seen(other.scene)).total() == 0
            assert (seen(other.scene) - seen(one.scene)).total() == 1
