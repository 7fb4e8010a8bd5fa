from dataclasses import replace

import pytest

from unirl.config import RlConfig
from unirl.data.atomic import DataError
from unirl.data.pair_store import read_pair_set, write_pair_set
from unirl.jobs import evaluate
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout, resolve_pairs
from unirl.jobs.prompt_check import check_prompts, samples_of
from unirl.models.policy import load_prompts

CONFIG = RlConfig()


@pytest.fixture(scope="module")
def checkpoint():
    return resolve_checkpoint("lab:janus")


@pytest.fixture(scope="module")
def samples():
    understanding, generation = resolve_heldout("lab:heldout", 8)
    return [*understanding, *generation]


def with_room_for(num_tokens):
    return replace(CONFIG, rollout=replace(CONFIG.rollout, max_model_len=num_tokens))


def test_long_prompts_are_counted_and_the_length_that_fits_them_all_is_named(checkpoint, samples):
    prompts = load_prompts(CONFIG.model, checkpoint)
    totals = [prompts.encode(sample, CONFIG.rollout.sampling).longest for sample in samples]
    limit = sorted(totals)[4]
    bad = [sample.id for sample, total in zip(samples, totals, strict=True) if total > limit]
    assert len(bad) > 3
    message = (
        rf"all 16 .*max_model_len={limit} .*got {len(bad)} that.*{bad[2]} takes.*set .*max_model_len={max(totals)},"
    )
    with pytest.raises(DataError, match=message) as raised:
        check_prompts(samples, with_room_for(limit), checkpoint)
    assert bad[3] not in str(raised.value)
    check_prompts(samples, with_room_for(max(totals)), checkpoint)


def test_a_special_token_is_found_among_the_others(checkpoint, samples):
    odd = replace(samples[-1], prompt="a cat <begin_of_image>")
    with pytest.raises(DataError, match=rf"all 17 .*got 1 that.*{odd.id}: .*special token <begin_of_image>") as raised:
        check_prompts([*samples, odd], CONFIG, checkpoint)
    assert "set rollout.max_model_len" not in str(raised.value)


def test_the_prompts_of_every_pair_are_checked(checkpoint, tmp_path):
    whole = read_pair_set(resolve_pairs("lab:pairs", tmp_path))
    first, second, *rest = whole.pairs
    odd = replace(second, generation=replace(second.generation, prompt="<|User|> draw"))
    write_pair_set(tmp_path / "odd", replace(whole, pairs=(first, odd, *rest)))
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, num_prompts=4))
    with pytest.raises(DataError, match=r"got 1 that.*<\|User\|>"):
        check_prompts(samples_of(config, tmp_path / "odd"), config, checkpoint)


def test_held_out_prompts_are_checked_too(checkpoint, tmp_path):
    pairs = resolve_pairs("lab:pairs", tmp_path)
    config = replace(
        with_room_for(40),
        data=replace(CONFIG.data, max_pairs=4),
        evaluation=replace(CONFIG.evaluation, num_prompts=4),
    )
    with pytest.raises(DataError, match=r"all 16 "):
        check_prompts(samples_of(config, pairs), config, checkpoint)
    assert len(list(samples_of(replace(config, evaluation=replace(config.evaluation, enabled=False)), pairs))) == 8
    with pytest.raises(DataError, match=r"all 960 .*got 596 that do not"):
        evaluate.main("lab:janus", with_room_for(40), local=True)
