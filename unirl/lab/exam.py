"""Held-out scenes with their questions: what the lab's models are measured on. Imports neither torch nor models."""

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from unirl.lab.world import HELDOUT_CATEGORIES, Question, Scene, make_question, render, sample_scene

HELDOUT_SEED = 777


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Held-out scenes, balanced over the five categories, and one question about each."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """[N, 20, 20, 3]."""
        return np.stack([render(scene) for scene in self.scenes])


def make_exam(num_scenes: int, seed: int = HELDOUT_SEED) -> Exam:
    """An exam whose categories take turns; equal arguments give equal exams."""
    rng = random.Random(seed)
    turns = len(HELDOUT_CATEGORIES)
    scenes = tuple(sample_scene(rng, HELDOUT_CATEGORIES[i % turns], heldout=True) for i in range(num_scenes))
    return Exam(scenes=scenes, questions=tuple(make_question(rng, scene) for scene in scenes))
