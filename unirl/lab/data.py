"""Lab scenes as the records that every job reads."""

import random

from unirl.lab.exam import HELDOUT_SEED, make_exam
from unirl.lab.world import Question, Scene, caption, make_question, render, sample_scene
from unirl.types import GenerationSample, UnderstandingSample

SOURCE = "lab"


def make_understanding(n: int, seed: int) -> list[UnderstandingSample]:
    """`n` questions about training scenes, all six categories in equal shares."""
    rng = random.Random(f"understanding/{seed}")
    scenes = [sample_scene(rng) for _ in range(n)]
    return [_understanding(f"lab-und-{seed}-{i:05d}", s, make_question(rng, s)) for i, s in enumerate(scenes)]


def make_generation(n: int, seed: int) -> list[GenerationSample]:
    """`n` prompts of training scenes with their pictures, all six categories in equal shares."""
    rng = random.Random(f"generation/{seed}")
    return [_generation(f"lab-gen-{seed}-{i:05d}", sample_scene(rng)) for i in range(n)]


def make_heldout(n: int = 480, seed: int = HELDOUT_SEED) -> tuple[list[UnderstandingSample], list[GenerationSample]]:
    """`n` questions and `n` prompts about the same held-out scenes, the five categories taking turns."""
    exam = make_exam(n, seed)
    pairs = list(zip(exam.scenes, exam.questions, strict=True))
    understanding = [_understanding(f"lab-heldout-und-{seed}-{i:04d}", s, q) for i, (s, q) in enumerate(pairs)]
    generation = [_generation(f"lab-heldout-gen-{seed}-{i:04d}", s) for i, (s, _) in enumerate(pairs)]
    return understanding, generation


def _understanding(sample_id: str, scene: Scene, question: Question) -> UnderstandingSample:
    return UnderstandingSample(
        id=sample_id,
        image=render(scene),
        question=question.text,
        choices=question.choices,
        answer=question.letter,
        category=scene.spec.category,
        source=SOURCE,
    )


def _generation(sample_id: str, scene: Scene) -> GenerationSample:
    return GenerationSample(
        id=sample_id,
        prompt=caption(scene.spec),
        image=render(scene),
        class_name=scene.spec.category,
        source=SOURCE,
    )
