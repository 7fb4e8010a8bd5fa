"""Masked-diffusion scoring: canvases before each step, logits of their cells, log-probabilities of what was revealed.

A canvas is all that the model sees, with masks where it writes; its cells are the places of those masks, in order.
What a step reveals is scored on the canvas as it stood before the step: the product over steps is the exact likelihood
of a sampler that draws the cells of a step independently, given which cells each step reveals.
Shapes: B rows, N cells of a row, T positions, V ids that a cell may take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.algorithms.logprobs import token_entropies, token_logprobs
from unirl.models.llada import LladaForDiffusion
from unirl.models.policy import TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class CellLaw:
    """The distribution that a cell is drawn from; the same for sampler and learner."""

    mask_id: int
    start: int
    """Id of the first of the V ids that a cell may take."""
    stop: int
    """Id after the last."""
    allowed: Tensor | None = None
    """bool [V] ids that may be drawn; None means all V."""
    temperature: float = 1.0
    guidance_scale: float = 1.0
    """s of `guided_logits`; 1 needs no null canvas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasRow:
    """One completion: the canvas it was written on, what was written, and when."""

    canvas: NDArray[np.int32]
    """[T] with a mask in every cell."""
    null: NDArray[np.int32] | None = None
    """[T'] the null canvas, with the same cells; needed for guidance."""
    values: NDArray[np.int32]
    """[N] what the cells hold in the end, counted from the law's `start`."""
    steps: NDArray[np.int16]
    """[N] step that revealed each cell."""
    counts: NDArray[np.bool_] | None = None
    """[N] cells to score; None scores all."""

    @property
    def scored_steps(self) -> NDArray[np.int16]:
        """Steps that revealed a cell to score, in order, each of which takes a pass."""
        return np.unique(self.steps if self.counts is None else self.steps[self.counts])


def cells_of(canvas: NDArray[np.int32], mask_id: int) -> NDArray[np.int64]:
    """Places [N] of a canvas's masks."""
    return np.flatnonzero(canvas == mask_id)


def written(
    canvas: NDArray[np.int32], values: NDArray[np.int32], which: NDArray[np.bool_], law: CellLaw
) -> NDArray[np.int32]:
    """A copy of the canvas [T] with the values of the cells `which` [N] written in."""
    copy = canvas.copy()
    copy[cells_of(canvas, law.mask_id)[which]] = values[which] + law.start
    return copy


def cell_logits(
    model: LladaForDiffusion,
    canvases: Sequence[NDArray[np.int32]],
    places: Sequence[NDArray[np.int64]],
    law: CellLaw,
) -> Tensor:
    """Logits float32 [sum of n, V] of chosen places of each canvas, row after row, in one pass.

    The head sees these places alone, so its memory is that of what a step reveals.

    Args:
        model: the network.
        canvases: int32 [T] each, of any lengths.
        places: int64 [n] each.
        law: says which ids.
    """
    ids, exists = padded(canvases, law.mask_id, model.device)
    return model.logits(picked(model.hidden_states(ids, exists), places), law.start, law.stop)


def padded(canvases: Sequence[NDArray[np.int32]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Canvases of any lengths as int64 [B, T], padded on the right, and bool [B, T] true where they are not."""
    ids = torch.full((len(canvases), max(map(len, canvases))), fill, dtype=torch.long)
    exists = torch.zeros(ids.shape, dtype=torch.bool)
    for row, canvas in enumerate(canvases):
        ids[row, : len(canvas)] = torch.from_numpy(canvas)
        exists[row, : len(canvas)] = True
    return ids.to(device), exists.to(device)


def picked(table: Tensor, places: Sequence[NDArray[np.int64]]) -> Tensor:
    """Entries [sum of n, ...] of a table [B, T, ...] at the places [n] of each row, row after row."""
    rows = torch.repeat_interleave(torch.arange(len(places)), torch.tensor([len(part) for part in places]))
    return table[rows.to(table.device), torch.from_numpy(np.concatenate(places)).to(table.device)]


def score_canvases(model: LladaForDiffusion, rows: Sequence[CanvasRow], law: CellLaw) -> Iterator[TokenScores]:
    """Log-probability of every cell that counts, one pass per step that revealed any; each may be backpropagated alone.

    The k-th pass takes the k-th such step of every row that has one, so memory is that of one canvas per row (two
    under guidance). `metrics` holds "guidance_gap": the sum of |guided - conditional| over the pass's cells.
    """
    steps = [row.scored_steps for row in rows]
    longest = max(len(row.values) for row in rows)
    for index in range(max(map(len, steps))):
        part = [
            (place, row, (row.steps == own[index]) & (True if row.counts is None else row.counts))
            for place, (row, own) in enumerate(zip(rows, steps, strict=True))
            if index < len(own)
        ]
        earlier = [row.steps < steps[place][index] for place, row, _ in part]
        cond = _logits_before(model, [row.canvas for _, row, _ in part], part, earlier, law)
        nulls = [row.null for _, row, _ in part if row.null is not None]
        guided = law.guidance_scale != 1.0
        if guided and len(nulls) != len(part):
            raise ValueError("score: expected a null canvas for every row under guidance; got rows without one")
        uncond = _logits_before(model, nulls, part, earlier, law) if guided else None
        tokens = torch.from_numpy(np.concatenate([row.values[now] for _, row, now in part])).long().to(cond.device)
        allowed = None if law.allowed is None else law.allowed.to(cond.device)
        streams = {} if uncond is None else {"uncond_logits": uncond[None], "guidance_scale": law.guidance_scale}
        logprobs = token_logprobs(cond[None], tokens[None], law.temperature, allowed, **streams)[0]
        entropy = token_entropies(cond[None], law.temperature, allowed, **streams)[0]
        metrics: dict[str, Tensor] = {}
        if guided:
            with torch.no_grad():
                alone = token_logprobs(cond.detach()[None], tokens[None], law.temperature, allowed)[0]
                metrics["guidance_gap"] = (logprobs.detach() - alone).abs().sum()
        scored = torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, _, now in part:
            scored[place, np.flatnonzero(now)] = True
        scored = scored.to(cond.device)
        spread = torch.zeros(scored.shape, device=cond.device)
        yield TokenScores(
            logprobs=spread.masked_scatter(scored, logprobs.float()),
            scored=scored,
            entropy=spread.masked_scatter(scored, entropy.float()),
            metrics=metrics,
        )


def _logits_before(
    model: LladaForDiffusion,
    canvases: Sequence[NDArray[np.int32]],
    part: Sequence[tuple[int, CanvasRow, NDArray[np.bool_]]],
    earlier: Sequence[NDArray[np.bool_]],
    law: CellLaw,
) -> Tensor:
    """Logits of the cells that a step reveals, on the canvases as they stood before it."""
    seen = [
        written(canvas, row.values, done, law)
        for canvas, (_, row, _), done in zip(canvases, part, earlier, strict=True)
    ]
    places = [cells_of(canvas, law.mask_id)[now] for canvas, (_, _, now) in zip(canvases, part, strict=True)]
    return cell_logits(model, seen, places, law)
