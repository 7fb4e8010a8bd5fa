import math

import pytest
import torch

from unirl.algorithms.losses import (
    BatchTotals,
    clipped_surrogate,
    kl_estimates,
    masked_sum,
    mean_metrics,
    surrogate_sums,
    token_scales,
)

AGGREGATIONS = ["sequence_mean", "sequence_sum", "token_mean", "constant_length"]
NUM_TOKENS = [3, 1, 2, 4, 4, 4]
TASKS = ["understanding"] * 3 + ["generation"] * 3
TOTALS = BatchTotals(
    num_trajectories={"understanding": 3, "generation": 3},
    num_tokens={"understanding": 6, "generation": 12},
    num_pairs=1,
)
MAX_LENGTHS = {"understanding": 5, "generation": 4}


def scales(num_tokens=NUM_TOKENS, tasks=TASKS, totals=TOTALS, **choice):
    return token_scales(num_tokens, tasks, totals, max_lengths=MAX_LENGTHS, **choice)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        # clip range 0.8 .. 1.3
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 2.6),  # gain capped: 1.3 * 2
        (0.5, 2.0, 1.0),  # loss kept: 0.5 * 2 < 0.8 * 2
        (1.5, -2.0, -3.0),  # penalty kept: 1.5 * -2 < 1.3 * -2
        (0.5, -2.0, -1.6),  # relief capped: 0.8 * -2 < 0.5 * -2
        (0.5, 0.0, 0.0),
    ],
)
def test_surrogate_is_pessimistic_for_both_signs(ratio, advantage, expected):
    got = clipped_surrogate(torch.tensor([[ratio]]), torch.tensor([advantage]), 0.2, 0.3)
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.0, 2.0, 2.0), (1.5, 2.0, 0.0), (0.5, 2.0, 2.0), (1.5, -2.0, -2.0), (0.5, -2.0, 0.0), (1.2, -1.0, -1.0)],
)
def test_surrogate_loses_its_gradient_only_where_the_clip_holds_a_gain(ratio, advantage, slope):
    leaf = torch.tensor([[ratio]], requires_grad=True)
    clipped_surrogate(leaf, torch.tensor([advantage]), 0.2, 0.3).sum().backward()
    assert leaf.grad.item() == slope


def test_hand_worked_kl_estimates():
    # d = ln 2: k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + ln 2 = 0.1931.
    difference = torch.tensor([[math.log(2)]], dtype=torch.float64)
    assert kl_estimates(difference, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimates(difference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimates(difference, "k3").item() == pytest.approx(math.log(2) - 0.5)


def test_k1_and_k3_average_to_the_exact_divergence_and_k2_nearly():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = (policy + 0.1 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    mean = {k: (policy.exp() * kl_estimates((policy - reference)[None], k)[0]).sum() for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    torch.testing.assert_close(mean["k2"], exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_expected_gradient_of_k1_and_k2_is_that_of_the_exact_divergence(estimator):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    estimates = kl_estimates((policy - reference)[None], estimator)[0]
    (got,) = torch.autograd.grad((policy.detach().exp() * estimates).sum(), logits)
    torch.testing.assert_close(got, exact)


def test_an_unknown_estimator_is_an_error():
    with pytest.raises((ValueError, TypeError), match="k4"):
        kl_estimates(torch.zeros(1, 1), "k4")


def test_hand_worked_scales_of_a_pair():
    # One pair, three answers of 3, 1, 2 tokens and three images of 4 tokens.
    expected = {
        "sequence_mean": [1 / 9, 1 / 3, 1 / 6, 1 / 12, 1 / 12, 1 / 12],  # 1 / (3 trajectories * own tokens)
        "sequence_sum": [1.0] * 6,  # 1 / 1 pair
        "token_mean": [1 / 6] * 3 + [1 / 12] * 3,  # 6 answer tokens, 12 image tokens
        "constant_length": [1 / 15] * 3 + [1 / 12] * 3,  # 3 * 5 and 3 * 4
    }
    for aggregation, values in expected.items():
        assert scales(aggregation=aggregation).tolist() == pytest.approx(values)


def test_hand_worked_scales_of_the_mixed_batch():
    expected = {
        "sequence_mean": [1 / 18, 1 / 6, 1 / 12, 1 / 24, 1 / 24, 1 / 24],  # 1 / (6 trajectories * own tokens)
        "sequence_sum": [1 / 6] * 6,  # eq. 1: mean over 6 trajectories
        "token_mean": [1 / 18] * 6,  # 18 tokens
        "constant_length": [1 / 30] * 3 + [1 / 24] * 3,  # 6 * 5 and 6 * 4
    }
    for aggregation, values in expected.items():
        assert scales(aggregation=aggregation, pooled=True).tolist() == pytest.approx(values)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_weights_add_up_to_one_per_task_or_one_in_all(aggregation):
    tokens = torch.tensor(NUM_TOKENS)
    assert float((scales(aggregation=aggregation) * tokens).sum()) == pytest.approx(2)
    assert float((scales(aggregation=aggregation, pooled=True) * tokens).sum()) == pytest.approx(1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_row_weighs_the_same_in_any_micro_batch_and_padding_weighs_nothing(aggregation, pooled):
    whole = scales(aggregation=aggregation, pooled=pooled)
    for row in range(6):
        part = scales([0, NUM_TOKENS[row]], [TASKS[row]] * 2, aggregation=aggregation, pooled=pooled)
        assert part.tolist() == [0.0, whole[row].item()]


def test_totals_of_a_micro_batch_are_refused():
    small = BatchTotals(
        num_trajectories={"understanding": 2, "generation": 3},
        num_tokens={"understanding": 6, "generation": 12},
        num_pairs=1,
    )
    with pytest.raises(ValueError, match="totals of the whole batch"):
        scales(totals=small)


def test_a_task_without_a_total_is_an_error():
    with pytest.raises(ValueError, match="'editing'"):
        scales(tasks=["editing"] * 6)


def test_a_trajectory_longer_than_its_limit_is_an_error():
    with pytest.raises(ValueError, match=r"at most max_lengths\['generation'\] tokens"):
        token_scales(NUM_TOKENS, TASKS, TOTALS, aggregation="constant_length", max_lengths={"understanding": 5})


def test_an_unknown_aggregation_is_an_error():
    with pytest.raises((ValueError, TypeError), match="mean"):
        scales(aggregation="mean")


@pytest.mark.parametrize(
    ("trajectories", "tokens", "pairs"),
    [({"a": 1}, {"b": 1}, 1), ({"a": -1}, {"a": 1}, 1), ({"a": 1}, {"a": 1}, 0)],
)
def test_totals_that_no_batch_can_have_are_an_error(trajectories, tokens, pairs):
    with pytest.raises(ValueError, match="expected"):
        BatchTotals(num_trajectories=trajectories, num_tokens=tokens, num_pairs=pairs)


def test_masked_sum_ignores_what_lies_outside_and_carries_no_gradient():
    values = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[True, True, False]]))
    assert total.item() == 3
    assert total.dtype == torch.float64
    assert not total.requires_grad


def test_hand_worked_metrics():
    # Ratios 0.5, 1, 2 and a padded 9; A > 0 in the first row, A < 0 in the second; clip range 0.8 .. 1.2.
    ratio = torch.tensor([[0.5, 1.0, 2.0, 9.0], [0.5, 1.0, 2.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]] * 2)
    sums = surrogate_sums(ratio.log(), torch.tensor([1.0, -1.0]), mask, 0.2, 0.2)
    means = mean_metrics({name: value.item() for name, value in sums.items()})
    assert means["ratio_mean"] == pytest.approx(7 / 6)
    # mean square (0.25 + 1 + 4) / 3 = 1.75, less (7/6)^2 = 1.3611
    assert means["ratio_std"] == pytest.approx(math.sqrt(1.75 - 49 / 36))
    assert means["clip_high_fraction"] == pytest.approx(1 / 6)  # ratio 2 with A > 0
    assert means["clip_low_fraction"] == pytest.approx(1 / 6)  # ratio 0.5 with A < 0
    # mean of ratio - 1 - ln ratio = (-0.5 + ln 2 + 0 + 1 - ln 2) / 3
    assert means["kl_old_mean"] == pytest.approx(0.5 / 3)


def test_metrics_of_parts_add_up_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(8, 6, generator=generator)
    advantages = torch.randn(8, generator=generator)
    mask = torch.rand(8, 6, generator=generator) < 0.7
    whole = surrogate_sums(log_ratio, advantages, mask, 0.2, 0.2)
    parts = [surrogate_sums(log_ratio[r], advantages[r], mask[r], 0.2, 0.2) for r in (slice(0, 3), slice(3, 8))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-14, atol=1e-14)


def test_metrics_without_loss_tokens_are_empty():
    assert mean_metrics({"tokens": 0.0, "ratio": 0.0}) == {}


def test_metrics_that_were_not_gathered_are_absent():
    assert mean_metrics({"tokens": 4.0, "entropy": 2.0}) == {"entropy_mean": 0.5}


def test_a_row_without_advantage_is_never_counted_as_clipped():
    log_ratio = torch.tensor([[-1.0, 1.0]])
    sums = surrogate_sums(log_ratio, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), 0.2, 0.2)
    assert sums["clipped_low"] == sums["clipped_high"] == 0
