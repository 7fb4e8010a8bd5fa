from pathlib import Path

import numpy as np
import pytest
import torch

import unirl.lab
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig, TextSampling
from unirl.lab.data import make_heldout
from unirl.models.interleaved import ChatLayout, JointVocabulary
from unirl.models.named_arrays import checksum, to_array
from unirl.models.policy import Scoring
from unirl.rollout.build import build_sampler
from unirl.rollout.seeds import sample_seed
from unirl.types import LearnerRow, RolloutRequest, TensorSpec, WeightsManifest

MODEL = ModelConfig()
FIGURES: list[str] = []


@pytest.fixture
def report():
    """Takes a line of measured figures for the end of the session's output."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("rollout figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


def sampling_with(guidance=3.0, temperature=1.0, max_tokens=24):
    return SamplingConfig(
        text=TextSampling(temperature=temperature, max_tokens=max_tokens),
        image=ImageSampling(temperature=temperature, guidance_scale=guidance),
    )


def engine_config(**changes):
    return RolloutConfig(**{"sampling": sampling_with(), "kv_cache_memory_gib": 0.0625} | changes)


@pytest.fixture(scope="session")
def lab_folder():
    return Path(unirl.lab.__file__).parent / "checkpoints" / "janus"


@pytest.fixture(scope="session")
def lab_requests():
    """Held-out prompts of the lab: `make(3, 2, seeds=4)` gives three questions and two drawings."""
    questions, drawings = make_heldout(24, 5)

    def make(num_questions, num_drawings, seeds=4, salt=0):
        chosen = [("understanding", s) for s in questions[:num_questions]]
        chosen += [("generation", s) for s in drawings[:num_drawings]]
        return [
            RolloutRequest(
                request_id=f"{sample.id}/{task}",
                pair_id=sample.id,
                task=task,
                sample=sample,
                seeds=tuple(sample_seed(salt, 0, sample.id, task, index) for index in range(seeds)),
            )
            for task, sample in chosen
        ]

    return make


@pytest.fixture(scope="session")
def plain(lab_folder):
    return build_sampler(MODEL, lab_folder, engine_config(backend="torch"), "both")


@pytest.fixture(scope="module")
def engine(lab_folder):
    """The two-stream engine on the lab's checkpoint; whoever changes its weights puts them back."""
    return build_sampler(MODEL, lab_folder, engine_config(deterministic=False), "both")


def tokens(groups):
    return [t.completion_ids.tolist() for group in groups for t in group.trajectories]


def logprob_gap(policy, groups, scoring: Scoring):
    """Largest |sampler - learner| per task."""
    gaps = {}
    for group in groups:
        rows = [
            LearnerRow(
                task=group.request.task,
                prompt_ids=t.prompt_ids,
                image=group.request.sample.image if group.request.task == "understanding" else None,
                completion_ids=t.completion_ids,
                loss_mask=t.loss_mask,
                old_logprobs=t.logprobs,
                advantage=0.0,
            )
            for t in group.trajectories
        ]
        with torch.no_grad():
            (scores,) = policy.score(rows, scoring)
        for row, values in zip(rows, scores.logprobs.numpy(), strict=True):
            gap = float(np.abs(values[: len(row.old_logprobs)] - row.old_logprobs).max())
            gaps[row.task] = max(gaps.get(row.task, 0.0), gap)
    return gaps


def publication(policy, state, version, dtype=None):
    """Manifest and arrays of a state dict, tied weights once."""
    named = [
        (name, to_array(value.to(dtype) if dtype else value)) for name, value in state.items() if name in policy.shapes
    ]
    specs = tuple(TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype)) for name, array in named)
    return WeightsManifest(policy_version=version, tensors=specs, checksum=checksum(named)), named


@pytest.fixture(scope="session")
def chat_layout():
    """Makes the layout of a family by hand; it encodes no text."""

    def make(image, *, size, codes, words, end, **more):
        plain = np.zeros(size, np.bool_)
        plain[[id for id in words if id != end]] = True
        drawable = plain.copy()
        drawable[[image.begin, end]] = True
        return ChatLayout(
            vocabulary=JointVocabulary(size=size, first_code=codes.start, num_codes=len(codes), drawable_text=drawable),
            image=image,
            start=(),
            turns={},
            end=end,
            encode_text=lambda text: [],
            decode_text=lambda ids: "",
            plain=plain,
            fingerprint="by hand",
            **more,
        )

    return make
