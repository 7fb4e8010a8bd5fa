"""What pre-training asks of a family: see `unirl.lab.pretrain`, and `<family>_student.py` for each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unirl.lab.lab_model import LabModel
from unirl.lab.noise import Answer, NoiseRates
from unirl.lab.vq_training import PatchDictionary
from unirl.lab.world import Question, Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of steps with a linearly falling learning rate."""

    name: str
    num_steps: int
    first_rate: float
    last_rate: float
    restart: bool
    """Start with fresh optimizer moments and a warm-up of 30 steps."""
    noisy: bool = False
    """Train on wrong captions and answers at the recipe's rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything the weights depend on. The defaults are those of the lab's Janus."""

    seed: int = 0
    num_scenes: int = 14_000
    """Training scenes, drawn once; none has a held-out caption."""
    vq_steps: int = 600
    generation_batch: int = 48
    understanding_batch: int = 40
    caption_dropout: float = 0.1
    """Share of prompts replaced by the null prompt, which guidance needs."""
    letter_weight: float = 3.0
    """Loss weight of an answer's letter: the letter is the last thing that is learned."""
    noise: NoiseRates = field(default_factory=NoiseRates)
    phases: tuple[Phase, ...] = (
        Phase(name="clean", num_steps=1030, first_rate=3e-3, last_rate=0.81e-3, restart=True),
        Phase(name="clean restart", num_steps=270, first_rate=2.2e-3, last_rate=0.89e-3, restart=True),
        Phase(name="noise", num_steps=160, first_rate=0.89e-3, last_rate=0.11e-3, restart=False, noisy=True),
    )
    exam_size: int = 480
    """Held-out scenes of each measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The training scenes with one question each, their pixels [N, 20, 20, 3] and their codes [N, 25]."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    images: NDArray[np.uint8]
    codes: Tensor


class Student(Protocol):
    """A tiny model of one family that learns to draw and to answer."""

    @property
    def module(self) -> nn.Module:
        """The network; parameters without gradient are left alone."""
        ...

    def image_tokenizer(self) -> tuple[nn.Module, nn.Module]:
        """What encodes pictures and what decodes them, trained apart."""
        ...

    def start_image_tokenizer(self, dictionary: PatchDictionary, seed: int) -> None:
        """Give every patch of the world its code."""
        ...

    def train_image_tokenizer(self, side: int, corpus: Corpus, num_steps: int, seed: int) -> float:
        """Train the encoder (side 0) or the decoder (side 1); returns the last loss."""
        ...

    def drawing_loss(
        self, captions: Sequence[str], dropped: Sequence[bool], codes: Tensor, rng: random.Random
    ) -> Tensor:
        """Nats per image code; a dropped caption is replaced by the empty prompt."""
        ...

    def answering_loss(
        self,
        corpus: Corpus,
        rows: Sequence[int],
        answers: Sequence[Answer],
        letter_weight: float,
        rng: random.Random,
    ) -> tuple[Tensor, float]:
        """Nats per token of the answers to these rows of the corpus, letters weighted; nats of a letter alone."""
        ...

    def as_model(self) -> LabModel:
        """The weights as they are now, to be examined."""
        ...

    def write(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the checkpoint folder: float16 weights, configs, tokenizer, and the facts in lab.json."""
        ...
