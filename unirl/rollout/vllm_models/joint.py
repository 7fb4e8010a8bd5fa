"""What families with one vocabulary and one head share in vLLM: ids are the checkpoint's own, the trunk is vLLM's."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from unirl.models.joint_policy import JointPolicy

NO_ENGINE_KEYS = ("vq_config", "vocabulary_map", "transformers_version")
"""Of a family's configuration; the rest describes its trunk under the names that vLLM's trunks read."""


class JointLlama(LlamaForCausalLM):
    """A Llama trunk whose checkpoint may hold an image tokenizer beside it, or name the trunk as a part."""

    checkpoint_names = WeightsMapper(orig_to_new_prefix={"model.vqmodel.": None, "model.text_model.": "model."})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights under the checkpoint's names."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.checkpoint_names)


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
    config |= {"architectures": [architecture], "head_dtype": "float32", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(policy.folder.glob("model*.safetensors*")):
        (folder / file.name).symlink_to(file.resolve())
