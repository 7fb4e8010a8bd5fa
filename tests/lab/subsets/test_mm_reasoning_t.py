import re

from unirl.lab.subsets import mm_reasoning_t
from unirl.lab.teacher import Teacher
from unirl.lab.verifier import detect, parse_caption, verify
from unirl.lab.world import RELATIONS, relation_between, render


def test_a_drawing_shows_where_the_story_ends(lessons, question_and_word):
    for kind, lesson in lessons(mm_reasoning_t.KINDS):
        image = render(lesson.drawings[0].scene)
        assert all(verify(spec, image).exact for spec in lesson.drawings[0].wanted)
        question, word = question_and_word(lesson)
        story = lesson.prompt[0].split(question)[0]
        if kind == "ring":
            centres = {found.shape: found.centre for found in detect(image).objects}
            told = re.findall(rf"the (\w+) is ({'|'.join(RELATIONS)}) the (\w+)", story)
            assert len(told) == 3
            one, other = re.findall(r"the (\w+)", question)
            assert (one, other) not in {(a, b) for a, _, b in told} | {(b, a) for a, _, b in told}
            assert all(relation_between(centres[a], centres[b]) == relation for a, relation, b in told)
            assert relation_between(centres[one], centres[other]).startswith(word)
        else:
            Teacher(allow_heldout=True).complete_generation(image, question, word)
            assert not verify(story_spec(story), image).exact


def story_spec(story):
    """What a story starts from."""
    phrase = re.match(r"there (?:is|are) (.*?) \.", story)[1]
    return parse_caption(f"a photo of {phrase}")


def test_the_control_asks_the_same_and_draws_nothing(lessons):
    for _, lesson in lessons(mm_reasoning_t.KINDS):
        direct = mm_reasoning_t.without_drawing(lesson)
        assert direct.prompt == (f"do not draw . {lesson.prompt[0]}",)
        assert direct.answer == lesson.answer
        assert not direct.drawings
        assert direct.reply[0].startswith("the answer is :")
