"""All rewards of both tasks in one process: a group in, its weighted sum and components out."""

from unirl.config import RewardConfig, RewardsConfig
from unirl.rewards.isolation import IsolatedReward
from unirl.rewards.reward import combine
from unirl.types import TASKS, RolloutGroup, ScoredGroup, Task


class RewardSet:
    """The rewards of a run. A failing one masks what it failed on and leaves the others alone."""

    def __init__(self, config: RewardsConfig) -> None:
        """Build every reward once.

        Raises:
            ValueError: a task has no reward, a name is unknown, or options do not fit.
        """
        self.rewards = {
            task: {name: IsolatedReward(name, settings) for name, settings in rewards_of(config, task).items()}
            for task in TASKS
        }
        self._weights = {
            task: {name: settings.weight for name, settings in rewards_of(config, task).items()} for task in TASKS
        }

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """The group with the rewards of its task."""
        task = group.request.task
        components = {name: reward.score(group) for name, reward in self.rewards[task].items()}
        return combine(group, components, self._weights[task])


def rewards_of(config: RewardsConfig, task: Task) -> dict[str, RewardConfig]:
    """Settings of a task's rewards by name.

    Raises:
        ValueError: the task has none, so that all its advantages would be zero.
    """
    settings = config.understanding if task == "understanding" else config.generation
    if not settings:
        raise ValueError(f"rewards.{task}: expected at least one reward; got none; name one, e.g. {{accuracy: {{}}}}")
    return settings
