"""A micro-batch on the device: its tensors, and the scoring passes that every rank makes in step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.learner.batching import MicroBatch
from unirl.models.policy import Policy, Scoring, TokenScores
from unirl.types import LearnerRow, Task

Scores = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""The fields of `TokenScores`."""
Runner = Callable[[Callable[[], Scores]], Scores]
"""An engine or module around `ComputingModule`."""


@dataclass(slots=True, kw_only=True)
class MicroTensors:
    """What the loss of one micro-batch needs; kept over the updates of a step."""

    micro: MicroBatch
    task: Task
    rows: list[LearnerRow]
    old_logprobs: Tensor
    """float32 [B, T] nats, under the scoring mode that the loss uses."""
    ref_logprobs: Tensor | None = None
    """float32 [B, T] of the initial policy."""
    importance: Tensor | None = None
    """float32 [B, T] capped probability of the policy before the update over that of older weights that sampled."""
    loss_mask: Tensor
    """bool [B, T], all false in a filler."""
    advantages: Tensor
    """float32 [B]."""
    scale: Tensor
    """float64 [B] from `token_scales`."""


def micro_tensors(
    micro: MicroBatch, rows: Sequence[LearnerRow], scales: Tensor, device: torch.device | str
) -> MicroTensors:
    """The micro-batch's rows as tensors, completions padded on the right.

    Args:
        micro: which rows.
        rows: all rows of the batch.
        scales: float64 [rows], loss weight of a token of each row.
        device: where the tensors go.
    """
    own = [rows[index] for index in micro.indices]
    return MicroTensors(
        micro=micro,
        task=own[0].task,
        rows=own,
        old_logprobs=_padded([row.old_logprobs for row in own]).to(device),
        loss_mask=_padded([row.loss_mask & micro.counted for row in own]).to(device),
        advantages=torch.tensor([row.advantage for row in own], dtype=torch.float32, device=device),
        scale=scales[list(micro.indices)].to(device),
    )


def _padded(arrays: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(array.copy()) for array in arrays], batch_first=True)


def scored_passes(
    policy: Policy, runner: Runner, data: MicroTensors, scoring: Scoring
) -> Iterator[tuple[TokenScores, Tensor]]:
    """Scores of each pass with the mask bool [B, T] of the tokens whose loss it carries.

    Passes beyond the micro-batch's own, which only keep the ranks in step, score the same rows anew with an empty mask.

    Raises:
        RuntimeError: the family made another number of passes than it announced, or left out or repeated a token.
    """
    own = data.micro.own_passes
    left = data.loss_mask.clone()
    passes: Iterator[TokenScores] = iter(())
    for index in range(data.micro.num_passes):
        if index % own == 0:
            passes = iter(policy.score(data.rows, scoring))
        logprobs, scored, entropy, metrics = runner(partial(_next_pass, passes))
        scores = TokenScores(logprobs=logprobs, scored=scored, entropy=entropy, metrics=metrics)
        mask = data.loss_mask & scored if index < own else torch.zeros_like(scored)
        yield scores, mask
        repeated, left = mask & ~left, left & ~mask
        if bool(repeated.any()):
            raise RuntimeError(_broken_promise(data, f"{int(repeated.sum())} tokens were scored twice"))
        if (index + 1) % own == 0 and next(passes, None) is not None:
            raise RuntimeError(_broken_promise(data, f"more than the {own} passes of passes_per_row"))
    if bool(left.any()):
        raise RuntimeError(_broken_promise(data, f"{int(left.sum())} loss tokens were never scored"))


def _next_pass(passes: Iterator[TokenScores]) -> Scores:
    scores = next(passes, None)
    if scores is None:
        raise RuntimeError(
            "learner: expected another scoring pass; the family's score() ended; let it make as many passes as its "
            "passes_per_row() announces"
        )
    return scores.logprobs, scores.scored, scores.entropy, scores.metrics


def _broken_promise(data: MicroTensors, got: str) -> str:
    return (
        f"learner: expected the family to score every loss token of {data.task} rows {list(data.micro.indices)} "
        f"exactly once, in as many passes as it announced; got: {got}; mend its score() or passes_per_row()"
    )
