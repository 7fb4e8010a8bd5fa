"""Ten defects, each planted in the family, the sampler or the files: the whole `unirl verify` names its line first."""

import os
import shutil
from dataclasses import replace
from itertools import takewhile

import pytest
import torch

from tests.janus_checkpoints import edit_json, write_janus, write_prompts
from unirl.algorithms import logprobs
from unirl.config import RlConfig, RolloutConfig, SamplingConfig, TextSampling
from unirl.jobs import verify
from unirl.models import janus_pro
from unirl.models.janus_pro import HEAD, JanusPro
from unirl.models.janus_prompts import JanusPrompts
from unirl.rollout import torch_sampler

# The optimizer check of DeepSpeed imports a compiled function; without the compiler that takes seconds less.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="module")
def random_janus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    write_janus(folder / "checkpoint")
    write_prompts(folder / "prompts")
    return folder


def findings_of(checkpoint, prompts):
    """What `unirl verify` finds in float32, in its order."""
    sampling = SamplingConfig(text=TextSampling(max_tokens=8))
    given = RlConfig(rollout=RolloutConfig(backend="torch", sampling=sampling))
    given = replace(given, evaluation=replace(given.evaluation, data=str(prompts)))
    config = verify.settings_for(given, checkpoint)
    found = verify.examine(config, checkpoint, verify.prompts_of(config, 2))
    return list(takewhile(lambda finding: finding.dtype == "float32", found))


def tied_head(patch, checkpoint):
    whole = JanusPro.load.__func__

    def load(*arguments, **settings):
        policy = whole(JanusPro, *arguments, **settings)
        policy.module.lm_head.weight = policy.module.model.language_model.embed_tokens.weight
        policy.tied = True
        del policy.shapes[HEAD]
        return policy

    patch.setattr(janus_pro, "load", load)


def shifted_codes(patch, checkpoint):
    embed = JanusPro.embed_codes
    patch.setattr(JanusPro, "embed_codes", lambda policy, codes: embed(policy, (codes + 1) % policy.num_codes))


def shifted_codes_in_the_decoder(patch, checkpoint):
    decode = JanusPro.decode_images

    def shifted(policy, codes, prompts=()):
        return decode(policy, [(row + 1) % policy.num_codes for row in codes], prompts)

    patch.setattr(JanusPro, "decode_images", shifted)


def wrong_pad_in_the_files(patch, checkpoint):
    edit_json(checkpoint / "generation_config.json", pad_token_id=4)


def wrong_pad_in_the_family(patch, checkpoint):
    whole = JanusPrompts.load.__func__

    def load(cls, *arguments):
        prompts = whole(cls, *arguments)
        return replace(prompts, ids=replace(prompts.ids, pad=prompts.ids.eos))

    patch.setattr(JanusPrompts, "load", classmethod(load))


def stale_weights(patch, checkpoint):
    patch.setattr(torch_sampler, "load_policy_weights", lambda policy, manifest, tensors: None)


def half_loaded_update(patch, checkpoint):
    def load(policy, manifest, tensors):
        targets = policy.module.state_dict()
        for name, array in list(tensors)[::2]:
            targets[name].copy_(torch.from_numpy(array))

    patch.setattr(torch_sampler, "load_policy_weights", load)


def trunk_with(patch, change):
    """Let `change` alter mask and positions before they reach the trunk."""

    def run(trunk, embeddings, mask, cache):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        mask, positions = change(mask, positions, cache)
        output = trunk(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        return output.last_hidden_state

    patch.setattr(janus_pro, "run_trunk", run)


def mask_off(patch, checkpoint):
    trunk_with(patch, lambda mask, positions, cache: (torch.ones_like(mask), positions))


def mask_off_in_the_learner(patch, checkpoint):
    trunk_with(patch, lambda mask, positions, cache: (torch.ones_like(mask) if cache is None else mask, positions))


def guidance_of_another_formula(patch, checkpoint):
    patch.setattr(torch_sampler, "guided_logits", lambda cond, uncond, scale: (1 + scale) * cond - scale * uncond)


def guidance_of_another_formula_everywhere(patch, checkpoint):
    for module in (torch_sampler, logprobs):
        patch.setattr(module, "guided_logits", lambda cond, uncond, scale: (1 + scale) * cond - scale * uncond)


def position_shift(patch, checkpoint):
    def shift(mask, positions, cache):
        return mask, positions + (cache is not None and cache.get_seq_length() > 0)

    trunk_with(patch, shift)


def dropped_pixels(patch, checkpoint):
    pixels = JanusPro._pixels
    patch.setattr(JanusPro, "_pixels", lambda policy, images: torch.zeros_like(pixels(policy, images)))


def dtype_of_the_sampler(patch, checkpoint):
    build = verify.build_sampler
    patch.setattr(verify, "build_sampler", lambda model, *others: build(replace(model, dtype="bfloat16"), *others))


def dtype_of_everything(patch, checkpoint):
    whole = JanusPro.load.__func__
    patch.setattr(janus_pro, "load", lambda config, path: whole(JanusPro, replace(config, dtype="bfloat16"), path))


AGREEMENT, GREEDY, SYNC = "agreement", "greedy tokens", "weight sync"
DEFECTS = [
    pytest.param(
        tied_head, ["layout", GREEDY], "lm_head.weight; mend the family's load(): names, tied", id="tied head"
    ),
    pytest.param(shifted_codes, [GREEDY], "compare the offset of codes", id="shifted code offset"),
    pytest.param(
        wrong_pad_in_the_files, ["special ids", GREEDY], "generation_config.json says pad 4, not 0", id="wrong pad id"
    ),
    pytest.param(stale_weights, [SYNC] * 4, "or the sampler keeps its old ones", id="stale weights"),
    pytest.param(half_loaded_update, [SYNC] * 3, "load every one, under its own name", id="half-loaded update"),
    pytest.param(mask_off, ["batch company", "padding", "padding"], "look at seeds, padding", id="mask off"),
    pytest.param(
        guidance_of_another_formula,
        [AGREEMENT, AGREEMENT, GREEDY, SYNC],
        "where only guided images fail, the formula of guidance",
        id="wrong guidance formula",
    ),
    pytest.param(
        position_shift, [*[AGREEMENT] * 4, GREEDY, GREEDY, SYNC, SYNC], "masks and positions", id="position shift"
    ),
    pytest.param(
        dropped_pixels,  # the sampler itself refuses, whatever it is asked for
        [AGREEMENT, "batch company", "padding", GREEDY, SYNC, SYNC, SYNC, "learning rate 0", "gradient"],
        "placeholder tokens without pixels",
        id="dropped pixels",
    ),
    pytest.param(
        dtype_of_the_sampler, [*[AGREEMENT] * 4, GREEDY, SYNC, SYNC], "compare temperature, precision", id="wrong dtype"
    ),
]
ELSEWHERE = [
    pytest.param(shifted_codes_in_the_decoder, ["pictures"], "compare the offset of codes", id="shifted code offset"),
    pytest.param(wrong_pad_in_the_family, ["special ids", GREEDY], "the tokenizer says pad 0", id="wrong pad id"),
    pytest.param(mask_off_in_the_learner, ["padding", "padding"], "padding is attended to", id="mask off"),
    pytest.param(guidance_of_another_formula_everywhere, [GREEDY], "guidance", id="wrong guidance formula"),
    pytest.param(
        dtype_of_everything, ["layout", *[AGREEMENT] * 3, "padding", "padding", GREEDY, SYNC], "in float32, in lm_head",
        id="wrong dtype",
    ),
]  # fmt: skip


def check(folder, checkpoint, monkeypatch, plant, lines, advice):
    shutil.copytree(folder / "checkpoint", checkpoint)
    plant(monkeypatch, checkpoint)
    failed = [finding for finding in findings_of(checkpoint, folder / "prompts") if finding.verdict == "fail"]
    assert [finding.gate for finding in failed] == lines
    assert advice in failed[0].reason


@pytest.mark.parametrize(("plant", "lines", "advice"), DEFECTS)
def test_a_defect_fails_its_line_first(random_janus, tmp_path, monkeypatch, plant, lines, advice):
    check(random_janus, tmp_path / "checkpoint", monkeypatch, plant, lines, advice)


@pytest.mark.slow
@pytest.mark.parametrize(("plant", "lines", "advice"), ELSEWHERE)
def test_a_defect_elsewhere_fails_its_line_first(random_janus, tmp_path, monkeypatch, plant, lines, advice):
    check(random_janus, tmp_path / "checkpoint", monkeypatch, plant, lines, advice)
