from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

from tests.rollout.conftest import logprob_gap, publication, sampling_with, tokens
from unirl.config import ModelConfig
from unirl.models.janus_pro import JanusPro
from unirl.models.policy import Scoring
from unirl.rollout.torch_sampler import TorchSampler


@pytest.fixture(scope="module")
def native(lab_folder):
    model = JanusForConditionalGeneration.from_pretrained(lab_folder, dtype=torch.float32, local_files_only=True)
    model.generation_config.top_k = None
    return model.eval()


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_greedy_images_equal_transformers_own(plain, native, lab_requests, guidance):
    requests = lab_requests(0, 6, seeds=1)
    ids, mask = plain.policy.pad_prompts([plain.policy.prompts.encode_generation(r.sample) for r in requests])
    wanted = native.generate(
        ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=guidance
    )
    assert tokens(plain.sample(requests, sampling_with(guidance, 0.0))) == wanted.tolist()


def test_greedy_answers_equal_transformers_own(plain, native, lab_requests):
    requests = lab_requests(6, 0, seeds=1)
    groups = plain.sample(requests, sampling_with(temperature=0.0))
    for group in groups:
        (answer,) = group.trajectories
        prompt = torch.from_numpy(answer.prompt_ids).long()[None]
        pixels = plain.policy._pixels([group.request.sample.image])
        wanted = native.generate(
            prompt, pixel_values=pixels, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
        )
        assert answer.completion_ids.tolist() == wanted[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("guidance", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_the_learners(plain, lab_requests, guidance, temperature):
    groups = plain.sample(lab_requests(4, 4), sampling_with(guidance, temperature))
    scoring = Scoring(text_temperature=temperature, image_temperature=temperature, guidance_scale=guidance)
    gaps = logprob_gap(plain.policy, groups, scoring)
    assert gaps["understanding"] <= 1e-5
    assert gaps["generation"] <= 1e-5 * (2 * guidance - 1)


def test_chunks_and_order_change_no_token(plain, lab_requests):
    requests = lab_requests(4, 4)
    together = plain.sample(requests, sampling_with())
    small = TorchSampler(plain.policy, plain.max_model_len, 4)
    assert tokens(small.sample(requests, sampling_with())) == tokens(together)
    turned = plain.sample(requests[::-1], sampling_with())
    assert tokens(turned[::-1]) == tokens(together)


def test_trajectories_say_how_they_ended(plain, lab_requests):
    question, drawing = plain.sample(lab_requests(1, 1, seeds=2), sampling_with(max_tokens=6))
    assert {t.finish_reason for t in question.trajectories} == {"length"}
    assert all(len(t.completion_ids) == 6 for t in question.trajectories)
    assert {t.finish_reason for t in drawing.trajectories} == {"stop"}
    assert {t.image.shape for t in drawing.trajectories} == {(20, 20, 3)}
    (whole,) = plain.sample(lab_requests(1, 0, seeds=8), sampling_with())
    ended = [t for t in whole.trajectories if t.finish_reason == "stop"]
    assert ended
    for trajectory in ended:
        assert (trajectory.completion_ids == plain.policy.end_id).nonzero()[0].tolist() == [
            len(trajectory.completion_ids) - 1
        ]
        assert trajectory.text.startswith("<think>")
        assert trajectory.policy_version == -1


def test_new_weights_change_the_tokens_and_wrong_ones_nothing(lab_folder, lab_requests):
    sampler = TorchSampler(JanusPro.load(ModelConfig(), lab_folder), 128, 128)
    requests = lab_requests(2, 2)
    before = tokens(sampler.sample(requests, sampling_with()))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + 0.05 * value.std() * torch.randn(value.shape, generator=generator) if value.ndim > 1 else value
        for name, value in sampler.policy.module.state_dict().items()
    }
    manifest, named = publication(sampler.policy, state, 7)
    with pytest.raises(ValueError, match="expected checksum"):
        sampler.load_weights(replace(manifest, checksum="0"), named)
    assert tokens(sampler.sample(requests, sampling_with())) == before
    sampler.load_weights(manifest, iter(named))
    groups = sampler.sample(requests, sampling_with())
    assert tokens(groups) != before
    assert {t.policy_version for group in groups for t in group.trajectories} == {7}
    assert all(np.array_equal(sampler.policy.module.state_dict()[name], array) for name, array in named)
