"""Causal attention of documents packed into one row: each attends to itself alone, as if it stood in a row of its own.

Without documents it is PyTorch's scaled dot product attention, so that one model serves training and sampling.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "unirl_packed"


def document_arguments(lengths: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """What a transformers model is told about a row [1, T] of documents of these lengths: places and borders."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "position_ids": positions[None].to(device),
        # Of four dimensions a mask is passed on as it is; nobody reads it.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_attention(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, T, heads, D] of query [B, heads, T, D], key and value [B, groups, T, D].

    With `cu_seq_lens_q`, B is 1 and document d lies in the places cu_seq_lens_q[d] to cu_seq_lens_q[d + 1].
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **arguments
        )
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        assert max_length_q is not None, "document_arguments() gives the longest document"
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=grouped,
        )
        assert isinstance(output, Tensor), "log-sum-exps were not asked for"
        return output[None], None
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q.tolist())]
    # Split rather than sliced: the gradient of a slice is as large as the row.
    documents = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in documents
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def use_packed_attention(module: Any) -> None:
    """Let a transformers model attend by `packed_attention`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module.config._attn_implementation = NAME
