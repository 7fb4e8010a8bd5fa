"""Where the time of a step went: a partition of the driver's time line, finer than the blocks that it runs.

Workers report how long they took, by their own clocks; when they began is known to the driver, which handed the work
out. No two clocks are ever compared.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PHASES = ("text_rollout", "image_rollout", "decode", "reward", "score", "backward", "sync", "idle", "other")
SAMPLING: dict[str, str] = {"understanding": "text_rollout", "generation": "image_rollout"}
"""Phase in which a worker samples for a task."""
_OF_BLOCK = {"wait": "idle", "publish": "sync"}


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the driver, by its monotonic clock."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """One piece of work of one worker."""

    role: str
    """Such as "rollout.text" or "reward.accuracy"."""
    begin: float
    """When the driver handed it out and the worker was free, by the driver's monotonic clock."""
    end: float
    """When the driver had the result; the worker was done by then."""
    seconds: Mapping[str, float]
    """What the worker says it took, by phase."""
    waited_s: float = 0.0
    """How long its requests had waited for a worker."""
    num_requests: int = 1
    num_tokens: int = 0
    num_images: int = 0

    @property
    def busy_until(self) -> float:
        """When the worker was done, up to what handing over took."""
        return min(self.end, self.begin + sum(self.seconds.values()))


def partition(
    blocks: Sequence[Block], activities: Sequence[Activity], learner: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each of `PHASES`; they sum to the seconds of the blocks.

    A moment of a rollout block goes in equal parts to the workers that are busy then, each by the mix of what its piece
    of work consisted of; a moment when none is, to idle. An update is divided by what the learner's first rank says.

    Args:
        blocks: of one step, one after the other.
        activities: of the workers; what lies outside a rollout block counts for nothing.
        learner: metrics of the step's update.
    """
    shares: defaultdict[str, float] = defaultdict(float)
    for block in blocks:
        seconds = block.end - block.begin
        if block.name == "rollout":
            _share(block, activities, shares)
        elif block.name == "update":
            own = {name: learner.get(f"learner/{name}_s", 0.0) for name in ("score", "backward")}
            part = min(1.0, seconds / total) if (total := sum(own.values())) else 0.0
            for name, value in own.items():
                shares[name] += part * value
            shares["other"] += max(0.0, seconds - part * total)
        else:
            shares[_OF_BLOCK.get(block.name, "other")] += seconds
    return {phase: shares[phase] for phase in PHASES}


def _share(block: Block, activities: Sequence[Activity], shares: defaultdict[str, float]) -> None:
    """Add the shares of one rollout block."""
    spans = [(max(a.begin, block.begin), min(a.busy_until, block.end), a) for a in activities]
    spans = [span for span in spans if span[1] > span[0]]
    changes = sorted(
        [(begin, 1, index) for index, (begin, _, _) in enumerate(spans)]
        + [(end, 0, index) for index, (_, end, _) in enumerate(spans)]
    )
    # Seconds that each worker gets: the reciprocal of how many are busy, summed over its time.
    busy: set[int] = set()
    got = [0.0] * len(spans)
    last = block.begin
    for moment, begins, index in changes:
        for other in busy:
            got[other] += (moment - last) / len(busy)
        shares["idle"] += 0.0 if busy else moment - last
        last = moment
        (busy.add if begins else busy.discard)(index)
    shares["idle"] += block.end - last
    for seconds, (_, _, activity) in zip(got, spans, strict=True):
        total = sum(activity.seconds.values())
        for phase, value in activity.seconds.items():
            shares[phase] += seconds * value / total


def fleet_metrics(activities: Sequence[Activity], seconds: float) -> dict[str, float]:
    """Tokens and images of each role a second, and how many requests waited for it on average.

    Args:
        activities: of one step.
        seconds: that its rollout took.
    """
    metrics: dict[str, float] = {}
    for role in sorted({activity.role for activity in activities}):
        own = [activity for activity in activities if activity.role == role]
        for name in ("tokens", "images"):
            if total := sum(getattr(activity, f"num_{name}") for activity in own):
                metrics[f"fleet/{role}/{name}_per_s"] = total / seconds
        waited = math.fsum(activity.waited_s * activity.num_requests for activity in own)
        metrics[f"fleet/{role}/queue_length"] = waited / seconds
    return metrics
