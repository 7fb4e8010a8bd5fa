"""Interleaved replies of every family's fine-tuned export, against the plain sampler and one teacher-forced pass."""

from dataclasses import replace

import pytest
import torch

from tests.models.conversations import CASES, codes_of, config_of, picture, say
from tests.rollout.conftest import publication
from tests.rollout.interleaved import check_replies, gaps, images, tokens
from unirl.models.policy import load_interleaved
from unirl.rollout.interleaved_engine import InterleavedEngine
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest
from unirl.rollout.interleaved_torch import InterleavedTorch
from unirl.rollout.vllm_process import EngineSettings

SETTINGS = EngineSettings(max_model_len=224, max_num_seqs=64, kv_cache_memory_gib=0.0625)
PICTURE = picture(size=(9, 12))
SLOW = ("emu3 native", "liquid tied")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def case(request, ten_steps):
    """Settings, folder and grid."""
    grid = (4, 4) if request.param == "janus_pro" else (2, 3)
    return config_of(request.param), ten_steps / request.param / "tuned", grid


@pytest.fixture(scope="module")
def policy(case):
    settings, folder, _ = case
    return load_interleaved(settings, folder)


@pytest.fixture(scope="module")
def engine(case):
    settings, folder, _ = case
    return InterleavedEngine(settings, folder, SETTINGS)


@pytest.fixture(scope="module")
def sampling(case):
    """Text is drawn hot, so that many ids and at times an image come up."""
    return InterleavedSampling(max_tokens=70, grid=case[2], text=Drawing(temperature=2.0))


@pytest.fixture(scope="module")
def make_requests(policy, case):
    """Words alone, a picture that is shown, one that the assistant drew before; half begin with an image."""
    dialogues = [
        [say("user", "what is a red ?")],
        [say("user", PICTURE, "what is ?")],
        [say("user", "a red"), say("assistant", PICTURE), say("user", "a green")],
        [say("user", PICTURE), say("assistant", "a red", PICTURE), say("user", "is", PICTURE)],
    ]

    def make(seeds):
        made = []
        for index, turns in enumerate(dialogues):
            prompt = policy.layout.encode(turns, codes_of(policy.layout, turns, grid=case[2]))
            for mark in ("", "+"):
                own = tuple(range(100 * index, 100 * index + seeds))
                made.append(
                    InterleavedRequest(
                        request_id=f"{index}{mark}", prompt=prompt, seeds=own, begin_with_image=bool(mark)
                    )
                )
        return made

    return make


@pytest.fixture(scope="module")
def requests(make_requests):
    return make_requests(2)


def test_two_hundred_replies_are_well_formed(engine, policy, make_requests, sampling, case, report):
    replies = engine.generate(make_requests(25), sampling)
    drawn = check_replies(replies, policy.layout, sampling.grid, sampling.max_tokens)
    report(f"{len(replies)} replies of fine-tuned {case[0].family}, all well formed, with {drawn} images")
    assert len(replies) == 200
    assert drawn > 100


@pytest.mark.slow
def test_tokens_equal_the_plain_samplers(engine, policy, requests, sampling):
    plain = InterleavedTorch(policy, SETTINGS.max_model_len)
    for settings in (sampling, replace(sampling, text=Drawing(temperature=0), image=Drawing(temperature=0))):
        replies = engine.generate(requests, settings)
        assert tokens(replies) == tokens(plain.generate(requests, settings))
        assert all(reply.well_formed for reply in replies)
        assert sum(len(images(reply)) for reply in replies) >= 8


def test_logprobs_equal_the_learners(engine, policy, case, requests, sampling, report):
    replies = engine.generate(requests, sampling)
    shown = {request.request_id: request.prompt.pixels for request in requests}
    pixels = tuple(picture for reply in replies for picture in shown[reply.request_id])
    text, image = gaps(policy, replies, sampling, pixels)
    family = case[0].family
    report(
        f"max |engine - learner| log-prob of {family}'s interleaved replies: text {text:.2g}, codes {image:.2g} nats"
    )
    assert max(text, image) <= 1e-5


@pytest.mark.slow
def test_new_weights_reach_the_engine(engine, case, policy, requests, sampling):
    settings, folder, _ = case
    moved = load_interleaved(settings, folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    before = tokens(engine.generate(requests, sampling))
    engine.load_weights(*publication(moved, moved.module.state_dict(), 1))
    after = tokens(engine.generate(requests, sampling))
    engine.load_weights(*publication(policy, policy.module.state_dict(), 0))
    assert after == tokens(InterleavedTorch(moved, SETTINGS.max_model_len).generate(requests, sampling)) != before
    assert tokens(engine.generate(requests, sampling)) == before


def test_a_picture_without_its_placeholders_is_refused(engine, policy, requests, sampling):
    if not policy.layout.sees_pixels:
        assert not any(request.prompt.pixels for request in requests)
        return
    torn = replace(requests[0], prompt=replace(requests[0].prompt, pixels=(PICTURE,)))
    with pytest.raises(ValueError, match="packed row: expected 16 image placeholders for 1 images; got 0"):
        engine.generate([torn], sampling)
