"""DeepSpeed made ready: process group, configuration from LearnerConfig, optimizer, and the module that it drives."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from unirl.config import LearnerConfig

ADAM_EPSILON = 1e-8
BUCKET_ELEMENTS = 5 * 10**7
"""Gradients are reduced and parameters gathered in buckets of at most so many elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where one rank stands in the group."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = 0
    """Port of rank 0; a group of one rank needs none."""


class ComputingModule(nn.Module):
    """Runs a computation with the policy inside a forward of the engine, where DeepSpeed gathers and frees weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.policy = module

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns: tensors in a tuple, since DeepSpeed finds them there and not in a dataclass."""
        return compute()


def start_process_group(place: RankPlace) -> None:
    """Join the group; blocks until every rank is there. A process that is already in a group of this size stays in it.

    Raises:
        RuntimeError: the process is in a group of another size.
    """
    cpu = not torch.cuda.is_available()
    backend = "gloo" if cpu else "nccl"
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        # A Ray actor sees its own GPU only, as number 0.
        LOCAL_RANK="0",
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if not torch.distributed.is_initialized():
        # A vLLM engine that ends in this process ends every group in it; DeepSpeed would go on using its own.
        deepspeed.utils.groups._release_process_group_references()
        if place.world_size == 1:
            alone = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1)
    # DeepSpeed's own calls; one warning per collective would drown the log.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if cpu:
        # Without an entry here DeepSpeed compiles a shared-memory reduction on first use, for minutes.
        cast(Any, deepspeed.ops).__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if torch.distributed.get_world_size() != place.world_size:
        raise RuntimeError(
            f"learner: expected a process group of {place.world_size} ranks; this process is already in one of "
            f"{torch.distributed.get_world_size()}; start each learner rank in a process of its own"
        )


def build_engine(module: nn.Module, config: LearnerConfig) -> Any:
    """DeepSpeed around `ComputingModule(module)`; trains what requires a gradient, in the module's precision.

    Raises:
        ValueError: nothing is trainable, or the configuration cannot run here.
    """
    import deepspeed

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("learner: expected trainable weights; got none; shorten model.frozen")
    engine, _, _, _ = deepspeed.initialize(
        model=ComputingModule(module),
        model_parameters=cast(Any, trainable),
        optimizer=_optimizer(trainable, config),
        config=deepspeed_config(config, trainable[0].dtype),
        dist_init_required=False,
    )
    check_private_sums(engine.optimizer, config)
    return engine


def build_frozen_engine(module: nn.Module, config: LearnerConfig, device: torch.device | str) -> Any:
    """`ComputingModule(module)` for scoring only: partitioned over the ranks under ZeRO-3, else a plain copy."""
    import deepspeed

    module.requires_grad_(False).eval()
    if config.zero_stage < 3:
        return ComputingModule(module).to(device)
    settings = deepspeed_config(config, next(module.parameters()).dtype)
    settings["zero_optimization"].pop("offload_optimizer", None)
    engine, _, _, _ = deepspeed.initialize(model=ComputingModule(module), config=settings, dist_init_required=False)
    return engine


def _optimizer(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    settings = {"lr": config.lr, "betas": config.betas, "eps": ADAM_EPSILON, "weight_decay": config.weight_decay}
    if config.offload_optimizer == "none":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)


PRIVATE_SUMS = {
    1: (("fp32_groups_gradients_flat",), ("partition_gradients", "bit16_groups")),
    2: (("partition_gradients", "bit16_groups", "averaged_gradients", "all_grad_tensors", "grad_start_offset"),),
    3: (("grad_partitions_flat_buffer",),),
}
"""Attributes of DeepSpeed's own in which its optimizer of a ZeRO stage keeps sums of gradients: one set or another."""
OFFLOADED_SUMS = {
    1: ("accumulated_grads_in_cpu", "norm_for_param_grads", "single_partition_of_fp32_groups"),
    2: ("accumulated_grads_in_cpu", "norm_for_param_grads", "single_partition_of_fp32_groups"),
    3: ("norm_for_param_grads", "fp32_partitioned_groups_flat"),
}
"""And those of an optimizer that is offloaded."""


def check_private_sums(optimizer: Any, config: LearnerConfig) -> None:
    """See that the sums which `clear_gradients` and `gradient_sums` touch are where they look for them.

    Raises:
        RuntimeError: another DeepSpeed keeps them elsewhere; old gradients would be added to new ones in silence.
    """
    stage, offloaded = config.zero_stage, config.offload_optimizer != "none"
    wanted = [(*names, *(OFFLOADED_SUMS[stage] if offloaded else ())) for names in PRIVATE_SUMS.get(stage, ((),))]
    if not any(all(hasattr(optimizer, name) for name in names) for names in wanted):
        import deepspeed

        raise RuntimeError(
            f"learner: expected DeepSpeed's optimizer of ZeRO stage {stage} to keep its gradients in "
            f"{' or in '.join(', '.join(names) for names in wanted)}; got a {type(optimizer).__name__} without "
            f"them in deepspeed {deepspeed.__version__}; install the version that launch/requirements names"
        )


def clear_gradients(engine: Any) -> None:
    """Forget the gradient of the last update in every buffer where DeepSpeed sums one up.

    Under ZeRO-3, and under offloading, DeepSpeed overwrites these sums in the first backward only. A weight that the
    first micro-batch does not pass through, like the head of the other task, would add to its old gradient.
    """
    optimizer = engine.optimizer
    # ZeRO-3 keeps one flat sum.
    buffers = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    # Offloading keeps a sum per parameter, and the master copy's gradient and its norm.
    buffers += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    if getattr(optimizer, "norm_for_param_grads", None):
        optimizer.norm_for_param_grads.clear()
        masters = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
        buffers += [master.grad for name in masters for master in getattr(optimizer, name, [])]
    for buffer in buffers:
        if buffer is not None:
            buffer.zero_()


def clips_itself(config: LearnerConfig, dtype: torch.dtype) -> bool:
    """Whether the learner must clip and measure the gradient: DeepSpeed reports no norm at stage 0 in float32."""
    return config.zero_stage == 0 and dtype == torch.float32


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings; every key whose default could change the update is written out.

    Raises:
        ValueError: offloading without a GPU, at a stage that cannot do it, or to a disk that is not named.
    """
    _check_offload(config)
    settings: dict[str, Any] = {
        # Micro-batches are ours: backward() accumulates, step() is the boundary, the loss is already normalised.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_itself(config, dtype) else config.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }
    if dtype == torch.bfloat16 and config.zero_stage > 0:
        # Sums of many small gradients vanish in bfloat16.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    for key, target in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_params)):
        if target != "none":
            place = {"nvme_path": config.nvme_path} if target == "nvme" else {}
            settings["zero_optimization"][key] = {"device": target, "pin_memory": True, **place}
    return settings


def _check_offload(config: LearnerConfig) -> None:
    targets = {config.offload_optimizer, config.offload_params} - {"none"}
    if targets and not torch.cuda.is_available():
        raise ValueError(
            f"learner.offload_optimizer, learner.offload_params: expected none without a GPU; got "
            f"{config.offload_optimizer}, {config.offload_params}; there is nothing to offload from, set both to none"
        )
    if (config.offload_params != "none" or "nvme" in targets) and config.zero_stage != 3:
        raise ValueError(
            f"learner.zero_stage: expected 3 to offload parameters or to use nvme; got {config.zero_stage}; set it to 3"
        )
    if targets and config.zero_stage == 0:
        raise ValueError("learner.zero_stage: expected 1 to 3 to offload the optimizer; got 0; set it to 2")
    if "nvme" in targets and not config.nvme_path:
        raise ValueError("learner.nvme_path: expected a folder on a local disk for nvme; got null; name one")


def learning_rate(config: LearnerConfig, update: int, num_updates: int) -> float:
    """Rate of update number `update`, counted from 0: a pure function, so that a resumed run continues exactly.

    Rises as lr (update + 1) / warmup_steps, then follows the schedule, which would reach 0 at `num_updates`.
    """
    warmup_steps = math.ceil(config.warmup_fraction * num_updates) or config.warmup_steps
    if update < warmup_steps:
        return config.lr * (update + 1) / warmup_steps
    progress = min(1.0, (update - warmup_steps) / max(1, num_updates - warmup_steps))
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1.0 - progress)
        case "cosine":
            return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            raise ValueError(
                f"learner.schedule: expected constant, linear or cosine; got {config.schedule!r}; correct the key"
            )
