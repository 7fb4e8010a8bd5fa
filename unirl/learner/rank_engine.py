"""One rank's DeepSpeed engine: gradients, the optimizer step, weights, checkpoints. Knows no loss and no batch."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unirl.config import LearnerConfig
from unirl.learner.engine import RankPlace, build_engine, clear_gradients, clips_itself, start_process_group
from unirl.learner.gradient_parts import GradientParts, gradient_sums
from unirl.learner.weights import Bucket, WeightExport
from unirl.types import WeightsManifest

SAMPLED = 64
"""Values of a tensor that are looked at to see whether it moves."""


class RankEngine:
    """All ranks call the same methods in the same order."""

    def __init__(self, module: nn.Module, config: LearnerConfig, place: RankPlace) -> None:
        """Join the process group and put the module under DeepSpeed.

        Args:
            module: the policy's own module; what requires a gradient is trained.
            config: how.
            place: this rank.

        Raises:
            ValueError: nothing is trainable, or settings that cannot run here.
        """
        start_process_group(place)
        self.place = place
        self._module, self._config = module, config
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        _set_mode(module, config.activation_checkpointing)
        self._engine = build_engine(module, config)
        self.device: torch.device = self._engine.device
        self.dtype = self._trainable[0].dtype
        self.num_backwards = 0
        """Since the start."""
        self._grad_square = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in self._trainable:
            parameter.register_hook(self._measure_gradient)
        self._own_norm: Tensor | None = None
        if clips_itself(config, self.dtype):
            self._engine.optimizer.register_step_pre_hook(self._clip_gradient)
        self._export: WeightExport | None = None

    def __call__(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, run where the weights are gathered."""
        return self._engine(compute)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def clear_gradients(self) -> None:
        """Start a sum of gradients."""
        clear_gradients(self._engine)

    def backward(self, loss: Tensor) -> float:
        """Add the gradient of this rank's part of one sum over all ranks; returns the square of what it added.

        The square is of the parameters' gradients of this backward alone, on this rank.
        """
        self._grad_square.zero_()
        # DeepSpeed averages gradients over ranks; the losses of the ranks are parts of one sum.
        self._engine.backward(loss * self.place.world_size)
        self.num_backwards += 1
        return self._grad_square.item()

    def gradient_parts(self) -> GradientParts:
        """Tells apart what is added to the gradient from here on; call it after `clear_gradients`."""
        num_ranks = self.place.world_size
        summed = not self.parts_need_traffic
        return GradientParts(lambda: gradient_sums(self._engine, self._trainable), num_ranks, summed_over_ranks=summed)

    @property
    def exchanges(self) -> bool:
        """Whether ranks exchange weights or gradients in each pass, and not once an update."""
        return self.place.world_size > 1 and self._config.zero_stage >= 2

    @property
    def parts_need_traffic(self) -> bool:
        """Whether the products of gradient parts take a reduction of whole gradients over the ranks."""
        return self.place.world_size > 1 and self._config.zero_stage < 2

    def step(self, step: int) -> float:
        """Move the optimizer; returns the global norm of the gradient before clipping.

        Raises:
            RuntimeError: the norm is not finite.
        """
        self._engine.step()
        norm = float(self._own_norm if self._own_norm is not None else self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RuntimeError(
                f"learner, step {step}: expected a finite gradient norm; got {norm}; lower learner.lr and resume from "
                "the last checkpoint"
            )
        return norm

    @torch.no_grad()
    def sampled_weights(self) -> Tensor:
        """[n] up to 64 values of each trained tensor, of what this rank holds of it, in order; a copy."""
        held = [getattr(parameter, "ds_tensor", parameter).flatten() for parameter in self._trainable]
        picked = [values[:: max(1, len(values) // SAMPLED)][:SAMPLED] for values in held]
        return torch.cat([values.to(self.device, torch.float32) for values in picked])

    def gather(self, own: Any) -> list[Any]:
        """What every rank gave, in their order."""
        everyone: list[Any] = [own] * self.place.world_size
        dist.all_gather_object(everyone, own)
        return everyone

    def weight_buckets(self, policy_version: int, *, copy: bool = True) -> Iterator[Bucket]:
        """All weights bucket by bucket, on rank 0; the other ranks go through the same buckets, which are empty.

        With `copy` False a bucket may be the weights themselves, to be read before the next one is taken.
        """
        self._export = WeightExport(self._module, policy_version=policy_version, holds_arrays=self.place.rank == 0)
        return self._export.buckets(copy=copy)

    def manifest(self) -> WeightsManifest:
        """Manifest of the last `weight_buckets`, once all were taken; meant for rank 0."""
        assert self._export is not None, "manifest() needs weight_buckets() first"
        return self._export.manifest()

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer, random-number states and `state` (JSON values) into `folder`.

        Raises:
            OSError: it could not be written; earlier checkpoints are whole.
        """
        from unirl.learner.checkpoint import save_checkpoint

        save_checkpoint(self._engine, folder, step=step, layout=self._layout(), state=state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint in `folder` into this fresh engine; returns the `state` saved with it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was written by another number of ranks, ZeRO stage or precision.
        """
        from unirl.learner.checkpoint import load_checkpoint

        return load_checkpoint(self._engine, folder, layout=self._layout())

    def _layout(self) -> dict[str, Any]:
        return {
            "learner.num_ranks": self.place.world_size,
            "learner.zero_stage": self._config.zero_stage,
            "model.dtype": str(self.dtype).removeprefix("torch."),
        }

    def _measure_gradient(self, gradient: Tensor) -> None:
        self._grad_square += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double().square()

    def _clip_gradient(self, *_: Any) -> None:
        limit = self._config.max_grad_norm or math.inf
        self._own_norm = nn.utils.clip_grad_norm_(self._trainable, limit)

    def destroy(self) -> None:
        """Free the engine and stay in the process group."""
        self._engine.destroy()

    def close(self) -> None:
        """Free the engine and leave the process group."""
        import deepspeed

        self.destroy()
        deepspeed.comm.destroy_process_group()


def _set_mode(module: nn.Module, activation_checkpointing: bool) -> None:
    """Evaluation mode, in which the policy samples; training mode without dropout where recomputation asks for it."""
    module.eval()
    if not activation_checkpointing:
        return
    enable = getattr(module, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            "learner.activation_checkpointing: expected a model that can recompute activations; "
            f"{type(module).__name__} has no gradient_checkpointing_enable; set the key to false"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
