"""What families with one vocabulary and one head share in vLLM: ids are the checkpoint's own, the trunk is vLLM's."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from unirl.config import ModelConfig
from unirl.models.joint_policy import EMBEDDING, HEAD, JointPolicy

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


def write_folder(policy: JointPolicy, folder: Path, model: type, **changes: Any) -> None:
    """Make a folder that vLLM can load: the trunk's configuration and links to the weights.

    Args:
        policy: its weights need not be loaded.
        folder: existing and empty.
        model: vLLM's model, in the tree or our own.
        changes: of the configuration, such as `model_type`.
    """
    architecture = f"Unirl{model.__name__}"
    ModelRegistry.register_model(architecture, model)
    config = {name: value for name, value in policy.config.to_dict().items() if name not in NO_ENGINE_KEYS}
    config |= {
        "architectures": [architecture],
        "head_dtype": "float32",
        "naming": dict(policy.naming),
        "tied": policy.config.tie_word_embeddings,
        "tie_word_embeddings": False,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(policy.folder.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file.resolve())
