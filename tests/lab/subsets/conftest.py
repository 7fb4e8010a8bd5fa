import random
import re

import pytest

from unirl.lab.world import LETTERS


def _draw(builders, num_each=40):
    rng = random.Random(0)
    return [(kind, build(rng)) for kind, build in builders.items() for _ in range(num_each)]


def _question_and_word(lesson):
    text = lesson.prompt[-1]
    question, choices = re.fullmatch(r"(?:.* \. )?(.* \?) (.*)", text).groups()
    words = dict(zip(*[iter(choices.split())] * 2, strict=True))
    assert tuple(words) == LETTERS
    return question, words[lesson.answer]


@pytest.fixture
def lessons():
    """Draws 40 lessons of every kind, as (kind, lesson)."""
    return _draw


@pytest.fixture
def question_and_word():
    """A lesson's question without its choices, and the choice that its answer names."""
    return _question_and_word
