"""Exams compared: the same prompts, judged twice, metric by metric with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.evaluation.intervals import bounded_interval, gain_interval

Estimate = tuple[float, float, float]
"""Mean, and the ends of its 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamRow:
    """One metric of the items that both exams judged."""

    metric: str
    """"subset/name"."""
    num: int
    before: Estimate
    after: Estimate
    gain: Estimate


def exam_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ExamRow]:
    """Every metric that judged at least two of the same items in both exams."""
    rows: list[ExamRow] = []
    for metric in metric_names(before):
        first, last = scores_of(before, metric), scores_of(after, metric)
        both = sorted(first.keys() & last.keys())
        if len(both) < 2:
            continue
        one, other = (np.array([scores[name] for name in both], np.float64) for scores in (first, last))
        gain = other - one
        rows.append(
            ExamRow(
                metric=metric,
                num=len(both),
                before=_estimate(one),
                after=_estimate(other),
                gain=(float(gain.mean()), *gain_interval(gain)),
            )
        )
    return rows


def means_of(exam: Mapping[str, Any]) -> dict[str, Estimate]:
    """Mean and interval of every metric that judged at least two items."""
    found = {metric: list(scores_of(exam, metric).values()) for metric in metric_names(exam)}
    return {metric: _estimate(np.array(scores)) for metric, scores in found.items() if len(scores) > 1}


def metric_names(exam: Mapping[str, Any]) -> list[str]:
    """Every "subset/name" of an exam, in its order."""
    return list(dict.fromkeys(f"{item['subset']}/{name}" for item in exam["items"] for name in item["scores"]))


def scores_of(exam: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Score of each item that the metric judged, by the item's id."""
    subset, _, name = metric.partition("/")
    items = [item for item in exam["items"] if item["subset"] == subset]
    return {item["id"]: item["scores"][name] for item in items if item["scores"][name] is not None}


def _estimate(scores: NDArray[np.float64]) -> Estimate:
    return float(scores.mean()), *bounded_interval(scores)
