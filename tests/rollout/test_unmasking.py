import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from unirl.models.canvases import CellLaw, cells_of, score_canvases
from unirl.models.llada import LladaConfig, LladaForDiffusion
from unirl.rollout.unmasking import draw_answers, draw_images, keyed_noise

MASK, FIRST, NUM = 80, 96, 24
IMAGES = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.9)
GUIDED = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.9, guidance_scale=5.0)
WORDS = CellLaw(mask_id=MASK, start=0, stop=120, temperature=0.7)


@pytest.fixture(scope="module")
def golden():
    """Recorded runs of the official samplers; see tests/models/test_llada.py."""
    with safe_open(Path(__file__).parents[1] / "models" / "llada_golden.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


@pytest.fixture(scope="module")
def model(golden):
    tensors, config = golden
    model = LladaForDiffusion(LladaConfig(**config)).eval()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model


def null_of(tensors):
    canvas = tensors["image.canvas"].numpy()
    return np.concatenate([tensors["image.uncond_prompt"].numpy(), canvas[cells_of(canvas, MASK)[0] - 2 :]])


@pytest.mark.parametrize(("name", "law"), [("plain", IMAGES), ("guided", GUIDED)])
def test_images_with_the_official_noise_are_the_official_images(golden, model, name, law):
    tensors, _ = golden

    def recorded(seed, step, cells, num_values):
        return tensors[f"image.{name}.value_noise.{step}"], tensors[f"image.{name}.order_noise.{step}"]

    canvas = tensors["image.canvas"].numpy().astype(np.int32)
    nulls = [null_of(tensors).astype(np.int32)] if law is GUIDED else None
    ((row, _),) = draw_images(model, [canvas], nulls, [0], law, 5, recorded)
    assert row.values.tolist() == tensors[f"image.{name}.codes"].tolist()
    assert sorted(set(row.steps.tolist())) == [0, 1, 2, 3, 4]


def test_answers_with_the_official_noise_are_the_official_answers(golden, model):
    tensors, _ = golden
    canvas = tensors["text.canvas"].numpy().astype(np.int32)
    places = cells_of(canvas, MASK)

    def recorded(seed, step, cells, num_values):
        uniform = tensors[f"text.uniform.{step}"][places[cells.numpy()]]
        return -torch.log(-torch.log(uniform)), torch.zeros(len(cells))

    ((row, _),) = draw_answers(model, [canvas], [0], WORDS, 6, 4, recorded)
    assert row.values.tolist() == tensors["text.ids"].numpy()[places].tolist()


def make_canvases():
    """Prompts of different lengths and pictures of different sizes."""
    rng = np.random.default_rng(0)
    canvases, nulls = [], []
    for num_prompt, (height, width) in ((5, (3, 4)), (11, (4, 4)), (2, (2, 5))):
        picture = ([MASK] * width + [81]) * height
        tail = [85, 82, *picture, 83, 86]
        canvases.append(np.array([*rng.integers(0, 80, num_prompt), *tail], np.int32))
        nulls.append(np.array([5, 84, *tail], np.int32))
    return canvases, nulls


@pytest.mark.parametrize("law", [IMAGES, GUIDED])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_sampler_reports_what_the_learner_computes(model, law, num_steps, record_property):
    canvases, nulls = make_canvases()
    drawn = draw_images(model, canvases, nulls, [3, 4, 5], law, num_steps)
    total = torch.zeros(3, 16)
    with torch.no_grad():
        for scores in score_canvases(model, [row for row, _ in drawn], law):
            total += scores.logprobs * scores.scored
    gap = max(float((total[i, : len(p)] - torch.from_numpy(p)).abs().max()) for i, (_, p) in enumerate(drawn))
    assert gap <= 1e-5 * (2 * law.guidance_scale - 1)


def test_as_many_steps_as_cells_reveal_one_cell_each(model):
    canvases, _ = make_canvases()
    ((row, _),) = draw_images(model, canvases[:1], None, [1], IMAGES, 12)
    assert sorted(row.steps.tolist()) == list(range(12))


@pytest.mark.parametrize("law", [IMAGES, GUIDED])
def test_company_and_order_change_no_token(model, law):
    canvases, nulls = make_canvases()
    together = draw_images(model, canvases, nulls, [3, 4, 5], law, 7)
    backwards = draw_images(model, canvases[::-1], nulls[::-1], [5, 4, 3], law, 7)[::-1]
    alone = [draw_images(model, [c], [n], [s], law, 7)[0] for c, n, s in zip(canvases, nulls, (3, 4, 5), strict=True)]
    for other in (backwards, alone):
        for (row, logprobs), (same, again) in zip(together, other, strict=True):
            assert row.values.tolist() == same.values.tolist()
            assert row.steps.tolist() == same.steps.tolist()
            assert np.abs(logprobs - again).max() < 1e-4


def test_another_seed_draws_another_image_and_the_same_seed_the_same(model):
    canvases, _ = make_canvases()
    first, again, other = (draw_images(model, canvases[:1], None, [s], IMAGES, 5)[0][0] for s in (1, 1, 2))
    assert first.values.tolist() == again.values.tolist() != other.values.tolist()


def test_noise_is_standard_gumbel_and_differs_by_seed_step_and_cell():
    cells = torch.arange(200)
    values, order = keyed_noise(7, 3, cells, 50)
    assert values.shape == (200, 50)
    # Mean 0.5772 and standard deviation 1.2825; 10,000 values give the mean to 0.013.
    assert values.mean().item() == pytest.approx(0.5772, abs=0.05)
    assert values.std().item() == pytest.approx(1.2825, abs=0.05)
    assert order.std().item() == pytest.approx(1.28, abs=0.3)
    for other in (keyed_noise(8, 3, cells, 50)[0], keyed_noise(7, 4, cells, 50)[0], values.roll(1, 0)):
        assert abs(np.corrcoef(values.flatten(), other.flatten())[0, 1]) < 0.05


def test_masked_ids_are_never_drawn(model):
    allowed = torch.ones(120, dtype=torch.bool)
    allowed[FIRST:] = False
    law = CellLaw(mask_id=MASK, start=0, stop=120, temperature=1.5, allowed=allowed)
    canvas = np.array([5, 6, 85, *[MASK] * 8, 86], np.int32)
    for row, logprobs in draw_answers(model, [canvas] * 8, list(range(8)), law, 4, 4):
        assert row.values.max() < FIRST
        assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(("num_steps", "block"), [(3, 4), (4, 3), (16, 4)])
def test_steps_and_blocks_that_do_not_fit_are_refused(model, num_steps, block):
    canvas = np.array([5, 6, 85, *[MASK] * 8, 86], np.int32)
    with pytest.raises(ValueError, match="expected"):
        draw_answers(model, [canvas], [0], WORDS, num_steps, block)


def test_more_steps_than_cells_are_refused(model):
    with pytest.raises(ValueError, match="expected 1 to 12 steps for 12 masked cells; got 13"):
        draw_images(model, make_canvases()[0][:1], None, [0], IMAGES, 13)
