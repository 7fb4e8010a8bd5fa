"""The embedded world's exam: held-out prompts answered by a checkpoint, the replies judged from pixels and words."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unirl.config import SftConfig
from unirl.evaluation.intervals import bounded_interval, t_interval
from unirl.jobs.responder import Prompt, Responder
from unirl.lab.unified_visual_exam import grade, make_exam

log = logging.getLogger(__name__)


def take_exam(config: SftConfig, checkpoint: Path) -> dict[str, Any]:
    """Scores of every item and the reply to it: {"items": [{"id", "subset", "kind", "scores", "text", ...}]}.

    Raises:
        ValueError: the checkpoint does not know the world's words, or a prompt is too long for the settings.
    """
    items = make_exam(config.evaluation.exam_items)
    responder = Responder(config.model, checkpoint, config.evaluation.replies)
    requests = responder.requests([Prompt(item.id, item.prompt) for item in items], seeds=(0,))
    log.info("exam: answering %d prompts of %d subsets", len(items), len({item.subset for item in items}))
    taken: list[dict[str, Any]] = []
    for item, reply in zip(items, responder.reply(requests), strict=True):
        segments = responder.segments(reply)
        taken.append(
            {
                "id": item.id,
                "subset": item.subset,
                "kind": item.kind,
                "scores": grade(item, segments),
                "text": [segment.text if segment.text is not None else "<image>" for segment in segments],
                "finish_reason": reply.finish_reason,
                "grammatical": reply.well_formed,
            }
        )
    return {"items": taken}


def exam_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Metric, before, after and paired gain, each with its 95 % interval, of two exams of equal items."""
    rows: list[tuple[str, str, str, str]] = []
    for metric in metric_names(before):
        first, last = scores_of(before, metric), scores_of(after, metric)
        both = sorted(first.keys() & last.keys())
        gains = np.array([last[name] - first[name] for name in both])
        gain = f"{gains.mean():+.3f} {_span(t_interval(gains))}" if len(both) > 1 else ""
        rows.append((metric, _estimate(list(first.values())), _estimate(list(last.values())), gain))
    return rows


def metric_names(exam: Mapping[str, Any]) -> list[str]:
    """Every "subset/metric" of an exam, in its order."""
    return list(dict.fromkeys(f"{item['subset']}/{name}" for item in exam["items"] for name in item["scores"]))


def scores_of(exam: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Score of each item that the metric judged, by the item's id."""
    subset, _, name = metric.partition("/")
    items = [item for item in exam["items"] if item["subset"] == subset]
    return {item["id"]: item["scores"][name] for item in items if item["scores"][name] is not None}


def _estimate(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.3f}" if scores else ""
    return f"{np.mean(scores):.3f} {_span(bounded_interval(np.array(scores, np.float64)))}"


def _span(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"
