import random

import pytest

from unirl.learner.packing import plan_rows


def plan(lengths, max_tokens=10, num_ranks=1, batching="packed"):
    return plan_rows(lengths, max_tokens=max_tokens, num_ranks=num_ranks, batching=batching)


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_sequence_lies_in_one_row_that_holds_it(batching, num_ranks):
    rng = random.Random(num_ranks)
    lengths = [rng.randint(1, 40) for _ in range(100)]
    ranks = plan(lengths, 64, num_ranks, batching)
    rows = [row for rank in ranks for row in rank]
    assert sorted(index for row in rows for index in row) == list(range(100))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert len({len(rank) for rank in ranks}) == 1
    tokens = [sum(lengths[index] for row in rank for index in row) for rank in ranks]
    assert max(tokens) - min(tokens) <= 64


def test_first_fit_decreasing_worked_by_hand():
    assert plan([4, 8, 1, 4, 2, 1]) == [[(1, 4), (0, 3, 2, 5)]]


def test_buckets_hold_like_lengths():
    assert plan([5, 1, 5, 1, 1, 5], batching="bucketed") == [[(0, 2), (5, 1, 3, 4)]]


def test_packing_fills_rows_better_than_buckets():
    rng = random.Random(0)
    lengths = [rng.randint(100, 2000) for _ in range(500)]
    num_rows = {batching: len(plan(lengths, 4096, 1, batching)[0]) for batching in ("packed", "bucketed")}
    assert num_rows["packed"] <= sum(lengths) / 4096 * 1.02 + 1
    assert num_rows["packed"] < num_rows["bucketed"]


def test_a_rank_without_sequences_gets_an_empty_row():
    assert plan([3], num_ranks=2) == [[(0,)], [()]]
    assert plan([], num_ranks=2) == [[], []]


def test_a_sequence_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="10 for one of 11 tokens"):
        plan([3, 11])
