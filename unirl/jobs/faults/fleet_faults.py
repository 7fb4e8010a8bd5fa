"""Faults inside the actors of a run on Ray: planted where they run, from the driver's next call to them."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import ray

from unirl.cluster.learner_group import LearnerGroup
from unirl.cluster.rollout_pool import RolloutPool
from unirl.jobs.faults.planting import replaced
from unirl.learner import learner as learner_file


def before_first(owner: Any, method: str, plant: Any) -> AbstractContextManager[None]:
    """`plant(self)` before the first call of a method, and never again."""
    planted: list[bool] = []

    def make(original: Any) -> Any:
        def call(self: Any, *arguments: Any, **settings: Any) -> Any:
            if not planted:
                plant(self)
                planted.append(True)
            return original(self, *arguments, **settings)

        return call

    return replaced(owner, method, make)


def deaf_worker() -> AbstractContextManager[None]:
    """On Ray, one of two rollout workers notes the version and keeps its old weights."""

    def deafen(worker: Any) -> None:
        def load(self: Any, manifest: Any, tensors: Any) -> None:
            self.policy_version = manifest.policy_version

        type(worker._sampler).load_weights = load

    def plant(pool: RolloutPool) -> None:
        handle: Any = pool._workers.all[0].handle
        ray.get(handle.__ray_call__.remote(deafen))

    return before_first(RolloutPool, "load_weights", plant)


def idle_rank() -> AbstractContextManager[None]:
    """On Ray, the second of two ranks takes all that it has for padding."""

    def idle(_: Any) -> None:
        plan = learner_file.plan_micro_batches

        def padded(*arguments: Any, **settings: Any) -> Any:
            first, second = plan(*arguments, **settings)
            return [first, [replace(micro, counted=False) for micro in second]]

        learner_file.plan_micro_batches = padded

    def plant(group: LearnerGroup) -> None:
        ray.get(group._gang._ranks[1].__ray_call__.remote(idle))

    return before_first(LearnerGroup, "update", plant)
