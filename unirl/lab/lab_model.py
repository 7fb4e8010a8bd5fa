"""What the lab asks of a base model, whatever its family: to draw captions and to answer questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unirl.lab.world import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How to draw tokens."""

    seed: int
    greedy: bool = False
    guidance: float = 1.0
    """Scale s of images: logits = null + s * (conditional - null); 1 runs no null stream."""


class LabModel(Protocol):
    """A base model to be examined."""

    def draw(self, captions: Sequence[str], plan: SamplingPlan) -> NDArray[np.uint8]:
        """Pictures [N, 20, 20, 3], one per caption."""
        ...

    def answer(self, images: NDArray[np.uint8], questions: Sequence[Question], plan: SamplingPlan) -> list[str]:
        """Answer texts about the pictures [N, 20, 20, 3]."""
        ...

    def reconstruct(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pictures [N, 20, 20, 3] after the image tokenizer took them apart and put them together."""
        ...
