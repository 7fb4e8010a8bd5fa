"""Rollout groups around given texts or pictures."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unirl.types import (
    AnswerType,
    FinishReason,
    GenerationSample,
    RolloutGroup,
    RolloutRequest,
    Trajectory,
    UnderstandingSample,
)

EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def question(
    answer: str = "B", answer_type: AnswerType = "choice", choices: tuple[str, ...] = ("red", "green", "blue")
) -> UnderstandingSample:
    return UnderstandingSample(
        id="q1",
        image=np.zeros((4, 4, 3), np.uint8),
        question="what color?",
        choices=choices if answer_type == "choice" else (),
        answer=answer,
        answer_type=answer_type,
    )


def answers(
    sample: UnderstandingSample, texts: Sequence[str], finish_reasons: Sequence[FinishReason] = ()
) -> RolloutGroup:
    reasons = finish_reasons or ["stop"] * len(texts)
    trajectories = [
        _trajectory(i, text=t, finish_reason=r) for i, (t, r) in enumerate(zip(texts, reasons, strict=True))
    ]
    return _group("understanding", sample, trajectories)


def pictures(prompt: str, images: Sequence[NDArray[np.uint8]]) -> RolloutGroup:
    trajectories = [_trajectory(index, image=image) for index, image in enumerate(images)]
    return _group("generation", GenerationSample(id="g1", prompt=prompt), trajectories)


def _group(task, sample, trajectories) -> RolloutGroup:
    seeds = tuple(trajectory.seed for trajectory in trajectories)
    request = RolloutRequest(request_id=f"p1/{task}", pair_id="p1", task=task, sample=sample, seeds=seeds)
    return RolloutGroup(request=request, trajectories=tuple(trajectories))


def _trajectory(seed: int, *, text=None, image=None, finish_reason: FinishReason = "stop") -> Trajectory:
    return Trajectory(
        prompt_ids=np.zeros(1, np.int32),
        completion_ids=np.zeros(2, np.int32),
        loss_mask=np.ones(2, np.bool_),
        logprobs=np.zeros(2, np.float32),
        modality="image" if text is None else "text",
        text=text,
        image=image,
        finish_reason=finish_reason,
        policy_version=0,
        seed=seed,
    )
