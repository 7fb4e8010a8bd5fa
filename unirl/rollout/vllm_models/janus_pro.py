"""Janus-Pro for vLLM: one model over the joint vocabulary, in which id `text_vocab_size + c` is image code c.

With two streams, classifier-free guidance runs inside the model: each request carries a conditional and an
unconditional sequence of equal length, every layer has two key-value caches over the same weights, and the code logits
are mixed. One request stays one sequence for the scheduler, so its two streams can never fall out of step.
"""

import copy
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from unirl.algorithms.guidance import guided_logits
from unirl.config import ModelConfig
from unirl.models.janus_pro import EMBEDDING, HEAD, JanusPro
from unirl.rollout.vllm_models.joint import with_own_head

ARCHITECTURE = "UnirlJanusPro"


@dataclass(slots=True)
class Streams:
    """What the steps to come need; the sampler sets it between calls, all layers read it."""

    num_active: int
    """2 runs the unconditional stream too. Never more than the model was built with."""
    modalities: frozenset[str] = frozenset({"text", "image"})
    """Heads to run: those of the requests in flight."""
    guidance_scale: float = 1.0


class TwoStreamAttention(LlamaAttention):
    """Attention with a second cache for the unconditional stream, which follows the first along the token axis."""

    def __init__(self, *args: Any, streams: Streams, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams = streams
        self.attn_unconditional = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=kwargs["cache_config"],
            quant_config=kwargs["quant_config"],
            prefix=f"{kwargs['prefix']}.attn_unconditional",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Hidden states [S T, H] of S active streams."""
        if self.streams.num_active == 1:
            return super().forward(positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        halves = zip(*(part.chunk(2) for part in (query, key, value)), strict=True)
        caches = (self.attn, self.attn_unconditional)
        attended = [cache(*(x.contiguous() for x in half)) for cache, half in zip(caches, halves, strict=True)]
        return self.o_proj(torch.cat(attended))[0]


class JanusForRollout(nn.Module):
    """The vLLM model; its configuration is written by `write_engine_folder`."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_model.": None,
            "model.aligner.": None,
            "model.vqmodel.": None,
            "model.generation_": "generation_",
            "model.language_model.": "model.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.text_vocab_size, self.hidden_size = config.text_vocab_size, config.hidden_size
        self.num_streams = config.num_streams
        self.streams = Streams(num_active=self.num_streams)
        trunk = copy.deepcopy(config)
        trunk.vocab_size = config.text_vocab_size
        layers: dict[str, Any] = {}
        if self.num_streams == 2:
            attention: Any = functools.partial(TwoStreamAttention, streams=self.streams)
            layers["layer_type"] = functools.partial(LlamaDecoderLayer, attn_layer_type=attention)
        self.model = LlamaModel(
            vllm_config=vllm_config.with_hf_config(trunk, architectures=["LlamaForCausalLM"]),
            prefix=maybe_prefix(prefix, "model"),
            **layers,
        )
        self.lm_head = ParallelLMHead(
            config.text_vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(config.text_vocab_size)
        vq = JanusVQVAEConfig(**config.vq_config)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(vq)
        # Guidance multiplies rounding by s + (s - 1), so this head is held in float32.
        self.generation_head = JanusVQVAEHead(vq).float()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, S H] of ids of the joint vocabulary, all streams of the model side by side."""
        conditional = self._embed(input_ids)
        if self.num_streams == 1:
            return conditional
        if self.streams.num_active == 1:
            return torch.cat([conditional, torch.zeros_like(conditional)], dim=-1)
        config = self.config
        kept = (input_ids == config.bos_token_id) | (input_ids == config.boi_id) | (input_ids >= self.text_vocab_size)
        unconditional = self._embed(torch.where(kept, input_ids, config.pad_id))
        return torch.cat([conditional, unconditional], dim=-1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [T, S H] of the active streams side by side."""
        if inputs_embeds is None:
            assert input_ids is not None, "vLLM gives ids or embeddings"
            inputs_embeds = self.embed_input_ids(input_ids)
        active = self.streams.num_active
        stacked = torch.cat(inputs_embeds.split(self.hidden_size, dim=-1)[:active])
        hidden = self.model(None, positions.repeat(active), intermediate_tensors, stacked)
        return torch.cat(hidden.chunk(active), dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits float32 [B, V] over the joint vocabulary, -inf where no request in flight may draw."""
        cond, *uncond = hidden_states.split(self.hidden_size, dim=-1)
        vocabulary = (len(cond), self.config.vocab_size)
        logits = torch.full(vocabulary, -torch.inf, dtype=torch.float32, device=cond.device)
        if "text" in self.streams.modalities:
            logits[:, : self.text_vocab_size] = self.logits_processor(self.lm_head, cond)
        if "image" in self.streams.modalities:
            codes = self.generation_head(cond.float())
            if uncond:
                codes = guided_logits(codes, self.generation_head(uncond[0].float()), self.streams.guidance_scale)
            logits[:, self.text_vocab_size :] = codes
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights under the checkpoint's names; the parts that the engine does not run are passed over."""
        named = with_own_head(weights, HEAD, EMBEDDING) if self.config.tied else weights
        return AutoWeightsLoader(self).load_weights(named, mapper=self.hf_to_vllm_mapper)

    def _embed(self, ids: Tensor) -> Tensor:
        is_code = ids >= self.text_vocab_size
        text = self.model.embed_tokens(torch.where(is_code, 0, ids))
        codes = self.generation_embeddings(torch.where(is_code, ids - self.text_vocab_size, 0))
        return torch.where(is_code[:, None], self.generation_aligner(codes), text)


def load_front(config: ModelConfig, path: Path) -> JanusPro:
    """The family without its trunk, which the engine holds."""
    return JanusPro.load(config, path, trunk=False)


def write_engine_folder(policy: JanusPro, folder: Path, num_streams: int = 1) -> None:
    """Make a folder that vLLM can load: a Llama configuration over the joint vocabulary and links to the weights.

    Args:
        policy: the family's policy; its trunk need not be loaded.
        folder: existing and empty.
        num_streams: 2 for guidance inside the model.
    """
    ModelRegistry.register_model(ARCHITECTURE, JanusForRollout)
    config = policy.config.text_config.to_dict()
    config |= {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": len(policy.allowed_text_ids) + policy.num_codes,
        "text_vocab_size": len(policy.allowed_text_ids),
        "forbidden_text_ids": (~policy.allowed_text_ids).nonzero()[:, 0].tolist(),
        "vq_config": policy.config.vq_config.to_dict(),
        "bos_token_id": policy.prompts.ids.bos,
        "eos_token_id": policy.end_id,
        "boi_id": policy.prompts.ids.boi,
        "pad_id": policy.prompts.ids.pad,
        "num_streams": num_streams,
        "tied": policy.tied,
        # The engine keeps a head of its own, because the learner's product is taken in float32 as well.
        "tie_word_embeddings": False,
        "head_dtype": "float32",
    }
    if num_streams == 2:
        # vLLM sizes its buffer of input embeddings by this key.
        config["projection_size"] = 2 * policy.config.text_config.hidden_size
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(policy.folder.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file.resolve())
