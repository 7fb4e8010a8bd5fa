from unirl.lab.subsets import understanding
from unirl.lab.world import describe


def test_a_description_in_understanding_data_is_of_the_picture(lessons):
    for _, lesson in lessons(understanding.KINDS):
        assert lesson.reply[0].startswith(f"<think> {describe(lesson.prompt[0])} :")


def test_text_reasoning_shows_no_picture(lessons):
    for _, lesson in lessons(understanding.TEXT_KINDS):
        assert all(isinstance(part, str) for part in (*lesson.prompt, *lesson.reply))
