import math

import pytest
import torch

from unirl.algorithms.advantages import group_relative_advantages


def slow_advantages(rewards, judged, pair_weights, std):
    rows = []
    for row, mask, weight in zip(rewards.tolist(), judged.tolist(), pair_weights.tolist(), strict=True):
        kept = [r for r, m in zip(row, mask, strict=True) if m]
        advantages = [0.0] * len(row)
        if len(kept) >= 2 and len(set(kept)) > 1:
            mean = sum(kept) / len(kept)
            squares = sum((r - mean) ** 2 for r in kept)
            divisor = {"sample": len(kept) - 1, "population": len(kept)}.get(std)
            scale = 1.0 if divisor is None else math.sqrt(squares / divisor) + 1e-4
            advantages = [weight * (r - mean) / scale if m else 0.0 for r, m in zip(row, mask, strict=True)]
        rows.append(advantages)
    return torch.tensor(rows, dtype=rewards.dtype)


def full(rewards):
    return torch.ones_like(rewards, dtype=torch.bool), torch.ones(len(rewards), dtype=rewards.dtype)


def test_hand_worked_group_of_four():
    # rewards 1 0 0 1: mean 0.5, deviations +-0.5, squares sum to 1; sample std sqrt(1/3), population std 0.5.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    judged, weights = full(rewards)
    signs = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    sample = group_relative_advantages(rewards, judged, weights, std="sample")
    torch.testing.assert_close(sample, signs * (0.5 / (math.sqrt(1 / 3) + 1e-4)))
    population = group_relative_advantages(rewards, judged, weights, std="population")
    torch.testing.assert_close(population, signs * (0.5 / 0.5001))
    torch.testing.assert_close(group_relative_advantages(rewards, judged, weights, std="none"), signs * 0.5)


def test_pair_weight_multiplies_every_advantage_of_its_group():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    judged, _ = full(rewards)
    advantages = group_relative_advantages(rewards, judged, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(advantages[1], 0.25 * advantages[0])


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_agrees_with_a_slow_loop_under_random_masks(std):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 4, (200, 5), generator=generator).double() / 3
    judged = torch.rand(200, 5, generator=generator) < 0.7
    weights = torch.rand(200, generator=generator, dtype=torch.float64)
    got = group_relative_advantages(rewards, judged, weights, std=std)
    torch.testing.assert_close(got, slow_advantages(rewards, judged, weights, std), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_carry_no_signal(value, dtype):
    rewards = torch.full((1, 7), value, dtype=dtype)
    advantages = group_relative_advantages(rewards, *full(rewards))
    assert advantages.dtype == dtype
    assert torch.equal(advantages, torch.zeros(1, 7, dtype=dtype))


def test_an_unjudged_sample_gets_zero_and_leaves_the_others_as_if_it_were_absent():
    rewards = torch.tensor([[1.0, float("nan"), 0.0, 0.5]])
    judged = torch.tensor([[True, False, True, True]])
    got = group_relative_advantages(rewards, judged, torch.ones(1))
    without = torch.tensor([[1.0, 0.0, 0.5]])
    torch.testing.assert_close(got[:, [0, 2, 3]], group_relative_advantages(without, *full(without)))
    assert got[0, 1] == 0


@pytest.mark.parametrize("judged", [[True, False], [False, False]])
def test_a_group_with_fewer_than_two_judged_samples_gets_zeros(judged):
    got = group_relative_advantages(torch.tensor([[3.0, 1.0]]), torch.tensor([judged]), torch.ones(1))
    assert torch.equal(got, torch.zeros(1, 2))


def test_shifting_rewards_changes_nothing_and_scaling_only_the_floor():
    rewards = torch.tensor([[0.2, 0.9, 0.4]], dtype=torch.float64)
    base = group_relative_advantages(rewards, *full(rewards))
    torch.testing.assert_close(group_relative_advantages(rewards + 5, *full(rewards)), base)
    torch.testing.assert_close(group_relative_advantages(rewards * 1e6, *full(rewards)), base, rtol=1e-3, atol=0)


def test_permuting_samples_permutes_advantages():
    rewards = torch.tensor([[0.2, 0.9, 0.4, 0.0]], dtype=torch.float64)
    order = [2, 0, 3, 1]
    permuted = group_relative_advantages(rewards[:, order], *full(rewards))
    torch.testing.assert_close(permuted, group_relative_advantages(rewards, *full(rewards))[:, order])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_judged_reward_that_is_not_finite_is_an_error_with_its_place(bad):
    rewards = torch.tensor([[1.0, 0.0], [0.0, bad]])
    with pytest.raises(ValueError, match="group 1, sample 1"):
        group_relative_advantages(rewards, *full(rewards))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_the_unit_interval_is_an_error(weight):
    rewards = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"weights in \[0, 1\]"):
        group_relative_advantages(rewards, full(rewards)[0], torch.tensor([weight]))


def test_one_sample_per_group_is_an_error():
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_relative_advantages(torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), torch.ones(3))


def test_an_unknown_std_is_an_error():
    rewards = torch.tensor([[1.0, 0.0]])
    with pytest.raises((ValueError, TypeError), match="biased"):
        group_relative_advantages(rewards, *full(rewards), std="biased")
