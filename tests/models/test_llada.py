"""LLaDA against the official implementation of Lumina-DiMOO.

llada_golden.safetensors was made once by running the official repository's model and its two samplers on random weights
of its own layout (2 layers of width 32, 120 ids of which the last 24 are image codes): weights, a row of ids with its
logits, a canvas of 3 x 4 cells drawn in 5 steps at temperature 0.9 without guidance and with w = 4, and an answer of
two blocks of 4 in 6 steps at temperature 0.7. Every noise tensor that the samplers drew was recorded with them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unirl.algorithms.guidance import guided_logits
from unirl.algorithms.unmasking import cosine_reveals, draw_values, linear_reveals, most_confident
from unirl.models.llada import KeysAndValues, LladaConfig, LladaForDiffusion

MASK, END_ANSWER, FIRST_CODE, NUM_CODES = 80, 86, 96, 24


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).with_name("llada_golden.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it does not iterate
        return tensors, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def model(golden):
    tensors, config = golden
    model = LladaForDiffusion(LladaConfig(**config)).eval()
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    return model


def test_logits_are_those_of_the_official_code(golden, model):
    tensors, _ = golden
    assert (model(tensors["ids"]) - tensors["logits"]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "scale"), [("plain", 1.0), ("guided", 5.0)])
def test_drawing_with_the_same_noise_gives_the_official_codes(golden, model, name, scale):
    """The official w is s - 1."""
    tensors, _ = golden
    canvas, uncond = tensors["image.canvas"].clone(), tensors["image.uncond_prompt"]
    num_prompt = int((canvas == MASK).nonzero()[0]) - 2
    cells = (canvas == MASK).nonzero()[:, 0]
    for step, count in enumerate(cosine_reveals(12, 5)):
        masked = (canvas == MASK).nonzero()[:, 0]
        cond = code_logits(model, canvas, masked)
        null = torch.cat([uncond, canvas[num_prompt:]])
        logits = guided_logits(cond, code_logits(model, null, masked - num_prompt + len(uncond)), scale)
        values, confidence = draw_values(logits, 0.9, tensors[f"image.{name}.value_noise.{step}"])
        chosen = most_confident(confidence + 0.9 * tensors[f"image.{name}.order_noise.{step}"], count)
        canvas[masked[chosen]] = FIRST_CODE + values[chosen]
    assert (canvas[cells] - FIRST_CODE).tolist() == tensors[f"image.{name}.codes"].tolist()


def code_logits(model, canvas, places):
    return model.logits(model.hidden_states(canvas[None])[0, places], FIRST_CODE, FIRST_CODE + NUM_CODES)


@torch.no_grad()
def test_answering_with_the_same_noise_gives_the_official_ids(golden, model):
    """The official code draws by argmax of exp(l) / (-log u)^T, which is l / T plus Gumbel noise."""
    tensors, _ = golden
    canvas, step = tensors["text.canvas"].clone(), 0
    start = int((canvas == MASK).nonzero()[0])
    for block in (slice(start, start + 4), slice(start + 4, start + 8)):
        for count in linear_reveals(4, 3):
            logits = model(canvas[None])[0, block]
            uniform = tensors[f"text.uniform.{step}"][block]
            values, confidence = draw_values(logits.double(), 0.7, -torch.log(-torch.log(uniform)))
            places = most_confident(confidence.masked_fill(canvas[block] != MASK, -torch.inf), count)
            canvas[block][places] = values[places]
            step += 1
    assert canvas.tolist() == tensors["text.ids"].tolist()


def test_padding_on_the_right_changes_nothing(golden, model):
    """The official code lets a short row of a batch see its padding; ours equals the row alone."""
    tensors, _ = golden
    ids = torch.cat([tensors["ids"], tensors["ids"].roll(1)])
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    together = model(ids, mask)
    assert (together[1, :13] - model(ids[1:, :13])[0]).abs().max() < 1e-5
    assert (together[0] - model(ids[:1])[0]).abs().max() < 1e-5


def test_part_of_the_positions_with_kept_keys_and_values_is_that_part_of_the_whole(golden, model):
    """Rows compute different positions, one of them twice; the second row is padded."""
    tensors, _ = golden
    ids = torch.cat([tensors["ids"], tensors["ids"].roll(1)])
    mask = torch.ones_like(ids).bool()
    mask[1, 13:] = False
    where = torch.tensor([[0, 7, 22, 3], [12, 5, 1, 12]])
    with torch.inference_mode():
        kept = KeysAndValues()
        whole = model.hidden_states(ids, mask, kept)
        part = model.hidden_states(ids, mask, kept, where)
    assert (whole - model.hidden_states(ids, mask)).abs().max() == 0
    assert (part - whole[torch.arange(2)[:, None], where]).abs().max() < 1e-5


def test_a_saved_model_loads_back_equal(golden, model, tmp_path):
    tensors, _ = golden
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {config[name] for name in ("d_model", "mlp_hidden_size", "vocab_size")} == {32, 48, 120}
    again = LladaForDiffusion.from_pretrained(tmp_path)
    assert torch.equal(again(tensors["ids"]), model(tensors["ids"]))


def test_gradient_checkpointing_changes_no_gradient(golden, model):
    tensors, _ = golden
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tensors["ids"]).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_disable()
        model.eval()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-7)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("field", [{"alibi": True}, {"n_kv_heads": 1}, {"include_bias": True}, {"d_model": 33}])
def test_another_architecture_is_refused(golden, field):
    with pytest.raises(
        ValueError, match=rf"config\.json: expected an LLaDA model as published .* got .*{next(iter(field))}"
    ):
        LladaConfig(**golden[1] | field)
