import random

from unirl.lab.subsets import understanding
from unirl.lab.teacher import Teacher
from unirl.lab.world import describe, make_scene, render


def test_a_description_in_understanding_data_is_of_the_picture(lessons):
    for _, lesson in lessons(understanding.KINDS):
        assert lesson.reply[0].startswith(f"<think> {describe(lesson.prompt[0])} :")


def test_text_reasoning_shows_no_picture(lessons):
    for _, lesson in lessons(understanding.TEXT_KINDS):
        assert all(isinstance(part, str) for part in (*lesson.prompt, *lesson.reply))


def test_the_answer_of_a_riddle_is_that_of_any_picture_of_it(lessons, question_and_word):
    rng, teacher = random.Random(0), Teacher(allow_heldout=True)
    for _, lesson in lessons(understanding.TEXT_KINDS):
        teacher.complete_generation(render(make_scene(rng, lesson.key)), *question_and_word(lesson))
