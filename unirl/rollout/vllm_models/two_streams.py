"""Classifier-free guidance inside a vLLM model: two token streams over one set of weights.

Each request carries a conditional and an unconditional sequence of equal length, and every layer has a key-value cache
for each. One request stays one sequence for the scheduler, so its two streams can never fall out of step. Streams stand
side by side in the width of embeddings and hidden states, and one behind the other in the tokens of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors


@dataclass(slots=True)
class Streams:
    """What the steps to come need; the sampler sets it between calls, all layers read it."""

    num_active: int
    """2 runs the unconditional stream too. Never more than the model was built with."""
    modalities: frozenset[str] = frozenset({"text", "image"})
    """Heads to run: those of the requests in flight."""
    guidance_scale: float = 1.0


class TwoCaches(nn.Module):
    """What a layer's attention over its cache becomes: the second half of the tokens has a cache of its own."""

    def __init__(self, attention: Any, streams: Streams, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.streams = streams
        self.attn = attention.attn
        self.attn_unconditional = Attention(
            attention.num_heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=attention.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{attention.attn.layer_name}_unconditional",
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attended values [S T, heads D] of S active streams."""
        if self.streams.num_active == 1:
            return self.attn(query, key, value)
        halves = zip(*(part.chunk(2) for part in (query, key, value)), strict=True)
        caches = (self.attn, self.attn_unconditional)
        return torch.cat(
            [cache(*(part.contiguous() for part in half)) for cache, half in zip(caches, halves, strict=True)]
        )


def add_second_caches(trunk: Any, streams: Streams, vllm_config: VllmConfig) -> None:
    """Give every layer of a trunk, whose attention is named as Llama's, a cache for the unconditional stream."""
    for layer in trunk.layers:
        layer.self_attn.attn = TwoCaches(layer.self_attn, streams, vllm_config)


def embed_streams(
    embed: Callable[[Tensor], Tensor], ids: Tensor, null_ids: Callable[[], Tensor], num_streams: int, streams: Streams
) -> Tensor:
    """Embeddings [T, S H] of ids [T], all streams of the model side by side; those that do not run are 0."""
    conditional = embed(ids)
    if num_streams == 1:
        return conditional
    unconditional = torch.zeros_like(conditional) if streams.num_active == 1 else embed(null_ids())
    return torch.cat([conditional, unconditional], dim=-1)


def run_streams(
    trunk: Any,
    embeddings: Tensor,
    positions: Tensor,
    intermediate: IntermediateTensors | None,
    *,
    width: int,
    num_active: int,
) -> Tensor:
    """Last hidden states [T, S H] of the active streams side by side, of embeddings [T, S' H], each of `width` H."""
    stacked = torch.cat(embeddings.split(width, dim=-1)[:num_active])
    hidden = trunk(None, positions.repeat(num_active), intermediate, stacked)
    return torch.cat(hidden.chunk(num_active), dim=-1)
