"""Supervised learning of masked-diffusion families: hide cells of a finished canvas, predict what they held.

The rule is that of Lumina-DiMOO's training: the share of hidden cells is cos(pi r / 2) with r uniform in [0, 1), an
answer and the padding behind it are hidden separately, and the loss is the plain mean over hidden cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from unirl.models.canvases import CellLaw, cell_logits, cells_of, written
from unirl.models.llada import LladaForDiffusion
from unirl.models.lumina_prompts import LuminaPrompts

SHORT = 5
"""An answer of at most this many tokens is hidden whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A canvas and what its cells should hold."""

    canvas: NDArray[np.int32]
    """[T] a mask in every cell."""
    values: NDArray[np.int32]
    """[N] counted from the law's `start`."""
    num_padding: int = 0
    """Cells at the end that only fill an answer's canvas; they are hidden by a share of their own."""


def answer_lesson(prompts: LuminaPrompts, canvas: NDArray[np.int32], text: str) -> Lesson:
    """The answer's ids, the end token, and padding in the cells that are left.

    Raises:
        ValueError: the answer with its end does not fit into the cells.
    """
    num_cells = len(cells_of(canvas, prompts.ids.mask))
    ids = [*prompts.tokenizer(text, add_special_tokens=False).input_ids, prompts.ids.end_answer]
    if len(ids) > num_cells:
        raise ValueError(
            f"answer: expected at most {num_cells - 1} tokens and the end in {num_cells} cells; got {len(ids) - 1} for "
            f"{text[:80]!r}; give the canvas more cells (max_tokens), or shorten the answer"
        )
    num_padding = num_cells - len(ids)
    values = np.asarray([*ids, *[prompts.ids.answer_pad] * num_padding], np.int32)
    return Lesson(canvas=canvas, values=values, num_padding=num_padding)


def without_prompt(prompts: LuminaPrompts, lesson: Lesson) -> Lesson:
    """The same picture after an empty instruction, which guidance needs to have been learned (one in ten)."""
    return replace(lesson, canvas=prompts.unconditional(lesson.canvas))


def hide_cells(lesson: Lesson, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which cells [N] the model has to predict: at least one of an answer or picture and one of the padding."""
    num_written = len(lesson.values) - lesson.num_padding
    whole = num_written <= SHORT
    return np.concatenate(
        [_hidden(num_written, rng, whole=whole), _hidden(lesson.num_padding, rng, whole=False)], dtype=bool
    )


def masked_cross_entropy(
    model: LladaForDiffusion, lessons: Sequence[Lesson], hidden: Sequence[NDArray[np.bool_]], law: CellLaw
) -> Tensor:
    """Nats float32 [sum of n] of the hidden cells, lesson after lesson, in one pass; their mean is the loss.

    Args:
        model: the network.
        lessons: of one modality.
        hidden: bool [N] each, from `hide_cells`.
        law: says among which ids a cell is predicted; from id 0 to V it is the official loss.
    """
    canvases = [written(own.canvas, own.values, ~cells, law) for own, cells in zip(lessons, hidden, strict=True)]
    places = [cells_of(own.canvas, law.mask_id)[cells] for own, cells in zip(lessons, hidden, strict=True)]
    logits = cell_logits(model, canvases, places, law)
    values = np.concatenate([own.values[cells] for own, cells in zip(lessons, hidden, strict=True)])
    return cross_entropy(logits, torch.from_numpy(values).long().to(logits.device), reduction="none")


def _hidden(num: int, rng: np.random.Generator, *, whole: bool) -> NDArray[np.bool_]:
    count = num if whole else min(num, max(1, int(num * math.cos(math.pi / 2 * rng.random()))))
    cells = np.zeros(num, bool)
    cells[rng.permutation(num)[:count]] = True
    return cells
