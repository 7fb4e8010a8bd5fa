"""What the engine's processor makes of rows that come, go and change places."""

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from unirl.models.interleaved import ImageMarkup
from unirl.rollout.interleaved_law import InterleavedSampling
from unirl.rollout.interleaved_processor import InterleavedProcessor
from unirl.rollout.interleaved_replies import make_rules

TEXT, CODES, END = {1, 2, 3, 4, 5, 10}, set(range(16, 24)), {13}


@pytest.fixture
def rules(chat_layout):
    layout = chat_layout(ImageMarkup(begin=10, end=13), size=24, codes=range(16, 24), words=range(1, 6), end=1)
    return make_rules(layout, InterleavedSampling(grid=(1, 2)))


@pytest.fixture
def processor():
    return InterleavedProcessor(None, torch.device("cpu"), False)


def request(rules, row, opened, ids):
    return row, SamplingParams(max_tokens=12, extra_args={"rules": rules, "opened": opened}), None, ids


def drawable(processor, size, added=(), removed=(), moved=()):
    processor.update_state(BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved))
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in processor.apply(torch.zeros(size, 24))]


def test_rows_follow_requests_that_enter_leave_and_move(processor, rules):
    replies = [[4], [4, 10], [16, 17]]
    added = [request(rules, 0, [], replies[0]), request(rules, 1, [], replies[1]), request(rules, 2, [10], replies[2])]
    assert drawable(processor, 3, added=added) == [TEXT, CODES, END]
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    assert drawable(processor, 3, moved=[(0, 1, swap)]) == [CODES, TEXT, END]
    assert drawable(processor, 2, removed=[0], moved=[(2, 0, one_way)]) == [END, TEXT]
    assert drawable(processor, 3, added=[request(rules, 2, [], [10, 20])]) == [END, TEXT, CODES]
    processor.update_state(None)
    assert not processor.is_argmax_invariant()


def test_the_list_of_a_reply_grows_by_itself(processor, rules):
    ids = []
    assert drawable(processor, 1, added=[request(rules, 0, [], ids)]) == [TEXT]
    for id, wanted in (
        (10, CODES),
        (16, CODES),
        (23, END),
        (13, TEXT),
        (2, TEXT),
        (2, TEXT),
        (2, TEXT),
        (2, TEXT - {10}),
    ):
        ids.append(id)
        assert drawable(processor, 1) == [wanted]


def test_a_row_that_comes_back_goes_on_where_it_was(processor, rules):
    assert drawable(processor, 1, added=[request(rules, 0, [10, 16], [17, 13, 10, 16])]) == [CODES]


def test_a_request_without_rules_is_refused():
    for extra in (None, {"opened": []}):
        with pytest.raises(ValueError, match="expected extra_args with rules and opened"):
            InterleavedProcessor.validate_params(SamplingParams(extra_args=extra))
