"""Packed documents against each alone in transformers' own attention."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from unirl.models.packed_attention import document_arguments, use_packed_attention


@pytest.fixture(params=[4, 2], ids=["own keys", "grouped keys"])
def models(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=request.param, max_position_embeddings=64,
    )  # fmt: skip
    plain, packed = LlamaModel(config), LlamaModel(LlamaConfig.from_dict(config.to_dict()))
    packed.load_state_dict(plain.state_dict())
    use_packed_attention(packed)
    return plain, packed


def test_a_document_in_company_equals_the_document_alone(models):
    plain, packed = models
    documents = [torch.randint(0, 50, (length,)) for length in (7, 1, 12, 3)]
    alone = [plain(input_ids=document[None]).last_hidden_state[0] for document in documents]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        row = torch.cat([documents[index] for index in order])[None]
        arguments = document_arguments([len(documents[index]) for index in order], "cpu")
        states = packed(input_ids=row, use_cache=False, **arguments).last_hidden_state[0]
        for index, part in zip(order, states.split([len(documents[index]) for index in order]), strict=True):
            torch.testing.assert_close(part, alone[index], atol=2e-6, rtol=0)


def test_gradients_equal_too(models):
    plain, packed = models
    documents = [torch.randint(0, 50, (length,)) for length in (5, 9)]
    for document in documents:
        plain(input_ids=document[None]).last_hidden_state.pow(2).sum().backward()
    arguments = document_arguments([5, 9], "cpu")
    packed(input_ids=torch.cat(documents)[None], use_cache=False, **arguments).last_hidden_state.pow(2).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-5, msg=name)


def test_without_documents_it_attends_as_transformers_does(models):
    plain, packed = models
    ids, mask = torch.randint(0, 50, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    found = packed(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-6, rtol=0)
