"""The approximate cache against the official sampler's.

approximate_cache_golden.safetensors was made once by running the official image sampler with its cache switched on, on
the weights of llada_golden.safetensors: a canvas of 4 x 5 cells (ids of image codes from 96, mask 80) at temperature
0.9 and w = 4, once in 12 steps with the official settings ("usual") and once in 15 steps with others ("short"; both in
the metadata as steps, share reused, warm-up, refresh interval). Recorded: the Gumbel noise of values and order at every
step; which positions of each stream every step computed; the codes, the step that revealed each, and its
log-probability under the official guided logits of that step, divided by the temperature.

Where the official code leaves a choice:
- Without guidance its cached path stops at a variable that was never set; ours has one stream then.
- It computes every position up to the quantile of certainty, equals included, and so do we. Its logits are of the
  weights' type, and in bfloat16 equals are frequent, so that it computes somewhat more than asked; ours are float32.
- It takes one row at a time. In our batches a row computes what it would compute alone.
- A cell revealed since its last computation goes on being seen as a mask. That is the approximation; ours too.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from unirl.models.canvases import CellLaw
from unirl.models.llada import LladaConfig, LladaForDiffusion
from unirl.rollout.approximate_cache import ApproximateCache, least_certain
from unirl.rollout.unmasking import draw_images

MASK, FIRST, NUM = 80, 96, 24
PLAIN = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.9)
GUIDED = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.9, guidance_scale=5.0)
USUAL = ApproximateCache()


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def golden():
    return read(Path(__file__).with_name("approximate_cache_golden.safetensors"))


@pytest.fixture(scope="module")
def model():
    tensors, metadata = read(Path(__file__).parents[1] / "models" / "llada_golden.safetensors")
    model = LladaForDiffusion(LladaConfig(**json.loads(metadata["config"]))).eval()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model


@pytest.fixture
def passes(model, monkeypatch):
    """For each pass through the blocks, bool [B, T] of the positions that it computed."""
    seen, whole = [], model.hidden_states

    def watched(ids, mask=None, kept=None, where=None):
        computed = torch.ones(ids.shape, dtype=torch.bool)
        seen.append(computed if where is None else torch.zeros_like(computed).scatter_(1, where, True))
        return whole(ids, mask, kept, where)

    monkeypatch.setattr(model, "hidden_states", watched)
    return seen


@pytest.fixture
def counted(model):
    """Positions that went through each pass of the first block, repeats included."""
    seen = []
    hook = model.model.transformer["blocks"][0].register_forward_pre_hook(
        lambda block, args: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    yield seen
    hook.remove()


def make_canvases():
    """Prompts of different lengths and pictures of different sizes: 24, 35 and 16 positions; nulls of other lengths."""
    rng = np.random.default_rng(0)
    canvases, nulls = [], []
    for num_prompt, (height, width) in ((5, (3, 4)), (11, (4, 4)), (2, (2, 4))):
        tail = [85, 82, *([MASK] * width + [81]) * height, 83, 86]
        canvases.append(np.array([*rng.integers(0, 80, num_prompt), *tail], np.int32))
        nulls.append(np.array([5, 84, *tail], np.int32))
    return canvases, nulls


def tokens(drawn):
    return [(row.values.tolist(), row.steps.tolist()) for row, _ in drawn]


@pytest.mark.parametrize("name", ["usual", "short"])
def test_with_the_official_noise_everything_is_that_of_the_official_cache(golden, model, passes, name):
    tensors, metadata = golden
    num_steps, keep, warmup, refresh_every = json.loads(metadata[name])
    cache = ApproximateCache(keep=keep, warmup=warmup, refresh_every=refresh_every)

    def recorded(seed, step, cells, num_values):
        return tensors[f"{name}.value_noise.{step}"], tensors[f"{name}.order_noise.{step}"]

    canvas, null = (tensors[stream].numpy().astype(np.int32) for stream in ("canvas", "null"))
    ((row, logprobs),) = draw_images(model, [canvas], [null], [0], GUIDED, num_steps, recorded, cache)
    for stream, computed in (("cond", passes[::2]), ("uncond", passes[1::2])):
        assert torch.equal(torch.cat(computed), tensors[f"{name}.{stream}_computed"]), stream
    assert row.values.tolist() == tensors[f"{name}.codes"].tolist()
    assert row.steps.tolist() == tensors[f"{name}.steps"].tolist()
    assert np.abs(logprobs - tensors[f"{name}.logprobs"].numpy()).max() < 1e-4
    ((exact, _),) = draw_images(model, [canvas], [null], [0], GUIDED, num_steps, recorded)
    assert exact.values.tolist() != row.values.tolist(), "the recording would not tell the cache from none"


@pytest.mark.parametrize(("law", "expected", "without"), [(PLAIN, 203, 420), (GUIDED, 391, 804)])
def test_fewer_positions_go_through_the_blocks(golden, model, counted, law, expected, without):
    """12 steps: 5 compute all of 35 (and 32 null) positions, 7 compute 4 of each."""
    canvas, null = (golden[0][stream].numpy().astype(np.int32) for stream in ("canvas", "null"))
    draw_images(model, [canvas], [null], [0], law, 12, cache=USUAL)
    assert sum(counted) == expected
    counted.clear()
    draw_images(model, [canvas], [null], [0], law, 12)
    assert sum(counted) == without


@pytest.mark.parametrize("law", [PLAIN, GUIDED])
@pytest.mark.parametrize("cache", [ApproximateCache(keep=0, warmup=0), ApproximateCache(warmup=0, refresh_every=1)])
def test_nothing_reused_is_the_exact_sampler(model, law, cache):
    canvases, nulls = make_canvases()
    exact = draw_images(model, canvases, nulls, [3, 4, 5], law, 7)
    cached = draw_images(model, canvases, nulls, [3, 4, 5], law, 7, cache=cache)
    assert tokens(cached) == tokens(exact)
    for (_, logprobs), (_, same) in zip(cached, exact, strict=True):
        assert np.abs(logprobs - same).max() < 1e-4


@pytest.mark.parametrize("law", [PLAIN, GUIDED])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_rows_of_different_lengths_are_what_each_is_alone(model, passes, law, keep):
    canvases, nulls = make_canvases()
    cache = ApproximateCache(keep=keep, warmup=0.2, refresh_every=4)
    together = draw_images(model, canvases, nulls, [3, 4, 5], law, 8, cache=cache)
    in_company = list(passes)
    for place, (canvas, null, seed) in enumerate(zip(canvases, nulls, (3, 4, 5), strict=True)):
        passes.clear()
        alone = draw_images(model, [canvas], [null], [seed], law, 8, cache=cache)
        assert tokens(alone) == tokens(together[place : place + 1])
        assert np.abs(alone[0][1] - together[place][1]).max() < 1e-4
        partial = [(own, both[place, : own.shape[1]]) for own, both in zip(passes, in_company, strict=True)
                   if not own.all()]  # fmt: skip
        assert len(partial) == (10 if law is GUIDED else 5)
        assert all(torch.equal(own[0], both) for own, both in partial)


def test_a_full_step_comes_after_the_warm_up_and_every_few_steps():
    def full(cache, num_steps):
        return [step for step in range(num_steps) if cache.computes_all(step, num_steps)]

    assert full(USUAL, 64) == [*range(20), 24, 29, 34, 39, 44, 49, 54, 59]
    assert full(USUAL, 1) == [0]
    assert full(ApproximateCache(warmup=0, refresh_every=100), 5) == [0]
    assert full(ApproximateCache(refresh_every=1), 6) == [*range(6)]


def test_the_least_certain_are_those_up_to_the_quantile_without_padding():
    certainty = torch.tensor([[4.0, 1, 3, 1, 5, 0, 0], [7.0, 6, 5, 4, 3, 2, 1]])
    # A quarter of the way from the first to the last of 5, and of 7: the second, and between the second and the third.
    assert least_certain(certainty, [5, 7], 0.25).tolist() == [[1, 3], [5, 6]]
    # The median of 5 is 3; of 7 it is 4. The shorter row repeats its first.
    assert least_certain(certainty, [5, 7], 0.5).tolist() == [[1, 2, 3, 1], [3, 4, 5, 6]]
    assert least_certain(torch.ones(1, 3), [3], 0.1).tolist() == [[0, 1, 2]], "equals are all computed"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"keep": 1.0}, r"expected keep in \[0, 1\); got 1.0; 0.9 means nine tenths"),
        ({"keep": float("nan")}, r"expected keep in \[0, 1\); got nan"),
        ({"warmup": -0.1}, r"expected warmup in \[0, 1\); got -0.1"),
        ({"refresh_every": 0}, "expected refresh_every of 1 or more steps; got 0; for no refresh"),
    ],
)
def test_settings_out_of_range_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        ApproximateCache(**field)
