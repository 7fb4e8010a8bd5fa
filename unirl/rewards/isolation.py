"""Keeps one reward's trouble to itself: a time limit, retries, and an answer in any case.

Each attempt runs in a thread. A late one gets an exception raised inside it, which ends a loop in Python. A call that
hangs outside Python cannot be ended this way: its thread is abandoned and the reward is built anew, twice at most; one
that also keeps the interpreter to itself (a runaway regular expression) stops even the clock. In a Ray actor the
process ends itself when `num_hung` is used up, and the pool starts another.
"""

import ctypes
import logging
import sys
import threading
from collections.abc import Callable

import numpy as np
from tenacity import Retrying, stop_after_attempt, wait_exponential

from unirl.config import RewardConfig
from unirl.rewards.cache import ScoreCache, content_keys
from unirl.rewards.reward import Reward, build_reward
from unirl.types import RewardScores, RolloutGroup

MAX_HUNG = 2
"""Abandoned threads at which a reward is not built anew: each may hold a model in memory."""
END_GRACE_S = 1.0

_log = logging.getLogger(__name__)


class _TimeIsUp(BaseException):
    """Raised inside a late thread; no Exception, so that a reward's own handlers let it pass."""


class IsolatedReward:
    """One reward with its cache. `score` always returns; one caller at a time."""

    def __init__(
        self, name: str, config: RewardConfig, build: Callable[[str, RewardConfig], Reward] = build_reward
    ) -> None:
        """Build the reward.

        Args:
            name: as in the config.
            config: limits and options.
            build: makes the reward, and makes it again after a hang.

        Raises:
            ConfigError: the options do not fit; errors of building are never swallowed here.
        """
        self.name = name
        self.num_failures = 0
        """Groups, or parts of groups left over by the cache, that this reward failed on."""
        self._config = config
        self._build = build
        self._reward: Reward | None = build(name, config)
        self._cache = ScoreCache(config.cache_entries)
        self._hung: list[threading.Thread] = []

    @property
    def num_hung(self) -> int:
        """Abandoned threads that still run."""
        self._hung = [thread for thread in self._hung if thread.is_alive()]
        return len(self._hung)

    def score(self, group: RolloutGroup) -> RewardScores:
        """Scores of a group; if every attempt failed all is unjudged, and `problem` says why."""
        return self._cache.score(content_keys(self.name, self._config.options, group), group, self._score_safely)

    def close(self) -> None:
        """End what the reward started, if it has a `close`."""
        close = getattr(self._reward, "close", None)
        if close is not None:
            close()

    def _score_safely(self, group: RolloutGroup) -> RewardScores:
        attempts = Retrying(
            stop=stop_after_attempt(self._config.max_attempts),
            wait=wait_exponential(multiplier=0.1, max=2),
            reraise=True,
        )
        try:
            return attempts(self._attempt, group)
        except Exception as error:  # noqa: BLE001  # the border that keeps a failed reward from being a zero or a crash
            self.num_failures += 1
            problem = (
                f"{self.name}: expected scores for request {group.request.request_id} in {self._config.max_attempts} "
                f"attempts of {self._config.timeout_s:g} s; got {type(error).__name__}: {error}; its "
                f"{len(group.trajectories)} trajectories are masked, repair the reward or raise timeout_s"
            )
            _log.warning("%s", problem, exc_info=error)
            size = len(group.trajectories)
            return RewardScores(values=np.zeros(size, np.float32), judged=np.zeros(size, np.bool_), problem=problem)

    def _attempt(self, group: RolloutGroup) -> RewardScores:
        if self._reward is None:
            if self.num_hung >= MAX_HUNG:
                raise TimeoutError(f"{MAX_HUNG} earlier calls still hang outside Python; restart the process")
            self._reward = self._build(self.name, self._config)
        scores = self._run(self._reward, group)
        if not isinstance(scores, RewardScores) or scores.values.shape != (len(group.trajectories),):
            raise TypeError(f"expected RewardScores of {len(group.trajectories)} values; got {scores!r:.200}")
        return scores

    def _run(self, reward: Reward, group: RolloutGroup) -> RewardScores:
        outcome: list[RewardScores | BaseException] = []

        def work() -> None:
            try:
                outcome.append(reward.score(group))
            except BaseException as error:  # noqa: BLE001  # carried to the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=work, name=f"reward-{self.name}", daemon=True)
        thread.start()
        thread.join(self._config.timeout_s)
        if thread.is_alive() and not outcome:
            self._end(thread)
            raise TimeoutError(f"no scores after {self._config.timeout_s:g} s")
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        if isinstance(outcome[0], BaseException):
            raise RuntimeError(f"the reward raised {outcome[0]!r}") from outcome[0]
        return outcome[0]

    def _end(self, thread: threading.Thread) -> None:
        """End a late thread, or abandon it together with the reward it is in."""
        assert thread.ident is not None, "the thread was started"
        # Python 3.11 under a debugger or coverage: while the exception waits for a blocked thread, this one would spin
        # at its next call for ever.
        if sys.gettrace() is None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))
            thread.join(END_GRACE_S)
        if thread.is_alive():
            self._hung.append(thread)
            self._reward = None
