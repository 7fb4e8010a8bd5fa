"""Understanding data: a rationale in words and the letter (UnifiedVisual section 3.2)."""

import random

from unirl.lab.subsets.lesson import Lesson, by_category
from unirl.lab.subsets.riddles import make_riddle
from unirl.lab.world import (
    CATEGORIES,
    HELDOUT_CATEGORIES,
    Category,
    describe,
    make_question,
    make_scene,
    make_spec,
    question_with_choices,
)


def _thought(thought: str, word: str, letter: str) -> str:
    return f"<think> {thought} : {word} {letter} </think> <answer> {letter} </answer>"


def _describe_and_answer(rng: random.Random, category: Category) -> Lesson:
    scene = make_scene(rng, make_spec(rng, category))
    question = make_question(rng, scene)
    return Lesson(
        key=scene.spec,
        prompt=(scene, question_with_choices(question.text, question.choices)),
        reply=(_thought(describe(scene), question.word, question.letter),),
        answer=question.letter,
    )


def _solve_riddle(rng: random.Random, category: Category) -> Lesson:
    """A riddle without pictures, and the lab's question about what it hides."""
    spec = make_spec(rng, category)
    riddle, question = make_riddle(rng, spec), make_question(rng, make_scene(rng, spec))
    return Lesson(
        key=spec,
        prompt=(f"think of {riddle.words} . {question_with_choices(question.text, question.choices)}",),
        reply=(_thought(riddle.solution.removesuffix(" ."), question.word, question.letter),),
        answer=question.letter,
    )


KINDS = by_category(_describe_and_answer, CATEGORIES)
TEXT_KINDS = by_category(_solve_riddle, HELDOUT_CATEGORIES)
