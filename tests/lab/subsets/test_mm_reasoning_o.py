import numpy as np

from unirl.lab.subsets import mm_reasoning_o
from unirl.lab.verifier import detect
from unirl.lab.world import RELATIONS, relation_between, render


def test_the_part_is_the_object_that_is_asked_about_at_its_place(lessons, question_and_word):
    for _, lesson in lessons(mm_reasoning_o.KINDS):
        whole = detect(render(lesson.prompt[0])).objects
        (part,) = detect(render(lesson.drawings[0].scene)).objects
        question, word = question_and_word(lesson)
        assert part in whole
        assert word == (part.color if question.startswith("what color") else part.shape)
        assert lesson.reply[-1].startswith(f"it is a {part.color} {part.shape} :")


def test_exactly_one_object_is_what_a_question_about_a_part_can_mean(lessons, question_and_word):
    for kind, lesson in lessons(mm_reasoning_o.KINDS):
        objects = detect(render(lesson.prompt[0])).objects
        question, _ = question_and_word(lesson)
        words = question.split()
        if kind.endswith("beside"):
            (other,) = (o for o in objects if o.shape == words[-2])
            relation = next(r for r in RELATIONS if f" {r} " in question)
            meant = [o for o in objects if o != other and relation_between(o.centre, other.centre) == relation]
        elif kind == "color":
            meant = [o for o in objects if o.shape == words[-2]]
        else:
            meant = [o for o in objects if o.color == words[-2]]
        assert meant == list(detect(render(lesson.drawings[0].scene)).objects)


def test_pictures_with_a_third_object_are_as_common_as_those_without(lessons):
    counts = [len(lesson.prompt[0].objects) for _, lesson in lessons(mm_reasoning_o.KINDS, 100)]
    assert set(counts) == {2, 3}
    assert 0.35 < np.mean([count == 3 for count in counts]) < 0.6
