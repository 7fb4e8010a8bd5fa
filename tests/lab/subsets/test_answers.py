import numpy as np
import pytest

from unirl.lab.subsets import mm_reasoning_mm, mm_reasoning_o, mm_reasoning_t, understanding
from unirl.lab.teacher import Teacher
from unirl.lab.world import LETTERS, render

ALL = {
    **{f"o/{kind}": build for kind, build in mm_reasoning_o.KINDS.items()},
    **{f"mm/{kind}": build for kind, build in mm_reasoning_mm.KINDS.items()},
    **{f"t/{kind}": build for kind, build in mm_reasoning_t.KINDS.items()},
    **{f"und/{kind}": build for kind, build in understanding.KINDS.items()},
    **{f"text/{kind}": build for kind, build in understanding.TEXT_KINDS.items()},
}


def test_every_reply_ends_in_the_right_word_and_its_letter(lessons, question_and_word):
    for kind, lesson in lessons(ALL, 15):
        _, word = question_and_word(lesson)
        letter = lesson.answer
        assert f": {word} {letter} " in lesson.reply[-1], kind
        assert lesson.reply[-1].endswith(f"<answer> {letter} </answer>"), kind


@pytest.mark.parametrize("builders", [mm_reasoning_mm.KINDS, understanding.KINDS])
def test_the_teacher_gives_the_same_answer_from_the_pixels(builders, lessons, question_and_word):
    teacher = Teacher(allow_heldout=True)
    for _, lesson in lessons(builders):
        teacher.complete_generation(render(lesson.prompt[0]), *question_and_word(lesson))


def test_letters_are_balanced(lessons):
    letters = [lesson.answer for _, lesson in lessons(ALL, 60)]
    shares = [letters.count(letter) / len(letters) for letter in LETTERS]
    assert np.allclose(shares, 0.25, atol=0.04)
