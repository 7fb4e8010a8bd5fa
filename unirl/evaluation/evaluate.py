"""Held-out measurements: the requests to make, means with 95 % intervals of what they scored, and gains between two."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unirl.evaluation.intervals import Interval, bounded_interval, cluster_interval, t_interval, wilson_interval
from unirl.types import (
    TASKS,
    GenerationSample,
    RolloutRequest,
    ScoredGroup,
    Task,
    UnderstandingSample,
)

Mode = Literal["sampled", "greedy"]
MODES: tuple[Mode, ...] = ("sampled", "greedy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over held-out items."""

    mean: float
    low: float | None
    """95 % interval: Wilson for values in [0, 1], else Student t; None when values other than 0 and 1 do not vary."""
    high: float | None
    num: int
    clustered_low: float | None = None
    """The same with items of one prompt taken as one draw; None also when no prompt repeats."""
    clustered_high: float | None = None
    num_clusters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem:
    """One completion of one held-out sample."""

    task: Task
    mode: Mode
    id: str
    category: str
    prompt: str
    """The question, or what to draw."""
    choices: tuple[str, ...]
    gold: str
    """Right answer; empty for generation."""
    prompt_image: str | None
    """File of the question's image."""
    text: str | None
    image: str | None
    """File of the drawn image."""
    finish_reason: str
    reward: float | None
    """None when it could not be judged."""
    parts: dict[str, float | None]
    """Each reward by name and each detail as "<reward>/<detail>"."""

    @property
    def values(self) -> dict[str, float | None]:
        """The reward and its parts by name."""
        return {"reward": self.reward, **self.parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One evaluation. `dataclasses.asdict` of it is what the run directory keeps."""

    policy_version: int
    items: tuple[EvaluationItem, ...]
    num_unjudged: int
    estimates: dict[str, Estimate]
    """By "<task>/<mode>/<part>", such as "generation/sampled/lab_verifier/exact"."""
    categories: dict[str, dict[str, Estimate]]
    """The same by category."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One measure before and after, over the items that both evaluations judged."""

    name: str
    before: Estimate
    after: Estimate
    difference: Estimate
    """Of the paired items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One row of an evaluation table."""

    task: Task
    parts: tuple[str, ...]
    """Names with the same numbers, such as ("reward", "accuracy", "accuracy/correct")."""
    sampled: Gain | None
    greedy: Gain | None

    @property
    def any(self) -> Gain:
        """The sampled numbers, or the greedy ones where there are no others."""
        gain = self.sampled or self.greedy
        assert gain is not None, self.parts
        return gain

    @property
    def label(self) -> str:
        """The most telling name: the last part of the last."""
        return self.parts[-1].rsplit("/", 1)[-1]


def make_requests(
    understanding: Sequence[UnderstandingSample],
    generation: Sequence[GenerationSample],
    seed_of: Callable[[Task, str], int],
) -> list[RolloutRequest]:
    """One completion per sample, seeded by the sample and nothing else, so that before and after draw alike.

    Args:
        understanding: questions.
        generation: prompts.
        seed_of: seed in [0, 2**31) of a task and a sample id.

    Raises:
        ValueError: a sample id occurs twice in a task, or there is no sample.
    """
    sides: tuple[tuple[Task, Sequence[Any]], ...] = (("understanding", understanding), ("generation", generation))
    requests = [
        RolloutRequest(
            request_id=f"{sample.id}/{task}",
            pair_id=sample.id,
            task=task,
            sample=sample,
            seeds=(seed_of(task, sample.id),),
        )
        for task, samples in sides
        for sample in samples
    ]
    distinct = {request.request_id for request in requests}
    if not requests or len(distinct) < len(requests):
        raise ValueError(
            f"evaluation: expected samples with distinct ids per task; got {len(requests)} samples with "
            f"{len(distinct)} ids; fill evaluation.data, or number its samples"
        )
    return requests


def summarise(
    sampled: Sequence[ScoredGroup],
    greedy: Sequence[ScoredGroup],
    save_image: Callable[[NDArray[np.uint8]], str],
) -> EvaluationResult:
    """Means and intervals of an evaluation, with every item, so that two evaluations compare item by item.

    Items that could not be judged are left out of the means and counted.

    Args:
        sampled: scored with the sampling settings of training.
        greedy: scored at temperature 0; may be empty.
        save_image: stores a picture and returns its name.

    Raises:
        ValueError: nothing was scored, or nothing of it was judged.
    """
    modes: tuple[tuple[Mode, Sequence[ScoredGroup]], ...] = (("sampled", sampled), ("greedy", greedy))
    items = tuple(item for mode, groups in modes for group in groups for item in _items(group, mode, save_image))
    if all(item.reward is None for item in items):
        problems = {s.problem for _, groups in modes for g in groups for s in g.components.values() if s.problem}
        raise ValueError(
            f"evaluation: expected judged items; got {len(items)} items and none judged "
            f"({'; '.join(sorted(problems)) or 'no reason given'}); mend the reward or the held-out data"
        )
    names = sorted({item.category for item in items if item.category})
    return EvaluationResult(
        policy_version=min(t.policy_version for g in (*sampled, *greedy) for t in g.group.trajectories),
        items=items,
        num_unjudged=sum(item.reward is None for item in items),
        estimates=_estimates(items),
        categories={name: _estimates([item for item in items if item.category == name]) for name in names},
    )


def find_gains(before: EvaluationResult, after: EvaluationResult) -> list[Gain]:
    """Every measure that both evaluations hold, in their order, from the items that both judged."""
    earlier = {(item.task, item.mode, item.id): item for item in before.items}
    gains = []
    for name in after.estimates:
        task, mode, part = name.split("/", 2)
        pairs = [
            (old.values.get(part), item.values.get(part), item)
            for item in after.items
            if (item.task, item.mode) == (task, mode) and (old := earlier.get((item.task, item.mode, item.id)))
        ]
        both = [(old, new, item) for old, new, item in pairs if old is not None and new is not None]
        if not both:
            continue
        old, new = (np.array([row[side] for row in both]) for side in (0, 1))
        clusters = [_cluster(row[2]) for row in both]
        gains.append(
            Gain(
                name=name,
                before=_estimate(old, clusters),
                after=_estimate(new, clusters),
                difference=_estimate(new, clusters, minus=old),
            )
        )
    return gains


def find_measures(before: EvaluationResult | None, after: EvaluationResult) -> list[Measure]:
    """The rows of an evaluation table. Parts with equal numbers are one row: a reward of one part equals that part.

    Args:
        before: the earlier evaluation; None compares `after` with itself.
        after: the later one.
    """
    gains = {gain.name: gain for gain in find_gains(before or after, after)}
    merged: dict[tuple[object, ...], list[str]] = {}
    for task, part in dict.fromkeys((name.split("/")[0], name.split("/", 2)[2]) for name in gains):
        both = [gains.get(f"{task}/{mode}/{part}") for mode in MODES]
        numbers = [gain and (gain.before, gain.after, gain.difference) for gain in both]
        merged.setdefault((task, *numbers), []).append(part)
    return [
        Measure(
            task=task,
            parts=tuple(parts),
            sampled=gains.get(f"{task}/sampled/{parts[0]}"),
            greedy=gains.get(f"{task}/greedy/{parts[0]}"),
        )
        for (task, *_), parts in merged.items()
        if task in TASKS
    ]


def from_document(document: Mapping[str, Any]) -> EvaluationResult:
    """An evaluation as it was before it was written as JSON.

    Raises:
        ValueError: fields are missing or unknown.
    """
    try:
        return EvaluationResult(
            policy_version=document["policy_version"],
            items=tuple(EvaluationItem(**item | {"choices": tuple(item["choices"])}) for item in document["items"]),
            num_unjudged=document["num_unjudged"],
            estimates=_read_estimates(document["estimates"]),
            categories={name: _read_estimates(values) for name, values in document["categories"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"evaluation: expected the fields of EvaluationResult; got {error!r}; evaluate again with this release"
        ) from error


def _read_estimates(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    return {name: Estimate(**estimate) for name, estimate in values.items()}


def _items(group: ScoredGroup, mode: Mode, save_image: Callable[[NDArray[np.uint8]], str]) -> Iterator[EvaluationItem]:
    request = group.group.request
    sample = request.sample
    asked = isinstance(sample, UnderstandingSample)
    for index, trajectory in enumerate(group.group.trajectories):
        yield EvaluationItem(
            task=request.task,
            mode=mode,
            id=sample.id,
            category=sample.category if asked else sample.class_name,
            prompt=sample.question if asked else sample.prompt,
            choices=sample.choices if asked else (),
            gold=sample.answer if asked else "",
            prompt_image=save_image(sample.image) if asked else None,
            text=trajectory.text,
            image=None if trajectory.image is None else save_image(trajectory.image),
            finish_reason=trajectory.finish_reason,
            reward=float(group.rewards[index]) if group.judged[index] else None,
            parts=_parts(group, index),
        )


def _parts(group: ScoredGroup, index: int) -> dict[str, float | None]:
    parts: dict[str, float | None] = {}
    for name, scores in group.components.items():
        named = {name: scores.values} | {f"{name}/{detail}": values for detail, values in scores.details.items()}
        judged = scores.judged[index]
        parts |= {part: float(values[index]) if judged else None for part, values in named.items()}
    return parts


def _estimates(items: Sequence[EvaluationItem]) -> dict[str, Estimate]:
    estimates = {}
    for task in TASKS:
        for mode in MODES:
            chosen = [item for item in items if (item.task, item.mode) == (task, mode)]
            for part in dict.fromkeys(part for item in chosen for part in item.values):
                judged = [(value, item) for item in chosen if (value := item.values.get(part)) is not None]
                if judged:
                    values = np.array([value for value, _ in judged])
                    estimates[f"{task}/{mode}/{part}"] = _estimate(values, [_cluster(item) for _, item in judged])
    return estimates


def _cluster(item: EvaluationItem) -> str:
    """Prompts to draw repeat word for word; a repeated question is about another image, so it stands alone."""
    return item.prompt if item.task == "generation" else item.id


def _estimate(
    values: NDArray[np.float64], clusters: Sequence[str], minus: NDArray[np.float64] | None = None
) -> Estimate:
    """Of the mean of values [N], or of the gain over the values `minus` [N] of the same items."""
    gains = values if minus is None else values - minus
    low, high = _interval(values, minus)
    clustered_low = clustered_high = None
    num_clusters = len(set(clusters))
    if 1 < num_clusters < len(gains) and np.ptp(gains):
        clustered_low, clustered_high = cluster_interval(gains, clusters)
    return Estimate(
        mean=math.fsum(gains) / len(gains),
        low=low,
        high=high,
        num=len(gains),
        clustered_low=clustered_low,
        clustered_high=clustered_high,
        num_clusters=num_clusters,
    )


def _interval(values: NDArray[np.float64], minus: NDArray[np.float64] | None) -> Interval | tuple[None, None]:
    if minus is None and np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(values.sum()), len(values))
    gains = values if minus is None else values - minus
    if not np.ptp(gains):  # equal values tell nothing about their spread
        return None, None
    if all(side.min() >= 0 and side.max() <= 1 for side in (values, minus) if side is not None):
        return bounded_interval(gains, 0.0 if minus is None else -1.0, 1.0)
    return t_interval(gains)
