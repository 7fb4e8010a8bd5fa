"""Held-out measurements of a policy, in a training run or by `unirl eval`."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unirl.config import RlConfig, SamplingConfig
from unirl.data.atomic import DataError
from unirl.evaluation.evaluate import EvaluationResult, make_requests, summarise
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout
from unirl.jobs.parts import Rewards, Rollouts, open_judged_rollouts
from unirl.jobs.prompt_check import check_prompts
from unirl.monitoring.run_facts import resume_command
from unirl.rewards.reward import check_rewards
from unirl.rollout.seeds import sample_seed
from unirl.types import GenerationSample, UnderstandingSample

log = logging.getLogger(__name__)

Heldout = tuple[Sequence[UnderstandingSample], Sequence[GenerationSample]]


def evaluate_policy(
    heldout: Heldout,
    rollouts: Rollouts,
    rewards: Rewards,
    config: RlConfig,
    save_image: Callable[[NDArray[np.uint8]], str],
) -> EvaluationResult:
    """One completion per held-out sample as in training, and one at temperature 0, scored by the run's rewards."""
    seed = config.evaluation.seed
    requests = make_requests(*heldout, lambda task, sample_id: sample_seed(seed, 0, sample_id, task, 0))
    sampling = config.rollout.sampling
    if config.evaluation.approximate_cache:
        sampling = replace(sampling, image=replace(sampling.image, approximate_cache=True))
    sampled = rewards.score(rollouts.sample(requests, sampling))
    greedy = []
    if config.evaluation.greedy:
        greedy = rewards.score(rollouts.sample(requests, at_temperature_0(sampling)))
    return summarise(sampled, greedy, save_image)


def at_temperature_0(sampling: SamplingConfig) -> SamplingConfig:
    """The same sampling, taking the most likely token each time."""
    return SamplingConfig(text=replace(sampling.text, temperature=0.0), image=replace(sampling.image, temperature=0.0))


def main(target: str, config: RlConfig, *, local: bool = False, as_json: bool = False) -> int:
    """Measure a run's policy or a checkpoint on the held-out samples and print the means with their intervals.

    Args:
        target: run directory, checkpoint folder or "lab:janus".
        config: model family, sampling, rewards, evaluation; for a run, the run's own.
        local: in this process, without Ray.
        as_json: print one JSON object.

    Raises:
        ConfigError: rewards that cannot be built.
        DataError: no such target, a run without an exported policy, or a prompt that is too long.
    """
    checkpoint = policy_of(target)
    config = replace(config, model=replace(config.model, path=str(checkpoint)))
    check_rewards(config.rewards)
    heldout = resolve_heldout(config.evaluation.data, config.evaluation.num_prompts)
    check_prompts([*heldout[0], *heldout[1]], config, checkpoint)
    log.info("measuring %s on %d questions and %d prompts; starting takes a while", checkpoint, *map(len, heldout))
    with open_judged_rollouts(config, checkpoint, local=local) as (rollouts, rewards):
        result = evaluate_policy(heldout, rollouts, rewards, config, save_image=lambda image: "")
    if as_json:
        estimates = {name: asdict(estimate) for name, estimate in result.estimates.items()}
        document = {"checkpoint": str(checkpoint), "num_unjudged": result.num_unjudged, "estimates": estimates}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return 0
    sys.stdout.write(f"{checkpoint}\n")
    for name, estimate in result.estimates.items():
        interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
        sys.stdout.write(f"{name:<48} {estimate.mean:.3f}{interval} n={estimate.num}\n")
    if result.num_unjudged:
        sys.stdout.write(f"{result.num_unjudged} completions could not be judged and are left out\n")
    return 0


def policy_of(target: str) -> Path:
    """The checkpoint folder meant by a run directory, a checkpoint or a "lab:" name."""
    if not (Path(target) / "run.json").is_file():
        return resolve_checkpoint(target)
    policy = Path(target) / "policy"
    if not policy.is_dir():
        raise DataError(
            f"{target}: expected a finished run with a folder policy; got none; finish it with "
            f"{resume_command(Path(target), json.loads((Path(target) / 'run.json').read_text()))}"
        )
    return resolve_checkpoint(str(policy))
