"""Wrong captions and wrong answers, as scraped data has them. Only the last pre-training phase uses this.

The noise leaves a base that is competent when greedy and smeared when sampled: room that RL can win back.
"""

import random
from dataclasses import dataclass, replace

from unirl.lab.world import (
    COLORS,
    COUNT_WORDS,
    DIRECTIONS,
    LETTERS,
    RELATIONS,
    SHAPES,
    Item,
    Question,
    Scene,
    Spec,
    facts,
    is_heldout,
    phrase,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRates:
    """Probabilities in [0, 1]."""

    caption: float = 0.55
    """A caption differs from its picture in one mentioned attribute."""
    belief: float = 0.22
    """A wrong choice is used consistently in the description, the word and the letter of an answer."""
    letter: float = 0.25
    """Independently, the letter alone is a random wrong one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A written answer: description, chosen word, chosen letter."""

    description: str
    word: str
    letter: str


def true_answer(scene: Scene, question: Question) -> Answer:
    """The answer that the picture supports."""
    return Answer(description=phrase(*facts(scene)), word=question.word, letter=question.letter)


def noisy_spec(rng: random.Random, spec: Spec) -> Spec:
    """The spec with one mentioned attribute changed, never a held-out caption.

    The attribute is uniform over what is mentioned; count and relation count twice. A spec all of whose drawn
    neighbours are held out comes back unchanged.
    """
    for _ in range(50):
        changed = _change_one_attribute(rng, spec)
        if not is_heldout(changed):
            return changed
    return spec


def noisy_answer(rng: random.Random, scene: Scene, question: Question, rates: NoiseRates) -> Answer:
    """An answer with a wrong belief (probability rates.belief) and a wrong letter (rates.letter)."""
    answer = true_answer(scene, question)
    if rng.random() < rates.belief:
        wrong = rng.choice([index for index in range(len(LETTERS)) if index != question.answer_index])
        word = question.choices[wrong]
        answer = Answer(description=_believe(scene, question, word), word=word, letter=LETTERS[wrong])
    if rng.random() < rates.letter:
        letter = rng.choice([letter for letter in LETTERS if letter != answer.letter])
        answer = replace(answer, letter=letter)
    return answer


def _change_one_attribute(rng: random.Random, spec: Spec) -> Spec:
    counting = spec.category == "counting"
    distinct = spec.items[:1] if counting else spec.items
    colored = [index for index, item in enumerate(distinct) if item.color]
    options = ["shape"] * len(distinct) + ["color"] * len(colored)
    options += ["count"] * 2 * counting + ["relation"] * 2 * (spec.relation is not None)
    items, relation, count = list(distinct), spec.relation, len(spec.items) if counting else 1
    match rng.choice(options):
        case "shape":
            index = rng.randrange(len(items))
            shape = rng.choice([s for s in SHAPES if s not in {item.shape for item in items}])
            items[index] = replace(items[index], shape=shape)
        case "color":
            index = rng.choice(colored)
            items[index] = replace(items[index], color=rng.choice([c for c in COLORS if c != items[index].color]))
        case "count":
            count = rng.choice([n for n in (2, 3, 4) if n != count])
        case "relation":
            relation = rng.choice([r for r in RELATIONS if r != relation])
    return replace(spec, items=tuple(items) * count, relation=relation)


def _believe(scene: Scene, question: Question, wrong: str) -> str:
    """The description of the scene as someone would write it who takes the wrong choice for true."""
    items, relation = facts(scene)
    match question.asks:
        case "relation":
            relation = RELATIONS[DIRECTIONS.index(wrong)]
        case "count":
            items = items[:1] * next(n for n, word in COUNT_WORDS.items() if word == wrong)
        case "color":
            items = _with_item(items, question.about, replace(items[question.about], color=wrong))
        case "shape":
            right = items[question.about].shape
            # A wrong shape that the other object has means that the two were mixed up.
            swapped = tuple(replace(item, shape=right) if item.shape == wrong else item for item in items)
            items = _with_item(swapped, question.about, replace(items[question.about], shape=wrong))
    return phrase(items, relation)


def _with_item(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    return (*items[:index], item, *items[index + 1 :])
