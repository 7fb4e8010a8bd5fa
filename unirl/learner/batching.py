"""Scored groups -> LearnerBatch, and its division into the micro-batches of each rank."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unirl.algorithms.advantages import group_relative_advantages
from unirl.algorithms.objective import find_objective
from unirl.algorithms.pair_weight import weigh_pairs
from unirl.config import AlgorithmConfig
from unirl.models.policy import Policy, Scoring
from unirl.types import (
    TASKS,
    LearnerBatch,
    LearnerRow,
    PairKind,
    PairRecord,
    ScoredGroup,
    Trajectory,
    UnderstandingSample,
    WeightedGroup,
)

MOST_APART = 1.02
"""Kinds of pairs get micro-batches of their own if that costs at most so many times what mixed ones do."""
PASS_TOKENS = 1024
"""Tokens that cost a rank as much as exchanging weights or gradients with the others once more."""


def weigh_groups(
    scored: Sequence[ScoredGroup], pairs: Sequence[PairRecord], config: AlgorithmConfig
) -> tuple[WeightedGroup, ...]:
    """Each group with its group-relative advantages times the weight of its pair (PairUni eq. 3, eq. 4).

    Raises:
        ValueError: no group, a group of a pair that is not in `pairs`, or what the advantages refuse.
    """
    if not scored:
        raise ValueError("batch: expected at least one scored group; got none; the step sampled nothing")
    weights = weigh_pairs(
        [pair.kind for pair in pairs],
        [pair.similarity for pair in pairs],
        rule=config.pair_weight if find_objective(config.objective).weighs_pairs else "none",
    )
    by_id = {pair.pair_id: (pair, weight) for pair, weight in zip(pairs, weights.tolist(), strict=True)}
    for group in scored:
        if group.group.request.pair_id not in by_id:
            raise ValueError(
                f"batch: expected the pair of every group among the {len(by_id)} pairs of the step; got group "
                f"{group.group.request.request_id} of pair {group.group.request.pair_id}; pass the pairs that the "
                "requests were made from"
            )
    return tuple(_weigh(group, *by_id[group.group.request.pair_id], config) for group in scored)


def _weigh(group: ScoredGroup, pair: PairRecord, weight: float, config: AlgorithmConfig) -> WeightedGroup:
    advantages = group_relative_advantages(
        torch.from_numpy(group.rewards.astype("float64"))[None],
        torch.from_numpy(group.judged.copy())[None],
        torch.tensor([weight], dtype=torch.float64),
        std=config.advantage_std,
    )
    return WeightedGroup(scored=group, pair=pair, pair_weight=weight, advantages=advantages[0].numpy())


def build_batch(groups: Sequence[WeightedGroup], config: AlgorithmConfig) -> LearnerBatch:
    """All rows of a step.

    Left out of the rows and of the counts: trajectories that no reward judged. Left out of the rows only: those
    without a loss token, and, when there is no KL penalty, those with advantage 0, whose gradient is exactly 0.
    """
    rows: list[LearnerRow] = []
    trajectories: Counter[str] = Counter(dict.fromkeys(TASKS, 0))
    tokens: Counter[str] = Counter(dict.fromkeys(TASKS, 0))
    for group in groups:
        scored, task = group.scored, group.scored.group.request.task
        for index, trajectory in enumerate(scored.group.trajectories):
            if not scored.judged[index]:
                continue
            loss_tokens, advantage = int(trajectory.loss_mask.sum()), float(group.advantages[index])
            trajectories[task] += 1
            tokens[task] += loss_tokens
            if loss_tokens and (advantage != 0.0 or config.kl_beta != 0.0):
                rows.append(_row(group, trajectory, advantage))
    return LearnerBatch(
        rows=tuple(rows),
        num_trajectories=dict(trajectories),
        num_loss_tokens=dict(tokens),
        num_pairs=len({group.pair.pair_id for group in groups}),
        policy_version=min(t.policy_version for group in groups for t in group.scored.group.trajectories),
    )


def _row(group: WeightedGroup, trajectory: Trajectory, advantage: float) -> LearnerRow:
    request = group.scored.group.request
    sample = request.sample
    return LearnerRow(
        task=request.task,
        prompt_ids=trajectory.prompt_ids,
        image=sample.image if isinstance(sample, UnderstandingSample) else None,
        completion_ids=trajectory.completion_ids,
        loss_mask=trajectory.loss_mask,
        old_logprobs=trajectory.logprobs,
        advantage=advantage,
        unmask_step=trajectory.unmask_step,
        pair_kind=group.pair.kind,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one task that go through the model together on one rank."""

    indices: tuple[int, ...]
    """Positions in the batch's rows."""
    counted: bool
    """False for a filler, whose loss is multiplied by zero: it only keeps this rank in step with the others."""
    own_passes: int
    """Passes that scoring these rows takes."""
    num_passes: int
    """Passes that every rank makes here; those beyond `own_passes` count for nothing."""
    kind: PairKind | None = None
    """Of the pairs of all ranks' rows here; None where they differ."""


def plan_micro_batches(
    rows: Sequence[LearnerRow],
    *,
    policy: Policy,
    scoring: Scoring,
    max_tokens: int,
    num_ranks: int,
    exchanges: bool = False,
) -> list[list[MicroBatch]]:
    """Micro-batches of each rank, in the order of their passes.

    All ranks get equally many, and at one position all have the same task and number of passes, since a forward or
    backward pass under ZeRO meets the other ranks inside the model. The tasks come one after the other, and in each of
    them the kinds of pairs, unless keeping the kinds apart cost noticeably more tokens or passes: so the gradient of a
    task or kind is a difference of two sums. Rows are taken from long to short (by passes, then tokens, then
    position), so that padding is small and the largest micro-batch comes first; no randomness.

    Args:
        rows: rows of all ranks.
        policy: says what scoring a row costs.
        scoring: decides between one stream and two.
        max_tokens: most tokens of a micro-batch on one rank, padding and all streams included.
        num_ranks: data-parallel ranks.
        exchanges: whether ranks exchange weights or gradients in each pass, as under ZeRO-2 and 3.

    Raises:
        ValueError: one row alone is above the budget.
    """
    tokens = [policy.tokens_per_row(row, scoring) for row in rows]
    passes = [policy.passes_per_row(row, scoring) for row in rows]
    if max(tokens, default=0) > max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_micro_batch: expected room for the longest row; got {max_tokens} for a "
            f"{rows[tokens.index(max(tokens))].task} row of {max(tokens)} tokens; set it to {max(tokens)} or more"
        )
    tasks = [[index for index, row in enumerate(rows) if row.task == task] for task in TASKS]
    kinds = sorted({row.pair_kind for row in rows}, key=str)
    apart = [[index for index in part if rows[index].pair_kind == kind] for part in tasks for kind in kinds]
    room = _Room(rows, tokens, passes, max_tokens, num_ranks, PASS_TOKENS if exchanges else 0)
    plans = [room.plan(groups) for groups in (apart, tasks)]
    return plans[0] if room.load(plans[0]) <= MOST_APART * room.load(plans[1]) else plans[1]


@dataclass(frozen=True, slots=True)
class _Room:
    """Rows with what each costs, and what a micro-batch holds."""

    rows: Sequence[LearnerRow]
    tokens: Sequence[int]
    passes: Sequence[int]
    max_tokens: int
    num_ranks: int
    pass_tokens: int

    def plan(self, groups: Sequence[Sequence[int]]) -> list[list[MicroBatch]]:
        """Micro-batches of each rank, group after group; none holds rows of two groups."""
        plan: list[list[MicroBatch]] = [[] for _ in range(self.num_ranks)]
        for group in groups:
            order = sorted(group, key=lambda index: (-self.passes[index], -self.tokens[index], index))
            while order:
                # Rows of equal passes are sorted by tokens, but fewer passes may come with more tokens: look at all.
                per_rank = _rows_per_rank([self.tokens[index] for index in order], self.max_tokens, self.num_ranks)
                taken, order = order[: per_rank * self.num_ranks], order[per_rank * self.num_ranks :]
                for rank, part in enumerate(plan):
                    part.append(self._micro_batch(taken, rank))
        return plan

    def _micro_batch(self, taken: Sequence[int], rank: int) -> MicroBatch:
        own = taken[rank :: self.num_ranks]
        indices = own or taken[-1:]
        kinds: set[PairKind | None] = {self.rows[index].pair_kind for index in taken}
        return MicroBatch(
            indices=tuple(indices),
            counted=bool(own),
            own_passes=max(self.passes[index] for index in indices),
            num_passes=max(self.passes[index] for index in taken),
            kind=kinds.pop() if len(kinds) == 1 else None,
        )

    def load(self, plan: Sequence[Sequence[MicroBatch]]) -> int:
        """Tokens of the rank that has most at each position, with padding and what the passes cost besides."""
        sizes = [[self._tokens(micro) * micro.num_passes for micro in part] for part in plan]
        return sum(map(max, zip(*sizes, strict=True)))

    def _tokens(self, micro: MicroBatch) -> int:
        return len(micro.indices) * max(self.tokens[i] for i in micro.indices) + self.pass_tokens


def _rows_per_rank(tokens: Sequence[int], max_tokens: int, num_ranks: int) -> int:
    """Most rows that each rank can take from the front; rows on a rank are padded to the longest one taken."""
    per_rank, longest = 0, 0
    for start in range(0, len(tokens), num_ranks):
        longest = max(longest, *tokens[start : start + num_ranks])
        if (per_rank + 1) * longest > max_tokens:
            break
        per_rank += 1
    return per_rank
