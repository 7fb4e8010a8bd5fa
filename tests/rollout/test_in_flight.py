"""Weights that come while completions are being drawn, in the plain sampler and in the engine."""

import numpy as np
import pytest
import torch

from tests.rollout.conftest import MODEL, engine_config, publication, sampling_with, tokens
from unirl.models.janus_pro import JanusPro
from unirl.models.policy import Scoring
from unirl.rollout.build import build_sampler
from unirl.rollout.torch_sampler import TorchSampler
from unirl.types import LearnerRow

SWITCH = 7
"""Tokens drawn before the weights come."""


@pytest.fixture(scope="module")
def moved(lab_folder):
    """The checkpoint with other weights in trunk and image head; prompts stay embedded as before."""
    policy = JanusPro.load(MODEL, lab_folder)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.module.named_parameters():
        if parameter.ndim > 1 and ("language_model.layers" in name or "generation_head" in name):
            parameter.data += 0.3 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(params=["torch", "vllm"])
def sampler(request, lab_folder):
    """With the checkpoint's weights as version 0; whatever it loads is undone."""
    if request.param == "vllm":
        sampler = request.getfixturevalue("engine")
    else:
        sampler = build_sampler(MODEL, lab_folder, engine_config(backend="torch"), "both")
    original = JanusPro.load(MODEL, lab_folder)
    sampler.load_weights(*publication(original, original.module.state_dict(), 0))
    yield sampler
    sampler.between_tokens = None
    sampler.load_weights(*publication(original, original.module.state_dict(), 0))


def load_after(sampler, num_tokens, *publications):
    """Load each publication in turn, each after so many tokens more."""
    calls, coming = iter(range(1, 1000)), list(publications)

    def between_tokens():
        if next(calls) % num_tokens == 0 and coming:
            manifest, named = coming.pop(0)
            sampler.load_weights(manifest, iter(named))

    sampler.between_tokens = between_tokens


def trajectories(groups):
    return [(group.request, trajectory) for group in groups for trajectory in group.trajectories]


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_equal_weights_change_no_token_and_every_span_is_noted(sampler, plain, lab_requests, task):
    requests = lab_requests(*((4, 0) if task == "understanding" else (0, 4)))
    before = tokens(sampler.sample(requests, sampling_with()))
    state = plain.policy.module.state_dict()
    load_after(sampler, SWITCH, publication(plain.policy, state, 1), publication(plain.policy, state, 2))
    groups = sampler.sample(requests, sampling_with())
    assert tokens(groups) == before
    spans = ((0, 0), (SWITCH, 1), (2 * SWITCH, 2))
    for _, trajectory in trajectories(groups):
        seen = tuple(span for span in spans if span[0] < len(trajectory.completion_ids))
        assert trajectory.version_spans == (seen if len(seen) > 1 else ())
        assert trajectory.policy_version == 0
    assert any(len(t.version_spans) == 3 for _, t in trajectories(groups))


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_each_token_is_drawn_under_the_weights_of_its_span(sampler, plain, moved, lab_requests, task):
    """Up to the switch tokens are the old weights'; every log-probability is what the span's weights score."""
    requests = lab_requests(*((4, 0) if task == "understanding" else (0, 4)))
    before = tokens(sampler.sample(requests, sampling_with()))
    load_after(sampler, SWITCH, publication(moved, moved.module.state_dict(), 5))
    groups = sampler.sample(requests, sampling_with())
    policies, worst, wrong = {0: plain.policy, 5: moved}, 0.0, 0.0
    for (request, trajectory), old in zip(trajectories(groups), before, strict=True):
        ids = trajectory.completion_ids
        assert ids[:SWITCH].tolist() == old[:SWITCH]
        versions = np.where(np.arange(len(ids)) < SWITCH, 0, 5)
        assert trajectory.version_spans == (((0, 0), (SWITCH, 5)) if len(ids) > SWITCH else ())
        scores = {version: score(policy, request, trajectory) for version, policy in policies.items()}
        worst = max(worst, np.abs(np.where(versions == 5, scores[5], scores[0]) - trajectory.logprobs).max())
        wrong = max(wrong, np.abs(scores[0] - trajectory.logprobs)[SWITCH:].max(initial=0.0))
    assert worst <= 1e-5 * 5
    assert wrong > 0.01, "the old weights score the new span otherwise, or this test says nothing"
    assert tokens(groups) != before
    assert tokens(sampler.sample(requests, sampling_with())) == tokens(
        new_sampler(moved).sample(requests, sampling_with())
    ), "what follows is the new weights' alone"


def score(policy, request, trajectory):
    row = LearnerRow(
        task=request.task,
        prompt_ids=trajectory.prompt_ids,
        image=request.sample.image if request.task == "understanding" else None,
        completion_ids=trajectory.completion_ids,
        loss_mask=trajectory.loss_mask,
        old_logprobs=trajectory.logprobs,
        advantage=0.0,
    )
    with torch.no_grad():
        (scores,) = policy.score([row], Scoring(guidance_scale=3.0))
    return scores.logprobs[0].numpy()


def new_sampler(policy):
    """A plain sampler with these weights alone."""
    return TorchSampler(policy, 200, 128)
