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
from torch import nn

from unirl.config import AlgorithmConfig, RlConfig
from unirl.learner.learner import Learner
from unirl.models.policy import MaskedDiffusionPolicy, load_policy
from unirl.rollout.diffusion_sampler import DiffusionSampler
from unirl.rollout.seeds import sample_seed
from unirl.types import GenerationSample, LearnerBatch, LearnerRow, RolloutRequest

BACKWARD = 2
"""Forward-equivalents of a backward pass."""
LONGEST = 1 << 20
"""No canvas is refused here."""


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
    config: RlConfig, checkpoint: Path, arms: Sequence[Arm], *, num_images: int = 16, rounds: int = 3
) -> list[UpdateCost]:
    """Cost of an update of each arm on the same sampled pictures, one rank; the first arm is the baseline."""
    rows = _sampled_rows(_policy(config, checkpoint), config, num_images)
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
            with _learner(config, checkpoint, arm) as learner, _counted(learner.policy.module) as counts:
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
    config: RlConfig, checkpoint: Path, *, num_images: int = 32, rounds: int = 3
) -> list[SamplingSpeed]:
    """Pictures per second one by one, together, and together with the approximate cache."""
    policy, sampling = _policy(config, checkpoint), config.rollout.sampling
    requests = _requests(num_images)
    cached = replace(sampling, image=replace(sampling.image, approximate_cache=True))
    one, all_at_once = DiffusionSampler(policy, LONGEST, 1), DiffusionSampler(policy, LONGEST, num_images)
    ways = {
        "one by one": lambda: one.sample(requests, sampling),
        f"{num_images} together": lambda: all_at_once.sample(requests, sampling),
        f"{num_images} together, approximate cache": lambda: all_at_once.sample(requests, cached),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, draw in ways.items():
            started = time.perf_counter()
            # The pictures come back as arrays in main memory, so the device has finished.
            draw()
            times[name].append(time.perf_counter() - started)
    speeds = {name: num_images / float(np.median(values[1:])) for name, values in times.items()}
    base = speeds["one by one"]
    return [SamplingSpeed(name=name, images_per_s=speed, ratio=speed / base) for name, speed in speeds.items()]


def _policy(config: RlConfig, checkpoint: Path) -> MaskedDiffusionPolicy:
    policy = load_policy(config.model, checkpoint)
    if not isinstance(policy, MaskedDiffusionPolicy):
        raise ValueError(
            f"bench diffusion: expected a masked-diffusion family; got model.family {config.model.family}; give the "
            "configuration of one, such as -c configs/rl/lab_lumina_dimoo.yaml"
        )
    nn.Module.to(policy.module, "cuda" if torch.cuda.is_available() else "cpu")
    return policy


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


def _sampled_rows(policy: MaskedDiffusionPolicy, config: RlConfig, num_images: int) -> list[LearnerRow]:
    sampler = DiffusionSampler(policy, LONGEST, num_images)
    rows: list[LearnerRow] = []
    for index, group in enumerate(sampler.sample(_requests(num_images), config.rollout.sampling)):
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
def _learner(config: RlConfig, checkpoint: Path, arm: Arm) -> Iterator[Learner]:
    one_rank = replace(config, algorithm=arm.settings(config.algorithm), learner=replace(config.learner, num_ranks=1))
    learner = Learner.from_config(one_rank, checkpoint, rank=0, address=("127.0.0.1", 0))
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
