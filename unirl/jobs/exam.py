"""The embedded world's exam: held-out prompts answered by a checkpoint, the replies judged from pixels and words."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.config import SftConfig
from unirl.jobs.responder import Prompt, Responder
from unirl.lab.unified_visual_exam import grade, make_exam
from unirl.types import Segment

log = logging.getLogger(__name__)

SaveImage = Callable[[NDArray[np.uint8]], str]
"""Keeps a picture and returns its path."""


def take_exam(config: SftConfig, checkpoint: Path, save_image: SaveImage) -> dict[str, Any]:
    """Every item with its scores, prompt and reply: {"items": [{"id", "subset", "kind", "scores", "reply", ...}]}.

    Raises:
        ValueError: the checkpoint does not know the world's words, or a prompt is too long for the settings.
    """
    items = make_exam(config.evaluation.exam_items)
    responder = Responder(config.model, checkpoint, config.evaluation.replies)
    requests = responder.requests([Prompt(item.id, item.prompt) for item in items], seeds=(0,))
    log.info("exam: answering %d prompts of %d subsets", len(items), len({item.subset for item in items}))

    def shown(segments: Sequence[Segment]) -> list[dict[str, str]]:
        return [
            {"text": segment.text or ""} if segment.image is None else {"image": save_image(segment.image)}
            for segment in segments
        ]

    taken: list[dict[str, Any]] = []
    for item, reply in zip(items, responder.reply(requests), strict=True):
        segments = responder.segments(reply)
        taken.append(
            {
                "id": item.id,
                "subset": item.subset,
                "kind": item.kind,
                "scores": grade(item, segments),
                "prompt": shown([segment for turn in item.prompt for segment in turn.segments]),
                "reply": shown(segments),
                "finish_reason": reply.finish_reason,
                "grammatical": reply.well_formed,
            }
        )
    return {"items": taken}
