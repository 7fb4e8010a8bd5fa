"""Whether a run can be sampled with its settings, prompt by prompt, found out before it rather than on the way."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from unirl.config import RlConfig
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.data.prompts import read_prompts
from unirl.jobs.assets import resolve_heldout
from unirl.models.policy import Prompts, load_prompts
from unirl.rollout.build import backend_problems
from unirl.types import GenerationSample, UnderstandingSample

SHOWN = 3


def check_settings(config: RlConfig, checkpoint: Path) -> Prompts:
    """Ask the family whether it can sample so; reads the tokenizer and the headers of the weights only.

    Raises:
        ConfigError: settings that the checkpoint cannot serve.
        DataError: a checkpoint of another family, or one that does not fit together.
    """
    try:
        prompts = load_prompts(config.model, checkpoint)
    except ValueError as error:
        raise unusable(error, checkpoint) from error
    if wrong := [*backend_problems(config.model, config.rollout), *prompts.find_problems(config)]:
        raise ConfigError(wrong)
    return prompts


def check_prompts(
    samples: Iterable[UnderstandingSample | GenerationSample], config: RlConfig, checkpoint: Path
) -> None:
    """Encode every prompt as a sampler would, after `check_settings`; takes the tokenizer only.

    Args:
        samples: what the run will sample for; their images are not looked at.
        config: the run's.
        checkpoint: folder of the initial policy.

    Raises:
        ConfigError: settings of sampling that the checkpoint cannot serve.
        DataError: a tokenizer that does not fit the checkpoint, or prompts that are too long or cannot be encoded;
            says how many and names the first.
    """
    prompts, limit = check_settings(config, checkpoint), config.rollout.max_model_len
    problems: list[str] = []
    num_samples, longest = 0, limit
    for sample in samples:
        num_samples += 1
        try:
            prompt = prompts.encode(sample, config.rollout.sampling)
        except ValueError as error:
            problems.append(str(error))
            continue
        if prompt.longest > limit:
            longest = max(longest, prompt.longest)
            problems.append(f"{type(sample).__name__} {sample.id} takes up to {prompt.longest} tokens")
    if problems:
        enough = f"set rollout.max_model_len={longest}, which fits every length, or " if longest > limit else ""
        raise DataError(
            f"prompts: expected all {num_samples} to fit into rollout.max_model_len={limit} with their completions; "
            f"got {len(problems)} that do not: {'; '.join(problems[:SHOWN])}; {enough}mend or drop these samples"
        )


def samples_of(config: RlConfig, pairs: Path) -> Iterator[UnderstandingSample | GenerationSample]:
    """Everything that a run will sample for: its pairs, and the held-out samples of its evaluations."""
    yield from read_prompts(pairs, config.data.max_pairs if config.data.take == "all" else None)
    if config.evaluation.enabled:
        for side in resolve_heldout(config.evaluation.data, config.evaluation.num_prompts):
            yield from side


def unusable(error: ValueError, checkpoint: Path) -> DataError:
    """What loading a checkpoint refused, with its folder where the words come from another package."""
    text = str(error)
    if "; got " in text:
        return DataError(text)
    return DataError(
        f"{checkpoint}: expected a checkpoint that loads; got {type(error).__name__}: {text}; get it again"
    )
