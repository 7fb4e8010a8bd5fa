import math

import pytest
import torch

from unirl.algorithms.importance import truncated_importance


def test_by_hand():
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.9), 0.0]])
    sampled = torch.tensor([[math.log(0.25), math.log(0.4), math.log(0.1), float("nan")]])
    mask = torch.tensor([[True, True, True, False]])
    # 0.5 / 0.25 = 2, 0.2 / 0.4 = 0.5, 0.9 / 0.1 = 9 held at 3, and 1 where nothing counts.
    expected = torch.tensor([[2.0, 0.5, 3.0, 1.0]])
    assert torch.allclose(truncated_importance(logprobs, sampled, mask, 3.0), expected)


def test_equals_a_plain_loop_and_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(5, 7, generator=generator, requires_grad=True)
    sampled, mask = torch.randn(5, 7, generator=generator), torch.rand(5, 7, generator=generator) < 0.7
    weights = truncated_importance(logprobs, sampled, mask, 2.0)
    assert not weights.requires_grad
    for row in range(5):
        for column in range(7):
            ratio = math.exp(logprobs[row, column].item() - sampled[row, column].item())
            plain = min(ratio, 2.0) if mask[row, column] else 1.0
            assert weights[row, column].item() == pytest.approx(plain, rel=1e-5)


def test_a_huge_ratio_does_not_overflow():
    far = torch.tensor([[0.0]]), torch.tensor([[-1000.0]]), torch.tensor([[True]])
    for cap in (2.0, 7.0):
        assert truncated_importance(*far, cap).item() == cap


@pytest.mark.parametrize("cap", [0.5, math.inf, math.nan])
def test_a_cap_that_would_shrink_every_token_is_refused(cap):
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        truncated_importance(one, one, one.bool(), cap)
