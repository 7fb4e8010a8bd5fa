"""The embedded world's exam: held-out prompts answered by a checkpoint, the replies judged from pixels and words."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.config import SftConfig
from unirl.config_rules import ConfigError, Problem
from unirl.jobs.responder import Prompt, Responder
from unirl.lab.unified_visual import SUBSETS, Subset
from unirl.lab.unified_visual_exam import grade, make_exam
from unirl.types import Segment

log = logging.getLogger(__name__)

SaveImage = Callable[[NDArray[np.uint8]], str]
"""Keeps a picture and returns its path."""
Shown = dict[str, Any]
"""A segment as {"text": ...} or {"image": ...}."""


def check_exam(config: SftConfig) -> None:
    """Refuse subsets that the exam does not have.

    Raises:
        ConfigError: names them.
    """
    if strange := [name for name in config.evaluation.exam_subsets if name not in SUBSETS]:
        rule = f"must hold only subsets of the exam, not {', '.join(strange)}"
        known = f"there are {', '.join(SUBSETS)}"
        raise ConfigError([Problem("evaluation.exam_subsets", config.evaluation.exam_subsets, rule, known)])


def take_exam(config: SftConfig, checkpoint: Path, save_image: SaveImage) -> dict[str, Any]:
    """Every item with its scores, prompt and reply: {"items": [{"id", "subset", "kind", "scores", "reply", ...}]}.

    The engine runs in a process of its own, since it and a learner would share, and end, one process group.

    Raises:
        KeyboardInterrupt: a signal came; the process was ended.
        ValueError: the checkpoint does not know the world's words, or a prompt is too long for the settings.
    """
    log.info("exam: answering %d prompts of each subset", config.evaluation.exam_items)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        process = pool.submit(os.getpid).result()
        try:
            items = pool.submit(_answers, config, checkpoint).result()
        except KeyboardInterrupt:
            # Leaving the block waits for what the process is at.
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            raise

    def kept(segment: Shown) -> Shown:
        return {"image": save_image(segment["image"])} if "image" in segment else segment

    return {"items": [item | {part: list(map(kept, item[part])) for part in ("prompt", "reply")} for item in items]}


def _answers(config: SftConfig, checkpoint: Path) -> list[dict[str, Any]]:
    """The graded items, pictures as arrays."""
    asked = config.evaluation.exam_subsets
    subsets: list[Subset] = [subset for subset in SUBSETS if subset in asked or not asked]
    items = make_exam(config.evaluation.exam_items, subsets=subsets)
    responder = Responder(config.model, checkpoint, config.evaluation.replies, section="evaluation.replies")
    requests = responder.requests([Prompt(item.id, item.prompt) for item in items], seeds=(0,))
    taken: list[dict[str, Any]] = []
    for item, reply in zip(items, responder.reply(requests), strict=True):
        segments = responder.segments(reply)
        taken.append(
            {
                "id": item.id,
                "subset": item.subset,
                "kind": item.kind,
                "scores": grade(item, segments),
                "prompt": _shown([segment for turn in item.prompt for segment in turn.segments]),
                "reply": _shown(segments),
                "finish_reason": reply.finish_reason,
                "grammatical": reply.well_formed,
            }
        )
    return taken


def _shown(segments: Sequence[Segment]) -> list[Shown]:
    return [{"text": s.text or ""} if s.image is None else {"image": s.image} for s in segments]
