from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

from tests.janus_checkpoints import write_janus
from tests.rollout.conftest import MODEL, engine_config, logprob_gap, publication, sampling_with, tokens
from unirl.config import ModelConfig
from unirl.models.janus_pro import EMBEDDING, JanusPro
from unirl.models.named_arrays import compare
from unirl.models.policy import Scoring
from unirl.rollout.build import build_sampler
from unirl.types import GenerationSample, RolloutRequest, UnderstandingSample


@pytest.fixture(scope="module")
def text_engine(lab_folder):
    """One stream, answers only, each unit of work alone."""
    return build_sampler(MODEL, lab_folder, engine_config(), "text")


@pytest.fixture(scope="module")
def public_folder(tmp_path_factory):
    return write_janus(tmp_path_factory.mktemp("janus") / "untied", shard="200KB")


@pytest.fixture(scope="module")
def public_requests():
    """Prompts for the public layout, most of which start alike."""
    picture = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    words = "what is the cat on ? a red mat and a blue".replace(" and", "").split()
    requests = []
    for index in range(6):
        text = " ".join(words * 5 + ["cat"] * index)
        question = UnderstandingSample(id="q", image=picture, question=text, choices=("red", "blue"), answer="A")
        drawing = GenerationSample(id="g", prompt=text)
        for task, sample in (("understanding", question), ("generation", drawing)):
            seeds = tuple(range(100 * index, 100 * index + 3))
            requests.append(
                RolloutRequest(request_id=f"{index}/{task}", pair_id=str(index), task=task, sample=sample, seeds=seeds)
            )
    return requests


@pytest.fixture
def restored(engine, plain):
    """The engine, with the checkpoint's weights again afterwards."""
    yield engine
    engine.load_weights(*publication(plain.policy, plain.policy.module.state_dict(), 0))


def moved_policy(folder, seed=0):
    """The checkpoint with every matrix moved a little."""
    policy = JanusPro.load(MODEL, folder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.module.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * parameter.data.std() * noise
    return policy


@pytest.mark.parametrize("guidance", [1.0, 3.0, 5.0])
def test_logprobs_equal_the_learners(engine, plain, lab_requests, guidance, report):
    groups = engine.sample(lab_requests(12, 12, seeds=8), sampling_with(guidance))
    gaps = logprob_gap(plain.policy, groups, Scoring(guidance_scale=guidance))
    text, image = gaps["understanding"], gaps["generation"]
    report(f"max |sampler - learner| log-prob at guidance {guidance}: text {text:.2g} nats, image {image:.2g} nats")
    assert gaps["understanding"] <= 1e-5
    assert gaps["generation"] <= 1e-5 * (2 * guidance - 1)


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (3.0, 1.0), (5.0, 0.7), (1.5, 0.0)])
def test_tokens_equal_the_plain_samplers(engine, plain, lab_requests, guidance, temperature):
    requests, sampling = lab_requests(8, 8), sampling_with(guidance, temperature)
    ours, theirs = engine.sample(requests, sampling), plain.sample(requests, sampling)
    assert tokens(ours) == tokens(theirs)
    for group, other in zip(ours, theirs, strict=True):
        for a, b in zip(group.trajectories, other.trajectories, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=5e-5)
            assert (a.text, a.finish_reason, a.seed) == (b.text, b.finish_reason, b.seed)
            assert a.image is None or np.array_equal(a.image, b.image)


def test_greedy_tokens_equal_transformers_own(engine, lab_folder, lab_requests):
    native = JanusForConditionalGeneration.from_pretrained(lab_folder, dtype=torch.float32, local_files_only=True)
    native.generation_config.top_k = None
    requests = lab_requests(4, 4, seeds=1)
    groups = engine.sample(requests, sampling_with(1.5, 0.0))
    for group in groups:
        (ours,) = group.trajectories
        prompt = torch.from_numpy(ours.prompt_ids).long()[None]
        inputs = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        if group.request.task == "understanding":
            pixels = engine._front._pixels([group.request.sample.image])
            wanted = native.generate(prompt, pixel_values=pixels, max_new_tokens=24, **inputs)[0, prompt.shape[1] :]
        else:
            wanted = native.generate(prompt, generation_mode="image", guidance_scale=1.5, **inputs)[0]
        assert ours.completion_ids.tolist() == wanted.tolist()


def test_first_code_follows_the_exact_distribution(engine, plain, lab_requests, report):
    (request,) = lab_requests(0, 1)
    count = 800
    request = replace(request, seeds=tuple(range(count)))
    (group,) = engine.sample([request], sampling_with(2.0))
    ids, mask = plain.policy.pad_prompts([group.trajectories[0].prompt_ids])
    with torch.no_grad():
        both = torch.cat([ids, plain.policy.unconditional(ids)])
        hidden = plain.policy.hidden_states(plain.policy.embed_text(both), mask.repeat(2, 1))[:, -1]
        cond, uncond = plain.policy.code_logits(hidden).double()
    wanted = (uncond + 2.0 * (cond - uncond)).softmax(0) * count
    counts = torch.bincount(torch.tensor([t.completion_ids[0] for t in group.trajectories]), minlength=len(wanted))
    common = wanted >= 5
    expected = torch.cat([wanted[common], wanted[~common].sum()[None]])
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.double), statistic / 2)
    report(f"first code: chi-square {statistic:.1f} at {len(expected) - 1} degrees of freedom, p = {p_value:.3f}")
    assert len(expected) > 5
    assert p_value > 1e-3


def test_company_and_order_change_no_token(engine, lab_requests, report):
    requests, sampling = lab_requests(6, 6), sampling_with()
    mixed = engine.sample(requests, sampling)
    wanted = {group.request.request_id: tokens([group]) for group in mixed}
    turned = engine.sample(requests[::-1], sampling)
    alone = [engine.sample([request], sampling)[0] for request in requests]
    halves = [
        group for task in ("understanding", "generation")
        for group in engine.sample([r for r in requests if r.task == task], sampling)
    ]  # fmt: skip
    groups = [*turned, *alone, *halves]
    pairs = [(a, b) for g in groups for a, b in zip(tokens([g]), wanted[g.request.request_id], strict=True)]
    flips = sum(a != b for a, b in pairs)
    num_tokens = sum(len(b) for _, b in pairs)
    report(f"{flips} of {len(pairs)} sequences ({num_tokens} tokens) differ in other company")
    assert flips == 0


def test_repetition_with_cached_prefixes_changes_nothing(engine, text_engine, lab_requests):
    for sampler, requests in ((engine, lab_requests(4, 4)), (text_engine, lab_requests(6, 0))):
        first = sampler.sample(requests, sampling_with())
        again = sampler.sample(requests, sampling_with())
        assert tokens(first) == tokens(again)


def test_answers_run_in_one_stream_and_equal_those_of_a_one_stream_engine(engine, text_engine, lab_requests):
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_: ran.append("second stream"))
        for name, module in engine._engine.model.named_modules()
        if name.endswith("attn_unconditional")
    ]
    hooks.append(engine._engine.model.generation_head.register_forward_hook(lambda *_: ran.append("image head")))
    requests = lab_requests(8, 0)
    answers = engine.sample(requests, sampling_with())
    assert not ran
    assert tokens(answers) == tokens(text_engine.sample(requests, sampling_with()))
    hooks.append(engine._engine.model.logits_processor.register_forward_hook(lambda *_: ran.append("text head")))
    engine.sample(lab_requests(0, 1), sampling_with())
    assert set(ran) == {"second stream", "image head"}
    ran.clear()
    engine.sample(lab_requests(0, 1), sampling_with(1.0))
    assert set(ran) == {"image head"}
    for hook in hooks:
        hook.remove()


def test_guidance_that_changes_between_calls_meets_no_stale_prefix(engine, plain, lab_requests):
    requests = lab_requests(0, 4)
    for guidance in (1.0, 3.0, 1.0, 5.0, 3.0):
        assert tokens(engine.sample(requests, sampling_with(guidance))) == tokens(
            plain.sample(requests, sampling_with(guidance))
        )


def test_new_weights_give_the_new_policys_tokens(restored, lab_folder, lab_requests):
    requests = lab_requests(6, 6)
    before = tokens(restored.sample(requests, sampling_with()))
    policy = moved_policy(lab_folder)
    manifest, named = publication(policy, policy.module.state_dict(), 5)
    held = restored.weight_slices()
    assert {
        EMBEDDING,
        "model.language_model.norm.weight",
        "model.generation_head.proj_out.weight",
    } <= held.keys()
    assert EMBEDDING in compare(manifest, held).differing
    restored.load_weights(manifest, named)
    assert not compare(manifest, restored.weight_slices()).is_stale
    groups = restored.sample(requests, sampling_with())
    plain = build_sampler(MODEL, lab_folder, engine_config(backend="torch"), "both")
    plain.policy.module.load_state_dict(policy.module.state_dict())
    assert tokens(groups) == tokens(plain.sample(requests, sampling_with())) != before
    assert logprob_gap(policy, groups, Scoring(guidance_scale=3.0))["understanding"] <= 1e-5
    assert {t.policy_version for group in groups for t in group.trajectories} == {5}
    assert restored.policy_version == 5


def test_weights_of_another_model_are_refused_and_nothing_changes(restored, lab_folder, lab_requests):
    requests = lab_requests(4, 4)
    before, version = tokens(restored.sample(requests, sampling_with())), restored.policy_version
    policy = moved_policy(lab_folder)
    manifest, named = publication(policy, policy.module.state_dict(), 9)
    wrong_name = replace(manifest, tensors=(replace(manifest.tensors[0], name="other"), *manifest.tensors[1:]))
    wrong_shape = replace(manifest, tensors=(replace(manifest.tensors[0], shape=(2, 2)), *manifest.tensors[1:]))
    for refused in (wrong_name, wrong_shape, replace(manifest, tensors=manifest.tensors[:-1])):
        with pytest.raises(ValueError, match="manifest that differs in"):
            restored.load_weights(refused, iter(named))
    with pytest.raises(ValueError, match="expected checksum"):
        restored.load_weights(replace(manifest, checksum="0"), iter(named))
    assert tokens(restored.sample(requests, sampling_with())) == before
    assert restored.policy_version == version


def test_bfloat16_publication_reaches_engine_and_front(restored, plain, lab_folder, lab_requests):
    state = plain.policy.module.state_dict()
    restored.load_weights(*publication(plain.policy, state, 2, torch.bfloat16))
    rounded = build_sampler(MODEL, lab_folder, engine_config(backend="torch"), "both")
    rounded.policy.module.load_state_dict({name: value.bfloat16().float() for name, value in state.items()})
    requests = lab_requests(4, 4)
    assert tokens(restored.sample(requests, sampling_with())) == tokens(rounded.sample(requests, sampling_with()))


def test_half_loaded_weights_are_never_sampled_from(restored, plain, lab_requests, monkeypatch):
    def torn(*args, **kwargs):
        raise OSError("connection lost")

    publication_0 = publication(plain.policy, plain.policy.module.state_dict(), 0)
    with monkeypatch.context() as patch:
        patch.setattr(restored._engine.llm, "collective_rpc", torn)
        with pytest.raises(OSError, match="connection lost"):
            restored.load_weights(*publication_0)
    with pytest.raises(RuntimeError, match="an update that failed half-way; start a new worker"):
        restored.sample(lab_requests(1, 0), sampling_with())


def test_interrupted_call_leaves_nothing_behind(engine, lab_requests, monkeypatch):
    requests = lab_requests(3, 3)
    wanted = tokens(engine.sample(requests, sampling_with()))
    core = engine._engine.llm.llm_engine
    step, calls = core.step, []

    def interrupted():
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.sample(lab_requests(6, 6), sampling_with())
    assert not core.has_unfinished_requests()
    assert tokens(engine.sample(requests, sampling_with())) == wanted


def test_long_prompt_is_refused_before_the_engine_sees_it(engine, lab_requests):
    (request,) = lab_requests(0, 1)
    long = replace(request, sample=replace(request.sample, prompt="a photo of " + "red circle and " * 60))
    with pytest.raises(ValueError, match=r"expected prompt and completion within rollout.max_model_len 128"):
        engine.sample([request, long], sampling_with())
    assert not engine._engine.llm.llm_engine.has_unfinished_requests()


def test_memory_for_less_than_one_sequence_is_refused_by_its_key(lab_folder):
    # 4 blocks of 32 tokens, keys and values, 2 streams, 4 layers, 3 heads of 32, float32.
    least = 4 * 32 * 2 * 2 * 4 * 3 * 32 * 4 / 2**30
    with pytest.raises(
        ValueError, match=rf"rollout.kv_cache_memory_gib: expected at least {least:.3g}.*2 streams; got"
    ):
        build_sampler(MODEL, lab_folder, engine_config(kv_cache_memory_gib=0.99 * least), "both")


def test_role_and_streams_limit_what_is_served(text_engine, lab_requests):
    with pytest.raises(ValueError, match="expected text requests as this sampler's role says; got image"):
        text_engine.sample(lab_requests(0, 1), sampling_with())


def test_image_engine_without_guidance_has_one_stream(public_folder, public_requests):
    config = engine_config(sampling=sampling_with(1.0))
    sampler = build_sampler(MODEL, public_folder, config, "image")
    drawings = [request for request in public_requests if request.task == "generation"]
    plain = build_sampler(MODEL, public_folder, replace(config, backend="torch"), "both")
    assert tokens(sampler.sample(drawings, sampling_with(1.0))) == tokens(plain.sample(drawings, sampling_with(1.0)))
    with pytest.raises(ValueError, match=r"expected 1, since this engine was built with one stream; got 3\.0"):
        sampler.sample(drawings, sampling_with(3.0))


def test_untied_public_layout_with_little_memory_equals_the_plain_sampler(public_folder, public_requests):
    # 12 blocks of 32 tokens, 2 streams, 2 layers, 2 heads of 32: far less than 36 sequences of 100 tokens need.
    memory = 12 * 32 * 2 * 2 * 2 * 2 * 32 * 4 / 2**30
    config = engine_config(kv_cache_memory_gib=memory, max_num_seqs=7)
    sampler = build_sampler(MODEL, public_folder, config, "both")
    plain = build_sampler(MODEL, public_folder, replace(config, backend="torch"), "both")
    groups = sampler.sample(public_requests, sampling_with(max_tokens=16))
    assert tokens(groups) == tokens(plain.sample(public_requests, sampling_with(max_tokens=16)))
    gaps = logprob_gap(plain.policy, groups, Scoring(guidance_scale=3.0))
    assert gaps["understanding"] <= 1e-5
    assert gaps["generation"] <= 5e-5
    policy = moved_policy(public_folder)
    sampler.load_weights(*publication(policy, policy.module.state_dict(), 1))
    plain.policy.module.load_state_dict(policy.module.state_dict())
    assert tokens(sampler.sample(public_requests, sampling_with())) == tokens(
        plain.sample(public_requests, sampling_with())
    )


def test_bfloat16_engine_stays_near_the_learner(lab_folder, lab_requests, report):
    model = ModelConfig(dtype="bfloat16")
    sampler = build_sampler(model, lab_folder, engine_config(), "both")
    policy = JanusPro.load(model, lab_folder)
    groups = sampler.sample(lab_requests(8, 8), sampling_with(1.5))
    gaps = logprob_gap(policy, groups, Scoring(guidance_scale=1.5))
    text, image = gaps["understanding"], gaps["generation"]
    report(f"max |sampler - learner| log-prob in bfloat16: text {text:.2g} nats, image {image:.2g} nats")
    assert gaps["understanding"] < 0.5
    assert gaps["generation"] < 1.0
