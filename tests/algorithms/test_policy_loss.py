import math
from itertools import product

import pytest
import torch

from unirl.algorithms.advantages import group_relative_advantages
from unirl.algorithms.logprobs import token_logprobs
from unirl.algorithms.losses import BatchTotals, mean_metrics, token_scales
from unirl.algorithms.objective import find_objective
from unirl.algorithms.pair_weight import weigh_pairs
from unirl.algorithms.policy_loss import LOG_RATIO_CAP, LossRule, policy_loss

AGGREGATIONS = ["sequence_mean", "sequence_sum", "token_mean", "constant_length"]
OBJECTIVES = ["pair_grpo", "pairwise", "vanilla_mixed"]
ARMS = list(product(OBJECTIVES, AGGREGATIONS))
UND, GEN = "understanding", "generation"
MAX_LENGTHS = {UND: 4, GEN: 5}
# Two pairs, one aligned and one retrieved, with two answers and two images each.
KINDS, SIMILARITIES = ["aligned", "retrieved"], [1.0, 0.64]
PAIRS = [0, 0, 1, 1, 0, 0, 1, 1]
TASKS = [UND] * 4 + [GEN] * 4
LENGTHS = [2, 4, 1, 3, 5, 5, 5, 5]
REWARDS = [[1.0, 0.0], [0.0, 1.0], [0.3, 0.2], [0.1, 0.9]]
TOTALS = BatchTotals(num_trajectories={UND: 4, GEN: 4}, num_tokens={UND: 10, GEN: 20}, num_pairs=2)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def batch():
    """Logits to differentiate, tokens, and log-probs of an old and a reference policy; ratios off the clip's kinks."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 5, 6, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 6, (8, 5), generator=generator)
    new = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    steps = torch.tensor([-0.5, -0.1, 0.05, 0.4], dtype=torch.float64)
    old = new - steps[torch.randint(0, 4, (8, 5), generator=generator)]
    ref = new + 0.3 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return logits, tokens, old, ref


def rule_of(objective):
    return "sqrt" if find_objective(objective).weighs_pairs else "none"


def advantages_of(objective):
    weights = weigh_pairs(KINDS, SIMILARITIES, rule_of(objective))
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    judged = torch.ones_like(rewards, dtype=torch.bool)
    return group_relative_advantages(rewards, judged, torch.cat([weights, weights])).flatten()


def scales_of(objective, aggregation, rows=range(8)):
    return token_scales(
        [LENGTHS[i] for i in rows],
        [TASKS[i] for i in rows],
        TOTALS,
        aggregation=aggregation,
        pooled=find_objective(objective).pools_tasks,
        max_lengths=MAX_LENGTHS,
    )


def slow_advantage(row, objective):
    task_block, pair = (0 if TASKS[row] == UND else 2), PAIRS[row]
    group = REWARDS[task_block + pair]
    mean = (group[0] + group[1]) / 2
    std = math.sqrt((group[0] - mean) ** 2 + (group[1] - mean) ** 2)
    weight = math.sqrt(SIMILARITIES[pair]) if objective == "pair_grpo" and KINDS[pair] == "retrieved" else 1.0
    return weight * (group[row % 2] - mean) / (std + 1e-4)


def slow_token(log_ratio, log_ref, advantage, rule):
    ratio = math.exp(log_ratio)
    held = min(max(ratio, 1 - rule.clip_low), 1 + rule.clip_high)
    estimates = {"k1": log_ref, "k2": log_ref**2 / 2, "k3": math.exp(-log_ref) - 1 + log_ref}
    return -min(ratio * advantage, held * advantage) + rule.kl_beta * estimates[rule.kl_estimator]


def slow_loss(logits, tokens, old, ref, objective, aggregation, rule):
    """Equations 1, 2 and 4 by loops: sum each trajectory, then average as the aggregation says."""
    trajectories = []
    for row in range(8):
        values = []
        for t in range(LENGTHS[row]):
            position = logits[row][t]
            log_total = math.log(sum(math.exp(x) for x in position))
            new = position[tokens[row][t]] - log_total
            values.append(slow_token(new - old[row][t], new - ref[row][t], slow_advantage(row, objective), rule))
        trajectories.append((TASKS[row], values))
    blocks = (
        [trajectories] if objective == "vanilla_mixed" else [[x for x in trajectories if x[0] == t] for t in (UND, GEN)]
    )
    return sum(slow_block(block, aggregation, objective) for block in blocks)


def slow_block(block, aggregation, objective):
    count = len(block)
    if aggregation == "sequence_mean":
        return sum(sum(values) / len(values) for _, values in block) / count
    if aggregation == "sequence_sum":
        return sum(sum(values) for _, values in block) / (count if objective == "vanilla_mixed" else 2)
    if aggregation == "token_mean":
        return sum(sum(values) for _, values in block) / sum(len(values) for _, values in block)
    return sum(sum(values) / MAX_LENGTHS[task] for task, values in block) / count


def loss_of(logits, batch, objective, aggregation, rule, rows=slice(None)):
    _, tokens, old, ref = batch
    logprobs = token_logprobs(logits[rows], tokens[rows], loss_mask=MASK[rows])
    return policy_loss(
        logprobs,
        old[rows],
        advantages_of(objective)[rows],
        MASK[rows],
        scales_of(objective, aggregation)[rows],
        rule,
        ref[rows],
    )


@pytest.mark.parametrize(("objective", "aggregation"), ARMS)
@pytest.mark.parametrize("rule", [LossRule(), LossRule(clip_low=0.3, clip_high=0.15, kl_beta=0.2)])
def test_loss_equals_a_slow_loop(batch, objective, aggregation, rule):
    loss, _ = loss_of(batch[0], batch, objective, aggregation, rule)
    slow = slow_loss(*(x.tolist() for x in batch), objective, aggregation, rule)
    assert loss.item() == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize(("objective", "aggregation"), ARMS)
@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
def test_gradient_equals_finite_differences_of_the_slow_loop(batch, objective, aggregation, kl_estimator):
    rule = LossRule(clip_low=0.3, clip_high=0.2, kl_beta=0.1, kl_estimator=kl_estimator)
    leaf = batch[0].clone().requires_grad_()
    loss_of(leaf, batch, objective, aggregation, rule)[0].backward()
    logits, *rest = (x.tolist() for x in batch)
    step, worst = 1e-5, 0.0
    for row, t, v in [(r, t, v) for r in range(8) for t in (0, 3) for v in (0, 4)]:
        sides = []
        centre = logits[row][t][v]
        for side in (step, -step):
            logits[row][t][v] = centre + side
            sides.append(slow_loss(logits, *rest, objective, aggregation, rule))
        logits[row][t][v] = centre
        worst = max(worst, abs((sides[0] - sides[1]) / (2 * step) - leaf.grad[row, t, v].item()))
    assert worst < 1e-8


def test_k1_learns_as_k2_and_reports_its_own_value(batch):
    grads, losses = [], []
    for estimator in ("k1", "k2"):
        leaf = batch[0].clone().requires_grad_()
        rule = LossRule(kl_beta=0.5, kl_estimator=estimator)
        loss, _ = loss_of(leaf, batch, "pair_grpo", "sequence_mean", rule)
        loss.backward()
        grads.append(leaf.grad)
        slow = slow_loss(*(x.tolist() for x in batch), "pair_grpo", "sequence_mean", rule)
        losses.append((loss.item(), slow))
    torch.testing.assert_close(grads[0], grads[1])
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-12)
    assert losses[1][0] == pytest.approx(losses[1][1], rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "aggregation", "expected"),
    [
        # One retrieved pair with s = 0.25, so w = 0.5. Answers of 1 and 2 tokens with A = +1, -1; images of 3 tokens
        # with A = +1, -1; every ratio 1.5 and clip 0.2. A token of the first gives 1.2, of the second -1.5.
        # eq. 4: 0.5 * [(1.2 - 2 * 1.5) + (3 * 1.2 - 3 * 1.5)] / 1 pair = 0.5 * (-1.8 - 0.9)
        ("pair_grpo", "sequence_sum", -1.35),
        # eq. 2: the same without the weight
        ("pairwise", "sequence_sum", -2.7),
        # eq. 1: mean over four trajectories
        ("vanilla_mixed", "sequence_sum", -2.7 / 4),
        # weight 0.5 times (1.2 - 1.5) / 2 + (1.2 - 1.5) / 2
        ("pair_grpo", "sequence_mean", -0.15),
        ("pairwise", "sequence_mean", -0.3),
        ("vanilla_mixed", "sequence_mean", -0.15),
        # weight 0.5 times (1.2 - 3.0) / 3 + (3.6 - 4.5) / 6
        ("pair_grpo", "token_mean", -0.375),
        ("vanilla_mixed", "token_mean", -2.7 / 9),
        # L = 4 and 5: weight 0.5 times -1.8 / (2 * 4) - 0.9 / (2 * 5)
        ("pair_grpo", "constant_length", -0.1575),
    ],
)
def test_hand_worked_example(objective, aggregation, expected):
    lengths = [1, 2, 3, 3]
    scale = token_scales(
        lengths,
        [UND, UND, GEN, GEN],
        BatchTotals(num_trajectories={UND: 2, GEN: 2}, num_tokens={UND: 3, GEN: 6}, num_pairs=1),
        aggregation=aggregation,
        pooled=find_objective(objective).pools_tasks,
        max_lengths=MAX_LENGTHS,
    )
    weight = weigh_pairs(["retrieved"], [0.25], rule_of(objective))
    logprobs = torch.full((4, 3), math.log(1.5), dtype=torch.float64)
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    advantages = weight * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, _ = policy_loss(logprobs, torch.zeros_like(logprobs), advantages, mask, scale, LossRule())
    assert -loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(("objective", "aggregation"), ARMS)
def test_micro_batches_of_any_cut_and_order_add_up_to_the_whole(batch, objective, aggregation):
    rule = LossRule(kl_beta=0.1)
    whole = batch[0].clone().requires_grad_()
    loss, sums = loss_of(whole, batch, objective, aggregation, rule)
    loss.backward()
    for cut in ([[3, 0], [7, 1, 2], [6], [4, 5]], [[i] for i in range(8)], [list(range(7, -1, -1))]):
        leaf = batch[0].clone().requires_grad_()
        results = [loss_of(leaf, batch, objective, aggregation, rule, rows) for rows in cut]
        total = sum(part for part, _ in results)
        total.backward()
        assert total.item() == pytest.approx(loss.item(), rel=1e-13)
        torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-12, atol=1e-14)
        for name, value in sums.items():
            assert sum(part[name] for _, part in results).item() == pytest.approx(value.item(), rel=1e-13)


def test_wider_padding_and_rubbish_in_it_change_nothing(batch):
    logits, tokens, old, ref = batch
    leaf = logits.clone().requires_grad_()
    loss, sums = loss_of(leaf, batch, "pair_grpo", "sequence_mean", LossRule(kl_beta=0.1))
    loss.backward()
    wide = torch.nn.functional.pad(MASK, (0, 2))

    def spoil(values):
        return torch.where(wide, torch.nn.functional.pad(values, (0, 2)), float("nan"))

    other = logits.clone().requires_grad_()
    logprobs = spoil(token_logprobs(other, tokens, loss_mask=MASK))
    scale = scales_of("pair_grpo", "sequence_mean")
    padded, padded_sums = policy_loss(
        logprobs, spoil(old), advantages_of("pair_grpo"), wide, scale, LossRule(kl_beta=0.1), spoil(ref)
    )
    padded.backward()
    assert padded.item() == pytest.approx(loss.item(), rel=1e-14)
    assert torch.equal(other.grad, leaf.grad)
    assert padded_sums == {name: pytest.approx(value.item(), rel=1e-14) for name, value in sums.items()}


def test_rows_without_advantage_may_be_left_out(batch):
    advantages = advantages_of("pair_grpo").clone()
    advantages[[1, 6]] = 0
    _, tokens, old, _ = batch
    new = token_logprobs(batch[0], tokens)
    scale = scales_of("pair_grpo", "sequence_mean")
    loss, _ = policy_loss(new, old, advantages, MASK, scale, LossRule())
    keep = [0, 2, 3, 4, 5, 7]
    kept, _ = policy_loss(new[keep], old[keep], advantages[keep], MASK[keep], scale[keep], LossRule())
    assert kept.item() == pytest.approx(loss.item(), rel=1e-13)


def test_a_micro_batch_of_padding_gives_zero_loss_and_a_zero_gradient():
    logprobs = torch.full((2, 3), float("nan"), requires_grad=True)
    rest = torch.full((2, 3), float("nan"))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, sums = policy_loss(logprobs, rest, torch.full((2,), float("nan")), mask, torch.zeros(2), LossRule(), rest)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logprobs.grad, torch.zeros(2, 3))
    assert all(value == 0 for value in sums.values())


def test_weights_by_position_generalise_weights_by_row(batch):
    _, tokens, old, _ = batch
    new, advantages = token_logprobs(batch[0], tokens), advantages_of("pair_grpo")
    scale = scales_of("pair_grpo", "token_mean")
    by_row, _ = policy_loss(new, old, advantages, MASK, scale, LossRule())
    by_position, _ = policy_loss(new, old, advantages, MASK, scale[:, None].expand(8, 5), LossRule())
    assert torch.equal(by_row, by_position)


def test_on_policy_every_ratio_is_one_and_the_gradient_is_that_of_reinforce(batch):
    logits, tokens, _, _ = batch
    leaf = logits.clone().requires_grad_()
    new = token_logprobs(leaf, tokens)
    scale, advantages = scales_of("pair_grpo", "sequence_mean"), advantages_of("pair_grpo")
    loss, sums = policy_loss(new, new.detach(), advantages, MASK, scale, LossRule(), new.detach())
    (mine,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (plain,) = torch.autograd.grad(-(new * MASK * (advantages * scale)[:, None]).sum(), leaf)
    torch.testing.assert_close(mine, plain)
    means = mean_metrics({name: value.item() for name, value in sums.items()})
    assert means == pytest.approx(
        dict.fromkeys(means, 0.0) | {"ratio_mean": 1.0}, abs=1e-12
    )  # no clipping, no divergence


def test_a_huge_ratio_is_held_counted_and_harmless():
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -1.0]])
    loss, sums = policy_loss(logprobs, old, -torch.ones(1), torch.ones(1, 2).bool(), torch.ones(1), LossRule())
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(LOG_RATIO_CAP) + 1, rel=1e-6)
    assert logprobs.grad.tolist() == [[0.0, 1.0]]
    assert sums["capped"].item() == 1


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "scale"])
def test_a_counted_value_that_is_not_finite_is_an_error_with_its_place(name):
    tensors = {key: torch.zeros(2, 3) for key in ("logprobs", "old_logprobs", "ref_logprobs", "scale")}
    tensors[name][1, 2] = float("nan")
    with pytest.raises(ValueError, match=rf"finite {name} .* nan at row 1, position 2"):
        policy_loss(advantages=torch.ones(2), loss_mask=torch.ones(2, 3).bool(), rule=LossRule(), **tensors)


def test_an_advantage_that_is_not_finite_is_an_error_with_its_row():
    zeros = torch.zeros(2, 3)
    advantages = torch.tensor([0.0, float("inf")])
    with pytest.raises(ValueError, match=r"finite advantages .* inf at row 1"):
        policy_loss(zeros, zeros, advantages, torch.ones(2, 3).bool(), torch.ones(2), LossRule())


def test_a_kl_penalty_without_a_reference_is_an_error():
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"ref_logprobs for kl_beta=0\.1"):
        policy_loss(zeros, zeros, torch.ones(1), torch.ones(1, 1).bool(), torch.ones(1), LossRule(kl_beta=0.1))


@pytest.mark.parametrize(
    "constants",
    [
        {"clip_low": 0.0},
        {"clip_low": 1.1},
        {"clip_high": 0.0},
        {"kl_beta": -0.1},
        {"kl_beta": float("nan")},
    ],
)
def test_constants_that_would_teach_something_else_are_refused(constants):
    with pytest.raises(ValueError, match="0 < clip_low <= 1"):
        LossRule(**constants)


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises((ValueError, TypeError), match="k9"):
        LossRule(kl_estimator="k9")
