"""Which actors a run needs, and what each takes of CPU, GPU and memory. Arithmetic only: starts nothing."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unirl.config import ClusterConfig, RlConfig, SftConfig, WorkersConfig
from unirl.types import TASKS

GIB = 1 << 30
PROCESS_GIB = 0.8
"""Resident memory of an actor that has imported torch and its engine, without weights."""
NUM_GRADIENT_COPIES = 3
"""Kept at once where gradients are told apart by task and kind of pair; see `unirl.learner.gradient_parts`."""
CPUS_PER_CORE = 4
"""Actors wait for each other most of the time, so a Ray started here may announce this many CPUs for each core."""


class PlacementError(RuntimeError):
    """Machine or cluster cannot hold the actor plan."""


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
        reference = config.algorithm.kl_beta > 0 and config.algorithm.kl_reference == "initial"
        more = (weights if reference else 0.0) + _measured_gib(config, num_parameters)
        plan.append(planned_learner(config, num_parameters, more_gib=more))
    for role in ("text", "image", "both"):
        workers: WorkersConfig = getattr(config.rollout, role)
        memory = PROCESS_GIB + weights + config.rollout.kv_cache_memory_gib
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


def planned_learner(config: RlConfig | SftConfig, num_parameters: int, *, more_gib: float = 0.0) -> PlannedActor:
    """The learner's ranks, each of which holds `more_gib` beside what it trains."""
    learner = config.learner
    return PlannedActor(
        role="learner",
        count=learner.num_ranks,
        num_cpus=learner.num_cpus,
        num_gpus=learner.num_gpus,
        memory_gib=PROCESS_GIB + more_gib + _learner_gib(config, num_parameters),
    )


def sft_plan(config: SftConfig, num_parameters: int) -> list[PlannedActor]:
    """The learner of a fine-tuning run. Encoders of pictures come and go before it starts."""
    return [planned_learner(config, num_parameters)]


def encoder_plan(config: SftConfig) -> list[PlannedActor]:
    """The encoders of pictures, which come and go before the learner starts."""
    workers = config.data.encoders
    return [
        PlannedActor(
            role="encoder",
            count=workers.num_workers,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
            memory_gib=2 * PROCESS_GIB,
        )
    ]


def _learner_gib(config: RlConfig | SftConfig, num_parameters: int) -> float:
    """Weights, gradients and AdamW's states of one rank, sharded as its ZeRO stage does; activations not counted."""
    weights_gib = num_parameters * (2 if config.model.dtype == "bfloat16" else 4) / GIB
    stage, ranks = config.learner.zero_stage, config.learner.num_ranks
    states = num_parameters * 4 * (3 if config.model.dtype == "bfloat16" else 2) / GIB
    parameters = weights_gib / (ranks if stage == 3 else 1)
    # DeepSpeed sums them in float32 from stage 1 on; see `unirl.learner.engine.deepspeed_config`.
    gradients = num_parameters * 4 / GIB / (ranks if stage >= 2 else 1) if stage else weights_gib
    if config.learner.offload_params != "none":
        parameters = 0.0
    optimizer = 0.0 if config.learner.offload_optimizer != "none" else states / (ranks if stage >= 1 else 1)
    return parameters + gradients + optimizer


def _measured_gib(config: RlConfig, num_parameters: int) -> float:
    """Copies of the gradient sums that a measured step keeps; beside a GPU they lie in main memory."""
    if config.learner.num_gpus or not config.monitoring.grad_cosine_every:
        return 0.0
    shards = config.learner.num_ranks if config.learner.zero_stage >= 2 else 1
    return NUM_GRADIENT_COPIES * num_parameters * 4 / GIB / shards


def total_resources(plan: list[PlannedActor]) -> dict[str, float]:
    """CPUs, GPUs and GiB of main memory that the plan needs at once.

    Colocated workers share a GPU by fractions that add up to 1.
    """
    return {
        "CPU": sum(actor.count * actor.num_cpus for actor in plan),
        "GPU": sum(actor.count * actor.num_gpus for actor in plan),
        "memory": sum(actor.count * actor.memory_gib for actor in plan if not actor.num_gpus),
    }


def machine_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What a Ray started on this machine may give out: CPUs, GPUs, GiB of main memory."""
    import torch

    announced = CPUS_PER_CORE * (os.cpu_count() or 1) if cluster.num_cpus is None else cluster.num_cpus
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return {"CPU": announced, "GPU": torch.cuda.device_count(), "memory": memory / GIB}


def shortages(plan: list[PlannedActor], present: Mapping[str, float]) -> list[str]:
    """Of what the plan needs more than there is; memory counts only where `present` says how much there is."""
    needed = {name: need for name, need in total_resources(plan).items() if name != "memory" or name in present}
    return [
        f"{name} {need:.4g}{unit} needed, {present.get(name, 0.0):.4g}{unit} present"
        for name, need in needed.items()
        for unit in (" GiB" if name == "memory" else "",)
        if need > present.get(name, 0.0) + 1e-6
    ]


def check_plan(plan: list[PlannedActor], present: Mapping[str, float]) -> None:
    """Refuse a plan that machine or cluster cannot hold, instead of waiting for ever.

    Memory, which is an estimate, is refused from twice of what there is.

    Raises:
        PlacementError: names what was asked for and what is there.
    """
    if shortages(plan, {**present, "memory": 2 * present.get("memory", math.inf)}):
        raise PlacementError(
            f"cluster: expected room for every actor; got {'; '.join(shortages(plan, present))}. Lower num_workers, "
            "num_ranks, num_cpus or num_gpus, or join a larger cluster (cluster.address); a Ray started on this "
            f"machine gives out {CPUS_PER_CORE} CPUs a core, or cluster.num_cpus. The plan:\n{render_plan(plan)}"
        )


def may_grow(node_types: Mapping[str, str]) -> bool:
    """Whether an autoscaler may add nodes; where none can, Ray gives each node a type made of the node's own id.

    Args:
        node_types: type of each node by its id, as the autoscaler reports them; empty where it reports none, which is
            the case for Ray's second autoscaler.
    """
    return not node_types or any(kind != f"node_{node}" for node, kind in node_types.items())


def check_machine(config: RlConfig, checkpoint: Path) -> None:
    """Refuse a run that would start a Ray here and not fit; a cluster is asked when it is joined.

    Raises:
        PlacementError: names what was asked for and what is there.
    """
    if not cluster_address(config.cluster):
        check_plan(actor_plan(config, count_parameters(checkpoint)), machine_resources(config.cluster))


def cluster_address(cluster: ClusterConfig) -> str | None:
    """Address of the Ray to join; None starts one on this machine."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


def render_plan(plan: list[PlannedActor]) -> str:
    """The plan as a table for people."""
    lines = [f"{'actor':<24}{'count':>6}{'cpus':>7}{'gpus':>7}{'memory':>12}"]
    for a in plan:
        where = "GPU" if a.num_gpus else "RAM"
        lines.append(f"{a.role:<24}{a.count:>6}{a.num_cpus:>7g}{a.num_gpus:>7g}{a.memory_gib:>7.2f} GiB {where}")
    return "\n".join(lines)
