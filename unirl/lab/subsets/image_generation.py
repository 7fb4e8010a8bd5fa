"""Pictures from words: plain captions, and riddles with a rationale (UnifiedVisual section 3.1.1, appendix G.1)."""

import random

from unirl.lab.subsets.lesson import Lesson, as_asked, by_category
from unirl.lab.subsets.riddles import make_riddle
from unirl.lab.subsets.wording import plain_request, so_draw, wording
from unirl.lab.world import (
    CATEGORIES,
    Category,
    make_scene,
    make_spec,
)


def _plain(rng: random.Random, category: Category) -> Lesson:
    """A caption and its picture, without a rationale."""
    scene = make_scene(rng, make_spec(rng, category))
    return Lesson(key=scene.spec, prompt=(plain_request(scene.spec),), reply=(as_asked(scene),))


def _inferred(rng: random.Random, category: Category) -> Lesson:
    """A riddle, the facts that solve it, and the picture."""
    scene = make_scene(rng, make_spec(rng, category))
    spec, riddle = scene.spec, make_riddle(rng, scene.spec)
    rationale = f"{riddle.solution} {so_draw(wording(spec))}"
    return Lesson(key=spec, prompt=(f"draw {riddle.words} .",), reply=(rationale, as_asked(scene)))


NORMAL = by_category(_plain, CATEGORIES)
"""Captions without a rationale, as in Laion."""
KINDS = by_category(_inferred, CATEGORIES)
