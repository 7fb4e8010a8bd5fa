import re

from unirl.lab.subsets import image_generation
from unirl.lab.verifier import parse_caption, verify
from unirl.lab.world import render


def named_at_the_end(text):
    return re.fullmatch(r".*so draw (.*) \.", text)[1]


def test_a_caption_is_answered_with_its_picture_alone(lessons):
    for _, lesson in lessons(image_generation.NORMAL):
        (drawing,) = lesson.reply
        spec = parse_caption(lesson.prompt[0].removeprefix("draw : "))
        assert drawing.wanted == (spec,) == (lesson.key,)
        assert verify(spec, render(drawing.scene)).exact


def test_a_riddle_is_solved_by_naming_what_is_drawn(lessons):
    for _, lesson in lessons(image_generation.KINDS):
        rationale, drawing = lesson.reply
        spec = parse_caption(f"a photo of {named_at_the_end(rationale)}")
        assert verify(spec, render(drawing.scene)).exact
        assert named_at_the_end(rationale) not in lesson.prompt[0]
