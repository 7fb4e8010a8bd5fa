"""What a teacher must offer, and the pipeline that completes single-task samples to quadruples (I, C, Q, A) with it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unirl.data.records import Rejected
from unirl.types import GenerationSample, Task, UnderstandingSample

LOG_EVERY = 1000
"""Samples between two lines of progress."""

_log = logging.getLogger(__name__)


class Consistency(Protocol):
    """A teacher's judgement of a quadruple."""

    @property
    def ok(self) -> bool:
        """Picture, question, answer and prompt agree."""
        ...

    @property
    def reason(self) -> str:
        """Why they do not; empty when they do."""
        ...


class Teacher(Protocol):
    """Completes samples. Raises ValueError for a record it cannot or must not complete; any other error stops the job.

    Images are uint8 [height, width, 3].
    """

    def complete_generation(self, image: NDArray[np.uint8], question: str, answer: str) -> str:
        """A prompt for the image that holds what is needed to answer; `answer` is the choice itself, not its letter."""
        ...

    def complete_understanding(self, image: NDArray[np.uint8], prompt: str) -> tuple[str, tuple[str, ...], str]:
        """A question about what the prompt describes: (question, choices, letter of the right choice)."""
        ...

    def verify(
        self, image: NDArray[np.uint8], question: str, choices: tuple[str, ...], answer: str, prompt: str
    ) -> Consistency:
        """Whether the whole quadruple agrees; `answer` is the letter where there are choices."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadruple:
    """A sample with its completion: both sides show the same image."""

    origin: Task
    """The side that was given; the other was made by the teacher."""
    understanding: UnderstandingSample
    generation: GenerationSample

    @property
    def origin_id(self) -> str:
        """Id of the sample that was given."""
        return self.understanding.id if self.origin == "understanding" else self.generation.id


def complete(
    samples: Iterable[UnderstandingSample | GenerationSample], teacher: Teacher
) -> tuple[list[Quadruple], list[Rejected]]:
    """Complete each sample and keep what the teacher finds consistent (generate, then verify; PairUni 2.1.1).

    Departure from the paper: a completion that contradicts the image is dropped, not asked for again; a teacher with
    chance in it may try again inside its own methods.

    Returns:
        Quadruples in the order of the samples, and the samples that were refused, with reasons.
    """
    quadruples: list[Quadruple] = []
    refused: list[Rejected] = []
    for row, sample in enumerate(samples):
        if row and row % LOG_EVERY == 0:
            _log.info("teacher: %d samples seen, %d completed, %d refused", row, len(quadruples), len(refused))
        try:
            quadruple = _complete_one(sample, teacher)
        except ValueError as refusal:
            refused.append(_refused(sample, row, str(refusal)))
            continue
        both = quadruple.understanding
        prompt = quadruple.generation.prompt
        verdict = teacher.verify(both.image, both.question, both.choices, both.answer, prompt)
        if verdict.ok:
            quadruples.append(quadruple)
        else:
            refused.append(_refused(sample, row, f"inconsistent completion: {verdict.reason}"))
    return quadruples, refused


def _complete_one(sample: UnderstandingSample | GenerationSample, teacher: Teacher) -> Quadruple:
    if isinstance(sample, UnderstandingSample):
        prompt = teacher.complete_generation(sample.image, sample.question, _answer_in_words(sample))
        drawn = GenerationSample(
            id=f"{sample.id}/prompt",
            prompt=prompt,
            image=sample.image,
            class_name=sample.category,
            source=sample.source,
        )
        return Quadruple(origin="understanding", understanding=sample, generation=drawn)
    if sample.image is None:
        raise ValueError(
            f"generation sample {sample.id}: expected an image to ask about; got none; give one or skip it"
        )
    question, choices, answer = teacher.complete_understanding(sample.image, sample.prompt)
    asked = UnderstandingSample(
        id=f"{sample.id}/question",
        image=sample.image,
        question=question,
        choices=choices,
        answer=answer,
        category=sample.class_name,
        source=sample.source,
    )
    return Quadruple(origin="generation", understanding=asked, generation=sample)


def _answer_in_words(sample: UnderstandingSample) -> str:
    return sample.choices[ord(sample.answer) - ord("A")] if sample.answer_type == "choice" else sample.answer


def _refused(sample: UnderstandingSample | GenerationSample, row: int, reason: str) -> Rejected:
    return Rejected(source=sample.source, row=row, id=sample.id, stage="teacher", reason=reason)
