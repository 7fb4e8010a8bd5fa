"""Learning from part of the reveal steps: by hand, and through the real learner with a tiny random Lumina-DiMOO."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.fakes import score_all
from tests.learner.conftest import SETTINGS
from tests.lumina_checkpoints import write_lumina
from unirl.config import AlgorithmConfig, ImageSampling, ModelConfig, SamplingConfig, TextSampling
from unirl.learner import diffusion_steps
from unirl.learner.diffusion_steps import draw_steps, merge_steps
from unirl.learner.learner import scoring_of
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.models.named_arrays import to_tensor
from unirl.monitoring.metrics import lookup
from unirl.rollout.completions import verified_weights
from unirl.types import GenerationSample, LearnerBatch, LearnerRow, UnderstandingSample

MODEL = ModelConfig(family="lumina_dimoo")
GUIDANCE = SETTINGS.sampling.image.guidance_scale
SAMPLING = SamplingConfig(
    text=TextSampling(temperature=SETTINGS.sampling.text.temperature, max_tokens=8, diffusion_steps=4),
    image=ImageSampling(guidance_scale=GUIDANCE, size=(16, 24), diffusion_steps=5),
)
SCORING = scoring_of(SAMPLING, AlgorithmConfig())
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
QUESTION = UnderstandingSample(id="q", image=PIXELS, question="is the cat red ?", answer="yes", answer_type="text")
DRAWING = GenerationSample(id="g", prompt="a red cat on a mat")


def row_of(steps, mask=None):
    length = len(steps) if steps is not None else 3
    return LearnerRow(
        task="generation",
        prompt_ids=np.array([1, 2], np.int32),
        image=None,
        completion_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.ones(length, bool) if mask is None else np.array(mask, bool),
        old_logprobs=np.zeros(length, np.float32),
        advantage=1.0,
        unmask_step=None if steps is None else np.array(steps, np.int16),
    )


@pytest.mark.parametrize(
    ("size", "merged"), [(1, [5, 0, 0, 9, 2, 5]), (2, [1, 0, 0, 1, 0, 1]), (3, [0, 0, 0, 1, 0, 0]), (9, [0] * 6)]
)
def test_steps_are_merged_in_their_order_and_numbered_anew(size, merged):
    row = row_of([5, 0, 0, 9, 2, 5])
    assert merge_steps(row, size).unmask_step.tolist() == merged
    assert merge_steps(row, size).unmask_step.dtype == np.int16
    assert row.unmask_step.tolist() == [5, 0, 0, 9, 2, 5]


def test_rows_without_steps_pass_unchanged():
    row = row_of(None)
    assert merge_steps(row, 3) is row
    assert draw_steps([row], 1, (0,)) == ([row], [1.0])


def test_drawn_steps_are_whole_and_weigh_as_much_as_all():
    # Steps 0, 1, 3 and 4 hold tokens of the loss; step 2 holds none, so that K is 4.
    row = row_of([0, 0, 1, 2, 2, 3, 4, 4], mask=[1, 1, 1, 0, 0, 1, 1, 0])
    for seed in range(20):
        ((kept,), (factor,)) = draw_steps([row], 3, (seed,))
        assert factor == pytest.approx(4 / 3)
        learned = {step for step, own in zip(row.unmask_step, kept.loss_mask, strict=True) if own}
        assert len(learned) == 3
        assert kept.loss_mask.tolist() == [
            bool(own) and step in learned for step, own in zip(row.unmask_step, row.loss_mask, strict=True)
        ]
        assert kept.unmask_step is row.unmask_step


@pytest.mark.parametrize("num_steps", [None, 4, 9])
def test_as_many_steps_as_there_are_change_nothing(num_steps):
    rows = [row_of([0, 1, 2, 3]), row_of([1, 1, 0, 0])]
    kept, factors = draw_steps(rows, num_steps, (0,))
    assert all(one is other for one, other in zip(kept, rows, strict=True))
    assert factors == [1.0, 1.0]


def drawn(row, seed, place=0):
    rows, _ = draw_steps([row_of([0, 1])] * place + [row], 2, seed)
    return tuple(rows[place].unmask_step[rows[place].loss_mask].tolist())


def test_every_subset_is_equally_likely_and_keyed_by_seed_and_content():
    row, num_draws = row_of([0, 1, 2, 3]), 3000
    counts = Counter(drawn(row, (seed,)) for seed in range(num_draws))
    assert set(counts) == set(combinations(range(4), 2))
    # Standard deviation of a share: sqrt(1/6 * 5/6 / 3000) = 0.0068.
    assert all(abs(count / num_draws - 1 / 6) < 4 * 0.0068 for count in counts.values())
    assert {drawn(row, (7,), place) for place in range(20)} == {drawn(row, (7,))}, "company changes nothing"
    others = [replace(row, completion_ids=row.completion_ids + number) for number in range(20)]
    assert len({drawn(other, (7,)) for other in others}) > 2
    assert drawn(row, (7, 1)) == drawn(row, (7, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_lumina(tmp_path_factory.mktemp("lumina") / "small")


def made_row(policy, sample, advantage, seed, num_steps, off_policy):
    """A completion with random values, revealed in `num_steps` steps; old log-probabilities are the policy's own."""
    rng = np.random.default_rng(seed)
    drawing = isinstance(sample, GenerationSample)
    canvas = policy.encode(sample, SAMPLING).ids
    length = int((canvas == policy.prompts.ids.mask).sum())
    words = np.arange(policy.prompts.num_codes) if drawing else np.flatnonzero(policy.prompts.allowed_text_ids())
    row = LearnerRow(
        task="generation" if drawing else "understanding",
        prompt_ids=canvas,
        image=None,
        completion_ids=rng.choice(words, length).astype(np.int32),
        loss_mask=np.ones(length, bool),
        old_logprobs=np.zeros(length, np.float32),
        advantage=advantage,
        unmask_step=rng.permutation(np.arange(length) % num_steps).astype(np.int16),
    )
    logprobs = score_all(policy, row, SCORING) + off_policy * rng.normal(size=length)
    return replace(row, old_logprobs=logprobs.astype(np.float32))


def batch_of(policy, num_steps=4, off_policy=0.0):
    """Two answers and two pictures; one answer stops counting before its last token."""
    rows = [
        made_row(policy, sample, advantage, seed, num_steps, off_policy)
        for seed, (sample, advantage) in enumerate([(QUESTION, 1.0), (QUESTION, -0.7), (DRAWING, 0.6), (DRAWING, -1.2)])
    ]
    cut = rows[1].loss_mask.copy()
    cut[np.flatnonzero(rows[1].unmask_step == 0)[0]] = False
    rows[1] = replace(rows[1], loss_mask=cut)
    return LearnerBatch(
        rows=tuple(rows),
        num_trajectories={"understanding": 3, "generation": 2},
        num_loss_tokens={"understanding": 20, "generation": 48},
        num_pairs=1,
        policy_version=-1,
    )


class GradientTap:
    """The gradient that the learner's backward passes leave in the weights, as one vector."""

    def __init__(self, module):
        self._parts = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.register_hook(partial(self._add, name))

    def _add(self, name, gradient):
        self._parts[name] += gradient

    def take(self):
        whole = torch.cat([part.flatten() for part in self._parts.values()])
        for part in self._parts.values():
            part.zero_()
        return whole


class Fixed:
    """A random generator that takes the same subset of the choices always."""

    def __init__(self, places):
        self._places = list(places)

    def choice(self, choices, size, replace):
        assert not replace
        assert size == len(self._places)
        return choices[self._places]


@pytest.mark.parametrize("num_drawn", [1, 2, 3])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_the_mean_gradient_over_all_subsets_is_the_full_gradient(
    make_learner, monkeypatch, folder, num_drawn, aggregation
):
    batch = batch_of(LuminaDimoo.load(MODEL, folder), off_policy=0.3)
    policy = LuminaDimoo.load(MODEL, folder)
    whole = make_learner(policy, lr=0.0, token_aggregation=aggregation, importance_cap=None)
    tap = GradientTap(policy.module)
    whole.update(batch, 0)
    full = tap.take()
    part = LuminaDimoo.load(MODEL, folder)
    learner = make_learner(
        part, lr=0.0, token_aggregation=aggregation, importance_cap=None, diffusion_steps_per_update=num_drawn
    )
    tap = GradientTap(part.module)
    gradients = []
    for step, places in enumerate(combinations(range(4), num_drawn)):
        monkeypatch.setattr(diffusion_steps.np.random, "default_rng", lambda seed, places=places: Fixed(places))
        learner.update(batch, step)
        gradients.append(tap.take())
    mean = torch.stack(gradients).mean(0)
    cosine = float(torch.nn.functional.cosine_similarity(mean, full, dim=0))
    ratio = float(mean.norm() / full.norm())
    alone = [float(torch.nn.functional.cosine_similarity(each, full, dim=0)) for each in gradients]
    print(f"{num_drawn} of 4 steps, {aggregation}: cosine 1 - {1 - cosine:.1e}, norm ratio 1 + {ratio - 1:.1e}")
    assert cosine > 0.9999
    assert ratio == pytest.approx(1.0, abs=1e-4)
    assert min(alone) < 0.95


def weights(learner):
    return {name: array for bucket in learner.weight_buckets() for name, array in bucket}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"diffusion_steps_per_update": 2},
        {"image_logprob": "conditional"},
        {"diffusion_shrink": 2},
        {"diffusion_shrink": 2, "diffusion_steps_per_update": 1},
    ],
)
def test_rate_zero_leaves_weights_bit_identical_and_ratios_one(make_learner, folder, changes):
    batch = batch_of(LuminaDimoo.load(MODEL, folder))
    learner = make_learner(LuminaDimoo.load(MODEL, folder), lr=0.0, updates_per_step=2, **changes)
    before = weights(learner)
    metrics = learner.update(batch, 0)
    after = weights(learner)
    assert before.keys() == set(learner.policy.shapes)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert metrics["policy/ratio_min"] == pytest.approx(1.0, abs=1e-5 * (2 * GUIDANCE - 1))
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5 * (2 * GUIDANCE - 1))
    assert metrics["learner/grad_norm"] > 0
    if not changes.get("diffusion_shrink"):
        assert metrics["policy/logprob_gap_max"] <= 1e-5 * (2 * GUIDANCE - 1)
    for name in metrics:
        lookup(name)


def test_merged_steps_are_rescored_so_that_the_first_ratio_is_exactly_one(make_learner, folder):
    policy = LuminaDimoo.load(MODEL, folder)
    batch = batch_of(policy)
    metrics = make_learner(LuminaDimoo.load(MODEL, folder), diffusion_shrink=2).update(batch, 0)
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_fraction"] == 0.0
    assert "policy/logprob_gap_max" not in metrics
    gaps = []
    for row in batch.rows:
        by_hand = replace(row, unmask_step=(row.unmask_step // 2).astype(np.int16))
        gaps.append(np.abs(score_all(policy, by_hand, SCORING) - row.old_logprobs)[row.loss_mask])
    assert metrics["policy/rescoring_gap"] == pytest.approx(float(np.concatenate(gaps).mean()), rel=1e-4)
    assert metrics["policy/rescoring_gap"] > 0.1


def test_merged_steps_keep_their_old_logprobs_over_the_updates_of_a_step(make_learner, folder):
    batch = batch_of(LuminaDimoo.load(MODEL, folder))
    learner = make_learner(LuminaDimoo.load(MODEL, folder), diffusion_shrink=2, updates_per_step=2)
    assert learner.update(batch, 0)["policy/ratio_max"] > 1.001
    with pytest.raises(
        ValueError, match=r"version 2, since .* merged steps .*got version -1; sample after each update"
    ):
        learner.update(batch, 1)


def count_of_passes(policy):
    """A list that grows by one with each pass of a stream through the trunk."""
    made = []
    policy.module.model.transformer["ln_f"].register_forward_hook(lambda module, inputs, output: made.append(1))
    return made


@pytest.mark.parametrize("num_drawn", [None, 1, 3])
@pytest.mark.parametrize("mode", ["guided", "conditional"])
def test_announced_passes_are_those_made(folder, num_drawn, mode):
    policy = LuminaDimoo.load(MODEL, folder)
    scoring = replace(SCORING, image_logprob=mode)
    whole = [row for num_steps in (1, 4, 6) for row in batch_of(policy, num_steps).rows]
    rows, _ = draw_steps(whole, num_drawn, (0,))
    for task in ("understanding", "generation"):
        own = [row for row in rows if row.task == task]
        announced = [policy.passes_per_row(row, scoring) for row in own]
        assert max(announced) == (num_drawn or 6)
        streams = 2 if task == "generation" and mode == "guided" else 1
        for group, wanted in [([row], n) for row, n in zip(own, announced, strict=True)] + [(own, max(announced))]:
            made = count_of_passes(policy)
            assert len(list(policy.score(group, scoring))) == wanted
            assert len(made) == wanted * streams


def test_an_update_makes_the_passes_of_the_steps_it_learns_from(make_learner, folder):
    batch = batch_of(LuminaDimoo.load(MODEL, folder), num_steps=6)
    made = {}
    for changes in ({}, {"diffusion_steps_per_update": 2}, {"diffusion_shrink": 3}):
        policy = LuminaDimoo.load(MODEL, folder)
        learner = make_learner(policy, **changes)
        count = count_of_passes(policy)
        learner.update(batch, 0)
        made[tuple(changes)] = len(count)
    # One stream for the answers, two for the pictures, each kind in one micro-batch.
    assert list(made.values()) == [6 * 3, 2 * 3, 2 * 3]


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "recompute"), [(2, "float32", False), (3, "float32", True), (3, "bfloat16", False)]
)
def test_lumina_dimoo_learns_publishes_and_exports(make_learner, folder, tmp_path, zero_stage, dtype, recompute):
    config = replace(MODEL, dtype=dtype)
    batch = batch_of(LuminaDimoo.load(config, folder))
    learner = make_learner(LuminaDimoo.load(config, folder), zero_stage=zero_stage, activation_checkpointing=recompute)
    before = weights(learner)
    metrics = learner.update(batch, 0)
    assert metrics["policy/logprob_gap_max"] < (2e-5 if dtype == "float32" else 0.1)
    assert metrics["policy/guidance_gap"] > 0
    later = learner.update(batch, 1)
    assert later["learner/loss"] < metrics["learner/loss"] - 0.01
    named = list(weights(learner).items())
    assert {name for name, _ in named} == set(learner.policy.shapes)
    assert not [name for name, array in named if np.array_equal(array, before[name])]
    # What the sampler checks before it takes weights, and what a later run loads.
    verified_weights(learner.manifest(), named, learner.policy.shapes)
    learner.export(tmp_path / "policy")
    loaded = LuminaDimoo.load(config, tmp_path / "policy").module.state_dict()
    for name, array in named:
        assert torch.equal(loaded[name], to_tensor(array).to(loaded[name].dtype)), name
