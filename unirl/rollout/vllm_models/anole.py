"""Anole for vLLM: a Llama trunk whose queries and keys are normalised in each head, as Chameleon's."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.utils import set_weight_attrs

from unirl.models.joint_policy import JointPolicy
from unirl.rollout.vllm_models.joint import JointLlama, load_joint_front, write_folder

EPSILON = 1e-5
"""Of the norm in each head, which no configuration names."""


class HeadNorm(nn.Module):
    """LayerNorm over each head, which has a scale and a shift of its own."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim))
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, values: Tensor) -> Tensor:
        """Normalised values [T, heads D]."""
        heads = values.unflatten(-1, self.weight.shape)
        return (functional.layer_norm(heads, heads.shape[-1:], eps=EPSILON) * self.weight + self.bias).flatten(-2)


class HeadNormAttention(LlamaAttention):
    """Attention whose queries and keys are normalised before they are rotated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_norm = HeadNorm(self.num_heads, self.head_dim)
        self.k_norm = HeadNorm(self.num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Hidden states [T, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, self.q_norm(query), self.k_norm(key))
        return self.o_proj(self.attn(query, key, value))[0]


class AnoleForRollout(JointLlama):
    """The vLLM model; its configuration is written by `write_engine_folder`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer: Any = functools.partial(LlamaDecoderLayer, attn_layer_type=HeadNormAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


def write_engine_folder(policy: JointPolicy, folder: Path) -> None:
    """Make a folder that vLLM can load.

    Raises:
        ValueError: a Chameleon that normalises behind its layers, as the one with 34 billion weights.
    """
    if policy.config.swin_norm:
        raise ValueError(
            f"{policy.folder}: expected a checkpoint with swin_norm false, as Anole's; got true; this trunk normalises "
            "before its layers alone"
        )
    write_folder(policy, folder, AnoleForRollout, model_type="llama")


load_front = load_joint_front
