"""Interleaved replies of every family but Anole, each against the plain sampler and one teacher-forced pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.janus_checkpoints import write_janus
from tests.joint_checkpoints import write_emu3, write_liquid
from tests.rollout.conftest import publication
from tests.rollout.interleaved import gaps, images, tokens
from unirl.config import ModelConfig
from unirl.models.policy import load_interleaved
from unirl.rollout.interleaved_engine import InterleavedEngine
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest
from unirl.rollout.interleaved_torch import InterleavedTorch
from unirl.rollout.vllm_process import EngineSettings
from unirl.types import Segment, Turn

pytestmark = pytest.mark.slow

SETTINGS = EngineSettings(max_model_len=224, max_num_seqs=16, kv_cache_memory_gib=0.0625)
# Heads of a size that the CPU's kernels take; Liquid's own is 256.
CASES = {
    "emu3": ("emu3", write_emu3, {"head_dim": 32}),
    "emu3 native": ("emu3", write_emu3, {"head_dim": 32, "native": True}),
    "liquid": ("liquid", write_liquid, {"head_dim": 256}),
    "liquid tied": ("liquid", write_liquid, {"head_dim": 32, "tied": True}),
    "janus_pro": ("janus_pro", write_janus, {}),
}
PICTURE = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)


SLOW = ("emu3 native", "liquid tied", "janus_pro")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def case(request, tmp_path_factory):
    """Settings, folder and grid."""
    family, write, options = CASES[request.param]
    folder = write(tmp_path_factory.mktemp(family) / "small", **options)
    return ModelConfig(family=family), folder, (4, 4) if family == "janus_pro" else (2, 3)


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
def requests(policy, case):
    """Words alone, a picture that is shown, one that the assistant drew before; half begin with an image."""

    def say(role, *parts):
        return Turn(
            role=role,
            segments=tuple(Segment(text=p) if isinstance(p, str) else Segment(image=p) for p in parts),
        )

    dialogues = [
        [say("user", "what is a cat ?")],
        [say("user", PICTURE, "what is the cat ?")],
        [say("user", "a red cat"), say("assistant", PICTURE), say("user", "a dog")],
        [say("user", PICTURE), say("assistant", "a cat", PICTURE), say("user", "a red", PICTURE)],
    ]
    made = []
    for index, turns in enumerate(dialogues):
        count = len(policy.layout.images_to_code(turns))
        codes = [np.arange(np.prod(case[2]), dtype=np.int32).reshape(case[2]) % 16 for _ in range(count)]
        prompt = policy.layout.encode(turns, codes)
        seeds = tuple(range(10 * index, 10 * index + 2))
        made.append(InterleavedRequest(request_id=f"{index}", prompt=prompt, seeds=seeds))
        made.append(InterleavedRequest(request_id=f"{index}+", prompt=prompt, seeds=seeds, begin_with_image=True))
    return made


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
