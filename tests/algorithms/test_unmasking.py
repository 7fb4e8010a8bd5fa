import math

import pytest
import torch

from unirl.algorithms.unmasking import cosine_reveals, draw_values, linear_reveals, most_confident


def test_hand_worked_cosine_schedule():
    # 12 cos(pi/2 s/4): 11.09, 8.49, 4.59, and 0 at the end: 11, 8, 4, 0 stay masked.
    assert cosine_reveals(12, 4) == [1, 3, 4, 4]
    assert cosine_reveals(12, 1) == [12]
    assert cosine_reveals(3, 3) == [1, 1, 1]


def test_the_papers_35_steps_reveal_at_most_46_of_1024_cells_at_once():
    reveals = cosine_reveals(1024, 35)
    assert reveals[:4] == [2, 3, 5, 7]
    assert (sum(reveals), max(reveals), len(reveals)) == (1024, 46, 35)


@pytest.mark.parametrize("schedule", [cosine_reveals, linear_reveals])
@pytest.mark.parametrize("num_cells", [1, 2, 7, 25, 64])
def test_every_step_reveals_and_all_is_revealed_once(schedule, num_cells):
    for num_steps in range(1, num_cells + 1):
        reveals = schedule(num_cells, num_steps)
        assert len(reveals) == num_steps
        assert min(reveals) >= 1
        assert sum(reveals) == num_cells


def test_text_is_revealed_evenly_with_the_rest_first():
    assert linear_reveals(8, 3) == [3, 3, 2]


@pytest.mark.parametrize("schedule", [cosine_reveals, linear_reveals])
@pytest.mark.parametrize("num_steps", [0, 5])
def test_more_steps_than_cells_are_refused(schedule, num_steps):
    with pytest.raises(ValueError, match=rf"expected 1 to 4 steps for 4 masked cells; got {num_steps}"):
        schedule(4, num_steps)


def test_values_follow_the_tempered_distribution_and_confidence_the_plain_one():
    logits, temperature, num_draws = torch.tensor([1.0, 0.0, -1.0, 2.0]), 0.5, 40_000
    generator = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(num_draws, 4, generator=generator)))
    allowed = torch.tensor([True, True, True, False])
    values, confidence = draw_values(logits.expand(num_draws, 4), temperature, noise, allowed)
    weights = [math.exp(value / temperature) for value in (1.0, 0.0, -1.0)]
    expected = torch.tensor([weight / sum(weights) * num_draws for weight in weights])
    counts = torch.bincount(values, minlength=4)
    assert counts[3] == 0
    # Chi-square with 2 degrees of freedom; 13.8 is passed once in a thousand.
    assert ((counts[:3] - expected).square() / expected).sum() < 13.8
    plain = torch.tensor([1.0, 0.0, -1.0]).log_softmax(0)
    assert torch.allclose(confidence, plain[values].to(confidence.dtype), atol=1e-6)


def test_temperature_0_takes_the_most_likely_value_whatever_the_noise():
    values, _ = draw_values(torch.tensor([[0.0, 3.0, 1.0]]), 0.0, torch.tensor([[100.0, 0.0, 0.0]]))
    assert values.tolist() == [1]


def test_equal_confidence_goes_by_place():
    assert most_confident(torch.tensor([0.5, 2.0, 0.5, 2.0]), 3).tolist() == [1, 3, 0]
