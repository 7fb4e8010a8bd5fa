"""Lessons that end in an answer: UnifiedVisual section 3.1.2 and the understanding data of section 3.2.

(O) cuts a part out of the picture it is asked about, (MM) recalls another picture that shares the asked property,
(T) draws what a text says; understanding data answers in words alone.
"""

import random
from dataclasses import replace
from functools import cache
from typing import Literal

from unirl.lab.lesson import (
    Builder,
    Drawing,
    Fact,
    Lesson,
    by_category,
    concluding,
    free_corners,
    in_place,
    is_reserved,
    offer,
    scene_of,
    sketch,
)
from unirl.lab.riddles import make_riddle
from unirl.lab.world import (
    CATEGORIES,
    COLORS,
    COUNT_WORDS,
    DIRECTIONS,
    HELDOUT_CATEGORIES,
    OPPOSITE,
    PLURALS,
    RELATIONS,
    SHAPES,
    Category,
    Item,
    PlacedObject,
    Question,
    Relation,
    Scene,
    Spec,
    describe,
    make_question,
    make_scene,
    make_spec,
    phrase,
    question_with_choices,
    relation_between,
)

# (O): steps, the part of the picture that matters, the answer.


def _look_closer(rng: random.Random, asks: Literal["color", "shape"]) -> Lesson:
    """A question about one object: named by its colour or its shape."""
    scene = make_scene(rng, make_spec(rng, "color_attr"))
    about = rng.choice(scene.objects)
    if asks == "color":
        name, question = f"the {about.shape}", f"what color is the {about.shape} ?"
    else:
        name, question = f"the {about.color} shape", f"what shape is {about.color} ?"
    return _cut_out(rng, scene, about, (question, asks), [f"find {name}", f"read its {asks}"])


def _look_beside(rng: random.Random, asks: Literal["color", "shape"]) -> Lesson:
    """A question about the object beside another."""
    scene = make_scene(rng, make_spec(rng, "position"))
    (about, other), relation = scene.objects, scene.spec.relation
    assert relation, "a position has a relation"
    where = f"{relation} the {other.shape}"
    question = f"what color is the shape {where} ?" if asks == "color" else f"what shape is {where} ?"
    steps = [f"find the {other.shape}", f"look {relation} it", f"read the {asks} there"]
    return _cut_out(rng, scene, about, (question, asks), steps)


def _cut_out(
    rng: random.Random,
    scene: Scene,
    about: PlacedObject,
    asked: tuple[str, Literal["color", "shape"]],
    steps: list[str],
) -> Lesson:
    question, asks = asked
    word = about.color if asks == "color" else about.shape
    text, letter = offer(rng, question, word, COLORS if asks == "color" else SHAPES)
    listed = " ".join(f"( {number} ) {step} ." for number, step in enumerate(steps, 1))
    closing = f"it is a {about.color} {about.shape} {concluding(word, letter)}"
    return Lesson(
        key=scene.spec,
        prompt=(_crowded(rng, scene, about), text),
        reply=(f"{listed} this part matters :", in_place((about,)), closing),
        answer=letter,
    )


def _crowded(rng: random.Random, scene: Scene, about: PlacedObject) -> Scene:
    """The scene, in half the cases with a third object of another shape and colour that leaves the answer clear."""
    if rng.random() < 0.5:
        return scene
    asked, other = about, next(placed for placed in scene.objects if placed is not about)
    shape = rng.choice([shape for shape in SHAPES if shape not in (asked.shape, other.shape)])
    color = rng.choice([color for color in COLORS if color not in (asked.color, other.color)])
    third = [
        PlacedObject(shape=shape, color=color, row=row, column=column) for row, column in free_corners(scene.objects)
    ]
    if scene.spec.relation:  # Nothing else may lie on that side.
        axis = int(scene.spec.relation in ("above", "below"))
        side = asked.centre[axis] - other.centre[axis]
        third = [placed for placed in third if (placed.centre[axis] - other.centre[axis]) * side <= 0]
    return scene_of((*scene.objects, rng.choice(third))) if third else scene


MM_REASONING_O: dict[str, Builder] = {
    "color": lambda rng: _look_closer(rng, "color"),
    "shape": lambda rng: _look_closer(rng, "shape"),
    "color_beside": lambda rng: _look_beside(rng, "color"),
    "shape_beside": lambda rng: _look_beside(rng, "shape"),
}


# (MM): what is shown, another picture that shares the asked property, the answer.


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


MM_REASONING_MM = by_category(_compare, CATEGORIES)


# (T): a text to picture to oneself, the picture, the answer read off it.


def _imagine(story: str, asked: tuple[str, str, str], drawing: Drawing, key: Spec) -> Lesson:
    question, word, letter = asked
    shown = phrase(key.items, key.relation)
    return Lesson(
        key=key,
        prompt=(f"{story} . {question}",),
        reply=("first draw it :", drawing, f"this is {shown} {concluding(word, letter)}"),
        answer=letter,
    )


def _asked(rng: random.Random, question: str, word: str, choices: tuple[str, ...]) -> tuple[str, str, str]:
    text, letter = offer(rng, question, word, choices)
    return text, word, letter


def _where(rng: random.Random, spec: Spec) -> tuple[str, str, str]:
    one, other = spec.items[:2]
    word = str(spec.relation).removesuffix(" of")
    return _asked(rng, f"where is the {one.shape} from the {other.shape} ?", word, DIRECTIONS)


def _imagine_count(rng: random.Random) -> Lesson:
    """One object comes or goes."""
    item = Item(shape=rng.choice(SHAPES), color=rng.choice(COLORS))
    after = rng.randint(2, 4)
    before = rng.choice([number for number in (after - 1, after + 1) if 2 <= number <= 4])
    spec = Spec(category="counting", items=(item,) * after)
    change = "add one more" if after > before else "remove one"
    story = f"there are {phrase((item,) * before, None)} . {change}"
    asked = _asked(rng, f"how many {PLURALS[item.shape]} ?", COUNT_WORDS[after], tuple(COUNT_WORDS.values()))
    return _imagine(story, asked, sketch(rng, spec), spec)


def _imagine_colors(rng: random.Random) -> Lesson:
    """Two objects swap their colours."""
    spec = make_spec(rng, "color_attr")
    one, other = spec.items
    before = (replace(one, color=other.color), replace(other, color=one.color))
    about = rng.choice(spec.items)
    asked = _asked(rng, f"what color is the {about.shape} ?", str(about.color), COLORS)
    return _imagine(f"there is {phrase(before, None)} . swap the colors", asked, sketch(rng, spec), spec)


def _imagine_places(rng: random.Random) -> Lesson:
    """Two objects swap their places."""
    spec = make_spec(rng, "position")
    assert spec.relation, "a position has a relation"
    story = f"there is {phrase(spec.items, OPPOSITE[spec.relation])} . swap the places"
    return _imagine(story, _where(rng, spec), sketch(rng, spec), spec)


_RING = ((0, 0), (0, 3), (3, 3), (3, 0))


def _imagine_ring(rng: random.Random) -> Lesson:
    """Four objects in the corners: three neighbourhoods are told, the fourth is asked."""
    shapes, turn, step = rng.sample(SHAPES, 4), rng.randrange(4), rng.choice((1, -1))
    places = [_RING[(turn + step * index) % 4] for index in range(4)]
    color = rng.choice(COLORS)
    objects = [
        PlacedObject(shape=shape, color=color, row=row, column=column)
        for shape, (row, column) in zip(shapes, places, strict=True)
    ]
    told = [_neighbours(objects[index + 1], objects[index]) for index in range(3)]
    asked = _neighbours(objects[3], objects[0])
    everything = tuple(_ring_spec(spec, shapes) for spec in (*told, asked))
    story = " . ".join(_told(rng, spec) for spec in told)
    drawing = Drawing(scene=Scene(spec=everything[-1], objects=(objects[3], *objects[:3])), wanted=everything)
    return _imagine(story, _where(rng, asked), drawing, asked)


def _neighbours(one: PlacedObject, other: PlacedObject) -> Spec:
    relation = relation_between(one.centre, other.centre)
    return Spec(category="position", items=(Item(shape=one.shape), Item(shape=other.shape)), relation=relation)


def _told(rng: random.Random, spec: Spec) -> str:
    """The spec as a sentence, from either side."""
    one, other, relation = *spec.items, spec.relation
    assert relation, "neighbours have a relation"
    if rng.random() < 0.5:
        one, other, relation = other, one, OPPOSITE[relation]
    return f"the {one.shape} is {relation} the {other.shape}"


def _ring_spec(spec: Spec, shapes: list[str]) -> Spec:
    """The relation of two together with the presence of the others."""
    named = {item.shape for item in spec.items}
    return replace(spec, items=(*spec.items, *(Item(shape=shape) for shape in shapes if shape not in named)))


MM_REASONING_T: dict[str, Builder] = {
    "count": _imagine_count,
    "colors": _imagine_colors,
    "places": _imagine_places,
    "ring": _imagine_ring,
}


def without_drawing(lesson: Lesson) -> Lesson:
    """The control of (T): the same question, answered at once."""
    (question,), conclusion = lesson.prompt, lesson.reply[-1]
    assert isinstance(conclusion, str), "a lesson of (T) ends in words"
    ending = conclusion[conclusion.rindex(":") :]
    return replace(lesson, prompt=(f"do not draw . {question}",), reply=(f"the answer is {ending}",))


# Understanding data: a rationale in words and the letter.


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


UNDERSTANDING = by_category(_describe_and_answer, CATEGORIES)
TEXT_REASONING = by_category(_solve_riddle, HELDOUT_CATEGORIES)
