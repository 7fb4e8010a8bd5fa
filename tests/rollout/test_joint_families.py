"""Answers and images of families with one joint vocabulary: the engine, the plain sampler and the learner agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.joint_rollouts import CASES, SIZE, make_requests, write_case
from tests.rollout.conftest import engine_config, logprob_gap, publication, sampling_with, tokens
from unirl.models.joint_policy import EMBEDDING
from unirl.models.named_arrays import compare
from unirl.models.policy import Scoring, load_policy
from unirl.rollout.build import build_sampler
from unirl.rollout.torch_sampler import TorchSampler

CONFIG = engine_config(max_model_len=256, max_num_seqs=32)


@pytest.fixture(
    scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] * (c == "liquid tied")) for c in CASES]
)
def case(request, tmp_path_factory):
    """Settings and folder."""
    return write_case(tmp_path_factory.mktemp("joint") / "c", request.param)


@pytest.fixture(scope="module")
def joint_plain(case):
    return build_sampler(*case, replace(CONFIG, backend="torch"), "both")


@pytest.fixture(scope="module")
def joint_engine(case):
    """The two-stream engine; whoever changes its weights puts them back."""
    return build_sampler(*case, replace(CONFIG, deterministic=False), "both")


@pytest.fixture(params=["torch", "vllm"])
def sampler(request, joint_plain, joint_engine):
    return joint_plain if request.param == "torch" else joint_engine


@pytest.mark.parametrize("guidance", [1.0, 3.0, 5.0])
def test_logprobs_equal_the_learners(sampler, joint_plain, case, guidance, report):
    groups = sampler.sample(make_requests(4, 4), sampling_with(guidance))
    gaps = logprob_gap(joint_plain.policy, groups, Scoring(guidance_scale=guidance))
    text, image = gaps["understanding"], gaps["generation"]
    who = f"{type(sampler).__name__}, {case[0].family}, guidance {guidance}"
    report(f"max |sampler - learner| log-prob, {who}: text {text:.2g} nats, image {image:.2g} nats")
    assert text <= 1e-5
    assert image <= 1e-5 * (2 * guidance - 1)


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (3.0, 1.0), (5.0, 0.7), (1.5, 0.0)])
def test_the_engines_tokens_equal_the_plain_samplers(joint_engine, joint_plain, guidance, temperature):
    requests, sampling = make_requests(4, 4), sampling_with(guidance, temperature)
    ours, theirs = joint_engine.sample(requests, sampling), joint_plain.sample(requests, sampling)
    assert tokens(ours) == tokens(theirs)
    for group, other in zip(ours, theirs, strict=True):
        for a, b in zip(group.trajectories, other.trajectories, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=5e-5)
            assert (a.text, a.finish_reason, a.seed) == (b.text, b.finish_reason, b.seed)
            assert a.image is None or np.array_equal(a.image, b.image)
            assert np.array_equal(a.prompt_ids, b.prompt_ids)


def test_company_and_order_change_no_token(sampler):
    requests, sampling = make_requests(4, 4), sampling_with()
    mixed = {group.request.request_id: tokens([group]) for group in sampler.sample(requests, sampling)}
    alone = [sampler.sample([request], sampling)[0] for request in requests]
    for group in (*alone, *sampler.sample(requests[::-1], sampling)):
        assert tokens([group]) == mixed[group.request.request_id]


def test_completions_hold_what_their_modality_may(sampler, joint_plain):
    policy = joint_plain.policy
    for group in sampler.sample(make_requests(3, 3), sampling_with(3.0, 1.5)):
        for trajectory in group.trajectories:
            if group.request.task == "generation":
                assert 0 <= trajectory.completion_ids.min() <= trajectory.completion_ids.max() < policy.num_codes
                assert trajectory.image.shape == (SIZE, SIZE, 3)
                assert trajectory.prompt_ids[-1] == policy.layout.image.begin
            else:
                assert policy.allowed_text_ids[trajectory.completion_ids].all()
                assert isinstance(trajectory.text, str)


def test_a_question_shows_its_own_image_as_codes(joint_engine, joint_plain):
    requests = make_requests(2, 0, seeds=1)
    for group in joint_engine.sample(requests, sampling_with()):
        (codes,) = joint_plain.policy.codec().encode([group.request.sample.image])
        (trajectory,) = group.trajectories
        ids = trajectory.prompt_ids - joint_plain.policy.first_code
        assert ids[(ids >= 0) & (ids < joint_plain.policy.num_codes)].tolist() == codes.ravel().tolist()


def test_new_weights_reach_the_engine(joint_engine, joint_plain, case):
    moved = load_policy(*case)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    requests = make_requests(3, 3)
    before = tokens(joint_engine.sample(requests, sampling_with()))
    manifest, named = publication(moved, moved.module.state_dict(), 1)
    assert EMBEDDING in compare(manifest, joint_engine.weight_slices()).differing
    joint_engine.load_weights(manifest, named)
    assert not compare(manifest, joint_engine.weight_slices()).is_stale
    groups = joint_engine.sample(requests, sampling_with())
    joint_engine.load_weights(*publication(joint_plain.policy, joint_plain.policy.module.state_dict(), 0))
    assert tokens(groups) == tokens(TorchSampler(moved, 256, 32).sample(requests, sampling_with())) != before
    assert logprob_gap(moved, groups, Scoring(guidance_scale=3.0))["generation"] <= 5e-5
    assert tokens(joint_engine.sample(requests, sampling_with())) == before


def test_weights_of_another_model_are_refused(joint_engine, joint_plain):
    manifest, named = publication(joint_plain.policy, joint_plain.policy.module.state_dict(), 9)
    wrong = replace(manifest, tensors=(replace(manifest.tensors[0], name="other"), *manifest.tensors[1:]))
    with pytest.raises(ValueError, match="manifest that differs in"):
        joint_engine.load_weights(wrong, iter(named))


def test_answers_run_in_one_stream_and_images_without_the_text_head(joint_engine):
    model, ran = joint_engine._engine.model, []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name.rpartition(".")[2]))
        for name, module in model.named_modules()
        if name.endswith(("attn_unconditional", "logits_processor"))
    ]
    joint_engine.sample(make_requests(1, 0), sampling_with())
    assert set(ran) == {"logits_processor"}
    ran.clear()
    joint_engine.sample(make_requests(0, 1), sampling_with())
    assert set(ran) == {"attn_unconditional"}
    ran.clear()
    joint_engine.sample(make_requests(0, 1), sampling_with(1.0))
    assert not ran
    for hook in hooks:
        hook.remove()
