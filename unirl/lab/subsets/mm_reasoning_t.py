"""A question in words, answered by way of a drawing, and its control (UnifiedVisual section 3.1.2, appendix G.5)."""

import random
from dataclasses import replace

from unirl.lab.subsets.arrangements import colors_exchanged, sketch
from unirl.lab.subsets.lesson import Builder, Drawing, Lesson, as_asked
from unirl.lab.subsets.wording import concluding, offer, wording
from unirl.lab.world import (
    COLORS,
    COUNT_WORDS,
    DIRECTIONS,
    OPPOSITE,
    PLURALS,
    SHAPES,
    Item,
    PlacedObject,
    Scene,
    Spec,
    make_spec,
    phrase,
    relation_between,
)


def _imagine(story: str, asked: tuple[str, str, str], drawing: Drawing, key: Spec) -> Lesson:
    question, word, letter = asked
    return Lesson(
        key=key,
        prompt=(f"{story} . {question}",),
        reply=("first draw it :", drawing, f"this is {wording(key)} {concluding(word, letter)}"),
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
    return _imagine(story, asked, as_asked(sketch(rng, spec)), spec)


def _imagine_colors(rng: random.Random) -> Lesson:
    """Two objects swap their colours."""
    spec = make_spec(rng, "color_attr")
    before = colors_exchanged(*spec.items)
    about = rng.choice(spec.items)
    asked = _asked(rng, f"what color is the {about.shape} ?", str(about.color), COLORS)
    return _imagine(f"there is {phrase(before, None)} . swap the colors", asked, as_asked(sketch(rng, spec)), spec)


def _imagine_places(rng: random.Random) -> Lesson:
    """Two objects swap their places."""
    spec = make_spec(rng, "position")
    assert spec.relation, "a position has a relation"
    story = f"there is {phrase(spec.items, OPPOSITE[spec.relation])} . swap the places"
    return _imagine(story, _where(rng, spec), as_asked(sketch(rng, spec)), spec)


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


KINDS: dict[str, Builder] = {
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
