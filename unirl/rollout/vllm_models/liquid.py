"""Liquid for vLLM: Gemma as it stands in the tree, over a longer table."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from vllm.model_executor.models.gemma import GemmaForCausalLM

from unirl.models.joint_policy import JointPolicy
from unirl.rollout.vllm_models.joint import load_joint_front, with_own_head, write_folder


class LiquidForRollout(GemmaForCausalLM):
    """The vLLM model; its configuration is written by `write_engine_folder`."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights under the checkpoint's names."""
        return super().load_weights(with_own_head(weights) if self.config.tied else weights)


def write_engine_folder(policy: JointPolicy, folder: Path) -> None:
    """Make a folder that vLLM can load."""
    write_folder(policy, folder, LiquidForRollout)


load_front = load_joint_front
