"""Which actors a run needs, and what each takes of CPU, GPU and memory. Arithmetic only: starts nothing."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from unirl.config import RlConfig, WorkersConfig
from unirl.types import TASKS

GIB = 1 << 30
PROCESS_GIB = 0.8
"""Resident memory of an actor that has imported torch and its engine, without weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedActor:
    """`count` equal actors. `memory_gib` is per actor: on the GPU when it has one, else in main memory."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float
    memory_gib: float


def count_parameters(checkpoint: Path) -> int:
    """Number of weights in a checkpoint folder, read from the safetensors headers alone.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"model.path: expected *.safetensors in {checkpoint}; got none; give a checkpoint folder"
        )
    total = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            size = 1
            for extent in entry["shape"] if name != "__metadata__" else (0,):
                size *= extent
            total += size
    return total


def actor_plan(config: RlConfig, num_parameters: int, *, with_learner: bool = True) -> list[PlannedActor]:
    """Every actor of a run, in the order they are started."""
    weights = num_parameters * (2 if config.model.dtype == "bfloat16" else 4) / GIB
    plan = [PlannedActor(role="pairing", count=1, num_cpus=0.0, num_gpus=0.0, memory_gib=PROCESS_GIB)]
    if with_learner:
        learner = config.learner
        plan.append(
            PlannedActor(
                role="learner",
                count=learner.num_ranks,
                num_cpus=learner.num_cpus,
                num_gpus=learner.num_gpus,
                memory_gib=PROCESS_GIB + _learner_gib(config, weights, num_parameters),
            )
        )
    for role in ("text", "image", "both"):
        workers: WorkersConfig = getattr(config.rollout, role)
        streams = 1 if role == "text" or config.rollout.sampling.image.guidance_scale == 1.0 else 2
        memory = PROCESS_GIB + weights + config.rollout.kv_cache_memory_gib * streams
        plan.append(
            PlannedActor(
                role=f"rollout.{role}",
                count=workers.num_workers,
                num_cpus=workers.num_cpus,
                num_gpus=workers.num_gpus,
                memory_gib=memory,
            )
        )
    for task in TASKS:
        for name, reward in config.rewards.active(task).items():
            plan.append(
                PlannedActor(
                    role=f"reward.{name}",
                    count=reward.num_workers,
                    num_cpus=reward.num_cpus,
                    num_gpus=reward.num_gpus,
                    memory_gib=PROCESS_GIB + (3.7 if name == "hpsv2" else 0.0),
                )
            )
    return [actor for actor in plan if actor.count > 0]


def _learner_gib(config: RlConfig, weights_gib: float, num_parameters: int) -> float:
    """Weights, gradients and AdamW's states of one rank, sharded as its ZeRO stage does; activations not counted."""
    stage, ranks = config.learner.zero_stage, config.learner.num_ranks
    states = num_parameters * 4 * (3 if config.model.dtype == "bfloat16" else 2) / GIB
    parameters = weights_gib / (ranks if stage == 3 else 1)
    gradients = weights_gib / (ranks if stage >= 2 else 1)
    if config.learner.offload_params != "none":
        parameters = 0.0
    optimizer = 0.0 if config.learner.offload_optimizer != "none" else states / (ranks if stage >= 1 else 1)
    reference = weights_gib if config.algorithm.kl_beta > 0 and config.algorithm.kl_reference == "initial" else 0.0
    return parameters + gradients + optimizer + reference


def total_resources(plan: list[PlannedActor]) -> dict[str, float]:
    """CPUs and GPUs that the plan needs at once. Colocated workers share a GPU by fractions that add up to 1."""
    return {
        "CPU": sum(actor.count * actor.num_cpus for actor in plan),
        "GPU": sum(actor.count * actor.num_gpus for actor in plan),
    }


def render_plan(plan: list[PlannedActor]) -> str:
    """The plan as a table for people."""
    lines = [f"{'actor':<24}{'count':>6}{'cpus':>7}{'gpus':>7}{'memory':>12}"]
    for a in plan:
        where = "GPU" if a.num_gpus else "RAM"
        lines.append(f"{a.role:<24}{a.count:>6}{a.num_cpus:>7g}{a.num_gpus:>7g}{a.memory_gib:>7.2f} GiB {where}")
    return "\n".join(lines)
