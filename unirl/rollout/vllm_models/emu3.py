"""Emu3 for vLLM: a Llama trunk as it stands in the tree."""

from pathlib import Path

from unirl.models.joint_policy import JointPolicy
from unirl.rollout.vllm_models.joint import JointLlama, load_joint_front, write_folder


def write_engine_folder(policy: JointPolicy, folder: Path) -> None:
    """Make a folder that vLLM can load."""
    write_folder(policy, folder, JointLlama, model_type="llama")


load_front = load_joint_front
