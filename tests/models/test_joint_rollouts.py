"""Prompts, scores and pictures of joint vocabularies for reinforcement learning; tiny Anole and Liquid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.joint_checkpoints import WORDS
from tests.joint_rollouts import CASES, SIZE, random_images, write_case
from tests.vq_checkpoints import noise, write_chameleon_vq
from unirl.algorithms.guidance import guided_logits
from unirl.config import (
    AlgorithmConfig,
    EvaluationConfig,
    ImageSampling,
    RlConfig,
    RolloutConfig,
    SamplingConfig,
)
from unirl.models import joint_policy
from unirl.models.policy import Scoring, load_policy, load_prompts
from unirl.types import GenerationSample, LearnerRow, UnderstandingSample

SAMPLING = SamplingConfig()
QUESTION = UnderstandingSample(
    id="q", image=noise(9, 12), question="what color is it ?", choices=("red", "green"), answer="A"
)
DRAWING = GenerationSample(id="g", prompt="draw a red circle")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Settings and folder."""
    return write_case(tmp_path_factory.mktemp("joint") / "c", request.param)


@pytest.fixture
def policy(case):
    return load_policy(*case)


def make_row(policy, sample, seed=0, length=5):
    """Row of a sample with random completion ids."""
    prompt, rng = policy.encode(sample, SAMPLING).ids, np.random.default_rng(seed)
    drawing = isinstance(sample, GenerationSample)
    words = rng.choice(np.flatnonzero(policy.allowed_text_ids.numpy()), length).astype(np.int32)
    ids = random_images(1, seed)[0] if drawing else words
    return LearnerRow(
        task="generation" if drawing else "understanding", prompt_ids=prompt, image=None if drawing else sample.image,
        completion_ids=ids, loss_mask=np.ones(len(ids), bool), old_logprobs=np.zeros(len(ids), np.float32),
        advantage=1.0,
    )  # fmt: skip


def only(passes):
    (scores,) = passes
    return scores


def test_prompts_by_hand(tmp_path):
    config, folder = write_case(tmp_path / "c", "anole")
    policy = load_policy(config, folder)
    # <s> <pad> </s> <unk>, codes 4 to 19, eoss, break, separator, <image>, words from 24.
    words = {word: 24 + index for index, word in enumerate((*WORDS, "A", "B"))}
    (codes,) = policy.codec().encode([QUESTION.image])
    text = [words[word] for word in ["what", "color", "is", "it", "?", "A", "red", "B", "green"]]
    asked = policy.encode(QUESTION, SAMPLING)
    assert asked.ids.tolist() == [0, 21, *(4 + codes.ravel()).tolist(), 20, *text, 22]
    assert asked.longest == len(asked.ids) + SAMPLING.text.max_tokens
    drawn = policy.encode(DRAWING, SAMPLING)
    assert drawn.ids.tolist() == [0, *(words[word] for word in ["draw", "a", "red", "circle"]), 22, 21]
    assert drawn.longest == len(drawn.ids) + 16
    assert policy.unconditional(torch.from_numpy(drawn.ids)).tolist() == [0, 1, 1, 1, 1, 1, 21]


def test_prompts_without_weights_have_the_same_length(policy, case):
    prompts = load_prompts(*case)
    for sample in (QUESTION, DRAWING):
        alone, whole = prompts.encode(sample, SAMPLING), policy.encode(sample, SAMPLING)
        assert (alone.ids.shape, alone.longest) == (whole.ids.shape, whole.longest)
        is_code = (whole.ids >= policy.first_code) & (whole.ids < policy.first_code + policy.num_codes)
        assert is_code.sum() == (16 if sample is QUESTION else 0)
        assert (alone.ids[is_code] == policy.first_code).all()
        assert (alone.ids[~is_code] == whole.ids[~is_code]).all()


def test_the_null_condition_is_the_familys_own_token(policy, case):
    ids = torch.from_numpy(policy.encode(DRAWING, SAMPLING).ids)
    name = {"anole": "<pad>", "liquid": "<unconditional>"}[case[0].family]
    null = policy.prompts().tokenizer.vocabulary[name]
    assert policy.unconditional(ids).tolist() == [ids[0], *[null] * (len(ids) - 2), policy.layout.image.begin]
    padded, _ = policy.pad_prompts([ids.numpy()[:3], ids.numpy()])
    assert padded[0, : len(ids) - 3].tolist() == [null] * (len(ids) - 3)


def test_special_tokens_in_a_text_are_refused(policy):
    bad = replace(DRAWING, prompt="draw " + {2: "</s>", 1: "<eos>"}[policy.end_id])
    with pytest.raises(ValueError, match="sequence generation sample g: expected plain text"):
        policy.encode(bad, SAMPLING)


def test_settings_that_would_be_ignored_are_problems(case):
    config = RlConfig(
        rollout=RolloutConfig(sampling=SamplingConfig(image=ImageSampling(size=(512, 512)))),
        algorithm=AlgorithmConfig(diffusion_steps_per_update=2),
        evaluation=EvaluationConfig(approximate_cache=True),
    )
    prompts = load_prompts(*case)
    keys = {problem.key for problem in prompts.find_problems(config)}
    assert keys == {
        "rollout.sampling.image.size", "algorithm.diffusion_steps_per_update", "evaluation.approximate_cache",
    }  # fmt: skip
    assert prompts.find_problems(RlConfig()) == []


def plain_logprobs(policy, row, scale):
    """One token after the other over whole prefixes, by the trunk's own forward on ids."""
    prompt, is_image = torch.from_numpy(row.prompt_ids).long()[None], row.task == "generation"
    first, values = policy.first_code if is_image else 0, []
    null = policy.unconditional(prompt)
    for index, token in enumerate(row.completion_ids.tolist()):
        seen = torch.from_numpy(row.completion_ids[:index].astype(np.int64))[None] + first
        rows = [policy.module.model(input_ids=torch.cat([each, seen], 1)) for each in (prompt, null)]
        logits = [policy.module.lm_head.weight @ each.last_hidden_state[0, -1] for each in rows]
        if is_image:
            cond, uncond = (each[first : first + policy.num_codes] for each in logits)
            law = guided_logits(cond, uncond, scale)
        else:
            law = logits[0].masked_fill(~policy.allowed_text_ids, -torch.inf)
        values.append(law.log_softmax(0)[token])
    return torch.stack(values)


@pytest.mark.parametrize(("sample", "scale"), [(QUESTION, 1.0), (DRAWING, 1.0), (DRAWING, 3.0)])
def test_scores_and_gradients_equal_a_plain_loop(policy, sample, scale):
    row = make_row(policy, sample)
    scores = only(policy.score([row], Scoring(guidance_scale=scale)))
    wanted = plain_logprobs(policy, row, scale)
    assert torch.allclose(scores.logprobs[0], wanted, atol=1e-5 * (2 * scale - 1))
    parameters = list(policy.module.parameters())
    ours = torch.autograd.grad(scores.logprobs.sum(), parameters)
    theirs = torch.autograd.grad(wanted.sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7)


def test_padding_order_and_micro_batch_change_nothing(policy):
    scoring = Scoring(guidance_scale=3.0)
    for samples in (
        [QUESTION, replace(QUESTION, question="it ?"), replace(QUESTION, image=noise(5, 5, 3))],
        [DRAWING, replace(DRAWING, prompt="a"), replace(DRAWING, prompt="a red circle and a green square")],
    ):
        rows = [make_row(policy, sample, seed, length=3 + seed) for seed, sample in enumerate(samples)]
        together = only(policy.score(rows, scoring))
        turned = only(policy.score(rows[::-1], scoring))
        for index, row in enumerate(rows):
            length = len(row.completion_ids)
            alone = only(policy.score([row], scoring)).logprobs[0]
            for other in (together.logprobs[index, :length], turned.logprobs[-1 - index, :length]):
                assert torch.allclose(other, alone, atol=5e-5)


def test_what_no_sampler_may_draw_is_refused(policy):
    row = make_row(policy, QUESTION)
    for wrong in (policy.layout.image.begin, policy.first_code):
        with pytest.raises(ValueError, match="ids that the sampler may draw"):
            only(policy.score([replace(row, completion_ids=np.full(5, wrong, np.int32))], Scoring()))
    drawing = make_row(policy, DRAWING)
    part = replace(
        drawing, completion_ids=drawing.completion_ids[:4], loss_mask=np.ones(4, bool), old_logprobs=np.zeros(4, "f4")
    )
    with pytest.raises(ValueError, match="expected images of 16 codes; got 4"):
        only(policy.score([part], Scoring()))


def test_tokens_per_row_counts_both_streams(policy):
    row, guided = make_row(policy, DRAWING), Scoring(guidance_scale=3.0)
    whole = len(row.prompt_ids) + 16
    assert policy.tokens_per_row(row, guided) == 2 * whole
    assert policy.tokens_per_row(row, replace(guided, image_logprob="conditional")) == whole
    assert policy.passes_per_row(row, guided) == 1


def test_pictures_are_those_of_the_image_tokenizer(policy):
    codec = policy.codec()
    codes = random_images(3)
    pictures = policy.decode_images(codes)
    assert [picture.shape for picture in pictures] == [(SIZE, SIZE, 3)] * 3
    wanted = codec.decode([row.reshape(4, 4) for row in codes])
    assert all(np.array_equal(a, b) for a, b in zip(pictures, wanted, strict=True))
    assert policy.decode_images([]) == []
    with pytest.raises(ValueError, match=r"expected codes \[16\] each"):
        policy.decode_images([codes[0][:4]])


def test_a_questions_image_is_encoded_once(policy, monkeypatch):
    encoded, codec = [], policy.codec()

    class Counting:
        def encode(self, images):
            encoded.extend(images)
            return codec.encode(images)

    policy.codec = Counting
    monkeypatch.setattr(joint_policy, "IMAGES_KEPT", 2)
    other = replace(QUESTION, question="is it red ?")
    for sample in (QUESTION, other, replace(QUESTION, image=noise(5, 5, 1)), other):
        policy.encode(sample, SAMPLING)
    assert len(encoded) == 2
    policy.encode(replace(QUESTION, image=noise(5, 5, 2)), SAMPLING)
    assert (len(encoded), len(policy.seen)) == (3, 1)


def test_an_image_tokenizer_of_another_size_or_none_is_refused(tmp_path):
    config, folder = write_case(tmp_path / "c", "liquid")
    for load in (load_prompts, lambda *case: load_policy(*case).prompts()):
        with pytest.raises(FileNotFoundError, match=r"image_tokenizer: expected the folder of Chameleon's VQGAN"):
            load(replace(config, image_tokenizer=None), folder)
    wrong = write_chameleon_vq(tmp_path / "vq", layout="meta-safetensors", size=SIZE, num_codes=48)
    with pytest.raises(ValueError, match=r"image_tokenizer: expected a codebook of 16 codes.*got 48; name the folder"):
        load_policy(replace(config, image_tokenizer=str(wrong)), folder).codec()


def test_saved_checkpoint_scores_alike(policy, case, tmp_path):
    policy.save(tmp_path / "saved", policy.module.state_dict())
    again = load_policy(case[0], tmp_path / "saved")
    for sample in (QUESTION, DRAWING):
        row, scoring = make_row(policy, sample), Scoring(guidance_scale=3.0)
        ours, theirs = (only(each.score([row], scoring)).logprobs for each in (policy, again))
        assert torch.equal(ours, theirs)


def test_bfloat16_takes_the_heads_product_in_float32(case):
    policy = load_policy(replace(case[0], dtype="bfloat16"), case[1])
    hidden = torch.randn(2, 64).bfloat16()
    weight = policy.module.lm_head.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(policy.text_logits(hidden), hidden.float() @ weight.float().T)
    codes = policy.text_logits(hidden)[:, policy.first_code : policy.first_code + policy.num_codes]
    assert torch.allclose(policy.code_logits(hidden), codes)
