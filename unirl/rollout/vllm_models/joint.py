"""What families with one vocabulary and one head share in vLLM: ids are the checkpoint's own, the trunk is vLLM's."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.sequence import IntermediateTensors

from unirl.algorithms.guidance import guided_logits
from unirl.config import ModelConfig
from unirl.models.joint_policy import EMBEDDING, HEAD, JointPolicy
from unirl.rollout.vllm_models.two_streams import Streams, add_second_caches, embed_streams, run_streams

ARCHITECTURE = "UnirlJoint"
NO_ENGINE_KEYS = ("vq_config", "vocabulary_map", "transformers_version")
"""Of a family's configuration; the rest describes its trunk under the names that vLLM's trunks read."""

NOT_THE_TRUNK = {"model.vqmodel.": None, "vqmodel.": None}
"""Beginnings of the names of an image tokenizer that is stored with the language model."""


class JointLlama(LlamaForCausalLM):
    """A Llama trunk whose checkpoint may hold an image tokenizer beside it, or name the trunk as a part of a whole."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights under the checkpoint's names."""
        renamed = {theirs: ours for ours, theirs in self.config.naming.items()}
        named = WeightsMapper(orig_to_new_prefix=NOT_THE_TRUNK | renamed).apply(weights)
        return AutoWeightsLoader(self).load_weights(with_own_head(named) if self.config.tied else named)


def with_own_head(
    weights: Iterable[tuple[str, Tensor]], head: str = HEAD, embedding: str = EMBEDDING
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a tied checkpoint with its table as the head too.

    An engine's head is no alias of the table: after a reload vLLM would leave it behind.
    """
    tables: list[Tensor] = []
    for name, weight in weights:
        if name != head:
            yield name, weight
        if name == embedding:
            tables.append(weight.detach())
    yield from ((head, table) for table in tables)


def load_joint_front(config: ModelConfig, path: Path) -> JointPolicy:
    """The family's policy without its weights, all of which the engine holds."""
    family = import_module(f"unirl.models.{config.family}").FAMILY
    return JointPolicy.load(family, config, path, weights=False)


class JointForRollout(nn.Module):
    """The vLLM model: a family's language model, in two streams where images are guided.

    Its configuration is written by `write_folder`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.num_streams = config.num_streams
        self.streams = Streams(num_active=self.num_streams)
        module, name = config.language_model
        self.language_model = getattr(import_module(module), name)(vllm_config=vllm_config, prefix=prefix)
        if self.num_streams == 2:
            add_second_caches(self.language_model.model, self.streams, vllm_config)
        self._codes = slice(config.first_code, config.first_code + config.num_codes)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, S H] of ids, all streams of the model side by side."""
        embed = self.language_model.embed_input_ids
        return embed_streams(embed, input_ids, lambda: self._null_ids(input_ids), self.num_streams, self.streams)

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
        return run_streams(
            self.language_model.model,
            inputs_embeds,
            positions,
            intermediate_tensors,
            width=self.config.hidden_size,
            num_active=self.streams.num_active,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits float32 [B, V] over the joint vocabulary, -inf where no request in flight may draw."""
        cond, *uncond = hidden_states.split(self.config.hidden_size, dim=-1)
        modalities = self.streams.modalities
        if "text" in modalities:
            logits = self.language_model.compute_logits(cond)
        else:
            logits = cond.new_full((len(cond), self.config.vocab_size), -torch.inf, dtype=torch.float32)
            logits[:, self._codes] = self._code_logits(cond)
        if uncond and "image" in modalities:
            other, scale = self._code_logits(uncond[0]), self.streams.guidance_scale
            logits[:, self._codes] = guided_logits(logits[:, self._codes], other, scale)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights under the checkpoint's names."""
        return {f"language_model.{name}" for name in self.language_model.load_weights(weights)}

    def _code_logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.float(), self.language_model.lm_head.weight[self._codes].float())

    def _null_ids(self, ids: Tensor) -> Tensor:
        kept = (ids >= self._codes.start) & (ids < self._codes.stop)
        for id in self.config.kept_ids:
            kept |= ids == id
        return torch.where(kept, ids, self.config.null_id)


def write_folder(policy: JointPolicy, folder: Path, model: type, num_streams: int, **changes: Any) -> None:
    """Make a folder that vLLM can load: the trunk's configuration and links to the weights.

    Args:
        policy: its weights need not be loaded.
        folder: existing and empty.
        model: vLLM's language model, in the tree or our own.
        num_streams: 2 for guidance inside the model.
        changes: of the configuration, such as `model_type`.
    """
    ModelRegistry.register_model(ARCHITECTURE, JointForRollout)
    vocabulary = policy.layout.vocabulary
    config = {name: value for name, value in policy.config.to_dict().items() if name not in NO_ENGINE_KEYS}
    config |= {
        "architectures": [ARCHITECTURE],
        "head_dtype": "float32",
        "naming": dict(policy.naming),
        "tied": policy.config.tie_word_embeddings,
        "tie_word_embeddings": False,
        "language_model": [model.__module__, model.__name__],
        "num_streams": num_streams,
        "first_code": vocabulary.first_code,
        "num_codes": vocabulary.num_codes,
        "forbidden_text_ids": (vocabulary.text_ids[~policy.allowed_text_ids.numpy()[vocabulary.text_ids]]).tolist(),
        **changes,
    }
    if num_streams == 2:
        config |= {"kept_ids": list(policy.prompts().kept_ids), "null_id": policy.prompts().null}
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(policy.folder.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file.resolve())
