"""What an update of a masked-diffusion family costs by arm, and what batching gives its sampler.

Arms take turns in one process, so that ratios hold where single timings are noisy. A forward-equivalent is one pass of
one canvas through the network; a backward pass counts as two. Run it by `unirl bench diffusion`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unirl.config import AlgorithmConfig, LearnerConfig, ModelConfig, SamplingConfig
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner, LearnerSettings
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.rollout.diffusion_sampler import DiffusionSampler
from unirl.rollout.seeds import sample_seed
from unirl.types import GenerationSample, LearnerBatch, LearnerRow, RolloutRequest

BACKWARD = 2
"""Forward-equivalents of a backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of learning from a picture's steps."""

    name: str
    num_steps: int | None = None
    """`algorithm.diffusion_steps_per_update`."""
    shrink: int = 1
    """`algorithm.diffusion_shrink`."""

    def settings(self, algorithm: AlgorithmConfig) -> AlgorithmConfig:
        """The algorithm section of this arm."""
        return replace(algorithm, diffusion_steps_per_update=self.num_steps, diffusion_shrink=self.shrink)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCost:
    """What one picture costs in an update."""

    arm: str
    forward_equivalents: float
    seconds: float
    ratio: float
    """Of the seconds of the first arm to these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpeed:
    """Pictures per second."""

    name: str
    images_per_s: float
    ratio: float
    """To the first way."""


def measure_updates(
    model: ModelConfig,
    checkpoint: Path,
    sampling: SamplingConfig,
    arms: Sequence[Arm],
    *,
    num_images: int = 16,
    rounds: int = 3,
) -> list[UpdateCost]:
    """Cost of an update of each arm on the same sampled pictures; the first arm is the baseline."""
    policy = LuminaDimoo.load(model, checkpoint)
    rows = _sampled_rows(policy, sampling, num_images)
    batch = LearnerBatch(
        rows=tuple(rows),
        num_trajectories={"understanding": 0, "generation": num_images},
        num_loss_tokens={"understanding": 0, "generation": sum(len(row.completion_ids) for row in rows)},
        num_pairs=num_images,
        policy_version=0,
    )
    canvas = len(rows[0].prompt_ids)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    positions: dict[str, float] = {}
    for _ in range(rounds + 1):
        for arm in arms:
            with _learner(model, checkpoint, sampling, arm) as learner, _counted(learner.policy.module) as counts:
                started = time.perf_counter()
                learner.update(batch, 0)
                seconds[arm.name].append(time.perf_counter() - started)
                positions[arm.name] = counts[0] * (1 + BACKWARD)
    # The first round warms up.
    medians = {name: float(np.median(values[1:])) / num_images for name, values in seconds.items()}
    return [
        UpdateCost(
            arm=arm.name,
            forward_equivalents=positions[arm.name] / canvas / num_images,
            seconds=medians[arm.name],
            ratio=medians[arms[0].name] / medians[arm.name],
        )
        for arm in arms
    ]


def measure_sampling(
    model: ModelConfig, checkpoint: Path, sampling: SamplingConfig, *, num_images: int = 32, rounds: int = 3
) -> list[SamplingSpeed]:
    """Pictures per second one by one, together, and together with the approximate cache."""
    policy = LuminaDimoo.load(model, checkpoint)
    policy.vq.load()
    requests = _requests(num_images)
    cached = replace(sampling, image=replace(sampling.image, approximate_cache=True))
    longest = 1 << 20
    ways: list[tuple[str, DiffusionSampler, SamplingConfig]] = [
        ("one by one", DiffusionSampler(policy, longest, 1), sampling),
        (f"{num_images} together", DiffusionSampler(policy, longest, num_images), sampling),
        (f"{num_images} together, approximate cache", DiffusionSampler(policy, longest, num_images), cached),
    ]
    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(rounds + 1):
        for name, sampler, settings in ways:
            started = time.perf_counter()
            sampler.sample(requests, settings)
            times[name].append(time.perf_counter() - started)
    speeds = {name: num_images / float(np.median(values[1:])) for name, values in times.items()}
    base = speeds[ways[0][0]]
    return [SamplingSpeed(name=name, images_per_s=speed, ratio=speed / base) for name, speed in speeds.items()]


def _requests(num_images: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            request_id=str(index),
            pair_id=str(index),
            task="generation",
            sample=GenerationSample(id=str(index), prompt="a photo of a red circle and a blue square"),
            seeds=(sample_seed(0, 0, str(index), "generation", 0),),
        )
        for index in range(num_images)
    ]


def _sampled_rows(policy: LuminaDimoo, sampling: SamplingConfig, num_images: int) -> list[LearnerRow]:
    sampler = DiffusionSampler(policy, max_model_len=1 << 20, max_num_seqs=num_images)
    rows: list[LearnerRow] = []
    for index, group in enumerate(sampler.sample(_requests(num_images), sampling)):
        (one,) = group.trajectories
        rows.append(
            LearnerRow(
                task="generation",
                prompt_ids=one.prompt_ids,
                image=None,
                completion_ids=one.completion_ids,
                loss_mask=one.loss_mask,
                old_logprobs=one.logprobs,
                advantage=1.0 if index % 2 else -1.0,
                unmask_step=one.unmask_step,
            )
        )
    return rows


@contextmanager
def _learner(model: ModelConfig, checkpoint: Path, sampling: SamplingConfig, arm: Arm) -> Iterator[Learner]:
    settings = LearnerSettings(
        learner=LearnerConfig(max_tokens_per_micro_batch=8192, zero_stage=0),
        algorithm=arm.settings(AlgorithmConfig()),
        sampling=sampling,
        num_steps=1,
    )
    learner = Learner(LuminaDimoo.load(model, checkpoint), settings, RankPlace())
    try:
        yield learner
    finally:
        learner.close()


@contextmanager
def _counted(module: Any) -> Iterator[list[int]]:
    """Positions that go through the network while this is open, padding included."""
    counts, inner = [0], module.hidden_states

    def hidden_states(ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        counts[0] += ids.numel()
        return inner(ids, *rest, **named)

    module.hidden_states = hidden_states
    try:
        yield counts
    finally:
        del module.hidden_states
