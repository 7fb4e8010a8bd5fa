"""The one place that lists the sampling backends."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from unirl.config import ModelConfig, RolloutConfig
from unirl.config_rules import Problem
from unirl.models.policy import AutoregressivePolicy, MaskedDiffusionPolicy, load_policy
from unirl.rollout.sampler import Sampler

Role = Literal["text", "image", "both"]


def backend_problems(model: ModelConfig, rollout: RolloutConfig) -> list[Problem]:
    """A backend that cannot sample the family; imports neither."""
    if rollout.backend != "vllm" or find_spec(f"unirl.rollout.vllm_models.{model.family}"):
        return []
    rule = f"cannot sample model.family {model.family}, which does not draw token after token"
    return [Problem("rollout.backend", rollout.backend, rule, "set rollout.backend=torch")]


def build_sampler(
    model: ModelConfig, path: Path, rollout: RolloutConfig, role: Role, *, rests: bool = False
) -> Sampler:
    """A sampler in this process with the weights of the checkpoint folder.

    Args:
        model: family and precision.
        path: checkpoint folder.
        rollout: backend, lengths, memory; `sampling.image.guidance_scale` says whether a second stream is needed.
        role: what it will be asked for: "text", "image", or "both".
        rests: whether it will be told to give its GPU memory back between calls.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: the checkpoint does not fit the family, or no such backend.
    """
    match rollout.backend:
        case "vllm":
            from unirl.rollout.vllm_engine import VllmSampler

            return VllmSampler(model, path, rollout, role, rests=rests)
        case "torch":
            from unirl.rollout.diffusion_sampler import DiffusionSampler
            from unirl.rollout.torch_sampler import TorchSampler

            policy = load_policy(model, path)
            nn.Module.to(policy.module, "cuda" if torch.cuda.is_available() else "cpu")
            sizes = rollout.max_model_len, rollout.max_num_seqs
            if isinstance(policy, MaskedDiffusionPolicy):
                return DiffusionSampler(policy, *sizes)
            return TorchSampler(cast(AutoregressivePolicy, policy), *sizes)
        case _:
            raise ValueError(f"rollout.backend: expected 'vllm' or 'torch'; got {rollout.backend!r}; correct the key")
