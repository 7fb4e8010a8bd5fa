"""The LLaDA transformer of Lumina-DiMOO: every position sees every other; a mask is predicted where it stands.

Parameter names and configuration fields are those of the official checkpoint; padding is on the right and masked out
(the official code builds a padding mask and then does not use it, so a short row of a batch sees its padding).
Shapes: B rows, T positions, H width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# The published models have these; the official code knows others, which no checkpoint of this family uses.
_FIXED: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
}


class LladaConfig(PreTrainedConfig):
    """config.json of an LLaDA model, under the official field names."""

    model_type = "llada"

    def __init__(  # noqa: PLR0913 - the fields of config.json
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int = 12288,
        vocab_size: int = 134548,
        embedding_size: int | None = None,
        max_sequence_length: int = 8192,
        rope_theta: float = 500_000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        init_std: float = 0.02,
        **rest: Any,
    ) -> None:
        """Take the fields.

        Raises:
            ValueError: a field says that the model is built otherwise than the published ones.
        """
        other = {name: rest[name] for name, value in _FIXED.items() if rest.get(name, value) not in (value, None)}
        if d_model % n_heads or (n_kv_heads or n_heads) != n_heads:
            other |= {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        if other:
            raise ValueError(
                f"config.json: expected an LLaDA model as published (n_heads divides d_model, n_kv_heads equals it, "
                f"{_FIXED}); got {other}; take another checkpoint"
            )
        self.d_model, self.n_heads, self.n_kv_heads, self.n_layers = d_model, n_heads, n_heads, n_layers
        self.mlp_hidden_size, self.vocab_size = mlp_hidden_size, vocab_size
        self.embedding_size = embedding_size or vocab_size
        self.max_sequence_length, self.rope_theta, self.rms_norm_eps = max_sequence_length, rope_theta, rms_norm_eps
        self.weight_tying, self.init_std = weight_tying, init_std
        options: dict[str, Any] = _FIXED | rest | {"tie_word_embeddings": weight_tying}
        super().__init__(**options)


class RmsNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised [..., H], of the same type."""
        wide = hidden.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * normal.to(hidden.dtype)


class KeysAndValues:
    """Rotated keys and values of every position of a batch, block by block, each as last computed; for inference.

    They take 2 x layers x H numbers a position: half a mebibyte in bfloat16 for the 8B model.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def renewed(self, block: int, where: Tensor | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, D] of all positions, after those at `where` were replaced in place.

        Args:
            block: number of the block.
            where: int64 [B, n]; None replaces everything, of any earlier shape.
            keys: [B, heads, n, D], or T in place of n.
            values: likewise.
        """
        if where is None:
            self._blocks[block] = keys, values
        else:
            places = where[:, None, :, None].expand_as(keys)
            for kept, new in zip(self._blocks[block], (keys, values), strict=True):
                kept.scatter_(2, places, new)
        return self._blocks[block]


Recall = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values of the computed positions -> those of all positions [B, heads, T, D]."""


class LladaBlock(GradientCheckpointingLayer):
    """Attention over all positions, then a gated feed-forward layer, each with its residual."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.mlp_hidden_size
        self._num_heads = config.n_heads
        self.attn_norm, self.ff_norm = (RmsNorm(width, config.rms_norm_eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, recall: Recall | None = None
    ) -> Tensor:
        """Hidden states [B, T, H].

        Args:
            hidden: [B, T, H], or n of the T positions.
            mask: bool [B, 1, 1, T] true where a position may be seen; None when all may.
            cos: float32 [T, head width] of the rotary angles, or one such table a row [B, 1, n, head width].
            sin: likewise.
            recall: keeps the keys and values computed here and brings in the others; None when nothing is kept.
        """
        normal = self.attn_norm(hidden)
        query, key, value = (
            project(normal).unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        if recall is not None:
            key, value = recall(key, value)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.attn_out(seen.transpose(1, 2).flatten(2))
        normal = self.ff_norm(hidden)
        return hidden + self.ff_out(functional.silu(self.ff_proj(normal)) * self.up_proj(normal))


class Head(nn.Linear):
    """Output projection in float32, of a range of the vocabulary only.

    Weights of less precision are copied to float32 for the product: 2 GiB for the text ids of the published model.
    """

    def forward(self, input: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits float32 [..., stop - start] of hidden states [..., H]."""
        return functional.linear(input.float(), self.weight[start:stop].float())


class _Trunk(nn.Module):
    """Holds the parameters under the official names."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        blocks = nn.ModuleList(LladaBlock(config) for _ in range(config.n_layers))
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": blocks,
            "ln_f": RmsNorm(config.d_model, config.rms_norm_eps),
            "ff_out": Head(config.d_model, config.embedding_size, bias=False),
        }
        self.transformer = nn.ModuleDict(parts)


class LladaForDiffusion(PreTrainedModel):
    """LLaDA with its head: hidden states of a canvas, and logits of chosen positions."""

    config_class = LladaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LladaBlock"]  # noqa: RUF012 - the type that the base class declares
    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}  # noqa: RUF012

    config: LladaConfig

    def __init__(self, config: LladaConfig) -> None:
        super().__init__(config)
        self.model = _Trunk(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.transformer["ff_out"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)

    def hidden_states(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        kept: KeysAndValues | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, H], normalised; with `where`, [B, n, H] of those positions alone.

        Args:
            ids: int64 [B, T], padded on the right.
            mask: bool [B, T] true where a position exists; None when all do.
            kept: takes the keys and values of this pass, and holds those of the positions that it leaves out.
            where: int64 [B, n] positions to compute, which may repeat; None means all. Needs an earlier pass over all
                of them with the same `kept`.
        """
        assert where is None or kept is not None, "a pass over part of the positions needs the others' keys and values"
        parts = self.model.transformer
        cos, sin = _angles(ids.shape[1], self.config, ids.device)
        # Without padding no mask, so that the fast kernels of attention stay open.
        visible = None if mask is None or bool(mask.all()) else mask[:, None, None, :]
        if where is not None:
            ids, cos, sin = ids.gather(1, where), cos[where][:, None], sin[where][:, None]
        hidden = parts["wte"](ids)
        for index, block in enumerate(cast("nn.ModuleList", parts["blocks"])):
            recall = None if kept is None else partial(kept.renewed, index, where)
            hidden = block(hidden, visible, cos, sin, recall)
        return parts["ln_f"](hidden)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits float32 [..., stop - start] of the ids from `start` to `stop`, of hidden states [..., H]."""
        return self.model.transformer["ff_out"](hidden, start, stop)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits float32 [B, T, V] of every position."""
        return self.logits(self.hidden_states(input_ids, None if attention_mask is None else attention_mask.bool()))


def _angles(length: int, config: LladaConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine float32 [T, head width] of the rotary embedding."""
    width = config.d_model // config.n_heads
    rates = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    turns = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    both = torch.cat([turns, turns], dim=-1)
    return both.cos(), both.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, heads, T, D] turned by their positions, computed in float32."""
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)
