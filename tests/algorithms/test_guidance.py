import pytest
import torch

from unirl.algorithms.guidance import guided_logits


def test_hand_worked_mix():
    # u + 3 (c - u): 1 + 3 * (2 - 1) = 4; 0 + 3 * (-1 - 0) = -3.
    got = guided_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]), 3.0)
    assert got.tolist() == [4.0, -3.0]


def test_scale_one_is_the_conditional_stream_and_zero_the_unconditional_one():
    cond, uncond = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    assert torch.equal(guided_logits(cond, uncond, 1.0), cond)
    assert torch.equal(guided_logits(cond, uncond, 0.0), uncond)


def test_lumina_writes_the_same_mix_with_w_one_lower():
    cond, uncond = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    w = 2.5
    torch.testing.assert_close(guided_logits(cond, uncond, w + 1), (1 + w) * cond - w * uncond)


def test_half_precision_streams_are_mixed_in_float32():
    cond, uncond = torch.randn(5, dtype=torch.bfloat16), torch.randn(5, dtype=torch.bfloat16)
    got = guided_logits(cond, uncond, 5.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, uncond.float() + 5 * (cond.float() - uncond.float()), rtol=0, atol=0)


def test_gradient_reaches_both_streams():
    cond, uncond = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    guided_logits(cond, uncond, 4.0).sum().backward()
    assert cond.grad.tolist() == [4.0] * 3
    assert uncond.grad.tolist() == [-3.0] * 3


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_an_error(scale):
    with pytest.raises(ValueError, match="finite guidance scale"):
        guided_logits(torch.zeros(2), torch.zeros(2), scale)
