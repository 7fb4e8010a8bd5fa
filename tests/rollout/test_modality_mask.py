from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from unirl.rollout.modality_mask import MODALITIES, ModalityMask


def make_mask(first_code):
    facts = SimpleNamespace(vocab_size=6, first_code=first_code, num_codes=2, forbidden_text_ids=[0])
    model = SimpleNamespace(hf_config=facts)
    config = SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(max_num_seqs=4))
    return ModalityMask(config, torch.device("cpu"), False)


@pytest.fixture
def mask():
    return make_mask(4)


def update(mask, size, added=(), removed=(), moved=()):
    rows = [(row, SamplingParams(extra_args={"modality": modality}), None, []) for row, modality in added]
    mask.update_state(BatchUpdate(batch_size=size, removed=removed, added=rows, moved=moved))
    finite = torch.isfinite(mask.apply(torch.zeros(size, 6)))
    kinds = {(False, True, True, True, False, False): "text", (False,) * 4 + (True,) * 2: "image"}
    return [kinds[tuple(row)] for row in finite.tolist()]


def test_rows_follow_requests_that_enter_leave_and_move(mask):
    assert update(mask, 3, added=[(0, "text"), (1, "image"), (2, "text")]) == ["text", "image", "text"]
    assert update(mask, 3, moved=[(0, 1, MoveDirectionality.SWAP)]) == ["image", "text", "text"]
    moved = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    assert update(mask, 2, removed=[0], moved=moved) == ["text", "text"]
    assert update(mask, 3, added=[(2, "image")]) == ["text", "text", "image"]
    mask.update_state(None)
    assert not mask.is_argmax_invariant()


def test_codes_may_lie_between_text_ids():
    mask = make_mask(2)
    rows = [
        (row, SamplingParams(extra_args={"modality": modality}), None, []) for row, modality in enumerate(MODALITIES)
    ]
    mask.update_state(BatchUpdate(batch_size=2, removed=(), added=rows, moved=()))
    text, image = torch.isfinite(mask.apply(torch.zeros(2, 6))).tolist()
    assert text == [False, True, False, False, True, True]
    assert image == [False, False, True, True, False, False]


@pytest.mark.parametrize("extra", [None, {}, {"modality": "sound"}])
def test_request_without_a_modality_is_refused(extra):
    with pytest.raises(ValueError, match=r"expected extra_args\['modality'\] in \('text', 'image'\)"):
        ModalityMask.validate_params(SamplingParams(extra_args=extra))
