import math

import pytest
import torch

from unirl.algorithms import logprobs as room
from unirl.algorithms.guidance import guided_logits
from unirl.algorithms.logprobs import token_entropies, token_logprobs


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(generator):
    return 3 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)


@pytest.fixture
def tokens(generator):
    return torch.randint(0, 7, (3, 5), generator=generator)


def slow_law(logits, temperature, allowed):
    """Probabilities of the allowed ids at one position, by plain arithmetic."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits.tolist()) if allowed is None or allowed[i]}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def test_hand_worked_value():
    # softmax of (0, ln 3) is (1/4, 3/4); at temperature 1/2 the odds square: (1/10, 9/10).
    logits = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    tokens = torch.tensor([[1]])
    assert token_logprobs(logits, tokens).item() == pytest.approx(math.log(3 / 4))
    assert token_logprobs(logits, tokens, 0.5).item() == pytest.approx(math.log(9 / 10))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert token_entropies(logits).item() == pytest.approx(entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("restricted", [False, True])
def test_agrees_with_a_slow_loop(logits, tokens, temperature, restricted):
    allowed = torch.tensor([True, True, False, True, False, True, True]) if restricted else None
    tokens = torch.where(tokens == 2, 3, torch.where(tokens == 4, 5, tokens)) if restricted else tokens
    got = token_logprobs(logits, tokens, temperature, allowed)
    entropies = token_entropies(logits, temperature, allowed)
    for b in range(3):
        for t in range(5):
            law = slow_law(logits[b, t], temperature, allowed)
            assert got[b, t].item() == pytest.approx(math.log(law[int(tokens[b, t])]), rel=1e-12)
            assert entropies[b, t].item() == pytest.approx(-sum(p * math.log(p) for p in law.values()), rel=1e-12)


def test_probabilities_of_the_allowed_ids_add_up_to_one(logits):
    allowed = torch.tensor([False, True, True, False, True, True, False])
    total = sum(
        token_logprobs(logits, torch.full((3, 5), i), 0.8, allowed).exp() for i in allowed.nonzero()[:, 0].tolist()
    )
    torch.testing.assert_close(total, torch.ones(3, 5, dtype=torch.float64))


def test_guided_mode_scores_the_mixed_logits_and_sends_gradient_into_both_streams(logits, tokens, generator):
    uncond = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    cond = logits.clone().requires_grad_()
    got = token_logprobs(cond, tokens, 0.9, uncond_logits=uncond, guidance_scale=3.0)
    mixed = guided_logits(cond, uncond, 3.0)
    expected = (mixed / 0.9).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), (cond, uncond)), torch.autograd.grad(expected.sum(), (cond, uncond)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    entropies = token_entropies(cond, 0.9, uncond_logits=uncond, guidance_scale=3.0)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=mixed / 0.9).entropy())
    assert not entropies.requires_grad


def test_guidance_one_equals_the_conditional_mode_bit_for_bit(logits, tokens):
    guided = token_logprobs(logits, tokens, uncond_logits=torch.randn_like(logits), guidance_scale=1.0)
    assert torch.equal(guided, token_logprobs(logits, tokens))


@pytest.mark.parametrize("elements", [1, 7, 15, 64])
def test_chunk_size_changes_neither_values_nor_gradients(logits, tokens, elements, monkeypatch):
    def run():
        leaf = logits.float().requires_grad_()
        values = token_logprobs(leaf, tokens, 0.7, uncond_logits=leaf.detach().flip(0), guidance_scale=2.0)
        return values.detach(), torch.autograd.grad((values * torch.arange(15.0).view(3, 5)).sum(), leaf)[0]

    whole_values, whole_gradient = run()
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", elements)
    values, gradient = run()
    assert torch.equal(values, whole_values)
    assert torch.equal(gradient, whole_gradient)


def test_values_are_float32_for_half_precision_logits(logits, tokens):
    got = token_logprobs(logits.bfloat16(), tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logprobs(logits.bfloat16().float(), tokens), rtol=0, atol=0)


def test_gradient_equals_finite_differences(logits, tokens):
    allowed = torch.tensor([True] * 6 + [False])
    tokens = tokens.clamp(max=5)
    uncond = logits.flip(0).clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, u: token_logprobs(c, tokens, 0.8, allowed, uncond_logits=u, guidance_scale=1.5),
        (logits.clone().requires_grad_(), uncond),
    )


def test_padding_is_zero_needs_no_valid_token_and_lets_no_nan_through(logits, tokens):
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    dirty = logits.clone()
    dirty[1, 3:] = float("nan")
    dirty.requires_grad_()
    wild = torch.where(mask, tokens, -100)
    got = token_logprobs(dirty, wild, uncond_logits=dirty.detach() * 0.5, guidance_scale=2.0, loss_mask=mask)
    clean = token_logprobs(logits, tokens, uncond_logits=logits * 0.5, guidance_scale=2.0)
    torch.testing.assert_close(got, torch.where(mask, clean, 0.0))
    got.sum().backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[1, 3:] == 0).all()
    entropies = token_entropies(dirty.detach(), loss_mask=mask)
    torch.testing.assert_close(entropies, torch.where(mask, token_entropies(logits), 0.0))


def test_a_single_allowed_id_is_certain(logits):
    allowed = torch.zeros(7, dtype=torch.bool)
    allowed[4] = True
    assert torch.equal(token_logprobs(logits, torch.full((3, 5), 4), 1.0, allowed), torch.zeros(3, 5).double())
    assert torch.equal(token_entropies(logits, 1.0, allowed), torch.zeros(3, 5).double())


def test_a_token_outside_the_allowed_ids_is_an_error_with_its_position(logits, tokens):
    allowed = torch.ones(7, dtype=torch.bool)
    allowed[6] = False
    tokens = tokens.clamp(max=5)
    tokens[2, 4] = 6
    with pytest.raises(ValueError, match=r"id 6 at row 2, position 4"):
        token_logprobs(logits, tokens, 1.0, allowed)


@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_outside_the_vocabulary_is_an_error_with_its_position(logits, tokens, token):
    tokens[0, 1] = token
    with pytest.raises(ValueError, match=rf"id {token} at row 0, position 1"):
        token_logprobs(logits, tokens, 1.0, torch.ones(7, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_an_error(logits, tokens, temperature):
    with pytest.raises(ValueError, match="temperature above 0"):
        token_logprobs(logits, tokens, temperature)


def test_guidance_without_a_second_stream_is_an_error(logits, tokens):
    with pytest.raises(ValueError, match="guidance_scale 1 without uncond_logits"):
        token_logprobs(logits, tokens, guidance_scale=5.0)


def test_an_empty_set_of_allowed_ids_is_an_error(logits):
    with pytest.raises(ValueError, match="at least one allowed"):
        token_entropies(logits, 1.0, torch.zeros(7, dtype=torch.bool))


def test_the_backward_pass_keeps_no_float32_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 1000)
    kept = []
    logits = torch.randn(4, 25, 100, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        token_logprobs(logits, torch.zeros(4, 25, dtype=torch.long))
    assert torch.bfloat16 in kept
    assert torch.float32 not in kept
