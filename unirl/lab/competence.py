"""How well a lab model answers and draws on held-out scenes: sampled and greedy, with 95 % intervals."""

import math

import numpy as np
from numpy.typing import NDArray

from unirl.lab.exam import Exam
from unirl.lab.lab_model import LabModel, SamplingPlan
from unirl.lab.tokenizer import answered_letter
from unirl.lab.verifier import detect, verify
from unirl.lab.world import caption

SAMPLING_SEED = 99
GUIDANCE_SCALES = (1.0, 1.5)


def answer_accuracy(model: LabModel, exam: Exam, *, greedy: bool) -> float:
    """Share of questions answered with the right letter, the answer written out whole."""
    texts = model.answer(exam.images, exam.questions, SamplingPlan(seed=SAMPLING_SEED, greedy=greedy))
    return float(np.mean([answered_letter(t) == q.letter for t, q in zip(texts, exam.questions, strict=True)]))


def drawing_scores(model: LabModel, exam: Exam, *, greedy: bool, guidance: float) -> tuple[float, float]:
    """Mean (exact, partial) of one picture per held-out caption."""
    plan = SamplingPlan(seed=SAMPLING_SEED, greedy=greedy, guidance=guidance)
    images = model.draw([caption(scene.spec) for scene in exam.scenes], plan)
    verdicts = [verify(scene.spec, image) for scene, image in zip(exam.scenes, images, strict=True)]
    return float(np.mean([v.exact for v in verdicts])), float(np.mean([v.partial for v in verdicts]))


def measure_understanding(model: LabModel, exam: Exam) -> dict[str, float]:
    """Accuracy sampled at temperature 1 and greedy."""
    return {
        "understanding_sampled": answer_accuracy(model, exam, greedy=False),
        "understanding_greedy": answer_accuracy(model, exam, greedy=True),
    }


def measure_generation(model: LabModel, exam: Exam) -> dict[str, float]:
    """Exact and partial scores, sampled and greedy, without guidance and with guidance 1.5."""
    scores = {}
    for guidance in GUIDANCE_SCALES:
        for greedy in (False, True):
            exact, partial = drawing_scores(model, exam, greedy=greedy, guidance=guidance)
            name = f"{'greedy' if greedy else 'sampled'}_guidance_{guidance:g}"
            scores |= {f"exact_{name}": exact, f"partial_{name}": partial}
    return scores


def measure_reconstruction(model: LabModel, exam: Exam) -> dict[str, float]:
    """How many held-out pictures survive VQ encode and decode: judged exact, and with every object unchanged.

    `exact` bounds what generation can score.
    """
    images = model.reconstruct(exam.images)
    exact = [verify(scene.spec, image).exact for scene, image in zip(exam.scenes, images, strict=True)]
    same = [_kinds(image) == _kinds(original) for image, original in zip(images, exam.images, strict=True)]
    return {"reconstruction_exact": float(np.mean(exact)), "reconstruction_same_objects": float(np.mean(same))}


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share of `num` independent trials (Wilson score)."""
    z = 1.959964
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, centre - half), min(1.0, centre + half)


def _kinds(image: NDArray[np.uint8]) -> list[tuple[str, str]]:
    return sorted((found.shape or "", found.color) for found in detect(image).objects)
