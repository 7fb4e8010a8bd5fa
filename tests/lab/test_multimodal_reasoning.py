import random
import re

import numpy as np
import pytest

from unirl.lab import multimodal_reasoning as reasoning
from unirl.lab.lesson import Fact, content, is_reserved
from unirl.lab.teacher import Teacher
from unirl.lab.verifier import detect, parse_caption, verify
from unirl.lab.world import (
    COLORS,
    COUNT_WORDS,
    LETTERS,
    RELATIONS,
    SHAPES,
    Scene,
    describe,
    relation_between,
    render,
)

NUM_EACH = 40


def lessons(builders, num_each=NUM_EACH):
    rng = random.Random(0)
    return [(kind, build(rng)) for kind, build in builders.items() for _ in range(num_each)]


def question_and_word(lesson):
    """The question without its choices, and the choice that the answer's letter names."""
    text = lesson.prompt[-1]
    question, choices = re.fullmatch(r"(?:.* \. )?(.* \?) (.*)", text).groups()
    words = dict(zip(*[iter(choices.split())] * 2, strict=True))
    assert tuple(words) == LETTERS
    return question, words[lesson.answer]


ALL = {
    **{f"o/{kind}": build for kind, build in reasoning.MM_REASONING_O.items()},
    **{f"mm/{kind}": build for kind, build in reasoning.MM_REASONING_MM.items()},
    **{f"t/{kind}": build for kind, build in reasoning.MM_REASONING_T.items()},
    **{f"und/{kind}": build for kind, build in reasoning.UNDERSTANDING.items()},
    **{f"text/{kind}": build for kind, build in reasoning.TEXT_REASONING.items()},
}


def test_every_reply_ends_in_the_right_word_and_its_letter():
    for kind, lesson in lessons(ALL, 15):
        _, word = question_and_word(lesson)
        letter = lesson.answer
        assert f": {word} {letter} " in lesson.reply[-1], kind
        assert lesson.reply[-1].endswith(f"<answer> {letter} </answer>"), kind


@pytest.mark.parametrize("builders", [reasoning.MM_REASONING_MM, reasoning.UNDERSTANDING])
def test_the_teacher_gives_the_same_answer_from_the_pixels(builders):
    teacher = Teacher(allow_heldout=True)
    for _, lesson in lessons(builders):
        teacher.complete_generation(render(lesson.prompt[0]), *question_and_word(lesson))


def test_the_part_is_the_object_that_is_asked_about_at_its_place():
    for _, lesson in lessons(reasoning.MM_REASONING_O):
        whole = detect(render(lesson.prompt[0])).objects
        (part,) = detect(render(lesson.drawings[0].scene)).objects
        question, word = question_and_word(lesson)
        assert part in whole
        assert word == (part.color if question.startswith("what color") else part.shape)
        assert lesson.reply[-1].startswith(f"it is a {part.color} {part.shape} :")


def test_exactly_one_object_is_what_a_question_about_a_part_can_mean():
    for kind, lesson in lessons(reasoning.MM_REASONING_O):
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


def test_pictures_with_a_third_object_are_as_common_as_those_without():
    counts = [len(lesson.prompt[0].objects) for _, lesson in lessons(reasoning.MM_REASONING_O, 100)]
    assert set(counts) == {2, 3}
    assert 0.35 < np.mean([count == 3 for count in counts]) < 0.6


def test_a_recalled_picture_shares_what_is_asked_and_is_another():
    for _, lesson in lessons(reasoning.MM_REASONING_MM):
        scene, (drawing,) = lesson.prompt[0], lesson.drawings
        assert drawing.scene in reasoning.pool()
        assert drawing.wanted.holds(detect(render(scene)).objects)
        assert drawing.wanted.holds(detect(render(drawing.scene)).objects)
        assert content(scene.objects) != content(drawing.scene.objects)
        assert lesson.reply[0] == f"this is {describe(scene)} . another picture with {drawing.wanted} :"


def test_the_pool_has_a_picture_for_every_fact_whatever_is_shown():
    facts = [Fact(asks="count", word=word) for word in COUNT_WORDS.values()]
    facts += [Fact(asks="color", word=color) for color in COLORS] + [Fact(asks="shape", word=shape) for shape in SHAPES]
    facts += [Fact(asks="relation", word=relation, shape=shape) for relation in RELATIONS for shape in SHAPES]
    pool = reasoning.pool()
    assert len(pool) < 80
    for fact in facts:
        fitting = [scene for scene in pool if fact.holds(scene.objects)]
        assert len({frozenset(content(scene.objects).items) for scene in fitting}) >= 2, fact


def test_the_pool_holds_no_reserved_picture_and_is_always_the_same():
    assert not any(is_reserved(scene.spec) or is_reserved(content(scene.objects)) for scene in reasoning.pool())
    assert reasoning.pool.__wrapped__() == reasoning.pool()


def test_recall_prefers_what_is_most_alike():
    def alike(scene, other):
        return len({*content(scene.objects).items} & {*content(other.objects).items})

    for _, lesson in lessons(reasoning.MM_REASONING_MM):
        scene, (drawing,) = lesson.prompt[0], lesson.drawings
        fitting = [other for other in reasoning.pool() if drawing.wanted.holds(other.objects)]
        kinds = {*content(scene.objects).items}
        best = max(alike(scene, other) for other in fitting if {*content(other.objects).items} != kinds)
        assert alike(scene, drawing.scene) == best


def test_what_no_picture_shows_cannot_be_recalled():
    with pytest.raises(ValueError, match="add one to the pool"):
        reasoning.recall(Scene(spec=content(()), objects=()), Fact(asks="color", word="pink"))


def test_a_drawing_shows_where_the_story_ends():
    for kind, lesson in lessons(reasoning.MM_REASONING_T):
        image = render(lesson.drawings[0].scene)
        assert all(verify(spec, image).exact for spec in lesson.drawings[0].wanted)
        question, word = question_and_word(lesson)
        story = lesson.prompt[0].removesuffix(question)
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


def test_the_control_asks_the_same_and_draws_nothing():
    for _, lesson in lessons(reasoning.MM_REASONING_T):
        direct = reasoning.without_drawing(lesson)
        assert direct.prompt == (f"do not draw . {lesson.prompt[0]}",)
        assert direct.answer == lesson.answer
        assert not direct.drawings
        assert direct.reply[0].startswith("the answer is :")


def test_a_description_in_understanding_data_is_of_the_picture():
    for _, lesson in lessons(reasoning.UNDERSTANDING):
        assert lesson.reply[0].startswith(f"<think> {describe(lesson.prompt[0])} :")


def test_text_reasoning_shows_no_picture():
    for _, lesson in lessons(reasoning.TEXT_REASONING):
        assert all(isinstance(part, str) for part in (*lesson.prompt, *lesson.reply))


def test_letters_are_balanced():
    letters = [lesson.answer for _, lesson in lessons(ALL, 60)]
    shares = [letters.count(letter) / len(letters) for letter in LETTERS]
    assert np.allclose(shares, 0.25, atol=0.04)
