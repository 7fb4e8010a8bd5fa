"""The restricted cross-entropy against a plain loop, a number worked by hand, and its two forms against each other."""

import math

import pytest
import torch

from unirl.algorithms.cross_entropy import masked_cross_entropy, sliced_cross_entropy

FIRST, NUM = 3, 4  # ids 3 to 6 of 10 are image codes
IS_CODE = torch.tensor([FIRST <= id < FIRST + NUM for id in range(10)])
ALL = torch.ones(10, dtype=torch.bool)


def slow_nats(logits, target, allowed):
    rivals = [id for id in range(10) if bool(IS_CODE[id]) == bool(IS_CODE[target]) and allowed[id]]
    return math.log(sum(math.exp(logits[id]) for id in rivals)) - logits[target]


def test_a_number_worked_by_hand():
    # Text ids 0 and 1 at logit 0 and ln 3, code 2 at ln 1000: the code is no rival of a text target.
    logits = torch.tensor([[0.0, math.log(3.0), math.log(1000.0)]])
    is_code = torch.tensor([False, False, True])
    every = torch.ones(3, dtype=torch.bool)
    nats, hits = masked_cross_entropy(logits, torch.tensor([0]), is_code, every)
    assert nats.item() == pytest.approx(math.log(4.0)), "1 of 1 + 3"
    assert not hits.item()
    nats, hits = masked_cross_entropy(logits, torch.tensor([2]), is_code, every)
    assert nats.item() == 0.0, "the only code there is"
    assert hits.item()


@pytest.mark.parametrize("without", [(), (0, 9)])
def test_masked_form_equals_a_plain_loop(without):
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 10) * 3, torch.randint(1, 9, (50,))
    allowed = ALL.clone()
    allowed[list(without)] = False
    nats, hits = masked_cross_entropy(logits, targets, IS_CODE, allowed)
    expected = [
        slow_nats(row.double().tolist(), target, allowed.tolist()) for row, target in zip(logits, targets, strict=True)
    ]
    torch.testing.assert_close(nats.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert 0 < hits.sum() < 50


@pytest.mark.parametrize("num_parts", [1, 3, 60])
def test_sliced_form_equals_masked_form_in_value_and_gradient(num_parts):
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 6), torch.randn(10, 6)
    targets = torch.randint(0, 10, (40,))
    allowed = ALL.clone()
    allowed[0] = False
    targets[targets == 0] = 1
    results = []
    for sliced in (False, True):
        rows, table = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if sliced:
            nats = torch.zeros(40)
            for ids in (IS_CODE.nonzero()[:, 0], (~IS_CODE).nonzero()[:, 0]):
                own = torch.isin(targets, ids)
                places = torch.searchsorted(ids, targets[own])
                head = lambda part, rows=table[ids]: part @ rows.T  # noqa: E731
                found, _ = sliced_cross_entropy(rows[own], places, head, allowed[ids], num_parts=num_parts)
                nats = nats.index_put((own.nonzero()[:, 0],), found)
        else:
            nats, _ = masked_cross_entropy(rows @ table.T, targets, IS_CODE, allowed)
        nats.sum().backward()
        results.append((nats.detach(), rows.grad, table.grad))
    for reference, light in zip(*results, strict=True):
        torch.testing.assert_close(light, reference, atol=1e-5, rtol=1e-6)


def test_the_other_modality_gets_no_gradient_at_all():
    torch.manual_seed(2)
    hidden, table = torch.randn(9, 6), torch.randn(10, 6, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 7, 8, 9, 0, 1, 2])
    masked_cross_entropy(hidden @ table.T, targets, IS_CODE, ALL)[0].sum().backward()
    assert table.grad is not None
    assert (table.grad[IS_CODE] == 0).all()
    assert (table.grad[~IS_CODE] != 0).any()


def test_no_targets_keep_the_graph():
    table = torch.randn(4, 6, requires_grad=True)
    nats, _ = sliced_cross_entropy(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), lambda rows: rows @ table.T)
    nats.sum().backward()
    assert table.grad is not None
    assert (table.grad == 0).all()
