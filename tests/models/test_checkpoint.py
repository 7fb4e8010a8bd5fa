import pytest
import torch

from unirl.models.checkpoint import all_finite, copy_into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5, 40, 1002])
def test_one_broken_value_anywhere_is_found(dtype, broken, place):
    values = torch.linspace(-1, 1, 1003).to(dtype)
    assert all_finite(values)
    values[place] = broken
    assert not all_finite(values)


@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.arange(3), torch.tensor(2.0), torch.ones(2, dtype=torch.bool)]
)
def test_what_cannot_be_broken_is_whole(values):
    assert all_finite(values)


def test_a_broken_weight_is_refused_before_anything_is_written():
    target = torch.zeros(2)
    with pytest.raises(ValueError, match="weight w: expected finite values"):
        copy_into({"w": target}, "w", torch.tensor([1.0, torch.nan]))
    assert not target.any()
