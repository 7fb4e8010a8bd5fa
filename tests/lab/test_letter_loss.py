import pytest
import torch

from unirl.lab.letter_loss import letter_weighted


def test_only_the_first_letter_of_each_answer_weighs_more():
    nats = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    learned = torch.tensor([[True, True, True, True], [True, True, True, False]])
    is_letter = torch.tensor([[False, True, False, True], [True, False, True, False]])
    loss, letter = letter_weighted(nats, learned, is_letter, 3.0)
    assert letter == (2.0 + 5.0) / 2
    assert loss.item() == pytest.approx((1 + 3 * 2 + 3 + 4 + 3 * 5 + 6 + 7) / 7)
