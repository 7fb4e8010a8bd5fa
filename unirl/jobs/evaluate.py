"""Held-out measurements of a policy, in a training run or by `unirl eval`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from unirl.config import RlConfig, SamplingConfig
from unirl.evaluation.evaluate import EvaluationResult, make_requests, summarise
from unirl.jobs.parts import Parts
from unirl.rollout.seeds import sample_seed
from unirl.types import GenerationSample, UnderstandingSample

Heldout = tuple[Sequence[UnderstandingSample], Sequence[GenerationSample]]


def evaluate_policy(
    heldout: Heldout, parts: Parts, config: RlConfig, save_image: Callable[[NDArray[np.uint8]], str]
) -> EvaluationResult:
    """One completion per held-out sample as in training, and one at temperature 0, scored by the run's rewards."""
    seed = config.evaluation.seed
    requests = make_requests(*heldout, lambda task, sample_id: sample_seed(seed, 0, sample_id, task, 0))
    sampled = parts.rewards.score(parts.rollouts.sample(requests, config.rollout.sampling))
    greedy = []
    if config.evaluation.greedy:
        greedy = parts.rewards.score(parts.rollouts.sample(requests, at_temperature_0(config.rollout.sampling)))
    return summarise(sampled, greedy, save_image)


def at_temperature_0(sampling: SamplingConfig) -> SamplingConfig:
    """The same sampling, taking the most likely token each time."""
    return SamplingConfig(text=replace(sampling.text, temperature=0.0), image=replace(sampling.image, temperature=0.0))
