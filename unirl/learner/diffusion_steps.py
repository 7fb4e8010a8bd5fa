"""Which reveal steps of masked-diffusion completions an update learns from. Rows without such steps pass unchanged."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unirl.types import LearnerRow


def merge_steps(row: LearnerRow, size: int) -> LearnerRow:
    """The row with each `size` consecutive reveal steps as one, numbered anew from 0 (TraceRL's shrink).

    What later ones of them revealed is then scored without what the earlier ones showed: cheaper by `size`, biased.
    """
    if row.unmask_step is None or size == 1:
        return row
    order = np.unique(row.unmask_step, return_inverse=True)[1]
    return replace(row, unmask_step=(order // size).astype(np.int16))


def draw_steps(
    rows: Sequence[LearnerRow], num_steps: int | None, seed: tuple[int, ...]
) -> tuple[list[LearnerRow], list[float]]:
    """Rows whose loss masks keep `num_steps` of their reveal steps, and the factor K / num_steps of each row's loss.

    K counts the steps that revealed a token of the loss. Every subset of them is equally likely, so the loss keeps its
    expectation, and so does its gradient.

    Args:
        rows: whole rows.
        num_steps: steps kept of each row, or fewer where it has fewer; None keeps all.
        seed: with the row's tokens it decides which, so that order and company change nothing.
    """
    kept, factors = list(rows), [1.0] * len(rows)
    for index, row in enumerate(rows):
        if row.unmask_step is None or num_steps is None:
            continue
        steps = np.unique(row.unmask_step[row.loss_mask])
        if len(steps) > num_steps:
            chosen = np.random.default_rng((*seed, _content(row))).choice(steps, num_steps, replace=False)
            kept[index] = replace(row, loss_mask=row.loss_mask & np.isin(row.unmask_step, chosen))
            factors[index] = len(steps) / num_steps
    return kept, factors


def _content(row: LearnerRow) -> int:
    """A number that depends on prompt, tokens and reveal steps alone."""
    steps = b"" if row.unmask_step is None else row.unmask_step.tobytes()
    parts = row.prompt_ids.tobytes() + row.completion_ids.tobytes() + steps
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big")
