"""A question about a picture, answered by way of another picture (UnifiedVisual section 3.1.2, appendix G.4)."""

import random
from dataclasses import replace
from functools import cache

from unirl.lab.subsets.lesson import Drawing, Fact, Lesson, by_category, is_reserved
from unirl.lab.subsets.wording import concluding
from unirl.lab.world import (
    CATEGORIES,
    COLORS,
    RELATIONS,
    SHAPES,
    Category,
    Item,
    Question,
    Relation,
    Scene,
    Spec,
    describe,
    make_question,
    make_scene,
    make_spec,
    question_with_choices,
)


@cache
def pool() -> tuple[Scene, ...]:
    """The pictures that can be recalled: always the same, none of them of a held-out caption."""
    rng = random.Random("pool")
    kinds = [Item(shape=shape, color=color) for shape in SHAPES for color in COLORS]
    crowds = [Spec(category="counting", items=(kind,) * number) for number in (2, 3, 4) for kind in kinds[::2]]
    singles = [Spec(category="colors", items=(kind,)) for kind in kinds]
    pairs = [pair for shape in SHAPES for relation in RELATIONS for pair in _two_pairs(rng, shape, relation)]
    return tuple(make_scene(rng, spec) for spec in (*singles, *crowds, *pairs) if not is_reserved(spec))


def _two_pairs(rng: random.Random, shape: str, relation: Relation) -> list[Spec]:
    """Two coloured pairs in which the shape has the relation: one for scenes of the other's content."""
    kinds = [Item(shape=other, color=color) for other in SHAPES for color in COLORS]
    contents = [
        Spec(category="color_attr", items=(one, other))
        for one in kinds
        for other in kinds
        if one.shape == shape != other.shape and one.color != other.color
    ]
    pairs = [replace(spec, category="position", relation=relation) for spec in contents if not is_reserved(spec)]
    return rng.sample([pair for pair in pairs if not is_reserved(pair)], 2)


def recall(scene: Scene, fact: Fact) -> Scene:
    """The picture of the pool that shows the fact too, other content, and is most like the scene; the first of them.

    Raises:
        ValueError: no picture of the pool shows the fact with other content.
    """
    kinds = {(placed.shape, placed.color) for placed in scene.objects}
    fitting = [
        (len(kinds & others), other)
        for other in pool()
        if fact.holds(other.objects)
        and ((others := {(placed.shape, placed.color) for placed in other.objects}) != kinds)
    ]
    if not fitting:
        raise ValueError(f"expected a picture of the pool that shows {fact}; got none; add one to the pool")
    return max(fitting, key=lambda pair: pair[0])[1]


def _shared_fact(scene: Scene, question: Question) -> Fact:
    """What another picture must show to support the answer."""
    if question.asks == "relation":
        return Fact(asks="relation", word=str(scene.spec.relation), shape=scene.objects[0].shape)
    return Fact(asks=question.asks, word=question.word)


def _compare(rng: random.Random, category: Category) -> Lesson:
    scene = make_scene(rng, make_spec(rng, category))
    question = make_question(rng, scene)
    fact = _shared_fact(scene, question)
    return Lesson(
        key=scene.spec,
        prompt=(scene, question_with_choices(question.text, question.choices)),
        reply=(
            f"this is {describe(scene)} . another picture with {fact} :",
            Drawing(scene=recall(scene, fact), wanted=fact),
            f"both have {fact} {concluding(question.word, question.letter)}",
        ),
        answer=question.letter,
    )


KINDS = by_category(_compare, CATEGORIES)
