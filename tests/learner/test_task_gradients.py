import json
import math
from dataclasses import replace

import pytest
import torch

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner.conftest import SETTINGS
from tests.learner.lab_rows import SCORING as LAB_SCORING
from tests.learner.lab_rows import lab_batch, lab_policy
from tests.learner.test_learner import SCORING, plain_loss
from tests.learner.test_ranks import start_two
from unirl.config import AlgorithmConfig
from unirl.learner import gradient_parts
from unirl.learner.engine import RankPlace
from unirl.learner.gradient_parts import GradientParts, cosine, norm
from unirl.learner.learner import Learner
from unirl.types import TASKS

KINDS = ("aligned", "retrieved")


def slow_gradients(policy, batch, scoring):
    """The gradient of each task and kind as one vector in float64, by plain autograd over their rows."""
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    found = {}
    for task in TASKS:
        for kind in KINDS:
            rows = tuple(row for row in batch.rows if (row.task, row.pair_kind) == (task, kind))
            if rows:
                loss = plain_loss(policy, replace(batch, rows=rows), scoring, AlgorithmConfig())
                grads = torch.autograd.grad(loss, trained, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, trained, strict=True)]
                found[task, kind] = torch.cat([grad.flatten() for grad in flat]).double()
    return found


def slow_metrics(policy, batch, scoring):
    grads = slow_gradients(policy, batch, scoring)
    tasks = [sum(grads[task, kind] for kind in KINDS) for task in TASKS]
    wanted = {f"learner/grad_norm/{task}": g.norm().item() for task, g in zip(TASKS, tasks, strict=True)}
    wanted["learner/grad_norm"] = sum(tasks).norm().item()
    sides = {"": tasks} | {f"/{kind}": [grads[task, kind] for task in TASKS] for kind in KINDS}
    wanted |= {f"learner/grad_cosine{end}": torch.cosine_similarity(*pair, dim=0).item() for end, pair in sides.items()}
    return wanted


@pytest.fixture(scope="module", params=[2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def two_ranks(request, tmp_path_factory):
    """What either rank wrote at a ZeRO stage."""
    out = tmp_path_factory.mktemp("gradients")
    (out / "stage").write_text(str(request.param))
    start_two("gradients_process", out, timeout_s=240)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def wanted():
    policy = lab_policy()
    return slow_metrics(policy, lab_batch(policy), LAB_SCORING)


def test_two_ranks_measure_what_plain_autograd_finds_on_the_lab_model(two_ranks, wanted):
    (first, second), _ = two_ranks[0]["1"]
    assert first["learner/num_micro_batches"] > 6
    for name, value in wanted.items():
        assert first[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    # The other rank says the same, and a clipped step goes on.
    other, _ = two_ranks[1]["1"]
    for one, two in zip((first, second), other, strict=True):
        assert {name: one[name] for name in wanted} == {name: two[name] for name in wanted}


def test_measuring_changes_no_bit_of_the_weights(two_ranks):
    (steps, measured), (plain_steps, plain) = (two_ranks[0][every] for every in "10")
    assert measured == plain
    assert not [name for name in plain_steps[0] if "cosine" in name or "grad_norm/" in name]
    assert [step["learner/grad_norm"] for step in steps] == [step["learner/grad_norm"] for step in plain_steps]


def kinds_of(batch):
    rows = [replace(row, pair_kind=KINDS[i // 2 % 2]) for i, row in enumerate(batch.rows)]
    return replace(batch, rows=tuple(rows))


def learner_with(every, dtype=torch.float32, **learner):
    settings = replace(SETTINGS, learner=replace(SETTINGS.learner, **learner), grad_cosine_every=every)
    policy = TinyPolicy()
    policy.module.to(dtype)
    return Learner(policy, settings, RankPlace())


@pytest.fixture
def measuring(make_learner):
    """Learners of one rank that measure every second step."""
    made = []

    def make(**learner):
        make_learner(TinyPolicy())  # whose end is that of the process group
        made.append(learner_with(2, max_tokens_per_micro_batch=40, **learner))
        return made[-1]

    yield make
    for learner in made:
        learner._engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_come_with_every_step_of_one_rank_and_cosines_with_measured_ones(measuring, stage):
    batch = kinds_of(tiny_batch(TinyPolicy(), SCORING, num_rows=8, off_policy=0.3))
    learner = measuring(zero_stage=stage, lr=0.0)
    steps = [learner.update(replace(batch, policy_version=step - 1), step) for step in (1, 2, 3)]
    wanted = slow_metrics(TinyPolicy(), batch, SCORING)
    for step, metrics in zip((1, 2, 3), steps, strict=True):
        shown = {name for name in metrics if "cosine" in name and not name.endswith("_s")}
        assert shown == (set() if step == 3 else {name for name in wanted if "cosine" in name})
        for name in wanted.keys() & metrics.keys():
            assert metrics[name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-5), name
        assert metrics["learner/grad_cosine_s"] > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bfloat16_the_parts_make_up_the_gradient_that_the_optimizer_takes(measuring, stage):
    batch = kinds_of(tiny_batch(TinyPolicy(), SCORING, num_rows=8, off_policy=0.3))
    found = measuring(dtype=torch.bfloat16, zero_stage=stage).update(batch, 1)
    one, other = (found[f"learner/grad_norm/{task}"] for task in TASKS)
    whole = math.sqrt(one**2 + other**2 + 2 * one * other * found["learner/grad_cosine"])
    assert whole == pytest.approx(found["learner/grad_norm"], rel=1e-4)
    for name, value in slow_metrics(TinyPolicy(), batch, SCORING).items():
        assert found[name] == pytest.approx(value, rel=0.05, abs=0.03), name


def test_a_task_that_is_absent_leaves_no_cosine_and_the_other_ones_norm(measuring):
    batch = tiny_batch(TinyPolicy(), SCORING, num_rows=8)
    rows = tuple(row for row in batch.rows if row.task == "generation")
    metrics = measuring().update(replace(batch, rows=rows), 1)
    assert "learner/grad_cosine" not in metrics
    assert "learner/grad_norm/understanding" not in metrics
    assert metrics["learner/grad_norm/generation"] == pytest.approx(metrics["learner/grad_norm"], rel=1e-6)


def test_a_task_without_gradient_has_norm_zero_and_no_cosine(measuring):
    batch = tiny_batch(TinyPolicy(), SCORING, num_rows=8)
    rows = tuple(replace(row, advantage=0.0) if row.task == "understanding" else row for row in batch.rows)
    metrics = measuring().update(replace(batch, rows=rows), 1)
    assert metrics["learner/grad_norm/understanding"] == 0.0
    assert metrics["learner/grad_norm/generation"] > 0
    assert "learner/grad_cosine" not in metrics


def test_kinds_that_share_micro_batches_have_no_cosine_of_their_own(measuring, monkeypatch):
    monkeypatch.setattr("unirl.learner.batching.MOST_APART", 0.0)
    batch = kinds_of(tiny_batch(TinyPolicy(), SCORING, num_rows=8, off_policy=0.3))
    metrics = measuring().update(batch, 1)
    wanted = slow_metrics(TinyPolicy(), batch, SCORING)
    assert metrics["learner/grad_cosine"] == pytest.approx(wanted["learner/grad_cosine"], abs=1e-5)
    assert not [name for name in metrics if name.endswith(KINDS)]


def test_products_of_parts_by_hand(monkeypatch):
    monkeypatch.setattr(gradient_parts, "PIECE_ELEMENTS", 2)
    sums = [torch.zeros(3), torch.zeros(())]
    parts = GradientParts(lambda: [piece.flatten() for piece in sums], 1, summed_over_ranks=True)
    sums[0] += torch.tensor([3.0, 0.0, 4.0])
    parts.end_part()
    sums[0] += torch.tensor([0.0, 2.0, 1.0])
    sums[1] += 2.0
    products, seconds = parts.products()
    assert products == [[25.0, 4.0], [4.0, 9.0]]
    assert (norm(products, [0]), norm(products, [1]), norm(products, [0, 1])) == (5.0, 3.0, math.sqrt(42))
    assert cosine(products, [0], [1]) == pytest.approx(4 / 15)
    assert cosine([[0.0, 0.0], [0.0, 9.0]], [0], [1]) is None
    assert seconds > 0


def test_how_far_an_update_went_is_measured_after_it(make_learner):
    """The k3 estimate over every token, since each task fits one micro-batch."""
    batch = tiny_batch(TinyPolicy(), SCORING, num_rows=8)
    make_learner(TinyPolicy())
    learner = learner_with(2, lr=1e-3)
    metrics = learner.update(batch, 2)
    kl, tokens = 0.0, 0
    for row in batch.rows:
        (scores,) = learner.policy.score([row], SCORING)
        for new, old in zip(scores.logprobs[0][row.loss_mask].tolist(), row.old_logprobs[row.loss_mask], strict=True):
            kl, tokens = kl + math.exp(new - old) - 1 - (new - old), tokens + 1
    assert metrics["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/kl_update"] == pytest.approx(kl / tokens, rel=1e-4)
    assert kl / tokens > 0.01
    assert "policy/kl_update" not in learner.update(replace(batch, policy_version=1), 3), "a step that is not measured"
    learner._engine.destroy()
