"""Which sequences share a row, and which rows each rank runs: no tensor, no model, no randomness."""

from collections.abc import Sequence
from typing import Literal

Batching = Literal["packed", "bucketed"]
Row = tuple[int, ...]
"""Positions of the sequences that lie one behind the other."""


def plan_rows(lengths: Sequence[int], *, max_tokens: int, num_ranks: int, batching: Batching) -> list[list[Row]]:
    """The rows of each rank, equally many, since a pass under ZeRO meets the other ranks inside the model.

    Rows are dealt out from full to empty, so that ranks work about equally long. An empty row is a filler.

    Args:
        lengths: tokens of each sequence.
        max_tokens: most tokens of a row.
        num_ranks: data-parallel ranks.
        batching: "packed" fills rows as full as first-fit-decreasing does; "bucketed" gives a row sequences of like
            length, which costs fewer passes where attention pads them.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(
            f"learner.max_tokens_per_micro_batch: expected room for the longest sequence; got {max_tokens} for one of "
            f"{max(lengths)} tokens; set it to {max(lengths)} or more, or data.max_length lower"
        )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    left: list[int] = []
    for index in order:
        open_rows = range(len(rows)) if batching == "packed" else range(max(0, len(rows) - 1), len(rows))
        place = next((row for row in open_rows if left[row] >= lengths[index]), None)
        if place is None:
            rows.append([])
            left.append(max_tokens)
            place = len(rows) - 1
        rows[place].append(index)
        left[place] -= lengths[index]
    by_size = sorted(range(len(rows)), key=lambda row: (left[row], row))
    by_size += [-1] * (-len(rows) % num_ranks)
    ranks: list[list[Row]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(by_size), num_ranks):
        dealt = by_size[start : start + num_ranks]
        # Back and forth, so that no rank always gets the fuller row.
        ranks_in_turn = ranks if start // num_ranks % 2 == 0 else ranks[::-1]
        for rank, row in zip(ranks_in_turn, dealt, strict=True):
            rank.append(tuple(rows[row]) if row >= 0 else ())
    return ranks
