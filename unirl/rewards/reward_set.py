"""All rewards of both tasks in one process: a group in, its weighted sum and components out."""

from unirl.config import RewardsConfig
from unirl.rewards.isolation import IsolatedReward
from unirl.rewards.reward import combine
from unirl.types import TASKS, RolloutGroup, ScoredGroup


class RewardSet:
    """The rewards of a run. A failing one masks what it failed on and leaves the others alone."""

    def __init__(self, config: RewardsConfig) -> None:
        """Build every reward once.

        Raises:
            ValueError: a task has no reward.
            ConfigError: a name is unknown, or options do not fit.
        """
        for task in TASKS:
            if not config.active(task):
                # All its advantages would be zero.
                raise ValueError(f"rewards.{task}: expected at least one reward with a weight; got none; name one")
        self._rewards = {task: {n: IsolatedReward(n, c) for n, c in config.active(task).items()} for task in TASKS}
        self._weights = {task: {n: c.weight for n, c in config.active(task).items()} for task in TASKS}

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """The group with the rewards of its task."""
        task = group.request.task
        components = {name: reward.score(group) for name, reward in self._rewards[task].items()}
        return combine(group, components, self._weights[task])

    def close(self) -> None:
        """End the rewards' child processes."""
        for rewards in self._rewards.values():
            for reward in rewards.values():
                reward.close()
