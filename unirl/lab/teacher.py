"""The scripted teacher: completes a question into a caption and a caption into a question, from pixels.

It plays the part of the large models of PairUni section 2.1: (I, Q, A) -> C, (I, C) -> (Q, A), and the check that
all four agree. It sees the picture through the verifier's detector, so it works on drawn and on generated pictures.
"""

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from unirl.lab.verifier import FREE_JUNK_PX, FoundObject, detect, parse_caption, verify
from unirl.lab.world import (
    CELL_PX,
    COLORS,
    COUNT_WORDS,
    GLYPH_PX,
    LETTERS,
    OPPOSITE,
    PLURALS,
    SHAPES,
    Category,
    Item,
    PlacedObject,
    Relation,
    Scene,
    Spec,
    caption,
    is_heldout,
    make_question,
    relation_between,
)

QuestionKind = Literal["shown", "color", "shape of color", "count", "partner", "relation"]
RefusalKind = Literal["unreadable picture", "unknown question", "wrong answer", "wrong caption", "held-out caption"]


class TeacherRefusalError(ValueError):
    """The teacher cannot or must not complete this record; `kind` groups refusals for counting."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind: RefusalKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """Whether picture, question, answer and caption agree, and why not."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A question taken apart: its kind and the shape or colour words in it."""

    kind: QuestionKind
    words: tuple[str, ...] = ()


class Teacher:
    """Completes records, each the same way whatever was asked before, and counts what it refuses."""

    def __init__(self, *, seed: int = 0, allow_heldout: bool = False) -> None:
        """Make a teacher.

        Args:
            seed: chooses among equally good completions.
            allow_heldout: complete into and from captions reserved for evaluation too; never for training data.
        """
        self._seed = seed
        self._allow_heldout = allow_heldout
        self.num_refused: Counter[RefusalKind] = Counter(dict.fromkeys(get_args(RefusalKind), 0))
        self.num_heldout_avoided = 0
        """Times that the first choice was a held-out caption and another true one was taken."""

    def complete_generation(self, image: NDArray[np.uint8], question: str, answer: str) -> str:
        """A caption of the image uint8 [20, 20, 3] from which the question can be answered.

        Args:
            image: the lab picture that the question is about.
            question: without choices, e.g. "what color is the square ?".
            answer: the right choice itself, e.g. "red", not its letter.

        Raises:
            TeacherRefusalError: the picture shows something else than lab objects, the question is not of the lab, the
                answer is not what the picture shows, or every fitting caption is held out.
        """
        asked = self._ask(question)
        items, relation = self._look(image)
        truth = _answer(asked, items, relation)
        if truth != answer:
            self._refuse("wrong answer", f"expected {truth!r} for {question!r}; got {answer!r}; drop the record")
        fitting = [spec for spec in _true_specs(items, relation) if _answer(asked, spec.items, spec.relation) == truth]
        self._random(image, question).shuffle(fitting)
        fitting.sort(key=lambda spec: spec.category not in _own_categories(asked))
        allowed = [spec for spec in fitting if self._allow_heldout or not is_heldout(spec)]
        if not allowed:
            self._refuse("held-out caption", f"expected a training caption; all for {question!r} are held out; skip it")
        self.num_heldout_avoided += allowed[0] is not fitting[0]
        return caption(allowed[0])

    def complete_understanding(self, image: NDArray[np.uint8], prompt: str) -> tuple[str, tuple[str, ...], str]:
        """A question about the image uint8 [20, 20, 3] that fits its caption: (question, choices, right letter).

        Raises:
            TeacherRefusalError: the prompt is not a caption of the lab, is held out, or the picture does not show it.
        """
        spec = self._parse(prompt)
        if is_heldout(spec) and not self._allow_heldout:
            self._refuse("held-out caption", f"expected a training caption; got {prompt!r}; skip it")
        if not verify(spec, image).exact:
            self._refuse("wrong caption", f"expected a picture of {prompt!r}; got another; drop the record")
        question = make_question(self._random(image, prompt), _scene(spec, detect(image).objects))
        return question.text, question.choices, question.letter

    def verify(
        self, image: NDArray[np.uint8], question: str, choices: tuple[str, ...], answer: str, prompt: str
    ) -> Consistency:
        """Whether the picture shows the prompt, the letter is right, and the prompt alone gives the answer."""
        if answer not in LETTERS[: len(choices)]:
            return Consistency(ok=False, reason=f"expected a letter of {len(choices)} choices; got answer {answer!r}")
        word = choices[LETTERS.index(answer)]
        try:
            asked, spec = self._ask(question), self._parse(prompt)
            truth = _answer(asked, *self._look(image))
        except TeacherRefusalError as refusal:
            return Consistency(ok=False, reason=str(refusal))
        if truth != word:
            return Consistency(ok=False, reason=f"wrong answer: the picture says {truth!r}, the record {word!r}")
        if not verify(spec, image).exact:
            return Consistency(ok=False, reason=f"wrong caption: the picture does not show {prompt!r}")
        if _answer(asked, spec.items, spec.relation) != word:
            return Consistency(ok=False, reason=f"poor caption: {prompt!r} does not answer {question!r}")
        return Consistency(ok=True)

    def _ask(self, question: str) -> _Asked:
        for kind, pattern in _QUESTIONS.items():
            if match := pattern.fullmatch(question):
                return _Asked(kind=kind, words=match.groups())
        return self._refuse("unknown question", f"expected a question of the lab; got {question!r}; see lab/world.py")

    def _parse(self, prompt: str) -> Spec:
        try:
            return parse_caption(prompt)
        except ValueError as error:
            return self._refuse("wrong caption", str(error))

    def _look(self, image: NDArray[np.uint8]) -> tuple[tuple[Item, ...], Relation | None]:
        """What the picture shows, objects in reading order."""
        detection = detect(image)
        objects = sorted(detection.objects, key=lambda found: found.centre[::-1])
        items = tuple(Item(shape=found.shape, color=found.color) for found in objects if found.shape)
        if not 1 <= len(items) == len(objects) <= max(COUNT_WORDS) or detection.junk_px > FREE_JUNK_PX:
            self._refuse("unreadable picture", f"expected one to four lab objects; got {detection}; drop the record")
        two_kinds = len(items) == 2 and items[0].shape != items[1].shape
        return items, relation_between(objects[0].centre, objects[1].centre) if two_kinds else None

    def _refuse(self, kind: RefusalKind, message: str) -> NoReturn:
        self.num_refused[kind] += 1
        raise TeacherRefusalError(kind, message)

    def _random(self, image: NDArray[np.uint8], text: str) -> random.Random:
        """Randomness keyed by the record, so that order and worker change nothing."""
        digest = hashlib.sha256(image.tobytes() + text.encode())
        return random.Random(f"{self._seed}/{digest.hexdigest()}")


_SHAPE, _COLOR, _PLURAL = (f"({'|'.join(words)})" for words in (SHAPES, COLORS, PLURALS.values()))
_QUESTIONS: dict[QuestionKind, re.Pattern[str]] = {
    "shown": re.compile(r"what shape is shown \?"),
    "color": re.compile(rf"what color is the {_SHAPE} \?"),
    "shape of color": re.compile(rf"what shape is {_COLOR} \?"),
    "count": re.compile(rf"how many {_PLURAL} \?"),
    "partner": re.compile(rf"what shape is with the {_SHAPE} \?"),
    "relation": re.compile(rf"where is the {_SHAPE} from the {_SHAPE} \?"),
}


def _own_categories(asked: _Asked) -> tuple[Category, ...]:
    """Categories of captions that say little beyond the answer."""
    match asked.kind:
        case "shown":
            return ("single_object",)
        case "color" | "shape of color":
            return ("colors", "color_attr")
        case "count":
            return ("counting",)
        case "partner":
            return ("two_object",)
        case "relation":
            return ("position",)


def _answer(asked: _Asked, items: tuple[Item, ...], relation: Relation | None) -> str | None:
    """The answer that the items and their relation give; None where they leave it open."""
    words = asked.words
    match asked.kind:
        case "shown":
            return items[0].shape if len(items) == 1 else None
        case "color":
            return _only([item.color for item in items if item.shape == words[0]])
        case "shape of color":
            return _only([item.shape for item in items if item.color in (words[0], None)])
        case "count":
            return COUNT_WORDS[len(items)] if all(PLURALS[item.shape] == words[0] for item in items) else None
        case "partner":
            others = [item.shape for item in items if item.shape != words[0]]
            return others[0] if len(items) == 2 and len(others) == 1 else None
    shapes = tuple(item.shape for item in items)
    if relation is None or set(shapes) != set(words):
        return None
    return (relation if shapes == words else OPPOSITE[relation]).removesuffix(" of")


def _only(values: list[str | None]) -> str | None:
    return values[0] if len(values) == 1 else None


def _true_specs(items: tuple[Item, ...], relation: Relation | None) -> list[Spec]:
    """Every caption of the world that a picture of these items meets exactly."""
    first = items[0]
    if len(items) == 1:
        return [Spec(category="single_object", items=(Item(shape=first.shape),)), Spec(category="colors", items=items)]
    if len({item.shape for item in items}) == 1:
        colors = {item.color for item in items} if len({item.color for item in items}) == 1 else set()
        mentions = [None, *colors]
        return [Spec(category="counting", items=(Item(shape=first.shape, color=c),) * len(items)) for c in mentions]
    if len(items) != 2:
        return []
    orders = [(items, relation), (items[::-1], relation and OPPOSITE[relation])]
    return [spec for (one, other), link in orders for spec in _pair_specs(one, other, link)]


def _pair_specs(one: Item, other: Item, relation: Relation | None) -> list[Spec]:
    bare_one, bare_other = Item(shape=one.shape), Item(shape=other.shape)
    specs = [Spec(category="two_object", items=(bare_one, item)) for item in (bare_other, other)]
    if relation is not None:
        specs += [Spec(category="position", items=(item, bare_other), relation=relation) for item in (bare_one, one)]
    if one.color != other.color:
        specs.append(Spec(category="color_attr", items=(one, other)))
    return specs


def _scene(spec: Spec, objects: tuple[FoundObject, ...]) -> Scene:
    """The found objects in the order of the spec's items; the picture is known to meet the spec."""
    left = list(objects)
    placed = []
    for item in spec.items:
        found = next(o for o in left if o.shape == item.shape and item.color in (None, o.color))
        left.remove(found)
        column, row = (round((c - (GLYPH_PX - 1) / 2) / CELL_PX) for c in found.centre)
        placed.append(PlacedObject(shape=item.shape, color=found.color, row=row, column=column))
    return Scene(spec=spec, objects=tuple(placed))
