import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes import TinyPolicy, score_all, tiny_batch
from tests.janus_checkpoints import write_janus
from tests.learner.conftest import SETTINGS
from unirl.config import AlgorithmConfig, ModelConfig, SamplingConfig
from unirl.learner import learner as learner_file
from unirl.learner.batching import plan_micro_batches
from unirl.learner.learner import scoring_of
from unirl.models.janus_pro import JanusPro
from unirl.models.named_arrays import to_tensor
from unirl.models.policy import TokenScores
from unirl.monitoring.metrics import lookup
from unirl.rollout.completions import verified_weights
from unirl.types import GenerationSample, LearnerBatch, LearnerRow, UnderstandingSample

SCORING = scoring_of(SETTINGS.sampling, AlgorithmConfig())


def weights(learner):
    return {name: array for bucket in learner.weight_buckets() for name, array in bucket}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype("f8") - other[name].astype("f8")).max()) for name in one)


def plain_loss(policy, batch, scoring, algorithm, *, stale=False):
    """The objective token by token: PairUni eq. 1, 2 and 4 with the mean per trajectory and task.

    `stale` says that the batch is of older weights, and the policy has not moved since the step began.
    """
    loss = torch.zeros(())
    for row in batch.rows:
        if algorithm.objective == "vanilla_mixed":
            count = sum(batch.num_trajectories.values())
        else:
            count = batch.num_trajectories[row.task]
        passes = [(s.logprobs[0], s.scored[0]) for s in policy.score([row], scoring)]
        for position in range(len(row.completion_ids)):
            if not row.loss_mask[position]:
                continue
            (new,) = [logprobs[position] for logprobs, scored in passes if scored[position]]
            old, weight = float(row.old_logprobs[position]), 1.0
            if stale and algorithm.importance_cap is not None:
                old, weight = new.item(), min(math.exp(new.item() - old), algorithm.importance_cap)
            ratio = torch.exp(new - old)
            clipped = torch.clamp(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
            gain = torch.minimum(ratio * row.advantage, clipped * row.advantage)
            loss = loss - weight * gain / (count * int(row.loss_mask.sum()))
    return loss


@pytest.mark.parametrize("objective", ["pair_grpo", "pairwise", "vanilla_mixed"])
@pytest.mark.parametrize(("masked", "cap"), [(False, None), (True, None), (False, 1.2), (True, 1.2)])
def test_three_updates_equal_a_plain_token_loop_with_torch_adamw(make_learner, objective, masked, cap):
    """From the second on the batch is of older weights; a cap then weighs tokens instead of clipping them."""
    policy = TinyPolicy(masked=masked)
    plain = copy.deepcopy(policy)
    learner = make_learner(policy, objective=objective, importance_cap=cap, max_tokens_per_micro_batch=40)
    trained = [p for p in plain.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    sampler = TinyPolicy(masked=masked)
    for step in range(3):
        batch = tiny_batch(sampler, SCORING, seed=step, off_policy=0.3)
        metrics = learner.update(batch, step)
        optimizer.zero_grad()
        algorithm, stale = AlgorithmConfig(objective=objective, importance_cap=cap), step > 0
        loss = plain_loss(plain, batch, SCORING, algorithm, stale=stale)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert metrics["learner/loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert metrics["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        weighs = stale and cap is not None
        assert (metrics["policy/clip_fraction"] > 0) != weighs
        assert ("policy/importance_mean" in metrics) == weighs
        assert not weighs or 0 < metrics["policy/importance_capped_fraction"] < 1
    expected = {name: p.detach().numpy() for name, p in plain.module.named_parameters()}
    got = {name: array for name, array in weights(learner).items() if name in expected}
    # AdamW divides by the gradient's own size, so a rounding of 1e-7 in a tiny gradient shows as a part of the rate.
    assert largest_difference(got, expected) < 1e-4
    assert metrics["learner/num_micro_batches"] > 2


def test_rate_zero_leaves_weights_bit_identical_and_ratios_one(make_learner):
    policy = TinyPolicy()
    learner = make_learner(policy, lr=0.0, updates_per_step=3)
    before = weights(learner)
    metrics = learner.update(tiny_batch(TinyPolicy(), SCORING), 0)
    after = weights(learner)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert metrics["policy/ratio_min"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/logprob_gap_max"] < 1e-5
    assert metrics["learner/grad_norm"] > 0
    assert learner.policy_version == 3


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batch_size_and_order_of_rows_change_rounding_only(make_learner, masked):
    results = []
    for budget, order in ((26, 1), (60, -1), (1000, 1)):
        learner = make_learner(TinyPolicy(masked=masked), max_tokens_per_micro_batch=budget)
        batch = tiny_batch(TinyPolicy(masked=masked), SCORING, num_rows=9, off_policy=0.3)
        metrics = learner.update(replace(batch, rows=batch.rows[::order]), 0)
        results.append((metrics, weights(learner)))
    (first, first_weights), *others = results
    assert first["learner/num_micro_batches"] > others[-1][0]["learner/num_micro_batches"] == 2
    for metrics, values in others:
        assert largest_difference(values, first_weights) < 5e-5
        for name in ("learner/loss", "learner/grad_norm", "policy/kl", "policy/entropy/image", "policy/guidance_gap"):
            assert metrics[name] == pytest.approx(first[name], rel=1e-5)


def test_frozen_weights_do_not_move_and_others_do(make_learner):
    learner = make_learner(TinyPolicy())
    before = weights(learner)
    learner.update(tiny_batch(TinyPolicy(), SCORING), 0)
    moved = {name for name, array in weights(learner).items() if not np.array_equal(array, before[name])}
    assert moved == {name for name in before if not name.startswith(("vision", "version"))}


def test_wrong_sampler_logprobs_show_as_a_gap(make_learner):
    batch = tiny_batch(TinyPolicy(), SCORING)
    row = batch.rows[0]
    wrong = row.old_logprobs.copy()
    wrong[0] += 0.25
    rows = (replace(row, old_logprobs=wrong), *batch.rows[1:])
    metrics = make_learner(TinyPolicy()).update(replace(batch, rows=rows, policy_version=-1), 0)
    assert metrics["policy/logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)
    stale = make_learner(TinyPolicy()).update(replace(batch, rows=rows, policy_version=-7), 0)
    assert stale["policy/logprob_gap_max"] == pytest.approx(0.25, abs=1e-4)


def test_gaps_of_answers_and_images_are_told_apart_with_their_means(make_learner):
    batch = tiny_batch(TinyPolicy(), SCORING)

    def off(row, nats):
        return replace(row, old_logprobs=row.old_logprobs + np.float32(nats))

    rows = tuple(off(row, 0.25 if row.task == "generation" else -0.125) for row in batch.rows)
    rows = (off(rows[0], -0.5), *rows[1:])
    assert rows[0].task == "understanding"
    metrics = make_learner(TinyPolicy()).update(replace(batch, rows=rows), 0)
    tokens = [int(row.loss_mask.sum()) for row in rows if row.task == "understanding"]
    assert metrics["policy/logprob_gap/image"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["policy/logprob_gap_max/image"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["policy/logprob_gap_max/text"] == metrics["policy/logprob_gap_max"] == pytest.approx(0.625, abs=1e-4)
    assert metrics["policy/logprob_gap/text"] == pytest.approx(0.125 + 0.5 * tokens[0] / sum(tokens), abs=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
def test_rows_and_tokens_are_counted_where_they_enter_a_loss(make_learner, monkeypatch, updates):
    def update():
        learner = make_learner(TinyPolicy(), max_tokens_per_micro_batch=26, updates_per_step=updates)
        return learner.update(batch, 0)

    batch = tiny_batch(TinyPolicy(), SCORING, num_rows=9)
    whole = update()
    assert whole["learner/num_rows"] == len(batch.rows)
    assert whole["learner/num_tokens"] == sum(int(row.loss_mask.sum()) for row in batch.rows)
    taken = []

    def plan(rows, **settings):
        ((lost, padding, *kept),) = plan_micro_batches(rows, **settings)
        taken.append(len(rows) - len(lost.indices) - len(padding.indices))
        return [[replace(padding, counted=False), *kept]]

    monkeypatch.setattr(learner_file, "plan_micro_batches", plan)
    assert update()["learner/num_rows"] == taken[0] < len(batch.rows)


def test_gap_is_not_reported_for_a_batch_of_older_weights(make_learner):
    learner = make_learner(TinyPolicy())
    batch = tiny_batch(TinyPolicy(), SCORING)
    assert "policy/logprob_gap_max" in learner.update(batch, 0)
    assert "policy/logprob_gap_max" not in learner.update(batch, 1)


def test_conditional_images_are_rescored_by_the_learner_before_it_moves(make_learner):
    learner = make_learner(TinyPolicy(), image_logprob="conditional", updates_per_step=2)
    guided = tiny_batch(TinyPolicy(), SCORING)
    metrics = learner.update(guided, 0)
    conditional = scoring_of(SETTINGS.sampling, AlgorithmConfig(image_logprob="conditional"))
    gaps = [
        np.abs(score_all(TinyPolicy(), row, conditional) - row.old_logprobs)
        for row in guided.rows
        if row.task == "generation"
    ]
    assert metrics["policy/guidance_gap"] == pytest.approx(float(np.concatenate(gaps).mean()), rel=1e-4)
    assert metrics["policy/logprob_gap_max"] < 1e-5
    # Half of the measured ratios are the first update's, exactly 1 for images; the second update moved away from it.
    assert metrics["policy/ratio_max"] > 1.001
    single = make_learner(TinyPolicy(), image_logprob="conditional").update(guided, 0)
    assert single["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"version 2.*got version 0; sample after each update"):
        learner.update(guided, 1)


def test_second_update_of_a_step_keeps_the_old_logprobs(make_learner):
    twice = make_learner(TinyPolicy(), updates_per_step=2)
    batch = tiny_batch(TinyPolicy(), SCORING)
    twice_metrics = twice.update(batch, 0)
    once = make_learner(TinyPolicy(), importance_cap=None)
    once.update(batch, 0)
    once.update(batch, 1)
    assert largest_difference(weights(twice), weights(once)) == 0.0
    assert twice_metrics["policy/kl"] > 0
    assert (twice.policy_version, once.policy_version) == (2, 2)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_kl_to_the_initial_policy_pulls_back(make_learner, zero_stage):
    batch = tiny_batch(TinyPolicy(), SCORING)
    moved = []
    for beta in (1e-6, 5.0):
        learner = make_learner(
            TinyPolicy(), reference=TinyPolicy(), kl_beta=beta, kl_reference="initial", zero_stage=zero_stage
        )
        first = learner.update(batch, 0)
        assert first["policy/kl_reference"] == pytest.approx(0.0, abs=1e-8)
        for step in range(1, 5):
            metrics = learner.update(batch, step)
        moved.append(metrics["policy/kl_reference"])
    assert 0 < moved[1] < 0.5 * moved[0]


def test_kl_to_the_initial_policy_needs_that_policy(make_learner):
    with pytest.raises(ValueError, match="load the initial checkpoint a second time"):
        make_learner(TinyPolicy(), kl_beta=0.1, kl_reference="initial")


def test_batch_without_rows_is_skipped_loudly_and_the_schedule_goes_on(make_learner):
    learner = make_learner(TinyPolicy(), warmup_steps=4)
    before = weights(learner)
    empty = replace(tiny_batch(TinyPolicy(), SCORING), rows=())
    metrics = learner.update(empty, 0)
    assert metrics["learner/skipped_updates"] == 1.0
    assert metrics["learner/lr"] == pytest.approx(2.5e-4)
    assert "learner/grad_norm" not in metrics
    assert largest_difference(weights(learner), before) == 0.0
    assert learner.policy_version == 1
    assert learner.update(tiny_batch(TinyPolicy(), SCORING, policy_version=1), 1)["learner/lr"] == pytest.approx(5e-4)


def test_batch_of_one_task_trains_that_task_only(make_learner):
    learner = make_learner(TinyPolicy())
    batch = tiny_batch(TinyPolicy(), SCORING)
    # The first step leaves gradients behind in every weight; the second must not use those of the other task again.
    learner.update(batch, 0)
    rows = tuple(row for row in batch.rows if row.task == "understanding")
    metrics = learner.update(replace(batch, rows=rows), 1)
    assert "learner/loss/generation" not in metrics
    assert "policy/entropy/image" not in metrics
    assert metrics["policy/entropy/text"] > 0


def test_not_a_number_names_task_and_rows_and_leaves_the_weights(make_learner):
    learner = make_learner(TinyPolicy())
    batch = tiny_batch(TinyPolicy(), SCORING)
    with torch.no_grad():
        learner.policy.module.codes.weight[batch.rows[3].completion_ids[0]] = float("nan")
    before = weights(learner)
    with pytest.raises(
        RuntimeError, match=r"step 5: expected finite.*log-probability of generation rows \[.*3.*\] \(ra"
    ):
        learner.update(batch, 5)
    assert all(np.array_equal(before[n], a, equal_nan=True) for n, a in weights(learner).items())


def test_gradient_that_is_not_finite_is_refused_before_the_step(make_learner):
    class Overflowing(TinyPolicy):
        def score(self, rows, scoring):
            for s in super().score(rows, scoring):
                # Finite forward, infinite slope: the square root at 0.
                kink = (s.logprobs - s.logprobs.detach()).clamp(min=0).sqrt() if rows[0].task == "generation" else 0.0
                yield TokenScores(logprobs=s.logprobs + kink, scored=s.scored, entropy=s.entropy)

    learner = make_learner(Overflowing())
    before = weights(learner)
    with pytest.raises(RuntimeError, match=r"gradient of generation rows \[1, 3, 5\]"):
        learner.update(tiny_batch(TinyPolicy(), SCORING), 0)
    assert largest_difference(weights(learner), before) == 0.0


def test_task_whose_gradient_vanishes_is_refused(make_learner):
    class Cut(TinyPolicy):
        def score(self, rows, scoring):
            for s in super().score(rows, scoring):
                cut = rows[0].task == "generation"
                logprobs = s.logprobs.detach() + 0.0 * s.logprobs if cut else s.logprobs
                yield TokenScores(logprobs=logprobs, scored=s.scored, entropy=s.entropy)

    with pytest.raises(RuntimeError, match=r"none at all from generation; check that model.frozen"):
        make_learner(Cut()).update(tiny_batch(TinyPolicy(), SCORING), 0)


def test_task_that_meets_frozen_weights_only_is_refused(make_learner):
    policy = TinyPolicy(frozen=("words", "codes", "positions", "trunk", "image_head"))
    with pytest.raises(RuntimeError, match=r"none at all from generation"):
        make_learner(policy).update(tiny_batch(TinyPolicy(), SCORING), 0)


def test_policy_without_trainable_weights_is_refused(make_learner):
    with pytest.raises(ValueError, match=r"shorten model\.frozen"):
        make_learner(TinyPolicy(frozen=("",)))


@pytest.mark.parametrize(
    ("extra", "missing", "message"),
    [(1, False, "more than the 1 passes"), (0, True, "never scored"), (-1, False, "score\\(\\) ended")],
)
def test_family_that_breaks_its_promise_about_passes_is_refused(make_learner, extra, missing, message):
    class Careless(TinyPolicy):
        def score(self, rows, scoring):
            for s in super().score(rows, scoring):
                scored = torch.zeros_like(s.scored) if missing else s.scored
                for _ in range(1 + extra):
                    yield TokenScores(logprobs=s.logprobs, scored=scored, entropy=s.entropy)

    with pytest.raises(RuntimeError, match=message):
        make_learner(Careless()).update(tiny_batch(TinyPolicy(), SCORING), 0)


def test_recomputed_activations_give_the_same_update(make_learner):
    batch = tiny_batch(TinyPolicy(), SCORING, off_policy=0.3)
    results = []
    for recompute in (False, True):
        learner = make_learner(TinyPolicy(), activation_checkpointing=recompute)
        assert learner.policy.module.training == recompute
        results.append((learner.update(batch, 0)["learner/grad_norm"], weights(learner)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert largest_difference(results[0][1], results[1][1]) < 1e-6


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_bfloat16_keeps_what_is_too_small_for_it(make_learner, zero_stage):
    policy = TinyPolicy()
    policy.module.bfloat16()
    policy.module.positions.weight.data.fill_(1.0)
    learner = make_learner(policy, zero_stage=zero_stage, lr=2e-4)
    # One update moves a weight of 1 by 2e-4, a twentieth of the step between neighbours in bfloat16; forty do move it.
    learner.update(tiny_batch(policy, SCORING), 0)
    assert (weights(learner)["positions.weight"] == np.uint16(0x3F80)).all()
    for step in range(1, 40):
        learner.update(tiny_batch(policy, SCORING, policy_version=step), step)
    assert (weights(learner)["positions.weight"][0] != np.uint16(0x3F80)).any()


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory):
    return write_janus(tmp_path_factory.mktemp("janus") / "small")


def janus_batch(policy, scoring):
    """Two answers of different length and two pictures, scored by the policy itself as its own sampler."""
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 255, (11, 7, 3), dtype=np.uint8)
    question = UnderstandingSample(
        id="q", image=picture, question="what colour is the cat ?", choices=("red", "blue"), answer="A"
    )
    drawing = GenerationSample(id="g", prompt="a red cat on a blue mat")
    words = np.flatnonzero(policy.allowed_text_ids.numpy())
    rows = []
    for index, length in enumerate((3, 5, policy.num_image_tokens, policy.num_image_tokens)):
        draws = length == policy.num_image_tokens
        draft = LearnerRow(
            task="generation" if draws else "understanding",
            prompt_ids=policy.encode(drawing if draws else question, SamplingConfig()).ids,
            image=None if draws else picture,
            completion_ids=generator.choice(np.arange(policy.num_codes) if draws else words, length).astype(np.int32),
            loss_mask=np.ones(length, bool),
            old_logprobs=np.zeros(length, np.float32),
            advantage=(-1.0) ** index,
        )
        rows.append(replace(draft, old_logprobs=score_all(policy, draft, scoring)))
    return LearnerBatch(
        rows=tuple(rows),
        num_trajectories={"understanding": 2, "generation": 2},
        num_loss_tokens={"understanding": 8, "generation": 2 * policy.num_image_tokens},
        num_pairs=1,
        policy_version=-1,
    )


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "recompute"), [(2, "float32", False), (3, "float32", True), (3, "bfloat16", False)]
)
def test_janus_pro_learns_publishes_and_exports(make_learner, janus_folder, tmp_path, zero_stage, dtype, recompute):
    config = ModelConfig(dtype=dtype)
    batch = janus_batch(JanusPro.load(config, janus_folder), SCORING)
    learner = make_learner(
        JanusPro.load(config, janus_folder), zero_stage=zero_stage, activation_checkpointing=recompute
    )
    before = weights(learner)
    metrics = learner.update(batch, 0)
    assert metrics["policy/logprob_gap_max"] < (1e-5 if dtype == "float32" else 0.1)
    assert metrics["policy/guidance_gap"] > 0
    for name in metrics:
        lookup(name)
    later = learner.update(batch, 1)
    assert later["learner/loss"] < metrics["learner/loss"] - 0.01
    named = list(weights(learner).items())
    still = {name for name, array in named if np.array_equal(array, before[name])}
    assert {name for name, _ in named if "vision_model" in name or "vqmodel" in name} <= still
    assert not [name for name in still if "language_model" in name]
    # What the sampler checks before it takes weights, and what a later run loads.
    verified_weights(learner.manifest(), named, learner.policy.shapes)
    learner.export(tmp_path / "policy")
    loaded = JanusPro.load(config, tmp_path / "policy").module.state_dict()
    for name, array in named:
        assert torch.equal(loaded[name], to_tensor(array).to(loaded[name].dtype)), name
