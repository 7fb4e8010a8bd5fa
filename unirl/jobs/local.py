"""The parts of a step in this process, without Ray: what `--local` runs, under a debugger if wanted."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.config import RewardsConfig, RlConfig, SamplingConfig
from unirl.learner.learner import Learner
from unirl.models.named_arrays import Comparison, compare
from unirl.models.policy import Policy
from unirl.monitoring.control import ScaleControl
from unirl.monitoring.phases import SAMPLING, Activity
from unirl.monitoring.step_data import SyncCheck
from unirl.rewards.reward_set import RewardSet
from unirl.rollout.build import build_sampler
from unirl.rollout.completions import DECODING, num_sampled
from unirl.rollout.units import units_of_work
from unirl.types import LearnerBatch, QuarantinedRequest, RolloutGroup, RolloutRequest, ScoredGroup, WeightsManifest


@dataclass(frozen=True, slots=True)
class LocalPublication:
    """Weights as the learner gathered them."""

    manifest: WeightsManifest
    tensors: list[tuple[str, NDArray[np.generic]]]


class LocalRollouts:
    """One sampler for both tasks, fed the same units of work as the pool feeds its workers."""

    def __init__(self, config: RlConfig, checkpoint: Path, control: ScaleControl | None = None) -> None:
        self._control = control
        self.oldest_version: int | None = None
        self._compared: list[Comparison] = []
        self._size = config.rollout.sequences_per_unit
        self._sampler = build_sampler(config.model, checkpoint, config.rollout, "both")
        self.num_passes = 0
        """Of the engine since the start."""
        self._sampler.between_tokens = self._after_pass
        self._activities: list[Activity] = []

    def _after_pass(self) -> None:
        self.num_passes += 1

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> Iterator[RolloutGroup]:
        """Groups in the order of the requests of each task."""
        for unit in units_of_work(requests, self._size):
            if self._control is not None and (order := self._control.poll()) is not None:
                refusal = "scale: expected a run on Ray; got one in one process (--local); resume it without --local"
                self._control.answer(order, "refused", refusal, {"both": 1})
            yield from self._sample(unit, sampling)

    def _sample(self, unit: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        begin, decoded = time.perf_counter(), DECODING.seconds
        groups = self._sampler.sample(unit, sampling)
        end, decode = time.perf_counter(), DECODING.seconds - decoded
        seconds = {SAMPLING[unit[0].task]: end - begin - decode, "decode": decode}
        tokens, images = num_sampled(groups)
        self._activities.append(
            Activity(
                role="rollout.both",
                begin=begin,
                end=end,
                seconds=seconds,
                num_requests=len(unit),
                num_tokens=tokens,
                num_images=images,
            )
        )
        return groups

    def take_activities(self) -> list[Activity]:
        """The units sampled since the last call."""
        activities, self._activities = self._activities, []
        return activities

    def load_weights(self, publication: LocalPublication, *, wait: bool = True) -> None:
        """Take over the learner's weights, at once."""
        self._sampler.load_weights(publication.manifest, publication.tensors)
        self._compared.append(compare(publication.manifest, self._sampler.weight_slices() or {}))

    def take_sync_check(self) -> SyncCheck:
        """Whether the sampler took over the weights of each sync since the last call."""
        compared, self._compared = self._compared, []
        stale = ("rollout.both 0",) if any(found.is_stale for found in compared) else ()
        return SyncCheck(stale, min((found.num_compared for found in compared), default=None))

    def take_restarts(self) -> int:
        """0: nothing here is replaced."""
        return 0

    def close(self) -> None:
        """Nothing here is a process of its own."""

    def take_quarantined(self) -> list[QuarantinedRequest]:
        """None: an error here ends the run."""
        return []


class LocalRewards:
    """Every reward in this process, with the same retries and time limits."""

    def __init__(self, config: RewardsConfig) -> None:
        self._set = RewardSet(config)
        self._activities: list[Activity] = []

    def score(self, groups: Iterable[RolloutGroup]) -> list[ScoredGroup]:
        """One scored group per group, sorted by request id."""
        return sorted(map(self._score, groups), key=lambda scored: scored.group.request.request_id)

    def _score(self, group: RolloutGroup) -> ScoredGroup:
        begin = time.perf_counter()
        scored = self._set.score(group)
        end = time.perf_counter()
        self._activities.append(Activity(role="reward", begin=begin, end=end, seconds={"reward": end - begin}))
        return scored

    def take_activities(self) -> list[Activity]:
        """The groups scored since the last call."""
        activities, self._activities = self._activities, []
        return activities

    def take_restarts(self) -> int:
        """0: nothing here is replaced."""
        return 0

    def close(self) -> None:
        """End the rewards' child processes."""
        self._set.close()


class LocalLearner:
    """One rank, in this process."""

    def __init__(self, config: RlConfig, checkpoint: Path) -> None:
        self._learner = Learner.from_config(config, checkpoint, rank=0, address=("127.0.0.1", 0))

    @property
    def policy(self) -> Policy:
        """The policy that it trains, to score with."""
        return self._learner.policy

    @property
    def policy_version(self) -> int:
        """Updates made so far."""
        return self._learner.policy_version

    @property
    def num_passes(self) -> int:
        """Backward passes since the start."""
        return self._learner.num_passes

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One or more optimizer updates."""
        return self._learner.update(batch, step)

    def publish_weights(self) -> LocalPublication:
        """A copy of the current weights."""
        tensors = [named for bucket in self._learner.weight_buckets() for named in bucket]
        return LocalPublication(self._learner.manifest(), tensors)

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint."""
        self._learner.save(folder, step, state)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint."""
        return self._learner.restore(folder)

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._learner.export(folder)

    def close(self) -> None:
        """Leave the process group, unless a vLLM engine in this process shares it and will end it at exit."""
        if "vllm" not in sys.modules:
            self._learner.close()
