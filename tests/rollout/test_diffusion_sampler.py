"""The sampler of masked diffusion on a tiny random Lumina-DiMOO: what it records is what the learner computes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.lumina_checkpoints import STRINGS, WORDS, write_lumina
from tests.rollout.conftest import publication, tokens
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig, TextSampling
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.models.lumina_prompts import DRAW_SYSTEM
from unirl.models.policy import Scoring
from unirl.rollout.build import build_sampler
from unirl.rollout.diffusion_sampler import DiffusionSampler
from unirl.types import GenerationSample, LearnerRow, RolloutRequest, UnderstandingSample

MODEL = ModelConfig(family="lumina_dimoo")
TEMPERATURE, NUM_CELLS, SIZE = 0.8, 8, (24, 24)
NUM_CODES = 36
ENDS = ("end_answer", "end_text", "answer_pad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_lumina(tmp_path_factory.mktemp("lumina") / "small")


@pytest.fixture(scope="module")
def policy(folder):
    """Nobody may change its weights."""
    return LuminaDimoo.load(MODEL, folder)


@pytest.fixture(scope="module")
def sampler(policy):
    return DiffusionSampler(policy, 200, 64)


def sampling_with(*, guidance=1.0, image_steps=5, text_steps=2, temperature=TEMPERATURE, block_length=None):
    return SamplingConfig(
        text=TextSampling(
            temperature=temperature, max_tokens=NUM_CELLS, diffusion_steps=text_steps, block_length=block_length
        ),
        image=ImageSampling(
            temperature=temperature, guidance_scale=guidance, size=SIZE, diffusion_steps=image_steps
        ),
    )  # fmt: skip


def request_of(sample, seeds):
    task = "understanding" if isinstance(sample, UnderstandingSample) else "generation"
    return RolloutRequest(
        request_id=f"{sample.id}/{task}", pair_id=sample.id, task=task, sample=sample, seeds=tuple(seeds)
    )


def questions(num_seeds=2):
    """Question images of four sizes, questions of four lengths."""
    pixels = np.random.default_rng(0)
    texts = ("what colour is the cat on the mat ?", "red ?", "is the bird green ?", "what is on the blue mat ?")
    made = []
    for index, (size, text) in enumerate(zip([(12, 12), (20, 28), (24, 24), (9, 60)], texts, strict=True)):
        image = pixels.integers(0, 256, (*size, 3), np.uint8)
        sample = UnderstandingSample(id=f"q{index}", image=image, question=text, choices=("yes", "no"), answer="A")
        made.append(request_of(sample, [100 * index + seed for seed in range(num_seeds)]))
    return made


def drawings(num_seeds=2):
    texts = ("a red cat on the blue mat", "dog", "two green bird on a mat")
    samples = [GenerationSample(id=f"g{index}", prompt=text) for index, text in enumerate(texts)]
    return [request_of(sample, [900 + 10 * i + seed for seed in range(num_seeds)]) for i, sample in enumerate(samples)]


def rows_of(groups, *, everything=False):
    """Learner rows of the trajectories; `everything` counts the tokens behind the end of an answer too."""
    return [
        LearnerRow(
            task=group.request.task,
            prompt_ids=t.prompt_ids,
            image=None,
            completion_ids=t.completion_ids,
            loss_mask=np.ones_like(t.loss_mask) if everything else t.loss_mask,
            old_logprobs=t.logprobs,
            advantage=1.0,
            unmask_step=t.unmask_step,
        )
        for group in groups
        for t in group.trajectories
    ]


@torch.no_grad()
def learner_logprobs(policy, rows, scoring):
    """Log-probabilities [T] of each row, all rows scored together, and how often each token was scored."""
    longest = max(len(row.completion_ids) for row in rows)
    total, seen = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest)
    for scores in policy.score(rows, scoring):
        total += torch.where(scores.scored, scores.logprobs, 0.0)
        seen += scores.scored
    lengths = [len(row.completion_ids) for row in rows]
    return [part[:n].numpy() for part, n in zip(total, lengths, strict=True)], [
        part[:n].numpy() for part, n in zip(seen, lengths, strict=True)
    ]


def largest_gap(policy, groups, scoring):
    rows = rows_of(groups, everything=True)
    scored, seen = learner_logprobs(policy, rows, scoring)
    assert all((count == 1).all() for count in seen), "each token once"
    return max(float(np.abs(new - row.old_logprobs).max()) for new, row in zip(scored, rows, strict=True))


def same_picture(one, other):
    """Other company may round a pixel the other way."""
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


def id_of(policy, role):
    return policy.prompts.tokenizer.convert_tokens_to_ids(STRINGS[role])


def may_answer(policy):
    """The ids of words and ends, from their strings alone."""
    kept = [*WORDS[1:], *(STRINGS[role] for role in ENDS)]
    return sorted(policy.prompts.tokenizer.convert_tokens_to_ids(kept))


@torch.no_grad()
def plain_logprobs(policy, trajectory, scale, temperature=TEMPERATURE):
    """Log-probability of each token by a loop over cells: the canvas is written out and goes through forward alone."""
    mask, first = id_of(policy, "mask"), id_of(policy, "first_code")
    canvas = trajectory.prompt_ids.tolist()
    streams = [canvas]
    if scale != 1.0:
        text = f"<system>{DRAW_SYSTEM}</system><user><uncondition></user>"
        start = canvas.index(id_of(policy, "begin_answer"))
        streams.append([*policy.prompts.tokenizer(text).input_ids, *canvas[start:]])
    drawn = trajectory.modality == "image"
    values, steps = trajectory.completion_ids.tolist(), trajectory.unmask_step.tolist()
    choices = list(range(first, first + 24)) if drawn else may_answer(policy)
    result = []
    for cell, value in enumerate(values):
        logits = []
        for stream in streams:
            places = [place for place, token in enumerate(stream) if token == mask]
            seen = list(stream)
            for other, place in enumerate(places):
                if steps[other] < steps[cell]:
                    seen[place] = values[other] + (first if drawn else 0)
            logits.append(policy.module(torch.tensor([seen]))[0, places[cell]][choices].double())
        mixed = logits[0] if scale == 1.0 else scale * logits[0] - (scale - 1) * logits[1]
        wanted = value + first if drawn else value
        result.append(float((mixed / temperature).log_softmax(0)[choices.index(wanted)]))
    return np.array(result)


@pytest.mark.parametrize("num_steps", [1, 2, 35])
@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_recorded_image_logprobs_are_those_of_the_learner(policy, sampler, scale, num_steps, report):
    groups = sampler.sample(drawings(), sampling_with(guidance=scale, image_steps=num_steps))
    assert {len(t.completion_ids) for g in groups for t in g.trajectories} == {NUM_CODES}
    assert len({len(t.prompt_ids) for g in groups for t in g.trajectories}) == 3
    assert all(set(t.unmask_step.tolist()) == set(range(num_steps)) for g in groups for t in g.trajectories)
    guided = Scoring(image_temperature=TEMPERATURE, guidance_scale=scale)
    gap = largest_gap(policy, groups, guided)
    report(f"Lumina-DiMOO images, guidance {scale:g}, {num_steps} steps: sampler - learner {gap:.1e} nats")
    assert gap <= 1e-5 * (2 * scale - 1)
    one = groups[1].trajectories[0]
    assert np.abs(plain_logprobs(policy, one, scale) - one.logprobs).max() <= 1e-5 * (2 * scale - 1)


@pytest.mark.parametrize("num_steps", [1, 2, 35])
@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_conditional_scores_are_those_of_the_conditional_stream(policy, sampler, scale, num_steps, report):
    """The sampler records guided ones, so that the learner must compute old ones itself."""
    groups = sampler.sample(drawings(num_seeds=1), sampling_with(guidance=scale, image_steps=num_steps))
    rows = rows_of(groups)
    scoring = Scoring(image_temperature=TEMPERATURE, guidance_scale=scale, image_logprob="conditional")
    scored, _ = learner_logprobs(policy, rows, scoring)
    trajectories = [group.trajectories[0] for group in groups]
    gap = max(np.abs(plain_logprobs(policy, t, 1.0) - new).max() for t, new in zip(trajectories, scored, strict=True))
    report(f"Lumina-DiMOO images, conditional of {scale:g}, {num_steps} steps: learner - plain loop {gap:.1e} nats")
    assert gap <= 1e-5
    away = [np.abs(new - t.logprobs).sum() for t, new in zip(trajectories, scored, strict=True)]
    with torch.no_grad():
        passes = list(policy.score(rows, replace(scoring, image_logprob="guided")))
    told = sum(float(scores.metrics.get("guidance_gap", 0.0)) for scores in passes)
    assert told == pytest.approx(sum(away) if scale != 1.0 else 0.0, rel=1e-3)
    assert (sum(away) > 1.0) == (scale != 1.0)


@pytest.mark.parametrize(("num_steps", "block_length"), [(1, None), (2, None), (8, None), (4, 4)])
def test_recorded_text_logprobs_are_those_of_the_learner(policy, sampler, num_steps, block_length, report):
    groups = sampler.sample(questions(), sampling_with(text_steps=num_steps, block_length=block_length))
    assert len({len(t.prompt_ids) for g in groups for t in g.trajectories}) == 4
    assert all(set(t.unmask_step.tolist()) == set(range(num_steps)) for g in groups for t in g.trajectories)
    scoring = Scoring(text_temperature=TEMPERATURE, guidance_scale=5.0)
    gap = largest_gap(policy, groups, scoring)
    report(f"Lumina-DiMOO text, {num_steps} steps: sampler - learner {gap:.1e} nats")
    assert gap <= 1e-5
    one = groups[3].trajectories[1]
    assert np.abs(plain_logprobs(policy, one, 1.0) - one.logprobs).max() <= 1e-5
    _, seen = learner_logprobs(policy, rows_of(groups), scoring)
    masks = [t.loss_mask for g in groups for t in g.trajectories]
    assert all((count > 0)[mask].all() for count, mask in zip(seen, masks, strict=True))
    if block_length:
        early = [t.unmask_step[:4].max() < t.unmask_step[4:].min() for g in groups for t in g.trajectories]
        assert all(early)


@pytest.mark.parametrize(
    ("request_made", "sampling", "scale"),
    [
        (drawings(1)[0], sampling_with(image_steps=NUM_CODES), 1.0),
        (drawings(1)[2], sampling_with(image_steps=NUM_CODES, guidance=3.0), 3.0),
        (questions(1)[1], sampling_with(text_steps=NUM_CELLS), 1.0),
    ],
    ids=["image", "guided image", "text"],
)
def test_one_cell_a_step_is_the_likelihood_of_the_chain_rule(policy, sampler, request_made, sampling, scale):
    """log p(v_1) + log p(v_2 | v_1) + ..., in the order of revealing, each factor from a forward pass of its own."""
    (group,) = sampler.sample([request_made], sampling)
    (t,) = group.trajectories
    assert sorted(t.unmask_step.tolist()) == list(range(len(t.completion_ids)))
    likelihood = plain_logprobs(policy, t, scale).sum()
    assert float(t.logprobs.astype("f8").sum()) == pytest.approx(likelihood, abs=1e-4 * (2 * scale - 1))
    scoring = Scoring(text_temperature=TEMPERATURE, image_temperature=TEMPERATURE, guidance_scale=scale)
    (scored,), _ = learner_logprobs(policy, rows_of([group], everything=True), scoring)
    assert float(scored.astype("f8").sum()) == pytest.approx(likelihood, abs=1e-4 * (2 * scale - 1))


def test_order_company_and_batch_size_change_no_token(policy, sampler):
    requests, sampling = [*questions(), *drawings()], sampling_with(guidance=3.0)
    together = sampler.sample(requests, sampling)
    order = [4, 2, 6, 0, 5, 1, 3]
    others = {
        "permuted": np.array(sampler.sample([requests[i] for i in order], sampling), object)[np.argsort(order)],
        "alone": [sampler.sample([request], sampling)[0] for request in requests],
        "one by one": DiffusionSampler(policy, 200, 1).sample(requests, sampling),
        "by three": DiffusionSampler(policy, 200, 3).sample(requests, sampling),
    }
    assert [group.request.request_id for group in together] == [request.request_id for request in requests]
    for name, groups in others.items():
        assert [group.request for group in groups] == requests, name
        assert tokens(groups) == tokens(together), name
        for one, same in zip(together, groups, strict=True):
            for t, other in zip(one.trajectories, same.trajectories, strict=True):
                assert t.unmask_step.tolist() == other.unmask_step.tolist(), name
                assert np.abs(t.logprobs - other.logprobs).max() < 5e-5
                assert t.text == other.text
                assert (t.image is None) == (other.image is None)
                assert t.image is None or same_picture(t.image, other.image)


@pytest.mark.parametrize("make", [questions, drawings])
def test_the_seed_alone_makes_two_completions_of_a_prompt_differ(sampler, make):
    request = replace(make()[0], seeds=(5, 6, 5))
    first, other, again = tokens(sampler.sample([request], sampling_with()))
    assert first == again != other


def test_pictures_are_those_of_their_codes(policy, sampler):
    groups = sampler.sample(drawings(1), sampling_with())
    for group in groups:
        (t,) = group.trajectories
        assert t.image.shape == (*SIZE, 3)
        assert same_picture(t.image, policy.vq.decode([t.completion_ids.reshape(6, 6)])[0])
        assert t.finish_reason == "stop"
        assert t.loss_mask.all()
        assert t.text is None


def test_an_answer_ends_at_its_first_end_token(policy, sampler):
    ends = {id_of(policy, role) for role in ENDS}
    reasons = []
    for group in sampler.sample(questions(num_seeds=6), sampling_with(text_steps=4)):
        for t in group.trajectories:
            ids = t.completion_ids.tolist()
            length = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
            assert t.finish_reason == ("length" if length is None else "stop")
            assert t.loss_mask.tolist() == [place < (length or NUM_CELLS) for place in range(NUM_CELLS)]
            assert len(ids) == NUM_CELLS
            words = policy.prompts.tokenizer.convert_ids_to_tokens(ids[: length or NUM_CELLS])
            hidden = (STRINGS["end_answer"], STRINGS["answer_pad"])
            assert t.text.split() == [word for word in words if word not in hidden]
            assert t.image is None
            reasons.append(t.finish_reason)
    assert {"stop", "length"} == set(reasons)


def test_text_at_temperature_0_is_the_most_likely_whatever_the_seed(policy, sampler):
    greedy = sampling_with(temperature=0.0, text_steps=NUM_CELLS)
    request = replace(questions()[0], seeds=(1, 2, 3))
    (group,) = sampler.sample([request], greedy)
    assert len({tuple(t.completion_ids.tolist()) for t in group.trajectories}) == 1
    t = group.trajectories[0]
    allowed, mask = may_answer(policy), id_of(policy, "mask")
    canvas = torch.from_numpy(t.prompt_ids).long()
    cells = (canvas == mask).nonzero()[:, 0].tolist()
    for step in range(NUM_CELLS):
        with torch.no_grad():
            law = policy.module(canvas[None])[0][:, allowed].double().log_softmax(-1)
        best, value = max((float(law[c].max()), allowed[int(law[c].argmax())]) for c in cells if canvas[c] == mask)
        (place,) = np.flatnonzero(t.unmask_step == step)
        assert t.completion_ids[place] == value
        assert t.logprobs[place] == pytest.approx(best, abs=1e-5)
        canvas[cells[place]] = value


def test_pictures_at_temperature_0_do_not_depend_on_the_seed(sampler):
    request = replace(drawings()[0], seeds=(1, 2))
    one, other = tokens(sampler.sample([request], sampling_with(temperature=0.0, guidance=3.0)))
    assert one == other


def test_no_other_id_is_drawn_however_likely(folder):
    """Masks, newlines, image codes and ids without a word get a head that makes them the most likely by far."""
    policy = LuminaDimoo.load(MODEL, folder)
    allowed = may_answer(policy)
    head = policy.module.get_output_embeddings().weight
    forbidden = [index for index in range(len(head)) if index not in allowed]
    assert {id_of(policy, role) for role in ("mask", "newline", "begin_image", "end_image")} < set(forbidden)
    with torch.no_grad():
        head[forbidden] *= 30.0
    sampler = DiffusionSampler(policy, 200, 64)
    for group in sampler.sample([*questions(8), *drawings(4)], sampling_with(temperature=3.0, guidance=3.0)):
        for t in group.trajectories:
            choices = range(24) if t.modality == "image" else allowed
            assert set(t.completion_ids.tolist()) <= set(choices)
            assert np.isfinite(t.logprobs).all()


def test_new_weights_draw_what_a_sampler_loaded_with_them_draws(folder, tmp_path, policy):
    other = LuminaDimoo.load(MODEL, write_lumina(tmp_path / "other", seed=1))
    sampler = DiffusionSampler(LuminaDimoo.load(MODEL, folder), 200, 64)
    requests, sampling = [*questions(1), *drawings(1)], sampling_with(guidance=3.0)
    assert {t.policy_version for g in sampler.sample(requests, sampling) for t in g.trajectories} == {-1}
    before = tokens(sampler.sample(requests, sampling))
    sampler.load_weights(*publication(policy, other.module.state_dict(), 4))
    after = sampler.sample(requests, sampling)
    fresh = DiffusionSampler(other, 200, 64)
    fresh.policy.vq = sampler.policy.vq
    assert tokens(after) == tokens(fresh.sample(requests, sampling)) != before
    assert {t.policy_version for g in after for t in g.trajectories} == {4}


@pytest.mark.parametrize("damage", ["name", "shape", "absent", "value", "checksum"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(folder, policy, damage):
    sampler = DiffusionSampler(LuminaDimoo.load(MODEL, folder), 200, 64, policy_version=2)
    state = {name: value + 1.0 for name, value in policy.module.state_dict().items()}
    *_, last = state
    manifest, named = publication(policy, state, 3)
    if damage == "name":
        manifest = replace(manifest, tensors=(*manifest.tensors[:-1], replace(manifest.tensors[-1], name="lm_head")))
        message = "manifest that differs in .*lm_head"
    elif damage == "shape":
        state[last] = state[last][:-1]
        manifest, named = publication(policy, state, 3)
        message = f"manifest that differs in .*{last}"
    elif damage == "absent":
        message = f"expected the manifest's {len(named)} weights in its order; got {len(named) - 1}"
        named = named[:-1]
    elif damage == "value":
        state[last][0] = float("nan")
        manifest, named = publication(policy, state, 3)
        message = f"NaN or infinity in {last}"
    else:
        manifest, message = replace(manifest, checksum="0"), "damaged on the way"
    with pytest.raises(ValueError, match=message):
        sampler.load_weights(manifest, named)
    assert sampler.policy_version == 2
    for name, value in sampler.policy.module.state_dict().items():
        assert torch.equal(value, policy.module.state_dict()[name]), name


def test_a_canvas_above_the_limit_is_refused_by_name(policy):
    longest = max(len(policy.encode(request.sample, sampling_with()).ids) for request in questions())
    DiffusionSampler(policy, longest, 8).sample(questions(1), sampling_with())
    with pytest.raises(ValueError, match=rf"request q\d/understanding: .*set rollout.max_model_len to {longest} or"):
        DiffusionSampler(policy, longest - 1, 8).sample(questions(1), sampling_with())


def test_the_torch_backend_of_this_family_is_this_sampler(folder):
    made = build_sampler(MODEL, folder, RolloutConfig(backend="torch", max_model_len=77, max_num_seqs=3), "both")
    assert isinstance(made, DiffusionSampler)
    assert (made.max_model_len, made.max_num_seqs, made.policy_version) == (77, 3, -1)
