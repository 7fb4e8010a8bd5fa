"""Drawing canvases of a masked-diffusion model: images by confidence and cosine schedule, answers block by block.

A cell's noise depends on the sequence's seed, the step and the cell, so company and order in a batch change nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.algorithms.guidance import guided_logits
from unirl.algorithms.unmasking import cosine_reveals, draw_values, linear_reveals, most_confident
from unirl.models.canvases import CanvasRow, CellLaw, cell_logits, cells_of, written
from unirl.models.llada import LladaForDiffusion
from unirl.rollout.approximate_cache import ApproximateCache, CachedLogits
from unirl.rollout.gumbel import gumbel_noise, mixed_seeds

Noise = Callable[[int, int, Tensor, int], tuple[Tensor, Tensor]]
"""(seed, step, cells int64 [n], V) -> Gumbel noise of the values float64 [n, V] and of the order float64 [n]."""
Drawn = tuple[CanvasRow, NDArray[np.float32]]
"""A completed row and the log-probability in nats of each of its cells [N]."""


def keyed_noise(seed: int, step: int, cells: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
    """Gumbel noise that depends on seed, step and cell alone; one column more than there are values, for the order."""
    noise = gumbel_noise(mixed_seeds(seed, step, cells), num_values + 1)
    return noise[:, :-1], noise[:, -1]


@torch.inference_mode()
def draw_images(  # noqa: PLR0913 - who draws what, how, and with which noise
    model: LladaForDiffusion,
    canvases: Sequence[NDArray[np.int32]],
    nulls: Sequence[NDArray[np.int32]] | None,
    seeds: Sequence[int],
    law: CellLaw,
    num_steps: int,
    noise: Noise = keyed_noise,
    cache: ApproximateCache | None = None,
) -> list[Drawn]:
    """Images in `num_steps` steps (MaskGIT, as Lumina-DiMOO samples): reveal the most confident cells, keep them.

    Confidence is the log-probability at temperature 1 plus Gumbel noise times the temperature, not annealed.

    Args:
        model: the network.
        canvases: int32 [T] each, of any geometry.
        nulls: their null canvases; None without guidance.
        seeds: one per canvas.
        law: image codes, temperature, guidance.
        num_steps: steps of every image.
        noise: where the noise comes from.
        cache: computes part of the positions in most steps, for inference only; None is exact.

    Raises:
        ValueError: more steps than an image has cells.
    """
    schedules = [cosine_reveals(len(cells_of(canvas, law.mask_id)), num_steps) for canvas in canvases]

    def choose(row: int, step: int, confidence: Tensor, order: Tensor) -> Tensor:
        return most_confident(confidence + law.temperature * order, schedules[row][step])

    streams = _streams(model, law, num_steps, cache)
    open_cells = [max(map(sum, schedules))] * num_steps
    return _unmask(streams, canvases, nulls, seeds, law, open_cells, choose, noise)


@torch.inference_mode()
def draw_answers(
    model: LladaForDiffusion,
    canvases: Sequence[NDArray[np.int32]],
    seeds: Sequence[int],
    law: CellLaw,
    num_steps: int,
    block_length: int,
    noise: Noise = keyed_noise,
) -> list[Drawn]:
    """Answers block after block from the left, `num_steps` in all, each step revealing its most confident cells.

    Args:
        model: the network.
        canvases: int32 [T] each, all with equally many cells.
        seeds: one per canvas.
        law: text ids and temperature.
        num_steps: steps of the whole answer, a multiple of the number of blocks.
        block_length: cells of a block; divides the number of cells.
        noise: where the noise comes from.

    Raises:
        ValueError: lengths or steps that do not divide, or more steps than cells.
    """
    lengths = {len(cells_of(canvas, law.mask_id)) for canvas in canvases}
    num_cells = max(lengths)
    num_blocks = num_cells // block_length
    if len(lengths) > 1 or num_cells % block_length or num_steps % num_blocks:
        raise ValueError(
            f"answers: expected equally many cells, in whole blocks, with whole steps for each; got cells {lengths}, "
            f"blocks of {block_length} and {num_steps} steps; choose lengths that divide"
        )
    per_block = num_steps // num_blocks
    reveals = linear_reveals(block_length, per_block)

    def choose(row: int, step: int, confidence: Tensor, order: Tensor) -> Tensor:
        return most_confident(confidence, reveals[step % per_block])

    open_cells = [(step // per_block + 1) * block_length for step in range(num_steps)]
    return _unmask(_streams(model, law, num_steps), canvases, None, seeds, law, open_cells, choose, noise)


Choice = Callable[[int, int, Tensor, Tensor], Tensor]
"""(row, step, confidence [n], order noise [n]) -> which of the n to reveal."""

StepLogits = Callable[[int, Sequence[NDArray[np.int32]], Sequence[NDArray[np.int64]]], Tensor]
"""(step, canvases [T] each, places [n] of each) -> logits float32 [sum of n, V]."""


def _streams(
    model: LladaForDiffusion, law: CellLaw, num_steps: int, cache: ApproximateCache | None = None
) -> tuple[StepLogits, StepLogits]:
    """Where the logits of the canvases and those of the null canvases come from."""
    if cache is not None:
        return CachedLogits(model, law, cache, num_steps), CachedLogits(model, law, cache, num_steps)

    def exact(step: int, canvases: Sequence[NDArray[np.int32]], places: Sequence[NDArray[np.int64]]) -> Tensor:
        return cell_logits(model, canvases, places, law)

    return exact, exact


def _unmask(  # noqa: PLR0913 - what both kinds of drawing share
    streams: tuple[StepLogits, StepLogits],
    canvases: Sequence[NDArray[np.int32]],
    nulls: Sequence[NDArray[np.int32]] | None,
    seeds: Sequence[int],
    law: CellLaw,
    open_cells: Sequence[int],
    choose: Choice,
    noise: Noise,
) -> list[Drawn]:
    """Steps of which each may reveal the first `open_cells[step]` cells of a row."""
    counts = [len(cells_of(canvas, law.mask_id)) for canvas in canvases]
    values = [np.zeros(count, np.int32) for count in counts]
    steps = [np.full(count, -1, np.int16) for count in counts]
    logprobs = [np.zeros(count, np.float32) for count in counts]
    num_values = law.stop - law.start
    cond, uncond = streams
    for step, end in enumerate(open_cells):
        masked = [np.flatnonzero(row[:end] == -1) for row in steps]
        logits = cond(step, *_before(canvases, values, steps, masked, law))
        if law.guidance_scale != 1.0:
            assert nulls is not None, "guidance needs null canvases"
            null_logits = uncond(step, *_before(nulls, values, steps, masked, law))
            logits = guided_logits(logits, null_logits, law.guidance_scale)
        allowed = None if law.allowed is None else law.allowed.to(logits.device)
        for row, part in enumerate(logits.split([len(cells) for cells in masked])):
            own = torch.from_numpy(masked[row]).to(part.device)
            value_noise, order_noise = noise(seeds[row], step, own, num_values)
            drawn, confidence = draw_values(part.double(), law.temperature, value_noise.double(), allowed)
            chosen = choose(row, step, confidence, order_noise)
            cells, ids = masked[row][chosen.cpu().numpy()], drawn[chosen]
            seen = part[chosen].float()
            tempered = (seen if allowed is None else seen.masked_fill(~allowed, -torch.inf)) / (law.temperature or 1.0)
            values[row][cells] = ids.int().cpu().numpy()
            logprobs[row][cells] = tempered.log_softmax(1).gather(1, ids[:, None])[:, 0].cpu().numpy()
            steps[row][cells] = step
    null_rows = nulls if nulls is not None else [None] * len(canvases)
    return [
        (CanvasRow(canvas=canvas, null=null, values=v, steps=s), p)
        for canvas, null, v, s, p in zip(canvases, null_rows, values, steps, logprobs, strict=True)
    ]


def _before(
    canvases: Sequence[NDArray[np.int32]],
    values: Sequence[NDArray[np.int32]],
    steps: Sequence[NDArray[np.int16]],
    masked: Sequence[NDArray[np.int64]],
    law: CellLaw,
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int64]]]:
    """The canvases as they stand before a step, and the places of their masked cells."""
    seen = [written(canvas, v, s >= 0, law) for canvas, v, s in zip(canvases, values, steps, strict=True)]
    places = [cells_of(canvas, law.mask_id)[cells] for canvas, cells in zip(canvases, masked, strict=True)]
    return seen, places
