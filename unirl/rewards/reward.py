"""What a reward must offer, how it is found by its name, and the weighted sum of several."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np

from unirl.config import RewardConfig, RewardName, RewardsConfig
from unirl.config_rules import ConfigError, Problem
from unirl.types import TASKS, RewardScores, RolloutGroup, ScoredGroup


class Reward(Protocol):
    """Scores the completions of one request. May raise: the caller retries, then masks the group and says why."""

    def score(self, group: RolloutGroup) -> RewardScores:
        """One value per trajectory; what cannot be judged is marked so, never scored 0."""
        ...


def build_reward(name: str, config: RewardConfig) -> Reward:
    """The reward of `unirl/rewards/<name>.py`.

    Raises:
        ConfigError: no reward has this name, or its options do not fit.
    """
    if problems := list(_problems(name, config, name)):
        raise ConfigError(problems)
    build = _build_of(name)
    parameters = inspect.signature(build).parameters
    return build(**{n: Path(v) if parameters[n].annotation is Path else v for n, v in config.options.items()})


def check_rewards(config: RewardsConfig) -> None:
    """Refuse names, options and files that would fail once the workers start.

    A reward without files is quick to build, and is built to see whether the values of its options fit.

    Raises:
        ConfigError: names everything that is wrong.
    """
    tables = {task: config.active(task) for task in TASKS}
    problems: list[Problem] = []
    for task, table in tables.items():
        for name, reward in table.items():
            key = f"rewards.{task}.{name}"
            problems += list(_problems(name, reward, key)) or _refused_values(name, reward, key)
    if problems:
        raise ConfigError(problems)


def _refused_values(name: str, config: RewardConfig, key: str) -> list[Problem]:
    if any(parameter.annotation is Path for parameter in inspect.signature(_build_of(name)).parameters.values()):
        return []
    try:
        _build_of(name)(**config.options)
    except (TypeError, ValueError) as error:
        return [Problem(f"{key}.options", config.options, f"are refused: {error}", "correct them")]
    return []


def _build_of(name: str) -> Callable[..., Reward]:
    return importlib.import_module(f"unirl.rewards.{name}").build


def _is_file(value: Any) -> bool:
    return isinstance(value, str | Path) and Path(value).is_file()


def _problems(name: str, config: RewardConfig, key: str) -> Iterator[Problem]:
    names = get_args(RewardName)
    if name not in names:
        yield Problem(key, name, "is not a reward", f"there are {', '.join(names)}")
        return
    parameters = inspect.signature(_build_of(name)).parameters
    for option in [option for option in config.options if option not in parameters]:
        fix = f"its options: {', '.join(parameters) or 'none'}"
        yield Problem(f"{key}.options.{option}", config.options[option], "is not an option of this reward", fix)
    for option, parameter in parameters.items():
        value = config.options.get(option, parameter.default)
        if value is inspect.Parameter.empty:
            yield Problem(f"{key}.options.{option}", None, "must be given", f"add {key}.options.{option}=VALUE")
        elif parameter.annotation is Path and value != "???" and not _is_file(value):
            yield Problem(f"{key}.options.{option}", value, "must be an existing file", "correct the path")


def combine(group: RolloutGroup, components: Mapping[str, RewardScores], weights: Mapping[str, float]) -> ScoredGroup:
    """Weighted sum of the components; a trajectory counts as judged when every component judged it."""
    size = len(group.trajectories)
    judged = np.ones(size, dtype=np.bool_)
    total = np.zeros(size, dtype=np.float32)
    for name, scores in components.items():
        judged &= scores.judged
        total += np.float32(weights[name]) * np.where(scores.judged, scores.values, 0.0).astype(np.float32)
    rewards = np.where(judged, total, 0.0).astype(np.float32)
    return ScoredGroup(group=group, rewards=rewards, judged=judged, components=dict(components))
