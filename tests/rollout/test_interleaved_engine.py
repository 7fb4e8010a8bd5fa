"""The engine of interleaved replies on a tiny Anole, against the plain sampler and one teacher-forced pass."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.joint_checkpoints import write_anole
from tests.rollout.conftest import publication
from tests.rollout.interleaved import check_replies, gaps, images, tokens
from unirl.config import ModelConfig
from unirl.models import anole
from unirl.rollout.interleaved_engine import InterleavedEngine
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest
from unirl.rollout.interleaved_torch import InterleavedTorch
from unirl.rollout.vllm_process import EngineSettings, with_memory
from unirl.types import Segment, TokenKind, Turn

MODEL = ModelConfig(family="anole")
SETTINGS = EngineSettings(max_model_len=160, max_num_seqs=64, kv_cache_memory_gib=0.0625)
SAMPLING = InterleavedSampling(max_tokens=64, grid=(3, 2))
GREEDY = replace(SAMPLING, text=Drawing(temperature=0), image=Drawing(temperature=0))
WORDS = ["draw", "a", "red", "circle", "and", "a", "green", "square", ".", "what", "color", "is", "it", "?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_anole(tmp_path_factory.mktemp("anole") / "small")


@pytest.fixture(scope="module")
def policy(folder):
    return anole.load_interleaved(MODEL, folder)


@pytest.fixture(scope="module")
def engine(folder):
    """Whoever changes its weights puts them back."""
    return InterleavedEngine(MODEL, folder, SETTINGS)


@pytest.fixture(scope="module")
def plain(policy):
    return InterleavedTorch(policy, SETTINGS.max_model_len)


@pytest.fixture(scope="module")
def make_requests(policy):
    """Prompts of growing length, which start alike; every third shows a picture of another size."""

    def make(count, seeds=4, **more):
        requests = []
        for index in range(count):
            segments = [Segment(text=" ".join((WORDS * 3)[: 5 + index]))]
            codes = []
            if index % 3 == 2:
                segments.insert(0, Segment(image=np.zeros((8, 8, 3), np.uint8)))
                codes.append(np.arange(4, dtype=np.int32).reshape(2, 2))
            prompt = policy.layout.encode([Turn(role="user", segments=tuple(segments))], codes)
            own = tuple(range(100 * index, 100 * index + seeds))
            requests.append(InterleavedRequest(request_id=str(index), prompt=prompt, seeds=own, **more))
        return requests

    return make


def test_every_reply_is_well_formed(engine, policy, make_requests, report):
    done = []
    replies = engine.generate(make_requests(25, seeds=8), SAMPLING, done.append)
    assert len(replies) == 200
    assert {id(reply) for reply in done} == {id(reply) for reply in replies}
    drawn = check_replies(replies, policy.layout, SAMPLING.grid, SAMPLING.max_tokens)
    report(f"{len(replies)} interleaved replies, all well formed, with {drawn} images")
    assert drawn > 100
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        GREEDY,
        replace(SAMPLING, text=Drawing(temperature=0), image=Drawing(temperature=0.7)),
        replace(SAMPLING, text=Drawing(temperature=1.3, top_k=6), image=Drawing(temperature=0)),
        replace(SAMPLING, text=Drawing(top_p=0.8), image=Drawing(temperature=0.8, top_k=5, top_p=0.9)),
        replace(SAMPLING, grid=None, max_images=0),
    ],
    ids=["sampled", "greedy", "greedy text", "greedy images", "cut off", "no images"],
)
def test_tokens_equal_the_plain_samplers(engine, plain, make_requests, sampling, report):
    requests = make_requests(6, seeds=2) + make_requests(3, seeds=1, begin_with_image=True) * bool(sampling.grid)
    ours, theirs = engine.generate(requests, sampling), plain.generate(requests, sampling)
    assert tokens(ours) == tokens(theirs)
    gap = max(float(abs(a.logprobs - b.logprobs).max()) for a, b in zip(ours, theirs, strict=True))
    report(f"max |engine - plain| log-prob of interleaved replies: {gap:.2g} nats")
    assert gap <= 1e-5
    for a, b in zip(ours, theirs, strict=True):
        assert (a.request_id, a.seed, a.finish_reason, a.well_formed) == (b.request_id, b.seed, b.finish_reason, True)
        assert a.kinds.tolist() == b.kinds.tolist()
        assert len(a.segments) == len(b.segments)


@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, replace(SAMPLING, text=Drawing(temperature=1.4), image=Drawing(temperature=0.6)), GREEDY],
    ids=["temperature 1", "own temperatures", "greedy"],
)
def test_logprobs_equal_the_learners(engine, policy, make_requests, sampling, report):
    replies = engine.generate(make_requests(12) + make_requests(4, begin_with_image=True), sampling)
    if sampling is GREEDY:
        # The pass scores greedy tokens as they are kept: under the law at temperature 1.
        sampling = replace(sampling, text=Drawing(), image=Drawing())
    text, image = gaps(policy, replies, sampling)
    report(f"max |engine - learner| log-prob of interleaved replies: text {text:.2g}, codes {image:.2g} nats")
    assert text <= 1e-5
    assert image <= 1e-5
    given = np.concatenate([reply.kinds for reply in replies]) == TokenKind.END
    assert (np.concatenate([reply.logprobs for reply in replies])[given] == 0).all()


def test_company_and_order_change_no_token(engine, make_requests):
    requests = make_requests(8)
    wanted = {(reply.request_id, reply.seed): reply.ids.tolist() for reply in engine.generate(requests, SAMPLING)}
    alone = [reply for request in requests for reply in engine.generate([request], SAMPLING)]
    single = [replace(request, seeds=request.seeds[1:2]) for request in requests]
    for reply in (*engine.generate(requests[::-1], SAMPLING), *alone, *engine.generate(single, SAMPLING)):
        assert reply.ids.tolist() == wanted[reply.request_id, reply.seed]


def test_no_image_is_begun_that_would_not_be_whole(engine, make_requests):
    for max_tokens in (9, 10, 17, 18):
        replies = engine.generate(make_requests(10, seeds=6), replace(SAMPLING, max_tokens=max_tokens))
        assert all(reply.well_formed and len(reply.ids) <= max_tokens for reply in replies)
        most = max(len(images(reply)) for reply in replies)
        # An image takes 8 tokens, and one is kept for what follows.
        assert 1 <= most <= (max_tokens - 1) // 8


def test_images_are_limited_in_number(engine, make_requests):
    for limit in (0, 1, 2):
        for begin in (False, True)[: 1 + bool(limit)]:
            requests = make_requests(10, seeds=6, begin_with_image=begin)
            replies = engine.generate(requests, replace(SAMPLING, max_images=limit))
            assert max(len(images(reply)) for reply in replies) == limit


def test_a_reply_begins_with_an_image_where_asked(engine, policy, make_requests):
    layout = policy.layout
    for reply in engine.generate(make_requests(4, begin_with_image=True), SAMPLING):
        assert reply.prompt_ids[-1] == layout.image.begin
        assert reply.kinds[:7].tolist() == [TokenKind.CODE] * 6 + [TokenKind.END]
        assert np.array_equal(reply.segments[0].codes.ravel(), reply.ids[:6] - layout.vocabulary.first_code)


def test_a_reply_goes_on_within_an_image(engine, make_requests):
    """A prompt that ends behind some of the codes is continued as if nothing had come between, here greedily."""
    (request,) = make_requests(1, seeds=1, begin_with_image=True)
    (whole,) = engine.generate([request], GREEDY)
    for cut in (1, 4, 6, 9):
        ids = np.concatenate([whole.prompt_ids, whole.ids[:cut]])
        prompt = replace(
            request.prompt, ids=ids, kinds=np.zeros(len(ids), np.uint8), in_loss=np.zeros(len(ids), np.bool_)
        )
        resumed = replace(request, prompt=prompt, begin_with_image=False)
        (rest,) = engine.generate([resumed], replace(GREEDY, max_tokens=64 - cut))
        assert rest.ids.tolist() == whole.ids[cut:].tolist()
        assert rest.well_formed
        assert cut > 6 or np.array_equal(images(rest)[0], images(whole)[0])


def test_a_modality_can_be_greedy_alone(engine, make_requests):
    first = [replace(request, seeds=(0, 1, 2, 3)) for request in make_requests(3, begin_with_image=True)]
    for greedy in ("text", "image"):
        replies = engine.generate(first, replace(SAMPLING, **{greedy: Drawing(temperature=0)}))
        for start in range(0, len(replies), 4):
            codes = {tuple(reply.ids[:6].tolist()) for reply in replies[start : start + 4]}
            assert (len(codes) == 1) == (greedy == "image")


def test_new_weights_give_the_new_policys_tokens(engine, policy, folder, make_requests):
    requests, kept = make_requests(6), policy.module.state_dict()
    before = tokens(engine.generate(requests, SAMPLING))
    moved = anole.load_interleaved(MODEL, folder)
    with torch.no_grad():
        for parameter in moved.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim))
    try:
        engine.load_weights(*publication(moved, moved.module.state_dict(), 5))
        replies = engine.generate(requests, SAMPLING)
        assert tokens(replies) == tokens(InterleavedTorch(moved, SETTINGS.max_model_len).generate(requests, SAMPLING))
        assert tokens(replies) != before
        assert max(gaps(moved, replies, SAMPLING)) <= 1e-5
        assert engine.policy_version == 5
    finally:
        engine.load_weights(*publication(policy, kept, 0))
    assert tokens(engine.generate(requests, SAMPLING)) == before


def test_what_cannot_be_served_is_said_before_anything_is_sampled(engine, plain, make_requests, policy):
    (request,) = make_requests(1, seeds=1)
    begun = replace(request, begin_with_image=True)
    ends = np.append(request.prompt.ids, [policy.layout.image.begin, 30]).astype(np.int32)
    torn = replace(request.prompt, ids=ends, kinds=np.zeros(len(ends), np.uint8), in_loss=np.zeros(len(ends), np.bool_))
    for wrong, sampling, message in (
        (request, replace(SAMPLING, max_tokens=155), r"request 0: expected prompt and reply within rollout.max_model_"),
        (request, replace(SAMPLING, max_tokens=8), r"request 0: expected rollout.max_tokens of at least 9, what an"),
        (begun, replace(SAMPLING, max_tokens=7), r"request 0: expected rollout.max_tokens of at least 8"),
        (request, replace(SAMPLING, grid=None), r"grid: expected rows and columns of image codes, since images may"),
        (request, replace(SAMPLING, grid=(0, 2)), r"grid: expected positive rows and columns of image codes; got 0 x"),
        (begun, replace(SAMPLING, max_images=0), r"request 0: expected max_images above 0, since the reply begins"),
        (replace(request, prompt=torn), SAMPLING, r"request 0: expected a prompt that ends in text or within an ima"),
    ):
        for sampler in (engine, plain):
            with pytest.raises(ValueError, match=message):
                sampler.generate([wrong, request], sampling)
    assert not engine._engine.llm.llm_engine.has_unfinished_requests()


def test_little_memory_changes_no_token(engine, folder, make_requests):
    # 7 blocks of 32 tokens, 2 layers, 2 heads of 32: what 7 sequences take until the first grows beyond its block.
    memory = 7 * 32 * 2 * 2 * 2 * 32 * 4 / 2**30
    small = InterleavedEngine(MODEL, folder, replace(SETTINGS, kv_cache_memory_gib=memory, max_num_seqs=7))
    requests, waits = make_requests(6, begin_with_image=True), []
    scheduler = small._engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (waits.append(None), preempt(*args, **kwargs))[1]
    assert tokens(small.generate(requests, SAMPLING)) == tokens(engine.generate(requests, SAMPLING))
    assert waits
    with pytest.raises(ValueError, match=r"rollout.kv_cache_memory_gib: expected at least"):
        InterleavedEngine(MODEL, folder, replace(SETTINGS, kv_cache_memory_gib=memory / 2))


def test_memory_that_nobody_set_holds_a_sequence():
    # Chameleon 7B: 32 layers, 32 heads of 128, keys and values, 4 bytes: 1 MiB a token.
    trunk = SimpleNamespace(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32)
    settings = replace(SETTINGS, max_model_len=4096, kv_cache_memory_gib=None)
    assert with_memory(trunk, settings, torch.float32).kv_cache_memory_gib == 4.0
    assert with_memory(trunk, settings, torch.bfloat16, num_streams=2).kv_cache_memory_gib == 4.0
    assert with_memory(trunk, replace(settings, max_model_len=64), torch.float32).kv_cache_memory_gib == 1.0


def test_bfloat16_engine_stays_near_the_learner(folder, make_requests, report):
    model = ModelConfig(family="anole", dtype="bfloat16")
    rounded = InterleavedEngine(model, folder, SETTINGS)
    assert rounded._engine.model.compute_logits(torch.zeros(1, 64, dtype=torch.bfloat16)).dtype == torch.float32
    text, image = gaps(anole.load_interleaved(model, folder), rounded.generate(make_requests(6), SAMPLING), SAMPLING)
    report(f"max |engine - learner| log-prob of interleaved replies in bfloat16: text {text:.2g}, codes {image:.2g}")
    assert max(text, image) < 0.5
