"""Where the learner's ranks and the rollout workers sit."""

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from unirl.cluster.plan import PlacementError
from unirl.config import RlConfig, SftConfig, WorkersConfig

SchedulingStrategy = PlacementGroupSchedulingStrategy | None


@dataclass(frozen=True, slots=True)
class Placement:
    """One bundle per learner rank; colocated rollout workers live in the same bundles, separate ones anywhere."""

    group: PlacementGroup
    num_ranks: int
    colocated: bool

    def for_rank(self, rank: int) -> SchedulingStrategy:
        """Scheduling of a learner rank."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)

    def for_rollout(self, worker: int) -> SchedulingStrategy:
        """Scheduling of the rollout worker with this number, counted over all roles."""
        if not self.colocated:
            return None
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=worker % self.num_ranks)

    def release(self) -> None:
        """Give the bundles back."""
        remove_placement_group(self.group)


def place(config: RlConfig | SftConfig) -> Placement:
    """Reserve the bundles, all or nothing.

    Raises:
        PlacementError: they were not free within cluster.start_timeout_s.
    """
    bundles = planned_bundles(config)
    colocated = config.cluster.placement == "colocated"
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(config.cluster.start_timeout_s):
        remove_placement_group(group)
        raise PlacementError(
            f"cluster: expected bundles {bundles} to become free within {config.cluster.start_timeout_s:g} s; got "
            f"{ray.available_resources()} available; stop other jobs, or lower num_ranks, num_cpus or num_gpus"
        )
    return Placement(group, config.learner.num_ranks, colocated)


def planned_bundles(config: RlConfig | SftConfig) -> list[dict[str, float]]:
    """Resources of each learner rank's bundle, colocated workers dealt out in turn."""
    learner = config.learner
    bundles = [{"CPU": learner.num_cpus, "GPU": learner.num_gpus} for _ in range(learner.num_ranks)]
    if isinstance(config, RlConfig) and config.cluster.placement == "colocated":
        workers: list[WorkersConfig] = []
        for role in (config.rollout.text, config.rollout.image, config.rollout.both):
            workers += [role] * role.num_workers
        for index, worker in enumerate(workers):
            bundle = bundles[index % learner.num_ranks]
            bundle["CPU"] += worker.num_cpus
            bundle["GPU"] += worker.num_gpus
    return [{name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001} for bundle in bundles]
