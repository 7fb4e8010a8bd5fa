from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from unirl.rollout.modality_mask import ModalityMask


@pytest.fixture
def mask():
    model = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=6, text_vocab_size=4, forbidden_text_ids=[0]))
    config = SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(max_num_seqs=4))
    return ModalityMask(config, torch.device("cpu"), False)


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


@pytest.mark.parametrize("extra", [None, {}, {"modality": "sound"}])
def test_request_without_a_modality_is_refused(extra):
    with pytest.raises(ValueError, match=r"expected extra_args\['modality'\] in \('text', 'image'\)"):
        ModalityMask.validate_params(SamplingParams(extra_args=extra))
