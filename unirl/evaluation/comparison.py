"""Final evaluations of several runs side by side, and their differences over the items that were the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unirl.evaluation.evaluate import Estimate, EvaluationItem, EvaluationResult, find_gains


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedMeasure:
    """One row: a measure in every run."""

    name: str
    """Such as "understanding/sampled/reward"; of measures with the same numbers, the last and most telling."""
    estimates: tuple[Estimate | None, ...]
    """One a run; None where the run lacks it."""
    differences: tuple[Estimate | None, ...]
    """Of every further run less the first, item by item; None where they share no judged item."""


def compare_evaluations(results: Sequence[EvaluationResult | None]) -> list[ComparedMeasure]:
    """Every measure that any of the runs has.

    Args:
        results: one a run, the first being what the others are compared with; None for a run without an evaluation.
    """
    first, *others = results
    gains = [
        {} if first is None or other is None else {g.name: g.difference for g in find_gains(*shared(first, other))}
        for other in others
    ]
    merged: dict[tuple[object, ...], ComparedMeasure] = {}
    for name in dict.fromkeys(name for result in results if result for name in result.estimates):
        estimates = tuple(result.estimates.get(name) if result else None for result in results)
        differences = tuple(found.get(name) for found in gains)
        key = (*name.split("/", 2)[:2], estimates, differences)
        merged[key] = ComparedMeasure(name=name, estimates=estimates, differences=differences)
    return list(merged.values())


def shared(one: EvaluationResult, other: EvaluationResult) -> tuple[EvaluationResult, EvaluationResult]:
    """Both evaluations with nothing but the held-out items that both asked, word for word and picture for picture."""
    common = {_question(item) for item in one.items} & {_question(item) for item in other.items}
    left, right = (
        replace(side, items=tuple(item for item in side.items if _question(item) in common)) for side in (one, other)
    )
    return left, right


def _question(item: EvaluationItem) -> tuple[object, ...]:
    # Pictures are named by their content.
    return item.task, item.mode, item.id, item.prompt, item.choices, item.gold, item.prompt_image
