"""Phrases that several subsets share, so that a small model meets them often."""

import random
from collections.abc import Sequence

from unirl.lab.world import LETTERS, Spec, caption, phrase, question_with_choices


def wording(spec: Spec) -> str:
    """What the spec asks for: "a red circle left of a square"."""
    return phrase(spec.items, spec.relation)


def plain_request(spec: Spec) -> str:
    """The caption as a request, without any riddle."""
    return as_request(caption(spec))


def as_request(words: str) -> str:
    """A caption as a request: "draw : a photo of a circle"."""
    return f"draw : {words}"


def so_draw(words: str) -> str:
    """The end of a rationale, which names the picture that follows."""
    return f"so draw {words} ."


def numbered(sentences: Sequence[str]) -> list[str]:
    """The sentences as a list: "( 1 ) find the circle ."."""
    return [f"( {number} ) {sentence} ." for number, sentence in enumerate(sentences, 1)]


def offer(rng: random.Random, question: str, word: str, pool: Sequence[str]) -> tuple[str, str]:
    """The question with the right word among four shuffled choices, and the right letter."""
    choices = [word, *rng.sample([other for other in pool if other != word], 3)]
    rng.shuffle(choices)
    return question_with_choices(question, tuple(choices)), LETTERS[choices.index(word)]


def concluding(word: str, letter: str) -> str:
    """The end of every reply to a question; the letter right after the word makes its look-up an induction."""
    return f": {word} {letter} <answer> {letter} </answer>"
