"""UnifiedVisual-240K in miniature: seven subsets that end in pictures or answers, and data to compare them with.

A sample is a pure function of (seed, subset, index), so that it can be streamed, split and repeated. What the lessons
say stands in `subsets/`.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from unirl.lab import words
from unirl.lab.subsets import (
    image_correction,
    image_editing,
    image_generation,
    mm_internet,
    mm_reasoning_mm,
    mm_reasoning_o,
    mm_reasoning_t,
    understanding,
)
from unirl.lab.subsets.lesson import Builder, Lesson, draw_lesson, prompt_turns, reply_segments
from unirl.types import InterleavedSample, Turn

Subset = Literal[
    "image_generation",
    "image_editing",
    "image_correction",
    "mm_reasoning_o",
    "mm_reasoning_mm",
    "mm_reasoning_t",
    "mm_internet",
    "understanding",
    "text_reasoning",
    "normal",
    "mm_reasoning_t_direct",
]
SUBSETS: tuple[Subset, ...] = get_args(Subset)

GENERATION_SUBSETS = SUBSETS[:7]
"""The seven of the paper's table 3."""

WORDS = (
    *words.WORDS,
    *("(", ")", "1", "2", "3", "4", ".", ","),
    *("draw", "build", "give", "change", "remove", "keep", "swap", "make", "add", "find", "look", "read", "think"),
    *("picture", "shapes", "colors", "places", "number", "mistakes", "part", "answer", "odd", "match", "matters"),
    *("window", "wheel", "roof", "kiss", "corners", "arms"),
    *("blood", "tomato", "grass", "leaf", "sky", "sea", "sun", "banana"),
    *("this", "it", "its", "there", "are", "be", "do", "have", "has", "no", "not", "only", "both", "another"),
    *("so", "now", "then", "first", "again", "in", "to", "more", "less", "than", "opposite", "but", "must", "wrong"),
)
"""Every word of the samples."""

_BUILDERS: dict[Subset, Mapping[str, Builder]] = {
    "image_generation": image_generation.KINDS,
    "image_editing": image_editing.KINDS,
    "image_correction": image_correction.KINDS,
    "mm_reasoning_o": mm_reasoning_o.KINDS,
    "mm_reasoning_mm": mm_reasoning_mm.KINDS,
    "mm_reasoning_t": mm_reasoning_t.KINDS,
    "mm_internet": mm_internet.KINDS,
    "understanding": understanding.KINDS,
    "text_reasoning": understanding.TEXT_KINDS,
    "normal": image_generation.NORMAL,
    "mm_reasoning_t_direct": mm_reasoning_t.KINDS,
}


def kinds(subset: Subset, *, heldout: bool = False) -> tuple[str, ...]:
    """What a subset's samples are about; single objects are never held out."""
    return tuple(kind for kind in _BUILDERS[subset] if not (heldout and kind == "single_object"))


def make_lesson(subset: Subset, seed: int, index: int, *, heldout: bool = False) -> tuple[str, Lesson]:
    """The kind and the content of one sample; kinds take turns.

    `mm_reasoning_t_direct` asks what `mm_reasoning_t` asks under the same seed and index.

    Raises:
        ValueError: there is no such subset.
    """
    if subset not in _BUILDERS:
        raise ValueError(f"expected a subset of {', '.join(SUBSETS)}; got {subset!r}; correct it")
    choices = kinds(subset, heldout=heldout)
    kind = choices[index % len(choices)]
    part, theme = "heldout" if heldout else "training", subset.removesuffix("_direct")
    rng = random.Random(f"unified_visual/{part}/{theme}/{seed}/{index}")
    lesson = draw_lesson(rng, _BUILDERS[subset][kind], heldout=heldout)
    return kind, mm_reasoning_t.without_drawing(lesson) if subset == "mm_reasoning_t_direct" else lesson


def make_sample(subset: Subset, seed: int, index: int, *, heldout: bool = False) -> InterleavedSample:
    """One sample as the data pipeline reads it; the kind is the last part of its source."""
    kind, lesson = make_lesson(subset, seed, index, heldout=heldout)
    return InterleavedSample(
        id=f"{subset}-{'heldout-' * heldout}{seed}-{index:06d}",
        turns=(*prompt_turns(lesson), Turn(role="assistant", segments=reply_segments(lesson))),
        subset=subset,
        source=f"lab/{kind}",
    )


def training_samples(subset: Subset, count: int, seed: int) -> Iterator[InterleavedSample]:
    """The first `count` training samples of a subset; none shows or asks for a held-out caption."""
    return (make_sample(subset, seed, index) for index in range(count))


def heldout_samples(subset: Subset, count: int, seed: int) -> Iterator[InterleavedSample]:
    """The first `count` held-out samples of a subset, each about a held-out caption."""
    return (make_sample(subset, seed, index, heldout=True) for index in range(count))
